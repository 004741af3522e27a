"""Keep the DELETEs of one worker until the API has them, or Redis.

A DELETE that the API does not take is tried again a little later, twice; then it is parked: left to
Redis, from which others send it for as long as it takes. While the API is away all are parked, some
at each tick. When Redis is away as well they wait here, up to a bound. Nothing here knows a socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from . import counters as c
from .backoff import backoff
from .errors import ApiError, ApiUnreachable
from .exchange import Exchange
from .retry_queue import RetryQueue

MOST_KEPT: Final = 200_000
"""DELETEs that wait here, at most."""
ATTEMPTS_BEFORE_PARKING: Final = 3
MOST_PARKED_PER_TICK: Final = 1_000

# So many are more than the API can be told of soon: those who have waited longest are parked.
_CROWD: Final = 100_000
_FIRST_PAUSE_S: Final = 0.4
_LONGEST_PAUSE_S: Final = 30.0
# After this time a DELETE does not wait for messages any longer.
_PATIENCE_S: Final = 1.0
_LOG_EVERY_S: Final = 10.0

_log = structlog.get_logger()


class Departures:
    """Decide which DELETE goes next, and what becomes of those that the API does not take.

    Args:
        slot: the worker's counters.
        limit: DELETEs under way at once, at most.
        park: leaves one to Redis; True when Redis took it. None when there is nobody to take it.
        give_up: ends one without an answer.
    """

    def __init__(
        self,
        slot: memoryview,
        limit: int,
        park: Callable[[Exchange], bool] | None,
        give_up: Callable[[Exchange, ApiError], None],
    ) -> None:
        self._slot = slot
        self._limit = limit
        self._park_in_redis = park
        self._give_up = give_up
        self.waiting: deque[Exchange] = deque()
        """Those that can be sent; the one that goes next first."""
        self._retries = RetryQueue()
        self._under_way = 0
        self.is_overdue = False
        """Whether one has waited so long for messages to pause that it goes before the next."""
        self._lost = 0
        self._lost_logged_at = float("-inf")

    def __repr__(self) -> str:
        return (
            f"<Departures disconnects_queued={len(self.waiting)}"
            f" disconnects_sent={self._under_way} disconnects_retries={len(self._retries)}>"
        )

    def __len__(self) -> int:
        """Count those whose outcome is not known."""
        return len(self.waiting) + len(self._retries) + self._under_way

    @property
    def ready(self) -> int:
        """Count those that may be sent now."""
        return min(len(self.waiting), self._limit - self._under_way)

    def next(self) -> Exchange | None:
        """Take out one to be sent, None when there is none or enough are under way."""
        if not self.waiting or self._under_way >= self._limit:
            return None
        self.is_overdue = False
        self._under_way += 1
        return self.waiting.popleft()

    def put_back(self, exchange: Exchange) -> None:
        """Send one again at once that cannot have arrived."""
        self._under_way -= 1
        self.waiting.appendleft(exchange)

    def on_answer(self, exchange: Exchange, now: float, *, taken: bool) -> None:
        """Learn whether the API has one that was sent; if not, try it again later, or park it."""
        self._under_way -= 1
        if taken or (exchange.attempts >= ATTEMPTS_BEFORE_PARKING and self.park(exchange)):
            return
        self._slot[c.REQUESTS_RETRIED] += 1
        pause_s = backoff(exchange.attempts, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._retries.put(exchange, now + pause_s)

    def park(self, exchange: Exchange) -> bool:
        """Leave one to Redis and tell its owner; False when Redis did not take it."""
        if self._park_in_redis is None or not self._park_in_redis(exchange):
            return False
        # For this worker the request has ended without an answer of the API.
        self._slot[c.REQUESTS_FAILED] += 1
        self._slot[c.DISCONNECTS_PARKED] += 1
        exchange.owner.on_parked(exchange)
        return True

    def take_all(self) -> list[Exchange]:
        """Take out all that are not under way."""
        taken = [*self.waiting, *self._retries.take_all()]
        self.waiting.clear()
        return taken

    def on_tick(self, now: float, *, api_is_away: bool) -> None:
        """Bring back what is to be tried again, park, and keep to the bound."""
        self.waiting.extend(self._retries.due(now))
        if api_is_away:
            self._park_some(MOST_PARKED_PER_TICK)
        elif len(self) > _CROWD:
            self._park_some(min(MOST_PARKED_PER_TICK, len(self) - _CROWD))
        while len(self.waiting) + len(self._retries) > MOST_KEPT:
            self._lose(now)
        self._log_losses(now)
        self.is_overdue = bool(
            self.waiting and not self._under_way and self.waiting[0].started < now - _PATIENCE_S
        )
        self._slot[c.DISCONNECTS_WAITING] = len(self)

    def _oldest(self) -> Exchange:
        return self.waiting.popleft() if self.waiting else self._retries.pop()

    def _park_some(self, count: int) -> None:
        if self._park_in_redis is None:
            return
        for _ in range(min(count, len(self.waiting) + len(self._retries))):
            exchange = self._oldest()
            if not self.park(exchange):
                self.waiting.appendleft(exchange)
                return  # Redis is away; it is asked again at the next tick

    def _lose(self, now: float) -> None:
        self._lost += 1
        self._slot[c.DISCONNECTS_LOST] += 1
        self._give_up(self._oldest(), ApiUnreachable("too many disconnects wait for the API"))

    def _log_losses(self, now: float) -> None:
        if self._lost and now - self._lost_logged_at >= _LOG_EVERY_S:
            _log.error("disconnects lost: too many wait for the API", lost=self._lost)
            self._lost = 0
            self._lost_logged_at = now
