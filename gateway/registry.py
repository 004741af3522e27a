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
agree on which connection is the youngest. While Redis is away they are this host's idea of that
time, and younger than what an announcement may have brought about whose answer was lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from .disconnects import entry
from .envelope import REPLACED, Envelope, encode
from .fence import CHECK, REFUSE, Fence
from .redis_link import REPLY_TIMEOUT_S, RedisLink, Reply, Script, has_no_effect, ignore, scan
from .redis_time import RedisTime

_PENDING_MARGIN_S: Final = 30
_BATCH: Final = 500
# A mark is not made later than that: well before the link is given up for want of an answer, so
# that it is certain then that there will be none.
_ANNOUNCE_S: Final = REPLY_TIMEOUT_S / 2
_ANNOUNCEMENTS: Final = 3

# KEYS: prefix. ARGV: worker, epoch, id, milliseconds, and the time in ms after which nobody waits
# for it, 0 for none. Marks a connect; returns its generation in µs, a string; or the time in ms, an
# integer, when it is too late.
_ANNOUNCE: Final = Script(
    """
local worker, epoch, id = ARGV[1], ARGV[2], ARGV[3]
local pending = KEYS[1] .. 'p:' .. id
local values = redis.call('MGET', KEYS[1] .. 'i:' .. worker, KEYS[1] .. 'c:' .. id, pending)
local held = values[1]
"""
    + REFUSE
    + """
local time = redis.call('TIME')
local now, deadline = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[5])
if deadline > 0 and now > deadline then return now end
local born = time[1] * 1000000 + time[2]
-- Younger than what is there, whatever the clocks have done meanwhile.
for i = 2, 3 do
  local value = values[i]
  if value then born = math.max(born, tonumber(string.match(value, ' (%d+)$')) + 1) end
end
local generation = string.format('%.0f', born)
redis.call('SET', pending, worker .. ' ' .. generation, 'PX', ARGV[4])
redis.call('SADD', KEYS[1] .. 'a:' .. worker, id .. ' ' .. generation)
return generation
"""
)

# KEYS: prefix. ARGV: worker, epoch, milliseconds, then for each connect: id, generation, and 1 if
# it is the one that pushes are for. Marks connects again that Redis may have forgotten.
_MARK_AGAIN: Final = Script(
    "local worker, epoch = ARGV[1], ARGV[2]"
    + CHECK
    + """
for i = 4, #ARGV, 3 do
  local id, generation = ARGV[i], ARGV[i + 1]
  redis.call('SADD', KEYS[1] .. 'a:' .. worker, id .. ' ' .. generation)
  if ARGV[i + 2] == '1' then
    redis.call('SET', KEYS[1] .. 'p:' .. id, worker .. ' ' .. generation, 'PX', ARGV[3])
  end
end
return 1
"""
)

# KEYS: prefix. ARGV: worker, epoch, then for each claim: id, generation, envelope that tells the
# previous owner.
# Returns for each claim the value that holds the id now. No id may come twice. The keys are made
# from the prefix, so one call serves many ids; Redis Cluster would need one call for each.
_CLAIM: Final = Script(
    """
local prefix, worker, epoch = KEYS[1], ARGV[1], ARGV[2]
local keys = {prefix .. 'i:' .. worker}
for i = 3, #ARGV, 3 do
  keys[#keys + 1] = prefix .. 'c:' .. ARGV[i]
  keys[#keys + 1] = prefix .. 'p:' .. ARGV[i]
end
local values = redis.call('MGET', unpack(keys))
local held = values[1]
"""
    + REFUSE
    + """
local holders = {}
for i = 3, #ARGV, 3 do
  local id, generation, at = ARGV[i], ARGV[i + 1], 2 * i / 3
  local key, value, before = keys[at], worker .. ' ' .. generation, values[at]
  local owner, born
  if before and before ~= value then
    owner, born = string.match(before, '^(%S+) (%d+)$')
  end
  -- Where a connection before it is does not matter any more, see g: of the disconnects.
  if values[at + 1] == value then redis.call('DEL', keys[at + 1], prefix .. 'g:' .. id) end
  redis.call('SREM', prefix .. 'a:' .. worker, id .. ' ' .. generation)
  if owner and tonumber(born) > tonumber(generation) then
    holders[#holders + 1] = before
  else
    redis.call('SET', key, value)
    redis.call('HSET', prefix .. 'w:' .. worker, id, generation)
    if owner and owner ~= worker then
      if redis.call('HGET', prefix .. 'w:' .. owner, id) == born then
        redis.call('HDEL', prefix .. 'w:' .. owner, id)
      end
      redis.call('PUBLISH', prefix .. 'w:' .. owner, ARGV[i + 2] .. born)
    end
    holders[#holders + 1] = value
  end
end
return holders
"""
)

# KEYS: prefix. ARGV: worker, epoch, id, generation, close code or 0, reason. With a close code the
# end is one that the API must hear of.
# Returns 0 when another connection holds the id, so that nothing is owed, else 1.
_RELEASE: Final = Script(
    """
local prefix, worker, epoch, id, generation = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local hash, key = prefix .. 'w:' .. worker, prefix .. 'c:' .. id
local held, value = unpack(redis.call('MGET', prefix .. 'i:' .. worker, key))
"""
    + REFUSE
    + """
if redis.call('HGET', hash, id) == generation then redis.call('HDEL', hash, id) end
if value and value ~= worker .. ' ' .. generation then return 0 end
if value then redis.call('DEL', key) end
if ARGV[5] ~= '0' then
  redis.call('HSET', prefix .. 'e:' .. worker, id .. ' ' .. generation, ARGV[5] .. ' ' .. ARGV[6])
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

SCRIPTS: Final = (_ANNOUNCE, _MARK_AGAIN, _CLAIM, _RELEASE, _WITHDRAW)


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
        fence: knows this worker.
        redis_time: what time it is at Redis.
        pending_s: how long a connect may be decided at most, in seconds.
    """

    def __init__(
        self, link: RedisLink, prefix: str, fence: Fence, redis_time: RedisTime, pending_s: float
    ) -> None:
        self._link = link
        self._prefix = prefix.encode("ascii")
        self._fence = fence
        self._worker = fence.worker
        self._redis_time = redis_time
        self._pending_ms = int((pending_s + _PENDING_MARGIN_S) * 1000)

    def announce(self, client_id: bytes, claimant: Claimant, attempts: int = 1) -> None:
        """Mark a connect as being decided here; `claimant.on_announced` follows.

        The API is asked only after that: it may push to the client through any worker as soon
        as it has answered, and each must find the mark.

        Args:
            attempts: how many this makes; the last has no deadline.
        """
        clock = self._redis_time
        sent_at = time.monotonic()
        late_ms = clock.deadline_ms(_ANNOUNCE_S)
        deadline_ms = late_ms if attempts < _ANNOUNCEMENTS else 0

        def on_reply(reply: Reply) -> None:
            if isinstance(reply, bytes):
                generation = int(reply)
                clock.pass_by(generation)
                claimant.on_announced(generation)
                return
            if isinstance(reply, int):
                clock.learn(reply, sent_at)
                self.announce(client_id, claimant, attempts + 1)
                return
            if not has_no_effect(reply):
                # It may have given out a generation, which must not be younger than the one that
                # the API is going to be asked with.
                clock.pass_by((late_ms + 1) * 1000)
            claimant.on_announced(None)

        self._call(on_reply, _ANNOUNCE, client_id, self._pending_ms, deadline_ms)

    def withdraw(self, client_id: bytes, generation: int) -> None:
        """Take the mark away again: the connect came to nothing."""
        self._link.call(ignore, _WITHDRAW, self._prefix, self._worker, client_id, generation)

    def claim(self, client_id: bytes, generation: int, claimant: Claimant) -> None:
        """Hold an id from now on; a connection of it elsewhere is told that it is replaced."""

        own = b"%b %d" % (self._worker, generation)

        def on_reply(reply: Reply) -> None:
            claimant.on_claimed(isinstance(reply, Exception) or reply[0] == own)

        self._call(on_reply, _CLAIM, client_id, generation, self._replaced_head(client_id))

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

        self._call(on_reply, _CLAIM, *arguments)

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
        self._mark_again(list(deciding()), connecting)
        async for entries in scan(self._link, b"HSCAN", self._prefix + b"w:" + self._worker):
            for client_id, generation in zip(entries[::2], entries[1::2], strict=True):
                client = clients.get(client_id)
                if client is None or client.generation != int(generation):
                    self._call(ignore, _RELEASE, client_id, generation, 0, b"")
        async for marks in scan(self._link, b"SSCAN", self._asking):
            here = {entry(claimant) for claimant in deciding()}
            for mark in marks:
                if mark not in here:
                    client_id, _, generation = mark.partition(b" ")
                    self.withdraw(client_id, int(generation))

    def _mark_again(
        self, deciding: Sequence[Claimant], connecting: Mapping[bytes, Claimant]
    ) -> None:
        for start in range(0, len(deciding), _BATCH):
            arguments: list[bytes | int] = [self._pending_ms]
            for claimant in deciding[start : start + _BATCH]:
                client_id, generation = claimant.client_id, claimant.generation
                is_newest = connecting.get(client_id) is claimant
                arguments += (client_id, generation, int(is_newest))
            self._call(ignore, _MARK_AGAIN, *arguments)

    @property
    def _asking(self) -> bytes:
        return self._prefix + b"a:" + self._worker

    def _call(self, callback: Callable[[Any], None], script: Script, *rest: bytes | int) -> None:
        """Call a script that adds, which the fence may hold off."""
        fence = self._fence
        self._link.call(callback, script, self._prefix, fence.worker, fence.epoch, *rest)
