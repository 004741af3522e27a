"""Cut bytes as a network might."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from itertools import pairwise


def splits(data: bytes) -> Iterator[list[bytes]]:
    """Yield the data byte by byte, and in a few larger pieces.

    The cuts follow from the data alone, so that what was found once is found again.
    """
    yield [data[i : i + 1] for i in range(len(data))]
    rng = random.Random(zlib.crc32(data))
    for count in (1, 3):
        cuts = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(count))})
        yield [data[start:end] for start, end in pairwise(cuts)]
