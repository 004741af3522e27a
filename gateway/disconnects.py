"""State how Redis keeps each connection until the API has heard of its end: keys and scripts.

An end that the API must hear of is written down before anything else happens to it, and struck off
when the API has answered 2xx. So whoever dies in between leaves a trace that another can follow.
Keys, all behind the prefix, beside those of the registry:

    a:<worker>    set of "<id> <generation>": connects that the API is being asked about
    w:<worker>    hash of id → generation: connections that are open
    e:<worker>    hash of "<id> <generation>" → "<code> <reason>": connections that have ended and
                  of which the worker tells the API itself
    leases        sorted set of worker → time until which it counts as alive, in ms of Redis'
                  clock; 0 when it has ended
    x:<worker>    set of "<id> <generation>": connections that were given up for lost although, as
                  it turned out, their worker lived; it closes them when it comes back
    g:<id>        "<worker> <generation>": a connection that was given up like that, for as long as
                  its worker may come back; a push to it is not answered with 404 meanwhile. None
                  of a client that was connected elsewhere by then
    disconnects   stream of ends that nobody but a reaper will tell the API of: those of workers
                  that died, and those that the API did not take at once; fields id, generation,
                  code, reason, and failures, the number of attempts, on one that was put back
    data          random id, so that a reaper can tell when all of this was lost
    dropped       number of entries that fell off the stream because it had reached its bound

What a worker sends too late to add to these is held off by the fence module, whose key i:<worker>
stands beside them.

A worker that dies leaves its three keys; a reaper moves them to the stream in one atomic step per
batch, so that several reapers never move one twice. The consumer group hands each entry of the
stream to one reaper.
"""

from __future__ import annotations

from typing import Final, Protocol

from .fence import CHECK, ENTER, SHUT
from .redis_link import Script

STREAM: Final = "disconnects"
GROUP: Final = "reapers"
DROPPED: Final = "dropped"
DATA: Final = "data"
LEASES: Final = "leases"

LEASE_S: Final = 15.0
"""A worker that has not renewed its lease for so long counts as dead."""
RENEW_EVERY_S: Final = 3.0

WORKER_LOST: Final = "worker lost"
"""Reason that the API is told of a connection that ended with its worker; the code is 1006."""


class Connection(Protocol):
    """Be a connection that Redis knows."""

    client_id: bytes
    generation: int


def entry(connection: Connection) -> bytes:
    """Return how the sets and hashes here name a connection: "<id> <generation>"."""
    return b"%b %d" % (connection.client_id, connection.generation)


# Entries that one call of TAKE_OVER looks at in each of the three keys; Redis does nothing else for
# 3 ms for that many.
_BATCH: Final = 250
# How long a worker that was given up for lost finds out about it.
_GIVEN_UP_S: Final = 86_400
BACK_S: Final = 300
"""For so long after it was given up a connection is told from one that never was: its client may
still be connected to a worker that is cut off from Redis."""

# Expects the locals prefix and bound.
_OWE: Final = """
local function owe(id, generation, code, reason)
  local stream = prefix .. 'disconnects'
  local over = redis.call('XLEN', stream) - bound + 1
  if over > 0 then
    redis.call('XTRIM', stream, 'MAXLEN', bound - 1)
    redis.call('INCRBY', prefix .. 'dropped', over)
  end
  redis.call('XADD', stream, '*', 'id', id, 'generation', generation, 'code', code,
    'reason', reason)
end
"""

# KEYS: prefix. ARGV: worker, epoch, lease in ms. Enters the epoch as well.
# Returns 1 when connections of this worker were given up for lost meanwhile, so that it has to
# close them, else 0; Redis' time in ms; and 1 when Redis knew of a lease of this worker, else 0.
RENEW: Final = Script(
    "local worker, epoch = ARGV[1], ARGV[2]"
    + ENTER
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local is_new = redis.call('ZADD', KEYS[1] .. 'leases', now + ARGV[3], worker)
return {redis.call('EXISTS', KEYS[1] .. 'x:' .. worker), now, 1 - is_new}
"""
)

# KEYS: prefix. ARGV: worker, entries of x:. Strikes off what the worker has closed.
AMEND: Final = Script(
    """
redis.call('SREM', KEYS[1] .. 'x:' .. ARGV[1], unpack(ARGV, 2))
for i = 2, #ARGV do
  local id, generation = string.match(ARGV[i], '^(%S+) (%d+)$')
  local key = KEYS[1] .. 'g:' .. id
  if redis.call('GET', key) == ARGV[1] .. ' ' .. generation then redis.call('DEL', key) end
end
return 1
"""
)

# KEYS: prefix. ARGV: worker, epoch, then for each: the entry of an end, its code and reason. Enters
# ends again that the worker tells the API of itself.
OWE: Final = Script(
    "local worker, epoch = ARGV[1], ARGV[2]"
    + CHECK
    + """
for i = 3, #ARGV, 2 do
  redis.call('HSET', KEYS[1] .. 'e:' .. worker, ARGV[i], ARGV[i + 1])
end
return 1
"""
)

# KEYS: prefix. ARGV: worker, epoch, id, generation, code, reason, bound of the stream. Leaves an
# end to the reapers.
PARK: Final = Script(
    "local prefix, worker, epoch, bound = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[7])"
    + CHECK
    + _OWE
    + """
redis.call('HDEL', prefix .. 'e:' .. worker, ARGV[3] .. ' ' .. ARGV[4])
owe(ARGV[3], ARGV[4], ARGV[5], ARGV[6])
return 1
"""
)

# KEYS: prefix. ARGV: worker, bound of the stream, 1 if the worker is known to be dead, else its
# lease decides; ms for which a connect may be decided, so that younger ones are left for later;
# the end of the lease that was found to be over, so that a worker that has renewed it meanwhile
# lives, whatever Redis' clock says (without it the clock decides).
# Moves a batch of what the worker left to the stream.
# Returns how many were moved, how many were not because the client has reconnected, and whether
# there is more; or nil when the worker lives, or another reaper has finished with it.
# What is next is picked at random: a scan that begins anew with each batch finds less and less,
# and in a large key nothing at all, because it has to pass the gaps that the batches before left.
TAKE_OVER: Final = Script(
    "local prefix, worker, bound = KEYS[1], ARGV[1], tonumber(ARGV[2])"
    + _OWE
    + f"""
local batch, lost, given_up_s, back_s = {_BATCH}, '{WORKER_LOST}', {_GIVEN_UP_S}, {BACK_S}
"""
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = tonumber(redis.call('ZSCORE', prefix .. 'leases', worker) or now + 1)
local is_dead = ARGV[3] == '1' or lease == 0
local hold = tonumber(ARGV[4] or 0)
local seen = tonumber(ARGV[5])
if not is_dead and (seen and lease ~= seen or not seen and lease > now) then return false end
"""
    + SHUT
    + """

local moved, reconnected = 0, 0
local function is_back(id, generation)
  local value = redis.call('GET', prefix .. 'c:' .. id)
  if not value then return false end
  return tonumber(string.match(value, ' (%d+)$')) > tonumber(generation)
end
local function move(id, generation, code, reason)
  local key, value = prefix .. 'c:' .. id, worker .. ' ' .. generation
  if is_back(id, generation) then
    reconnected = reconnected + 1
  else
    owe(id, generation, code, reason)
    moved = moved + 1
  end
  if redis.call('GET', key) == value then redis.call('DEL', key) end
  local pending = prefix .. 'p:' .. id
  if redis.call('GET', pending) == value then redis.call('DEL', pending) end
end
local function give_up(id, generation)
  if is_dead then return end
  redis.call('SADD', prefix .. 'x:' .. worker, id .. ' ' .. generation)
  redis.call('EXPIRE', prefix .. 'x:' .. worker, given_up_s)
  if is_back(id, generation) then return end
  redis.call('SET', prefix .. 'g:' .. id, worker .. ' ' .. generation, 'EX', back_s)
end

local open = prefix .. 'w:' .. worker
local entries = redis.call('HRANDFIELD', open, batch, 'WITHVALUES')
for i = 1, #entries, 2 do
  local id, generation = entries[i], entries[i + 1]
  move(id, generation, '1006', lost)
  redis.call('HDEL', open, id)
  give_up(id, generation)
end
-- The API may still be at work on these; it must not hear of the end before it has decided.
local asking, taken = prefix .. 'a:' .. worker, 0
for _, entry in ipairs(redis.call('SRANDMEMBER', asking, batch)) do
  local id, generation = string.match(entry, '^(%S+) (%d+)$')
  -- One from the future has its birth from a clock that is wrong.
  local age = now - tonumber(generation) / 1000
  if age >= hold or age < -hold then
    move(id, generation, '1006', lost)
    redis.call('SREM', asking, entry)
    give_up(id, generation)
    taken = taken + 1
  end
end
local ended = prefix .. 'e:' .. worker
entries = redis.call('HRANDFIELD', ended, batch, 'WITHVALUES')
for i = 1, #entries, 2 do
  local id, generation = string.match(entries[i], '^(%S+) (%d+)$')
  local code, reason = string.match(entries[i + 1], '^(%d+) (.*)$')
  move(id, generation, code, reason)
  redis.call('HDEL', ended, entries[i])
end
local asked = redis.call('EXISTS', asking)
local more = redis.call('EXISTS', open, ended)
if more + asked == 0 then
  redis.call('ZREM', prefix .. 'leases', worker)
elseif is_dead then
  redis.call('ZADD', prefix .. 'leases', 0, worker)
end
return {moved, reconnected, (more > 0 or asked > 0 and taken > 0) and 1 or 0}
"""
)

SCRIPTS: Final = (RENEW, AMEND, OWE, PARK, TAKE_OVER)
