"""Guess what was meant, or say nothing."""

from __future__ import annotations

import pytest
from ws2api.gateway.spelling import guess

NAMES = ("--workers", "--listen", "--push-listen", "--log-level")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--wrokers", "--workers"),
        ("--push_listen", "--push-listen"),
        ("--loglevel", "--log-level"),
        ("--banana", None),
        ("", None),
    ],
)
def test_nearest_name_is_meant(name: str, meant: str | None) -> None:
    assert guess(name, NAMES) == (f"; did you mean {meant}?" if meant else "")


def test_prefix_makes_no_names_alike() -> None:
    assert guess("FOO", ["API"], "WS2API_") == ""
    assert guess("APIS", ["API"], "WS2API_") == "; did you mean WS2API_API?"
