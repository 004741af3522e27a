"""Space out attempts so that those who wait for the same thing do not come as one wave."""

from __future__ import annotations

import random
from typing import Final

# 0.1 s doubled 20 times is more than a day: enough for any limit, and no overflow.
_MOST_DOUBLINGS: Final = 20


def backoff(attempt: int, first_s: float, limit_s: float) -> float:
    """Return the pause in seconds after so many attempts, from 1.

    The pause doubles with each attempt up to the limit; it is between half and the whole of that,
    at random.
    """
    whole_s = min(limit_s, first_s * 2.0 ** min(attempt - 1, _MOST_DOUBLINGS))
    return whole_s * (0.5 + random.random() / 2)
