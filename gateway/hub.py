"""Hold what the clients of one worker share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from . import counters as c
from .address_limit import AddressLimit
from .ask import Ask
from .door import Door
from .gate import Gate
from .handshake import HandshakePolicy
from .http_wire import RequestEncoder
from .journal import Journal
from .outbox import Outbox
from .redis_time import RedisTime
from .registry import Registry
from .sweeper import Sweeper
from .upstream import Upstream

if TYPE_CHECKING:
    from .admission import Admission
    from .client import Client

_LOG_EVERY_S: Final = 10.0

_log = structlog.get_logger()


@dataclass(slots=True)
class Hub:
    """Hold what all clients of a worker share."""

    slot: memoryview
    sweeper: Sweeper
    upstream: Upstream
    registry: Registry
    outbox: Outbox
    gate: Gate
    encoder: RequestEncoder
    policy: HandshakePolicy
    push_url: bytes
    worker: str
    max_in_flight: int
    max_queue: int
    max_message_size: int
    max_write_buffer: int
    ping_interval_s: float
    """0 when pings are off."""
    ping_timeout_s: float
    handshake_timeout_s: float
    write_timeout_s: float
    reroute: Callable[[Ask], None]
    """Route an ask again that was held for a client whose connect came to nothing."""
    most_clients: int
    """Sockets of clients that may be open, so that files are left for the API, Redis and pushes."""
    most_refused: int
    """Sockets beyond those that may be open while their clients are told that there is no room."""
    serve_http: Callable[[asyncio.Transport, bytes], None] | None
    """Take over a connection that is no upgrade, with the bytes read so far; None to refuse."""
    call_soon: Callable[[Callable[[], None]], object]
    journal: Journal
    limit: AddressLimit | None
    """None while an address may have any number of connections."""
    trace_refusal: Callable[[bytes, int, str], None] = lambda *_: None
    """Learn of a connect that the gateway refuses by itself: id, status, reason."""
    refusing: bool = False
    """True when the worker is about to end, so that nobody can come in any more."""
    is_over: bool = False
    """True when what stands in Redis is left to the reapers as it is."""
    farewell: tuple[int, str] | None = None
    """Code and reason with which everybody has to go who still comes in; None while they stay."""
    clients: dict[bytes, Client] = field(default_factory=dict)
    """Open clients by id."""
    connecting: dict[bytes, Admission] = field(default_factory=dict)
    """Clients whose connect is being decided, the newest of each id."""
    live: set[Client] = field(default_factory=set)
    """Every client whose socket is open, or whom the API has not heard the last of."""
    sockets: int = 0
    """Open connections of clients; `live` also holds those whose socket has ended. Connections of
    the push port beyond its share count among them."""
    door: Door | None = None
    """Where clients come in; None before there is one."""
    blocked: dict[Client, tuple[float, int]] = field(default_factory=dict)
    """Clients whose write buffer is full: since when nothing was read, and its size."""
    redis_time: RedisTime = field(default_factory=RedisTime)
    # Time before which it is not logged again that there are too many clients.
    _quiet_until: float = 0.0

    def drop_slow(self, now: float) -> None:
        """End the connections of clients that have not read for too long; called each tick."""
        if not self.blocked:
            self.slot[c.CLIENTS_SLOW] = self.slot[c.WRITE_BUFFER_BYTES] = 0
            return
        waiting = 0
        for client, (since, size) in list(self.blocked.items()):
            now_size = client.write_buffer_bytes
            waiting += now_size
            if now_size < size:  # it reads, however slowly
                self.blocked[client] = now, now_size
            elif now - since > self.write_timeout_s:
                self.blocked[client] = now, now_size  # the close itself gets as long again
                client.drop_slow()
        self.slot[c.CLIENTS_SLOW] = len(self.blocked)
        self.slot[c.WRITE_BUFFER_BYTES] = waiting

    def socket_ended(self) -> None:
        """Count one socket less; let in those who wait when there is room, if only to refuse."""
        self.sockets -= 1
        if self.door is not None and self.door.is_shut:
            self.let_in(self.sweeper.now)

    def let_in(self, now: float) -> None:
        """Accept again if there is room; called each tick, too."""
        if self.door is not None and self.sockets <= self.most_clients + self.most_refused // 2:
            self.door.reopen()

    def note_full(self) -> None:
        """Log that a client is refused for want of files, now and then; of many, let some wait."""
        if self.door is not None and self.sockets >= self.most_clients + self.most_refused:
            self.door.shut()
        if self.sweeper.now >= self._quiet_until:
            self._quiet_until = self.sweeper.now + _LOG_EVERY_S
            _log.error("refusing clients: the limit of open files", clients=self.sockets)

    def next_generation(self) -> int:
        """Return a birth time in µs that no other connection of this worker has."""
        return self.redis_time.next_generation()
