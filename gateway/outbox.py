"""See to it that the API hears of every end: what is owed stands in Redis until it has been paid.

The worker tells the API itself, and strikes the entry off when the API has answered. What the API
does not take is left to the reapers, and so is everything when the worker ends before it is done;
see the disconnects module for the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from .disconnects import OWE, PARK, TAKE_OVER
from .disconnects import entry as entry_of
from .fence import Fence
from .redis_link import RedisLink, Reply, ignore, scan

_BATCH: Final = 500

# id, generation, code, reason
_End = tuple[bytes, int, int, bytes]


class Departed(Protocol):
    """Be a connection that has ended."""

    client_id: bytes
    generation: int
    close_code: int
    close_reason: str | None


class Outbox:
    """Keep Redis' list of the ends that one worker owes the API.

    Args:
        link: connection for commands.
        prefix: of every key.
        fence: knows this worker.
        bound: how many ends may wait for the reapers.
        pending_s: how long a connect may be decided at most, in seconds.
        call_soon: calls back at the end of the loop's tick.
    """

    def __init__(
        self,
        link: RedisLink,
        prefix: str,
        fence: Fence,
        bound: int,
        pending_s: float,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._link = link
        self._prefix = prefix.encode("ascii")
        self._fence = fence
        self._key = self._prefix + b"e:" + fence.worker
        self._bound = bound
        self._hold_ms = int(pending_s * 1000)
        self._call_soon = call_soon
        # Entries that the API has heard of in this tick, to be struck off together.
        self._settled: list[bytes] = []
        # What is being left to the reapers, by entry, until Redis has confirmed it.
        self._parking: dict[bytes, _End] = {}
        # True once all that stands in Redis goes to the reapers as it is.
        self._is_handing_over = False

    def settle(self, departed: Departed) -> None:
        """Strike off an end that the API has heard of."""
        if not self._settled:
            self._call_soon(self._strike_off)
        self._settled.append(entry_of(departed))

    def _strike_off(self) -> None:
        settled, self._settled = self._settled, []
        for start in range(0, len(settled), _BATCH):
            self._link.send(ignore, b"HDEL", self._key, *settled[start : start + _BATCH])

    def park(self, departed: Departed) -> bool:
        """Leave an end to the reapers; False while Redis is away, so that nobody could find it."""
        if not self._link.is_up:
            return False
        if self._is_handing_over:
            return True  # it goes with the others; by itself, it would go a second time
        entry, end = entry_of(departed), _end(departed)
        self._parking[entry] = end
        self._park(entry, end)
        return True

    def _park(self, entry: bytes, end: _End) -> None:
        def on_reply(reply: Reply) -> None:
            if not isinstance(reply, Exception):
                self._parking.pop(entry, None)  # else `restore` tries again

        fence = self._fence
        self._link.call(on_reply, PARK, self._prefix, fence.worker, fence.epoch, *end, self._bound)

    @property
    def unconfirmed(self) -> int:
        """Count the ends that Redis has yet to confirm as left to the reapers."""
        return len(self._parking)

    def enter(self, owed: Sequence[Departed]) -> None:
        """Write down ends that Redis may know nothing of; those that it knows stay as they are."""
        parts: list[bytes] = []
        for departed in owed:
            _, _, code, reason = _end(departed)
            parts += (entry_of(departed), b"%d %b" % (code, reason))
        fence = self._fence
        for start in range(0, len(parts), 2 * _BATCH):
            batch = parts[start : start + 2 * _BATCH]
            self._link.call(ignore, OWE, self._prefix, fence.worker, fence.epoch, *batch)

    async def restore(self, owed: Callable[[], Sequence[Departed]]) -> None:
        """Make Redis agree with this worker after it was away.

        Args:
            owed: lists the connections that have ended and of which the API has yet to hear.

        Raises:
            RedisUnavailable: if Redis is lost again.
        """
        self.enter(owed())
        for entry, end in list(self._parking.items()):
            self._park(entry, end)
        async for entries in scan(self._link, b"HSCAN", self._key):
            here = {entry_of(departed) for departed in owed()}
            for entry in entries[::2]:
                if entry not in here and entry not in self._parking:
                    self._link.send(ignore, b"HDEL", self._key, entry)

    async def hand_over(self) -> int:
        """Leave all that stands in Redis for this worker to the reapers; return how much it was.

        An end that is parked from here on is among it: Redis has known of each since its client
        was released.

        Raises:
            RedisUnavailable: if Redis is away; then the end of the lease tells the reapers.
            hiredis.ReplyError: if Redis refuses.
        """
        self._is_handing_over = True
        self._strike_off()
        count = 0
        more: Any = 1
        while more:
            moved, _, more = await self._link.ask(
                b"EVALSHA",
                TAKE_OVER.digest,
                1,
                self._prefix,
                self._fence.worker,
                self._bound,
                1,
                self._hold_ms,
            )
            count += moved
        return count


def _end(departed: Departed) -> _End:
    reason = (departed.close_reason or "").encode()
    return departed.client_id, departed.generation, departed.close_code, reason
