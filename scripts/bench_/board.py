"""Share counters and latencies between generator processes and the one that measures.

Each process has a row of 64-bit words in an anonymous shared mapping and is the only one to write
there; the measuring process looks at all rows at any time and takes differences.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass
from typing import Final

from bench_ import histogram

OPENED: Final = 0
"""Clients whose handshake was answered with 101."""
REFUSED: Final = 1
"""Connects that came to nothing."""
LOST: Final = 2
"""Connections that ended though nobody had asked for it."""
CLOSED: Final = 3
"""Connections that ended as asked."""
SENT: Final = 4
"""Messages sent, or pushes made."""
DONE: Final = 5
"""Messages answered, or pushes confirmed."""
FRAMES: Final = 6
"""Data frames that reached clients."""
LATE: Final = 7
"""Paced messages left out because the client's last one was not answered yet."""
PINGS: Final = 8
"""Pings of the server, each answered with a pong."""
UNEXPECTED: Final = 9
"""Frames and answers that were none of the known ones."""
READY: Final = 10
"""1 once the process waits for orders."""
OWNERS: Final = 11
"""Workers whose push URLs the API was told."""
MESSAGE_NS: Final = 16
CONNECT_NS: Final = MESSAGE_NS + histogram.BUCKETS
WORDS: Final = CONNECT_NS + histogram.BUCKETS


def _count(word: int) -> property:
    return property(lambda sample: sample.words[word])


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold what all rows said at one moment; the difference of two is a window of time.

    Attributes:
        time_s: the moment, or the length of the window.
        words: the sum of all rows.
    """

    time_s: float
    words: list[int]

    opened = _count(OPENED)
    refused = _count(REFUSED)
    lost = _count(LOST)
    closed = _count(CLOSED)
    sent = _count(SENT)
    done = _count(DONE)
    frames = _count(FRAMES)
    late = _count(LATE)
    pings = _count(PINGS)
    unexpected = _count(UNEXPECTED)

    @property
    def message_ns(self) -> list[int]:
        """Buckets of the latencies of messages, or of pushes."""
        return self.words[MESSAGE_NS : MESSAGE_NS + histogram.BUCKETS]

    @property
    def connect_ns(self) -> list[int]:
        """Buckets of the time from a connect to its 101."""
        return self.words[CONNECT_NS : CONNECT_NS + histogram.BUCKETS]

    @property
    def in_flight(self) -> int:
        """Messages that are not answered yet."""
        return int(self.sent - self.done)

    @property
    def errors(self) -> int:
        """Everything that should not have happened."""
        return int(self.refused + self.lost + self.unexpected)

    def __sub__(self, earlier: Sample) -> Sample:
        """Return what happened since."""
        words = [b - a for a, b in zip(earlier.words, self.words, strict=True)]
        return Sample(self.time_s - earlier.time_s, words)


class Board:
    """Own the mapping; create it before the processes are forked.

    Args:
        rows: how many processes there will be.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._words = memoryview(mmap.mmap(-1, rows * WORDS * 8)).cast("q")

    def row(self, index: int) -> memoryview:
        """Return the words of one process."""
        return self._words[index * WORDS : (index + 1) * WORDS]

    def sum(self, word: int) -> int:
        """Add up one word of all rows."""
        return sum(self._words[word::WORDS].tolist())

    def sample(self) -> Sample:
        """Look at everything."""
        columns = zip(*(self.row(index).tolist() for index in range(self.rows)), strict=True)
        return Sample(time.monotonic(), [sum(column) for column in columns])
