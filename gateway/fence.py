"""Make void what was sent to Redis over a connection that was given up since.

Bytes outlive their sender: in the buffers of a Redis that stood still, of a kernel whose packets
were lost, of a process that was killed. Redis carries them out when it gets them, be that half a
minute later, when the worker has told the API something else, or a reaper has told it that the
worker is gone. What keeps them from taking effect:

**The epoch.** A worker counts its connections for commands; the number is the epoch. Redis keeps,
behind the prefix:

    i:<worker>    "<epoch>": commands of this epoch take effect; "-<epoch>": a reaper took the
                  worker for dead, and none do up to this epoch; "dead": none do ever again. Not
                  there: Redis has forgotten everything, or the worker has just come into being

The first command on each connection is RENEW of the disconnects module, which enters the epoch
unless the key says that it is over; so it comes before anything that a reaper could take for a dead
worker's. TAKE_OVER, which a reaper calls and a worker at its end, writes "-<epoch>" or "dead"
before it moves anything. So Redis' own order decides:

- what a connection sent is carried out before the worker enters its next epoch: `restore` of the
  registry and the outbox, which come after RENEW, find it and take it back;
- it comes after that, or after TAKE_OVER: the script does nothing and answers FENCED. A worker that
  lives loses its connection over that answer, and the next has the next epoch.

ANNOUNCE, MARK_AGAIN, CLAIM and RELEASE of the registry, RENEW, OWE and PARK of the disconnects
carry the epoch: all that adds to a:, p:, e:, w:, c:, the stream or the leases. Commands that only
take away what can never be right again (WITHDRAW, HDEL of an end that the API has heard of) need
none.

**The deadline.** Some must not take effect late even if nobody has taken over: a push after its 504
was answered, and the mark of a connect that the worker has stopped to wait for. They carry a time
of Redis' clock, as far as the worker knows it (see the redis_time module), and after it they do
nothing and answer what time it is. So a worker whose idea of the time was wrong learns it, and
sends again. A generation that Redis may have given out without the worker learning of it is not
above the deadline; the one that the worker makes up instead is.

**The reset.** A TCP connection that is given up is reset, not closed, so that the kernel sends
nothing of it later.

A generation of which the API was never asked can be reported still when a worker dies within the
seconds between the mark and the question: nobody knows then whether it was asked.
"""

from __future__ import annotations

from typing import Final

# How long bytes of a dead worker may be on their way; TCP gives up after a quarter of an hour.
_DEAD_S: Final = 3_600
_FENCED: Final = "FENCED the worker was given up, or has a younger connection"

# For scripts with the locals epoch, and held, the value of the key; before they change anything.
REFUSE: Final = f"""
if held and held ~= epoch then
  return redis.error_reply('{_FENCED}')
end
"""

# For scripts with the locals worker and epoch that have no other key to get in the same call.
CHECK: Final = "\nlocal held = redis.call('GET', KEYS[1] .. 'i:' .. worker)" + REFUSE

# The same, and enters the epoch if it is a younger one than what is there, or the first.
ENTER: Final = f"""
local fence = KEYS[1] .. 'i:' .. worker
local held = redis.call('GET', fence)
if held ~= epoch then
  if held and (held == 'dead' or math.abs(tonumber(held)) >= tonumber(epoch)) then
    return redis.error_reply('{_FENCED}')
  end
  redis.call('SET', fence, epoch)
end
"""

# For a script with the locals prefix, worker, is_dead, and given_up_s, which is about to take over.
SHUT: Final = f"""
local fence = prefix .. 'i:' .. worker
if is_dead then
  redis.call('SET', fence, 'dead', 'EX', {_DEAD_S})
else
  local held = redis.call('GET', fence)
  if held and string.match(held, '^%d') then
    redis.call('SET', fence, '-' .. held, 'EX', given_up_s)
  end
end
"""


class Fence:
    """Know this worker, and the epoch of its connection to Redis.

    Args:
        worker: incarnation of the worker.
    """

    __slots__ = ("_epoch", "epoch", "worker")

    def __init__(self, worker: str) -> None:
        self.worker = worker.encode("ascii")
        self._epoch = 0
        self.epoch = b"0"
        """What scripts get as their epoch."""

    def advance(self) -> None:
        """Begin the epoch of a new connection."""
        self._epoch += 1
        self.epoch = b"%d" % self._epoch
