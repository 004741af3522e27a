"""Remember heads within bounds."""

from __future__ import annotations

import pytest
from ws2api.gateway.known_heads import MAX_HEAD_BYTES, MOST_HEADS, KnownHeads


def test_head_is_looked_up() -> None:
    known: KnownHeads[int] = KnownHeads()
    known.remember(b"head", 7)
    assert known.get(b"head") == 7
    assert known.get(b"other") is None
    known.remember(b"head", 8)
    assert known == {b"head": 8}


@pytest.mark.parametrize(("size", "is_kept"), [(MAX_HEAD_BYTES, True), (MAX_HEAD_BYTES + 1, False)])
def test_long_head_is_not_worth_it(size: int, is_kept: bool) -> None:
    known: KnownHeads[int] = KnownHeads()
    known.remember(b"x" * size, 1)
    assert (b"x" * size in known) == is_kept


def test_too_many_give_way_to_the_newest() -> None:
    known: KnownHeads[int] = KnownHeads()
    for number in range(MOST_HEADS):
        known.remember(b"%d" % number, number)
    assert len(known) == MOST_HEADS
    known.remember(b"one more", -1)
    assert known == {b"one more": -1}


def test_never_more_than_the_bound() -> None:
    known: KnownHeads[int] = KnownHeads()
    for number in range(10 * MOST_HEADS):
        known.remember(b"%d" % number, number)
        assert len(known) <= MOST_HEADS
        assert known[b"%d" % number] == number
