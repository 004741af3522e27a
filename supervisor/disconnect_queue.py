"""Take disconnects out of the stream in Redis: each belongs to one reaper until the API has it.

See the disconnects module of the gateway for the keys. The consumer group hands each entry to one
consumer, and keeps it pending for that one until it is struck off. The entries of a reaper that
died go to those that live: to its successor in the same gateway at once, to others when its whole
gateway is gone, or after a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from ws2api.gateway.disconnects import DATA, DROPPED, GROUP, LEASES, STREAM

SILENT_S: Final = 3.0
"""A reaper that lives asks Redis for something more often."""
_PAGE: Final = 256
# A consumer of nothing that was silent for so long belonged to a reaper that died.
_FORGET_AFTER_S: Final = 600

_BEGIN: Final = "0-0"
_END: Final = "18446744073709551615-0"  # the very last id would be taken for ">"

# KEYS: prefix. ARGV: consumer, then for each entry: its id, client id, generation. Makes sure that
# the entries are still this consumer's, and that nobody takes them for some time; strikes off those
# whose clients have reconnected.
# Returns the id of this run of Redis and of the data in it: everything may have been lost if it
# differs from the last; and a Claim for each.
_CLAIM: Final = f"""
local stream, group = KEYS[1] .. '{STREAM}', '{GROUP}'
local about = redis.pcall('INFO', 'server')
local run = type(about) == 'string' and string.match(about, 'run_id:(%x+)') or ''
local claims = {{run .. ' ' .. (redis.call('GET', KEYS[1] .. '{DATA}') or '')}}
for i = 2, #ARGV, 3 do
  local entry, claim = ARGV[i], 0
  local pending = redis.pcall('XPENDING', stream, group, entry, entry, 1)
  if not pending.err and pending[1] and pending[1][2] == ARGV[1] then
    local value = redis.call('GET', KEYS[1] .. 'c:' .. ARGV[i + 1])
    if value and tonumber(string.match(value, ' (%d+)$')) > tonumber(ARGV[i + 2]) then
      redis.call('XACK', stream, group, entry)
      redis.call('XDEL', stream, entry)
      claim = 2
    elseif #redis.call('XCLAIM', stream, group, ARGV[1], 0, entry, 'JUSTID') > 0 then
      claim = 1
    end
  end
  claims[#claims + 1] = claim
end
return claims
"""

# KEYS: prefix. ARGV: consumer, 1 if the entry is to be entered even if it is nobody's, its id, then
# its fields. Moves an entry to the end of the stream. Returns 0 when it is another consumer's.
_PUT_BACK: Final = f"""
local stream, group, entry = KEYS[1] .. '{STREAM}', '{GROUP}', ARGV[3]
if ARGV[2] == '0' then
  local pending = redis.pcall('XPENDING', stream, group, entry, entry, 1)
  if pending.err or not pending[1] or pending[1][2] ~= ARGV[1] then return 0 end
end
redis.call('XADD', stream, '*', 'id', ARGV[4], 'generation', ARGV[5], 'code', ARGV[6],
  'reason', ARGV[7], 'failures', ARGV[8])
redis.call('XACK', stream, group, entry)
redis.call('XDEL', stream, entry)
return 1
"""

# KEYS: prefix. ARGV: consumer, milliseconds of silence. Removes the consumer, and those that were
# silent for so long; none that has entries, for they would be nobody's then.
_FORGET: Final = f"""
local stream, group = KEYS[1] .. '{STREAM}', '{GROUP}'
local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, group)
if consumers.err then return 0 end
local count = 0
for _, fields in ipairs(consumers) do
  local consumer = {{}}
  for i = 1, #fields, 2 do consumer[fields[i]] = fields[i + 1] end
  local is_over = consumer.name == ARGV[1] or consumer.idle > tonumber(ARGV[2])
  if consumer.pending == 0 and is_over then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer.name)
    count = count + 1
  end
end
return count
"""

_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Disconnect:
    """Hold an entry of the stream: the end of a connection of which the API has yet to hear.

    Attributes:
        entry: its id in the stream.
        client_id: as it stands on the wire.
        failures: attempts that the API did not take.
        run: id of the run of Redis that it was read from.
    """

    entry: bytes
    client_id: bytes
    generation: int
    code: int
    reason: bytes
    failures: int = 0
    run: bytes = b""


class Claim(IntEnum):
    """Say whose an entry is, before the API is told."""

    GONE = 0
    """Another's by now, or struck off."""
    HELD = 1
    RECONNECTED = 2
    """The client is back; the entry has been struck off."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Hold what is to be known of the stream: its length, the age of its oldest entry in seconds,
    and how many entries fell off because it was full."""

    length: int
    oldest_s: int
    dropped: int


class DisconnectQueue:
    """Be one consumer of the stream.

    Every method raises redis' errors when Redis is away or refuses.

    Args:
        redis: gives bytes (RESP2, nothing decoded).
        prefix: of every key.
        instance: unique id of the gateway, which has one reaper at a time.
        pid: of the reaper.
        abandoned_s: seconds after which an entry that was not touched is that of a dead reaper.
    """

    def __init__(
        self, redis: Redis, prefix: str, instance: str, pid: int, abandoned_s: float
    ) -> None:
        self._redis = redis
        self._prefix = prefix
        self._stream = prefix + STREAM
        self._family = f"{instance}-".encode("ascii")
        self._consumer = f"{instance}-{pid}"
        self._abandoned_ms = int(abandoned_s * 1000)
        self._cursor: str | bytes = _BEGIN
        self._claim = redis.register_script(_CLAIM)
        self._put_back = redis.register_script(_PUT_BACK)
        self._forget = redis.register_script(_FORGET)

    async def open(self) -> bytes:
        """Create the stream and the group, if they are not there.

        Returns:
            the id of this run of Redis, as far as it says, and of the data in it.
        """
        await self._redis.set(self._prefix + DATA, secrets.token_hex(8), nx=True)
        try:
            # From the first entry on: what came before the group is to be delivered as well.
            await self._redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        run, *_ = await self.claim(())
        return run

    async def read(self, count: int, wait_s: float) -> list[Disconnect]:
        """Take entries that nobody has taken before.

        Args:
            count: at most so many.
            wait_s: how long to wait for the first; 0 does not wait.
        """
        reply: Any = await self._redis.xreadgroup(
            GROUP,
            self._consumer,
            {self._stream: ">"},
            count=count,
            block=int(wait_s * 1000) or None,
        )
        return await self._parse(reply[0][1]) if reply else []

    async def adopt(self, count: int) -> tuple[list[Disconnect], bool]:
        """Take entries of dead reapers, and tell whether that was the last of them.

        Entries that this consumer has not touched for so long are among them.
        """
        reply: Any = await self._redis.xautoclaim(
            self._stream, GROUP, self._consumer, self._abandoned_ms, self._cursor, count=count
        )
        self._cursor = reply[0]
        is_last = reply[0] in (b"0-0", b"0")
        if is_last:
            await self._forget(keys=[self._prefix], args=["", _FORGET_AFTER_S * 1000])
        return await self._parse(reply[1]), is_last

    async def recover(self, count: int, held: Collection[bytes]) -> list[Disconnect]:
        """Take what this gateway's reapers were given and this one does not hold.

        That is what the predecessor held when it died, and what Redis gave out in the moment in
        which the connection was lost.

        Args:
            count: at most so many; fewer come when there are no more.
            held: ids of the entries that this one holds.
        """
        consumers: list[Any] = await self._redis.xinfo_consumers(self._stream, GROUP)
        names = [each["name"] for each in consumers if each["name"].startswith(self._family)]
        return await self._take_from(names, count, held)

    async def inherit(self, count: int) -> list[Disconnect]:
        """Take what reapers were given whose whole gateway is gone.

        A gateway is gone when none of its workers has a lease and its reaper is silent: that of
        one that is about to end, or has yet to start its workers, is not. When Redis itself stood
        still it all looks the same, so call this only some time after that.

        Args:
            count: at most so many; fewer come when there are no more.
        """
        living = await self._living_gateways()
        consumers: list[Any] = await self._redis.xinfo_consumers(self._stream, GROUP)
        gone = [
            each["name"]
            for each in consumers
            if each["idle"] >= SILENT_S * 1000
            and each["name"].partition(b"-")[0] not in living
            and not each["name"].startswith(self._family)
        ]
        return await self._take_from(gone, count, ())

    async def _take_from(
        self, consumers: Iterable[bytes], count: int, held: Collection[bytes]
    ) -> list[Disconnect]:
        found: list[Disconnect] = []
        for consumer in consumers:
            start = "-"
            while len(found) < count:
                page: list[Any] = await self._redis.xpending_range(
                    self._stream, GROUP, start, "+", _PAGE, consumer
                )
                entries: list[Any] = [each["message_id"] for each in page]
                missed = [entry for entry in entries if entry not in held]
                if missed := missed[: count - len(found)]:
                    reply: Any = await self._redis.xclaim(
                        self._stream, GROUP, self._consumer, 0, missed
                    )
                    found += await self._parse(reply)
                if len(page) < _PAGE:
                    break
                start = f"({entries[-1].decode()}"
        return found

    async def touch(self) -> None:
        """Give a sign of life while nothing is read."""
        await self._redis.xreadgroup(GROUP, self._consumer, {self._stream: _END}, count=1)

    async def _living_gateways(self) -> set[bytes]:
        """List the instances of which a worker has a lease."""
        now_s, now_us = await self._redis.time()
        workers: list[Any] = await self._redis.zrangebyscore(
            self._prefix + LEASES, now_s * 1000 + now_us // 1000, "+inf"
        )
        return {worker.partition(b"-")[0] for worker in workers}

    async def claim(self, disconnects: Sequence[Disconnect]) -> tuple[bytes, list[Claim]]:
        """Make sure, right before the API is told, that nobody else tells it.

        Returns:
            the id of this run of Redis and of its data, and a claim for each.
        """
        arguments: list[Any] = [self._consumer]
        for each in disconnects:
            arguments += (each.entry, each.client_id, each.generation)
        reply: Any = await self._claim(keys=[self._prefix], args=arguments)
        return bytes(reply[0]), [Claim(value) for value in reply[1:]]

    async def settle(self, entries: Iterable[bytes]) -> None:
        """Strike off entries of which the API has heard."""
        entries = list(entries)
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xack(self._stream, GROUP, *entries)
            pipeline.xdel(self._stream, *entries)
            await pipeline.execute()

    async def put_back(self, disconnect: Disconnect, *, even_if_lost: bool = False) -> None:
        """Move an entry to the end of the stream, for any reaper to take.

        Args:
            even_if_lost: enter it also when Redis knows nothing of it.
        """
        await self._put_back(
            keys=[self._prefix],
            args=[
                self._consumer,
                int(even_if_lost),
                disconnect.entry,
                disconnect.client_id,
                disconnect.generation,
                disconnect.code,
                disconnect.reason,
                disconnect.failures,
            ],
        )

    async def measure(self) -> Measure:
        """Look at the stream."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xlen(self._stream)
            pipeline.xrange(self._stream, count=1)
            pipeline.time()
            pipeline.get(self._prefix + DROPPED)
            length, first, (now_s, _), dropped = await pipeline.execute()
        born_s = int(first[0][0].partition(b"-")[0]) // 1000 if first else now_s
        return Measure(length, max(0, now_s - born_s), int(dropped or 0))

    async def leave(self) -> None:
        """Be a consumer no more; what it still has waits for its successors."""
        await self._forget(keys=[self._prefix], args=[self._consumer, _FORGET_AFTER_S * 1000])

    async def _parse(self, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> list[Disconnect]:
        """Read entries; strike off what fell off the stream meanwhile, and what is none of ours."""
        disconnects, useless = [], []
        for entry, fields in entries:
            try:
                disconnects.append(
                    Disconnect(
                        entry,
                        fields[b"id"],
                        int(fields[b"generation"]),
                        int(fields[b"code"]),
                        fields[b"reason"],
                        int(fields.get(b"failures", 0)),
                    )
                )
            except (KeyError, ValueError, TypeError, AttributeError):
                useless.append(entry)
                if fields:
                    _log.error("an entry of the stream is no disconnect", entry=entry)
        if useless := [entry for entry in useless if entry is not None]:
            await self.settle(useless)
        return disconnects
