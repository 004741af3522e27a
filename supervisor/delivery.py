"""Bring disconnects from the stream to the API: paced, retried, and no more at hand than is needed.

Two loops run side by side, each of repeated steps: one reads from the stream, one sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import Callable, Collection
from typing import Final, Protocol

import structlog
from ws2api.gateway import counters as c
from ws2api.gateway.backoff import backoff
from ws2api.gateway.breaker import CLOSED, Breaker

from .api_client import Outcome, Verdict
from .disconnect_queue import SILENT_S, Claim, Disconnect, DisconnectQueue
from .pacing import TokenBucket

MAX_HELD: Final = 2048
MAX_AT_ONCE: Final = 32

_READ_AT_ONCE: Final = 256
_READ_WAIT_S: Final = 0.5
_IDLE_S: Final = 0.5
_POLL_S: Final = 0.02
_CANCEL_AGAIN_S: Final = 0.1
_PROBE_POLL_S: Final = 0.05
_ADOPT_EVERY_S: Final = 5.0
_FIRST_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 60.0
_LOG_EVERY_S: Final = 5.0

_log = structlog.get_logger()


class Api(Protocol):
    """Tell the API of a disconnect."""

    async def report(self, disconnect: Disconnect) -> Outcome:
        """Do it, and say what came of it; raises nothing."""


class Delivery:
    """Hold the entries that are on their way from the stream to the API.

    Args:
        queue: where they come from, and where they are struck off.
        api: where they go.
        rate: how many a second, at most.
        figures: the row of the reaper in the counters.
        max_held: how many entries to hold; the stream keeps the others.
    """

    def __init__(
        self,
        queue: DisconnectQueue,
        api: Api,
        rate: float,
        figures: memoryview,
        *,
        max_held: int = MAX_HELD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._api = api
        self._figures = figures
        self._max_held = max_held
        self._clock = clock
        self._bucket = TokenBucket(rate, clock())
        self._breaker = Breaker(MAX_AT_ONCE)
        # Every entry that is at hand, whatever it waits for.
        self._held: dict[bytes, Disconnect] = {}
        # (due, number, entry) of those that wait to be sent; the number breaks ties.
        self._waiting: list[tuple[float, int, Disconnect]] = []
        self._numbers = itertools.count()
        self._sending: set[asyncio.Task[None]] = set()
        # Those that the API has, to be struck off together.
        self._taken: list[bytes] = []
        # Those that go to the end of the stream; True for one of which Redis knows nothing.
        self._returning: list[tuple[Disconnect, bool]] = []
        # Which run of Redis entries are read from.
        self._run = b""
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._must_recover = True
        self._must_inherit = False
        # Since when nothing is known to have been wrong with Redis.
        self._calm_since = clock()
        self._adopt_at = clock()
        self._resting = False
        self._finishing = False
        self._has_read_all = False
        self._log_at = clock()
        self._unlogged = 0

    def __repr__(self) -> str:
        return (
            f"<Delivery held={len(self._held)} waiting={len(self._waiting)}"
            f" sending={len(self._sending)} taken={len(self._taken)}"
            f" returning={len(self._returning)} {self._breaker!r}>"
        )

    @property
    def is_finished(self) -> bool:
        """Tell, after `finish` or `rest`, whether there is nothing left that could be done now."""
        if self._resting:
            return not self._sending and not self._taken
        is_api_away = self._breaker.state != CLOSED and not self._sending
        return not self._taken if is_api_away else self._has_read_all and not self._held

    def finish(self) -> None:
        """Wait for nothing new from here on."""
        self._finishing = True
        self._has_read_all = False

    def rest(self) -> None:
        """Begin nothing from here on, only bring to an end what is under way to the API."""
        self._resting = True

    async def close(self) -> None:
        """Give up what is being sent; it stays in the stream."""
        await end_tasks(self._sending)
        self._figures[c.DISCONNECTS_HELD] = 0

    def on_redis_lost(self) -> None:
        """Learn that an answer of Redis may have been lost on the way."""
        self._must_recover = True
        self._calm_since = self._clock()

    # Reading.

    async def read(self) -> None:
        """Take in some entries, as far as there is room; wait for them or for room."""
        room = min(self._max_held - len(self._held), _READ_AT_ONCE)
        if self._resting:
            await asyncio.sleep(_POLL_S)
            return
        if room <= 0:
            await self._queue.touch()
            await _wait(self._room, _IDLE_S)
            return
        now = self._clock()
        was_finishing = self._finishing
        if self._must_recover:
            found = await self._recover(room)
        elif now >= self._adopt_at:
            found, is_last = await self._queue.adopt(room)
            if is_last:
                self._adopt_at = now + _ADOPT_EVERY_S
                self._must_inherit = True
        elif self._must_inherit and now - self._calm_since >= SILENT_S:
            found = await self._queue.inherit(room)
            self._must_inherit = len(found) == room
        else:
            found = await self._queue.read(room, 0 if was_finishing else _READ_WAIT_S)
            if was_finishing and not found:
                self._has_read_all = True
                await asyncio.sleep(_POLL_S)
        self._take_in(found)

    async def _recover(self, room: int) -> list[Disconnect]:
        self._must_recover = False
        try:
            self._run = await self._queue.open()
            found = await self._queue.recover(room, self._held)
        except BaseException:
            self._must_recover = True
            raise
        self._must_recover |= len(found) == room
        return found

    def _take_in(self, found: list[Disconnect]) -> None:
        now = self._clock()
        for disconnect in found:
            if disconnect.entry not in self._held:
                disconnect.run = self._run
                self._held[disconnect.entry] = disconnect
                self._wait_for_turn(disconnect, now)
        self._note_held()
        if found:
            self._wake.set()

    def _wait_for_turn(self, disconnect: Disconnect, now: float) -> None:
        """Let an entry wait: its turn is at once, or when the pause after its failures is over."""
        due = now
        if disconnect.failures:
            due += backoff(disconnect.failures, _FIRST_RETRY_S, _MAX_RETRY_S)
        heapq.heappush(self._waiting, (due, next(self._numbers), disconnect))

    def _forget(self, entry: bytes) -> None:
        self._held.pop(entry, None)
        self._room.set()
        self._note_held()

    def _note_held(self) -> None:
        if len(self._held) >= self._max_held:
            self._room.clear()
        self._figures[c.DISCONNECTS_HELD] = len(self._held)

    # Sending.

    async def send(self) -> None:
        """Strike off what the API has, send what may be sent now, or wait until something may."""
        self._wake.clear()
        await self._strike_off()
        await self._put_back()
        now = self._clock()
        batch = self._next_batch(now)
        if not batch:
            await _wait(self._wake, self._idle_s(now))
            return
        try:
            run, claims = await self._queue.claim(batch)
        except BaseException:
            for disconnect in batch:
                self._wait_for_turn(disconnect, now)
            raise
        for disconnect, claim in zip(batch, claims, strict=True):
            if claim is Claim.HELD:
                self._start(disconnect)
            elif claim is Claim.GONE and run != disconnect.run:  # Redis was restarted, and empty
                self._returning.append((disconnect, True))
            else:
                self._figures[c.REAPER_SUPPRESSED] += claim is Claim.RECONNECTED
                self._forget(disconnect.entry)

    async def _strike_off(self) -> None:
        if not self._taken:
            return
        taken, self._taken = self._taken, []
        try:
            await self._queue.settle(taken)
        except BaseException:  # not to be sent again only because Redis is away
            self._taken += taken
            raise
        for entry in taken:
            self._forget(entry)

    async def _put_back(self) -> None:
        while self._returning:
            disconnect, is_lost = self._returning.pop()
            try:
                await self._queue.put_back(disconnect, even_if_lost=is_lost)
            except BaseException:
                self._wait_for_turn(disconnect, self._clock())
                raise
            self._forget(disconnect.entry)

    def _next_batch(self, now: float) -> list[Disconnect]:
        """Take from the heap what is due and may be sent."""
        if self._resting:
            return []
        room = min(self._room_at_api(now), self._bucket.available(now))
        batch: list[Disconnect] = []
        while len(batch) < room and self._waiting and self._waiting[0][0] <= now:
            batch.append(heapq.heappop(self._waiting)[2])
        return batch

    def _room_at_api(self, now: float) -> int:
        return min(self._breaker.room(now), MAX_AT_ONCE - len(self._sending))

    def _idle_s(self, now: float) -> float:
        """Return how long nothing will be due, unless somebody wakes the loop."""
        if not self._waiting:
            return _IDLE_S
        wait_s = max(self._waiting[0][0] - now, self._bucket.wait_s())
        if self._room_at_api(now) <= 0:  # until an answer comes, or it is time for a probe
            wait_s = max(wait_s, _PROBE_POLL_S)
        return min(_IDLE_S, wait_s)

    def _start(self, disconnect: Disconnect) -> None:
        self._bucket.take(1)
        self._breaker.admit()
        task = asyncio.create_task(self._report(disconnect))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _report(self, disconnect: Disconnect) -> None:
        sent_at = self._clock()
        outcome = await self._api.report(disconnect)
        task = asyncio.current_task()
        assert task is not None
        self._sending.discard(task)  # before the loop looks how many there are
        if outcome.verdict is Verdict.TAKEN:
            self._figures[c.REAPER_DELIVERED] += 1
            self._taken.append(disconnect.entry)
        else:
            self._figures[c.REAPER_FAILURES] += 1
            self._retry(disconnect, is_to_blame=outcome.verdict is not Verdict.UNREACHABLE)
        self._tell_breaker(outcome, sent_at)
        self._wake.set()

    def _retry(self, disconnect: Disconnect, *, is_to_blame: bool) -> None:
        disconnect.failures += is_to_blame
        if is_to_blame and len(self._held) > self._max_held // 2:
            # Those that the API never takes must not fill all the room.
            self._returning.append((disconnect, False))
        else:
            self._wait_for_turn(disconnect, self._clock())

    def _tell_breaker(self, outcome: Outcome, sent_at: float) -> None:
        now, breaker = self._clock(), self._breaker
        was_closed = breaker.state == CLOSED
        if outcome.verdict in (Verdict.TAKEN, Verdict.REFUSED):
            breaker.on_success(now, sent_at, something_waits=bool(self._waiting))
        elif outcome.verdict is Verdict.LATE:
            breaker.on_nothing(sent_at)
        else:
            # Whoever it was that left: nobody waits for a DELETE.
            breaker.on_failure(now, sent_at, None)
        is_closed = breaker.state == CLOSED
        if was_closed and not is_closed:
            _log.warning("the API takes no disconnects", reason=outcome.reason)
        elif is_closed and not was_closed:
            _log.info("the API takes disconnects again", held=len(self._held))
        if outcome.verdict in (Verdict.REFUSED, Verdict.LATE):
            self._log_failure(outcome, now)

    def _log_failure(self, outcome: Outcome, now: float) -> None:
        """Log one of many."""
        if now < self._log_at:
            self._unlogged += 1
            return
        _log.warning(
            "the API does not take a disconnect", reason=outcome.reason, others=self._unlogged
        )
        self._log_at, self._unlogged = now + _LOG_EVERY_S, 0


async def end_tasks(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: in the midst of connecting, libraries lose a cancel."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
