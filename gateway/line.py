"""Keep the requests that cannot go yet, and those that end without having gone.

First come, first served is fair here, because a client has no more than `max_in_flight` requests in
line; that bounds the line, too. Connects and messages go before disconnects. Nothing here knows a
socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container
from typing import Final

from . import counters as c
from .backoff import backoff
from .breaker import MAX_RETRY_AFTER_S
from .departures import Departures
from .errors import ApiAbandoned, ApiError, ApiTimeout, ApiUnreachable
from .exchange import CONNECT, DISCONNECT, Exchange
from .retry_queue import RetryQueue

_MIN_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 2.0
_EXPIRE_EVERY_S: Final = 0.3


class Line:
    """Decide which request is next, and how long one may wait.

    Args:
        slot: the worker's counters.
        timeout_s: for a request, attempts included; a disconnect has no such limit.
        most_disconnects: under way at once.
        park: leaves a disconnect to Redis; None when there is nobody to take it.
        call_soon: calls back from the loop.
    """

    def __init__(
        self,
        slot: memoryview,
        timeout_s: float,
        most_disconnects: int,
        park: Callable[[Exchange], bool] | None,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._slot = slot
        self._timeout_s = timeout_s
        self._call_soon = call_soon
        self.queue: deque[Exchange] = deque()
        """Connects and messages that can be sent."""
        # Messages that wait for their next attempt.
        self._retries = RetryQueue()
        self.departures = Departures(slot, most_disconnects, park, self.fail_soon)
        self._expire_at = 0.0
        self._failing: deque[tuple[Exchange, ApiError]] = deque()
        self._is_telling_soon = False

    def __repr__(self) -> str:
        return f"<Line queued={len(self.queue)} retries={len(self._retries)} {self.departures!r}>"

    @property
    def ready(self) -> int:
        """Count what may be sent now."""
        return len(self.queue) + self.departures.ready

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing waits, not even for another attempt."""
        return not (self.queue or self._retries or self.departures)

    def append(self, exchange: Exchange) -> None:
        """Put a request at the end."""
        (self.departures.waiting if exchange.event == DISCONNECT else self.queue).append(exchange)

    def put_back(self, exchange: Exchange) -> None:
        """Put a request that was sent but cannot have arrived at the head."""
        self._slot[c.REQUESTS_RETRIED] += 1
        if exchange.event == DISCONNECT:
            self.departures.put_back(exchange)
        else:
            self.queue.appendleft(exchange)

    def retry_later(self, exchange: Exchange, now: float, retry_after_s: float = 0.0) -> bool:
        """Put a message aside for another attempt; tell whether there is time for one.

        Args:
            retry_after_s: pause that the API has asked for, 0 if none.
        """
        pause_s = backoff(exchange.attempts, _MIN_BACKOFF_S, _MAX_BACKOFF_S)
        due = now + max(pause_s, min(retry_after_s, MAX_RETRY_AFTER_S))
        if due >= exchange.started + self._timeout_s:
            return False
        self._slot[c.REQUESTS_RETRIED] += 1
        self._retries.put(exchange, due)
        return True

    def next(self) -> Exchange | None:
        """Take out the request that is to go now; None when there is none."""
        if self.departures.is_overdue and (exchange := self.departures.next()) is not None:
            return exchange
        while self.queue:
            exchange = self.queue.popleft()
            if exchange.event != CONNECT or exchange.attempts or not exchange.owner.left:
                return exchange
            self.fail_soon(exchange, ApiUnreachable("the client has left"))
        return self.departures.next()

    def next_trial(self, suspects: Container[bytes], *, asks_all: bool) -> Exchange | None:
        """Take out the request that is to find out whether the API is back.

        It is of a client whose requests have not failed, where there is one: the fault may be in
        them. A DELETE goes only when no such client has another.

        Args:
            suspects: the clients whose requests have failed.
            asks_all: whether one of theirs, or a DELETE, may go if there is no other.
        """
        exchange = self._take_first(lambda queued: queued.owner.client_id not in suspects)
        if exchange is None and asks_all:
            exchange = self.departures.next() or self._take_first(lambda queued: True)
        return exchange

    def has_trial(self, suspects: Container[bytes], *, asks_all: bool) -> bool:
        """Tell whether there would be one; this costs no more than there are suspects."""
        if any(queued.owner.client_id not in suspects for queued in self.queue):
            return True
        return asks_all and self.ready > 0

    def _take_first(self, fits: Callable[[Exchange], bool]) -> Exchange | None:
        """Take out the first connect or message that fits and is still wanted."""
        for exchange in [*self.queue]:
            if not fits(exchange):
                continue
            self.queue.remove(exchange)
            if exchange.event != CONNECT or exchange.attempts or not exchange.owner.left:
                return exchange
            self.fail_soon(exchange, ApiUnreachable("the client has left"))
        return None

    # Requests that end here.

    def fail(self, exchange: Exchange, error: ApiError) -> None:
        """Tell the owner that there will be no answer."""
        self._slot[c.REQUESTS_FAILED] += 1
        exchange.owner.on_failure(exchange, error)

    def fail_soon(self, exchange: Exchange, error: ApiError) -> None:
        """Do the same from the loop, for when an owner may be calling us."""
        self._failing.append((exchange, error))
        self._tell_soon()

    def _tell_soon(self) -> None:
        if not self._is_telling_soon:
            self._is_telling_soon = True
            self._call_soon(self._tell)

    def _tell(self) -> None:
        self._is_telling_soon = False
        try:
            for _ in range(len(self._failing)):
                self.fail(*self._failing.popleft())
        finally:
            if self._failing:  # also when one owner's fault has kept the others from being told
                self._tell_soon()

    def turn_away(self, exchange: Exchange, cause: str) -> None:
        """Let a request fail because the API is away, and why that is."""
        self.fail_soon(exchange, ApiUnreachable("the API is unreachable", cause))

    def turn_away_connects(self, cause: str) -> None:
        """Do that for all connects in line; the others wait."""
        waiting = list(self.queue)
        self.queue.clear()
        for exchange in waiting:
            if exchange.event == CONNECT:
                self.turn_away(exchange, cause)
            else:
                self.queue.append(exchange)

    def give_up(self) -> None:
        """Park or fail all: the worker ends."""
        waiting = [*self.queue, *self._retries.take_all(), *self.departures.take_all()]
        self.queue.clear()
        for exchange in waiting:
            if exchange.event != DISCONNECT or not self.departures.park(exchange):
                self.fail_soon(exchange, ApiAbandoned("the gateway is shutting down"))

    def on_tick(self, now: float, *, api_is_away: bool) -> None:
        """Bring back what is to be tried again."""
        self.queue.extend(self._retries.due(now))
        self.departures.on_tick(now, api_is_away=api_is_away)
        self._slot[c.API_QUEUE] = len(self.queue)

    def expire(self, now: float, *, away_for: str) -> None:
        """Fail what has waited for too long.

        Args:
            away_for: why the API is away; empty if it is not.
        """
        if now < self._expire_at:
            return
        # What was put off comes back behind younger ones, so the whole queue is looked at.
        self._expire_at = now + _EXPIRE_EVERY_S
        oldest = now - self._timeout_s
        if not any(exchange.started < oldest for exchange in self.queue):
            return
        waiting = list(self.queue)
        self.queue.clear()
        for exchange in waiting:
            if exchange.started >= oldest:
                self.queue.append(exchange)
            elif away_for:
                self.turn_away(exchange, away_for)
            else:
                error = ApiTimeout("no connection to the API was free in time")
                self.fail_soon(exchange, error)
