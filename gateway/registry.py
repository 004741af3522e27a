"""Keep client id → (worker, generation) in Redis: claims, releases, duplicates.

Keys, all behind the prefix:

    c:<id>        "<worker> <generation>" of the open connection
    p:<id>        the same of a connect that is being decided, so that a push that the API makes
                  before the upgrade is finished finds the worker that will hold the client
    w:<worker>    hash of the worker's ids and their generations, for listing and for reaping

Beside them stand the keys of the disconnects module, which see to it that the API hears of every
end; the scripts here change them in the same atomic step.

The youngest generation wins, wherever and in whatever order the claims are made; a release takes
only its own generation away. Generations are Redis' own time, so that hosts with different clocks
agree on which connection is the youngest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from .disconnects import entry
from .envelope import REPLACED, Envelope, encode
from .redis_link import RedisLink, Reply, Script, ignore, scan

_PENDING_MARGIN_S: Final = 30
_BATCH: Final = 500

# KEYS: prefix. ARGV: id, worker, milliseconds. Marks a connect; returns its generation in µs.
_ANNOUNCE: Final = Script(
    """
local time = redis.call('TIME')
local born = time[1] * 1000000 + time[2]
local pending = KEYS[1] .. 'p:' .. ARGV[1]
-- Younger than what is there, whatever the clocks have done meanwhile.
for _, value in ipairs(redis.call('MGET', KEYS[1] .. 'c:' .. ARGV[1], pending)) do
  if value then born = math.max(born, tonumber(string.match(value, ' (%d+)$')) + 1) end
end
local generation = string.format('%.0f', born)
redis.call('SET', pending, ARGV[2] .. ' ' .. generation, 'PX', ARGV[3])
redis.call('SADD', KEYS[1] .. 'a:' .. ARGV[2], ARGV[1] .. ' ' .. generation)
return generation
"""
)

# KEYS: prefix. ARGV: worker, then for each claim: id, generation, envelope that tells the previous
# owner.
# Returns for each claim the value that holds the id now. The keys are made from the prefix, so
# one call serves many ids; Redis Cluster would need one call for each.
_CLAIM: Final = Script(
    """
local prefix, worker = KEYS[1], ARGV[1]
local held = {}
for i = 2, #ARGV, 3 do
  local id, generation = ARGV[i], ARGV[i + 1]
  local key, value = prefix .. 'c:' .. id, worker .. ' ' .. generation
  local before = redis.call('GET', key)
  local owner, born
  if before and before ~= value then
    owner, born = string.match(before, '^(%S+) (%d+)$')
  end
  local pending = prefix .. 'p:' .. id
  if redis.call('GET', pending) == value then redis.call('DEL', pending) end
  redis.call('SREM', prefix .. 'a:' .. worker, id .. ' ' .. generation)
  if owner and tonumber(born) > tonumber(generation) then
    held[#held + 1] = before
  else
    redis.call('SET', key, value)
    redis.call('HSET', prefix .. 'w:' .. worker, id, generation)
    if owner and owner ~= worker then
      if redis.call('HGET', prefix .. 'w:' .. owner, id) == born then
        redis.call('HDEL', prefix .. 'w:' .. owner, id)
      end
      redis.call('PUBLISH', prefix .. 'w:' .. owner, ARGV[i + 2] .. born)
    end
    held[#held + 1] = value
  end
end
return held
"""
)

# KEYS: prefix. ARGV: worker, id, generation, close code or 0, reason. With a close code the end is
# one that the API must hear of.
# Returns 0 when another connection holds the id, so that nothing is owed, else 1.
_RELEASE: Final = Script(
    """
local prefix, worker, id, generation = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local hash, key = prefix .. 'w:' .. worker, prefix .. 'c:' .. id
if redis.call('HGET', hash, id) == generation then redis.call('HDEL', hash, id) end
local value = redis.call('GET', key)
if value and value ~= worker .. ' ' .. generation then return 0 end
if value then redis.call('DEL', key) end
if ARGV[4] ~= '0' then
  redis.call('HSET', prefix .. 'e:' .. worker, id .. ' ' .. generation, ARGV[4] .. ' ' .. ARGV[5])
end
return 1
"""
)

# KEYS: prefix. ARGV: worker, id, generation. Takes back the mark of a connect that came to nothing.
_WITHDRAW: Final = Script(
    """
local key = KEYS[1] .. 'p:' .. ARGV[2]
redis.call('SREM', KEYS[1] .. 'a:' .. ARGV[1], ARGV[2] .. ' ' .. ARGV[3])
if redis.call('GET', key) == ARGV[1] .. ' ' .. ARGV[3] then return redis.call('DEL', key) end
return 0
"""
)

SCRIPTS: Final = (_ANNOUNCE, _CLAIM, _RELEASE, _WITHDRAW)


class Claimant(Protocol):
    """Be a connection whose id is claimed and released."""

    client_id: bytes
    generation: int
    close_code: int
    close_reason: str | None

    def on_announced(self, generation: int | None) -> None:
        """Learn that the connect is marked, and its generation; None while Redis is away."""

    def on_claimed(self, owned: bool = True) -> None:
        """Learn that the id is held, or that Redis is away and it will be when it returns.

        Args:
            owned: False when a younger connection has it.
        """

    def on_released(self, owned: bool) -> None:
        """Learn that the id is given up; owned is False when a newer connection has it."""

    def replace(self) -> None:
        """Give way to a newer connection of the same client."""


class Registry:
    """Enter the clients of one worker into Redis.

    Args:
        link: connection for commands.
        prefix: of every key.
        worker: incarnation of this worker.
        pending_s: how long a connect may be decided at most, in seconds.
    """

    def __init__(self, link: RedisLink, prefix: str, worker: str, pending_s: float) -> None:
        self._link = link
        self._prefix = prefix.encode("ascii")
        self._worker = worker.encode("ascii")
        self._pending_ms = int((pending_s + _PENDING_MARGIN_S) * 1000)

    def announce(self, client_id: bytes, claimant: Claimant) -> None:
        """Mark a connect as being decided here; `claimant.on_announced` follows.

        The API is asked only after that: it may push to the client through any worker as soon
        as it has answered, and each must find the mark.
        """

        def on_reply(reply: Reply) -> None:
            claimant.on_announced(None if isinstance(reply, Exception) else int(reply))

        self._call(on_reply, _ANNOUNCE, client_id, self._worker, self._pending_ms)

    def _mark_again(self, client_id: bytes, generation: int) -> None:
        self._link.send(
            ignore,
            b"SET",
            self._prefix + b"p:" + client_id,
            b"%b %d" % (self._worker, generation),
            b"PX",
            self._pending_ms,
        )

    def withdraw(self, client_id: bytes, generation: int) -> None:
        """Take the mark away again: the connect came to nothing."""
        self._call(ignore, _WITHDRAW, self._worker, client_id, generation)

    def claim(self, client_id: bytes, generation: int, claimant: Claimant) -> None:
        """Hold an id from now on; a connection of it elsewhere is told that it is replaced."""

        own = b"%b %d" % (self._worker, generation)

        def on_reply(reply: Reply) -> None:
            claimant.on_claimed(isinstance(reply, Exception) or reply[0] == own)

        self._call(
            on_reply, _CLAIM, self._worker, client_id, generation, self._replaced_head(client_id)
        )

    def claim_again(self, claimants: Iterable[Claimant]) -> None:
        """Enter many open clients after Redis was away; the newest of an id wins, any order."""
        batch: list[Claimant] = []
        for claimant in claimants:
            batch.append(claimant)
            if len(batch) == _BATCH:
                self._claim_batch(batch)
                batch = []
        if batch:
            self._claim_batch(batch)

    def _claim_batch(self, batch: list[Claimant]) -> None:
        arguments: list[bytes | int] = []
        for claimant in batch:
            client_id, generation = claimant.client_id, claimant.generation
            arguments += (client_id, generation, self._replaced_head(client_id))

        def on_reply(reply: Reply) -> None:
            if isinstance(reply, Exception):
                return  # lost again; the next return brings the next attempt
            for claimant, value in zip(batch, reply, strict=True):
                if value != b"%b %d" % (self._worker, claimant.generation):
                    claimant.replace()

        self._call(on_reply, _CLAIM, self._worker, *arguments)

    def _replaced_head(self, client_id: bytes) -> bytes:
        """Return what the script completes with the generation that has to give way."""
        return encode(Envelope(REPLACED, 0, b"", client_id, 0, 0, b""))

    def release(self, claimant: Claimant) -> None:
        """Give the id of an ended connection up, unless a newer one has it by now.

        From here on Redis knows that the API must hear of the end; `claimant.on_released` follows.
        """

        def on_reply(reply: Reply) -> None:
            claimant.on_released(isinstance(reply, Exception) or reply == 1)

        self._call(
            on_reply,
            _RELEASE,
            self._worker,
            claimant.client_id,
            claimant.generation,
            claimant.close_code,
            (claimant.close_reason or "").encode(),
        )

    # Redis is back.

    async def restore(
        self,
        clients: Mapping[bytes, Claimant],
        connecting: Mapping[bytes, Claimant],
        deciding: Callable[[], Iterable[Claimant]],
    ) -> None:
        """Make Redis agree with this worker after it was away.

        Every client that is here is entered again; then entries of clients that left go. In this
        order, so that a worker that dies in between leaves too much rather than too little.

        Args:
            connecting: connects that are being decided, the newest of each id.
            deciding: lists all of them.

        Raises:
            RedisUnavailable: if Redis is lost again.
        """
        self.claim_again(list(clients.values()))
        for claimant in connecting.values():
            if claimant.generation:
                self._mark_again(claimant.client_id, claimant.generation)
        for claimant in deciding():
            self._link.send(ignore, b"SADD", self._asking, entry(claimant))
        async for entries in scan(self._link, b"HSCAN", self._prefix + b"w:" + self._worker):
            for client_id, generation in zip(entries[::2], entries[1::2], strict=True):
                client = clients.get(client_id)
                if client is None or client.generation != int(generation):
                    self._call(ignore, _RELEASE, self._worker, client_id, generation, 0, b"")
        async for marks in scan(self._link, b"SSCAN", self._asking):
            here = {entry(claimant) for claimant in deciding()}
            for mark in marks:
                if mark not in here:
                    client_id, _, generation = mark.partition(b" ")
                    self._call(ignore, _WITHDRAW, self._worker, client_id, generation)

    @property
    def _asking(self) -> bytes:
        return self._prefix + b"a:" + self._worker

    def _call(self, callback: Callable[[Any], None], script: Script, *rest: bytes | int) -> None:
        self._link.call(callback, script, self._prefix, *rest)
