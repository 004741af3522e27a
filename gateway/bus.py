"""Carry asks and their confirmations between workers over Redis pub/sub.

A worker subscribes to one channel, its own. An ask goes out through a script that looks the owner
up and publishes to it in one round trip; the owner confirms to the asking worker's channel. All
that is due in one tick of the loop travels together, both ways.

What an asker is told: 503 when it is certain that the ask will not arrive, because it was never
written, Redis refused it, or nobody listened to it; when nobody knows, 504 at its time, unless a
confirmation comes before. Redis carries no ask out after that time (see the fence module). A
confirmation that could not be published, or that nobody heard, is published again for as long as
its asker may wait for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from . import counters as c
from . import outcomes
from .ask import Ask
from .envelope import CONFIRM, PROBE, PUSH, REPLACED, Envelope, decode, pack
from .redis_link import RedisLink, Reply, Script, has_no_effect
from .redis_time import RedisTime
from .sweeper import Sweeper

# Names per call of the script: MGET takes two keys for each, and Lua unpacks some thousands.
_BATCH: Final = 500
# Bytes per call, unless one ask alone is larger: Redis drops whoever sends it too much at once.
_BATCH_BYTES: Final = 4 << 20
_MAX_ASKS: Final = 20_000
_MAX_ASKED_BYTES: Final = 128 << 20
# What is kept to be confirmed again.
_MAX_UNHEARD_BYTES: Final = 16 << 20
# By how much this worker's idea of Redis' time may be late.
_SLACK_S: Final = 0.5

# The longest that a worker takes to find out that Redis is back, and to enter its clients again.
_RETURN_S: Final = 5.0

_NOBODY: Final = 0
_SENT: Final = 1
_SILENT: Final = 2
_GIVEN_UP: Final = 3
_FORGOTTEN: Final = 4

_log = structlog.get_logger()

# KEYS: prefix. ARGV: time in ms after which nobody waits for it, 0 for none; the worker that asks;
# then id, envelope, and where to begin to look ('p:', or 'c:' when a connect that is being decided
# has been waited for already), in turn.
# Returns for each 0: nobody has the id, 1: published, 2: the owner does not listen, 3: the owner
# was given up but may live, 4: nobody has it, but Redis does not know the worker that asks either,
# so it has forgotten all; or the time in ms when it is too late.
# A connect that is being decided goes before the open connection that it is about to replace.
_SEND: Final = Script(
    """
local prefix, deadline = KEYS[1], tonumber(ARGV[1])
if deadline > 0 then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  if now > deadline then return now end
end
local keys, states, members, parts = {}, {}, {}, {}
for i = 3, #ARGV, 3 do
  keys[#keys + 1] = prefix .. ARGV[i + 2] .. ARGV[i]
  keys[#keys + 1] = prefix .. 'c:' .. ARGV[i]
end
local values = redis.call('MGET', unpack(keys))
for i = 1, (#ARGV - 2) / 3 do
  local value = values[2 * i - 1] or values[2 * i]
  states[i] = 0
  if value then
    local owner = string.sub(value, 1, string.find(value, ' ', 1, true) - 1)
    local part, member = parts[owner], members[owner]
    if part then
      part[#part + 1], member[#member + 1] = ARGV[3 * i + 1], i
    else
      parts[owner], members[owner] = {ARGV[3 * i + 1]}, {i}
    end
  end
end
for owner, envelopes in pairs(parts) do
  local channel = prefix .. 'w:' .. owner
  local state = redis.call('PUBLISH', channel, table.concat(envelopes)) > 0 and 1 or 2
  for _, i in ipairs(members[owner]) do
    states[i] = state
    if state == 2 and values[2 * i - 1] and values[2 * i - 1] ~= values[2 * i] then
      -- When the worker that was deciding on the connect is gone, so is the mark. One that lives
      -- does not listen while its other connection to Redis is away, and still has the client.
      local lease = redis.call('ZSCORE', prefix .. 'leases', owner)
      if not lease or tonumber(lease) == 0 then
        redis.call('DEL', keys[2 * i - 1])
        states[i] = 0
      end
      if values[2 * i] then
        local other = prefix .. 'w:' .. string.match(values[2 * i], '^%S+')
        states[i] = redis.call('PUBLISH', other, ARGV[3 * i + 1]) > 0 and 1 or 2
      end
    end
  end
end
local is_known
for i, state in ipairs(states) do
  if state == 0 then
    if redis.call('EXISTS', prefix .. 'g:' .. ARGV[3 * i]) == 1 then
      states[i] = 3
    else
      if is_known == nil then
        is_known = redis.call('ZSCORE', prefix .. 'leases', ARGV[2]) and true or false
      end
      states[i] = is_known and 0 or 4
    end
  end
end
return states
"""
)

SCRIPTS: Final = (_SEND,)


class RemoteAsk(Ask):
    """Be an ask that came from another worker, which waits for the confirmation."""

    __slots__ = ("_bus", "number", "source")

    def __init__(self, bus: Bus, envelope: Envelope) -> None:
        super().__init__(
            envelope.kind,
            envelope.client_id,
            envelope.generation,
            envelope.code,
            envelope.payload,
            envelope.hops,
            envelope.waited,
        )
        self._bus = bus
        self.number = envelope.ask
        self.source = envelope.source

    def finish(self, outcome: int, body: bytes) -> None:
        """Confirm to the worker that asked."""
        self._bus.confirm(self, outcome, body)


# ask, its number if it is this worker's own or 0, and its envelope
_Outgoing = tuple[Ask, int, bytes]


class _Confirmations:
    """Be confirmations that are published to one worker, and called with how many heard them."""

    __slots__ = ("_bus", "due", "source", "wire")

    def __init__(self, bus: Bus, source: bytes, wire: bytes, due: float) -> None:
        self._bus = bus
        self.source = source
        self.wire = wire
        self.due = due

    def __call__(self, reply: Reply) -> None:
        if isinstance(reply, Exception) or not reply:
            self._bus.keep(self)


class Bus:
    """Send asks to the workers that hold the clients, and take those of other workers.

    Args:
        link: connection for commands.
        worker: incarnation of this worker.
        redis_time: what time it is at Redis.
        timeout_s: how long a confirmation may take.
        on_ask: called with each ask that arrives.
        on_replaced: called with id and generation of a connection that has to give way.
        on_probe: called with a probe that came back.
        on_forgotten: called when Redis knows nothing of this worker.
    """

    def __init__(
        self,
        link: RedisLink,
        prefix: str,
        worker: str,
        slot: memoryview,
        sweeper: Sweeper,
        redis_time: RedisTime,
        call_soon: Callable[[Callable[[], None]], object],
        timeout_s: float,
        on_ask: Callable[[RemoteAsk], None],
        on_replaced: Callable[[bytes, int], None],
        on_probe: Callable[[Envelope], None],
        on_forgotten: Callable[[], None],
    ) -> None:
        self._link = link
        self._prefix = prefix.encode("ascii")
        self._worker = worker.encode("ascii")
        self._slot = slot
        self._sweeper = sweeper
        self._redis_time = redis_time
        self._call_soon = call_soon
        self._timeout_s = timeout_s
        self._on_ask = on_ask
        self._on_replaced = on_replaced
        self._on_probe = on_probe
        self._on_forgotten = on_forgotten
        # Asks of this worker that are not confirmed yet, by number.
        self._asks: dict[int, Ask] = {}
        # Bytes of their payloads.
        self._asked_bytes = 0
        self.is_open = False
        """True while both connections to Redis are up; set through `open` and `close`."""
        # Until when an id that Redis does not know may be one that its worker has yet to enter.
        self._doubtful_until = 0.0
        self._number = 0
        # (started, number), oldest first; confirmed ones are passed over.
        self._deadlines: deque[tuple[float, int]] = deque()
        # What goes out at the end of this tick.
        self._outgoing: list[_Outgoing] = []
        self._confirmations: dict[bytes, list[bytes]] = {}
        # Confirmations that nobody has heard, and their bytes.
        self._unheard: list[_Confirmations] = []
        self._unheard_bytes = 0
        sweeper.every_tick(self._on_tick)

    @property
    def channel(self) -> bytes:
        """Name the channel that this worker subscribes to."""
        return self._prefix + b"w:" + self._worker

    @property
    def unconfirmed(self) -> int:
        """Count the asks of this worker that wait for their confirmation."""
        return len(self._asks)

    def open(self, *, returned: bool) -> None:
        """Take asks from now on.

        Args:
            returned: True when Redis was away, so that other workers may be entering their
                clients yet.
        """
        self.is_open = True
        if returned:
            self._doubtful_until = self._sweeper.now + _RETURN_S

    def close(self) -> None:
        """Take no asks while Redis is away; those under way keep their time to be confirmed."""
        self.is_open = False

    def forward(self, ask: Ask) -> None:
        """Hand an ask to the worker that holds its client; `ask.finish` is called in any case."""
        if not self.is_open or len(self._asks) >= _MAX_ASKS or self._asked_bytes > _MAX_ASKED_BYTES:
            ask.finish(outcomes.UNAVAILABLE, b"")
            return
        own = 0
        if isinstance(ask, RemoteAsk):
            number, source = ask.number, ask.source
        else:
            self._number = own = number = self._number % 0xFFFFFFFF + 1
            source = self._worker
            self._asks[number] = ask
            self._asked_bytes += len(ask.payload)
            self._deadlines.append((self._sweeper.now, number))
            if ask.kind == PUSH:
                self._slot[c.PUSHES_FORWARDED] += 1
            ask.forwarded = True
        wire = pack(
            ask.kind,
            number,
            source,
            ask.client_id,
            ask.generation,
            ask.code,
            ask.payload,
            ask.hops,
            ask.waited,
        )
        if not self._outgoing and not self._confirmations:
            self._call_soon(self._flush)
        self._outgoing.append((ask, own, wire))

    def confirm(self, ask: RemoteAsk, outcome: int, body: bytes) -> None:
        """Tell the asking worker what became of its ask."""
        wire = pack(CONFIRM, ask.number, b"", b"", 0, outcome, body)
        if not self._outgoing and not self._confirmations:
            self._call_soon(self._flush)
        self._confirmations.setdefault(ask.source, []).append(wire)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        confirmations, self._confirmations = self._confirmations, {}
        due = self._sweeper.now + self._timeout_s
        for source, wires in confirmations.items():
            self._publish(_Confirmations(self, source, b"".join(wires), due))
        batch: list[_Outgoing] = []
        size = 0
        for entry in outgoing:
            length = len(entry[2])
            if batch and (len(batch) == _BATCH or size + length > _BATCH_BYTES):
                self._send(batch)
                batch, size = [], 0
            batch.append(entry)
            size += length
        if batch:
            self._send(batch)

    def _publish(self, confirmations: _Confirmations) -> None:
        channel = self._prefix + b"w:" + confirmations.source
        self._link.send(confirmations, b"PUBLISH", channel, confirmations.wire)

    def keep(self, confirmations: _Confirmations) -> None:
        """Keep what nobody has heard until the next tick, if there is room."""
        size = self._unheard_bytes + len(confirmations.wire)
        if size <= _MAX_UNHEARD_BYTES and len(self._unheard) < _MAX_ASKS:
            self._unheard.append(confirmations)
            self._unheard_bytes = size

    def _confirm_again(self, now: float) -> None:
        """Publish what nobody has heard: this worker, or the asker, may have Redis back by now."""
        if not self._link.is_up:
            while self._unheard and self._unheard[0].due < now:
                self._unheard_bytes -= len(self._unheard.pop(0).wire)
            return
        unheard, self._unheard = self._unheard, []
        self._unheard_bytes = 0
        for confirmations in unheard:
            if confirmations.due >= now:
                self._publish(confirmations)

    def _send(self, batch: list[_Outgoing]) -> None:
        clock = self._redis_time
        sent_at = time.monotonic()
        arguments: list[bytes | int] = [
            clock.deadline_ms(self._timeout_s + _SLACK_S),
            self._worker,
        ]
        for ask, _, wire in batch:
            arguments += (ask.client_id, wire, b"c:" if ask.waited else b"p:")

        def on_reply(reply: Reply) -> None:
            if isinstance(reply, list):
                self._take_states(batch, reply)
            elif isinstance(reply, int):
                clock.learn(reply, sent_at)
                self._send_again(batch)
            elif has_no_effect(reply):
                self._take_states(batch, [_SILENT] * len(batch))
            # Else nobody knows: what is not confirmed in time is answered with a timeout.

        self._link.call(on_reply, _SEND, self._prefix, *arguments)

    def _take_states(self, batch: list[_Outgoing], states: list[int]) -> None:
        if _FORGOTTEN in states:
            self._on_forgotten()
        is_doubtful = self._sweeper.now < self._doubtful_until
        for (ask, own, _), state in zip(batch, states, strict=True):
            if state != _SENT:
                is_gone = state == _NOBODY and not is_doubtful
                outcome = outcomes.NOT_FOUND if is_gone else outcomes.UNAVAILABLE
                if not own or self._settle(own) is not None:
                    ask.finish(outcome, b"")

    def _send_again(self, batch: list[_Outgoing]) -> None:
        """Send what came too late by Redis' clock, unless it is too late by ours as well."""
        waiting: list[_Outgoing] = []
        for entry in batch:
            ask, own, _ = entry
            if own in self._asks:
                waiting.append(entry)
            elif not own:
                ask.finish(outcomes.UNAVAILABLE, b"")
        if waiting:
            self._send(waiting)

    def _settle(self, number: int) -> Ask | None:
        """Return an ask of this worker whose outcome is known; None if it was known before."""
        ask = self._asks.pop(number, None)
        if ask is not None:
            self._asked_bytes -= len(ask.payload)
        return ask

    def on_message(self, message: bytes) -> None:
        """Take one published message."""
        try:
            for envelope in decode(message):
                if envelope.kind == CONFIRM:
                    ask = self._settle(envelope.ask)
                    if ask is not None:
                        # Another version may know outcomes that this one does not.
                        known = envelope.code < len(outcomes.ANSWERS)
                        outcome = envelope.code if known else outcomes.TIMEOUT
                        ask.finish(outcome, envelope.payload)
                elif envelope.kind == REPLACED:
                    self._on_replaced(envelope.client_id, int(envelope.payload))
                elif envelope.kind == PROBE:
                    self._on_probe(envelope)
                else:
                    self._on_ask(RemoteAsk(self, envelope))
        except ValueError as error:
            _log.error("malformed message on the bus", error=str(error))

    def _on_tick(self, now: float) -> None:
        """Give up on confirmations that are overdue, and give those again that nobody heard."""
        if self._unheard:
            self._confirm_again(now)
        oldest = now - self._timeout_s
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] < oldest:
            ask = self._settle(deadlines.popleft()[1])
            if ask is not None:
                ask.finish(outcomes.TIMEOUT, b"")
