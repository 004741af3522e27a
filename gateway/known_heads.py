"""Remember what a parser made of heads, to look the same bytes up the next time: pure."""

from __future__ import annotations

from typing import Final, TypeVar

MAX_HEAD_BYTES: Final = 4_096
"""A longer one is not worth its memory."""
MOST_HEADS: Final = 256
"""Heads that are kept at the same time: a peer writes few different ones within a second."""

_T = TypeVar("_T")


class KnownHeads(dict[bytes, _T]):
    """Map a head to what it says, within bounds."""

    __slots__ = ()

    def remember(self, head: bytes, meaning: _T) -> None:
        """Keep a head, in place of all others when there are too many."""
        if len(head) > MAX_HEAD_BYTES:
            return
        if len(self) >= MOST_HEADS:
            self.clear()
        self[head] = meaning
