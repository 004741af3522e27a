"""Guess which name was meant by one that does not exist: pure."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def guess(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean NAME?` with the nearest of the names; empty if none is near.

    Args:
        prefix: of all of them, which is left out before and would make them alike.
    """
    near = get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
