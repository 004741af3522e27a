"""Put one worker together: start, serve, drain, stop. The one module that knows all others."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import ssl
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import hiredis
import structlog
import uvloop

from . import bus as bus_module
from . import counters as c
from . import disconnects, logs
from . import registry as registry_module
from .address_limit import AddressLimit, AddressTable
from .admission import Admission
from .bus import Bus
from .client import Client
from .client_paths import IDS, ClientPaths
from .counters import Counters
from .door import Door
from .drain import Drain
from .envelope import Envelope
from .errors import RedisUnavailable
from .exchange import Exchange
from .fence import Fence
from .files import Files
from .gate import Gate
from .handshake import HandshakePolicy
from .http_wire import RequestEncoder
from .hub import Hub
from .journal import Journal
from .lease import Lease
from .outbox import Outbox
from .probe import Probe
from .profiling import Profiler, whole_life
from .push import PushConnection, PushHub
from .recent import Recent
from .redis_link import RedisLink, ignore
from .redis_time import RedisTime
from .registry import Registry
from .router import Router
from .session import ASKING, CLAIMING
from .settings import Settings
from .sweeper import Sweeper
from .tracer import WorkerTracer
from .traces import Traces
from .upstream import Upstream
from .verbosity import Verbosity

_REDIS_START_S: Final = 5.0
_POLL_S: Final = 0.02
_WORST_LAG_S: Final = 5.0

_TOTALS: Final = (
    ("connections_opened", c.CONNECTIONS_OPENED),
    ("connections_closed", c.CONNECTIONS_CLOSED),
    ("requests_started", c.REQUESTS_STARTED),
    ("requests_failed", c.REQUESTS_FAILED),
    ("requests_succeeded", c.REQUESTS_SUCCEEDED),
)

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Assignment:
    """Tell a worker what is its own."""

    index: int
    """Number of its slot, from 0."""
    bank: int
    """Which bank of the slot's counters it writes."""
    incarnation: str
    """Unique id of this process: supervisor, slot, and number of the fork."""
    client_socket: socket.socket
    push_socket: socket.socket
    private_push_socket: socket.socket
    """Listens on an address that no other worker shares."""
    push_url: str
    """URL of the private push socket, without a slash at its end."""
    redis_url: str
    counters: Counters
    recent: Recent
    addresses: AddressTable
    """Connections by address, over all workers."""
    traces: Traces
    """What is traced for those who watch."""
    profiles: Path
    """Folder for the profiles that the admin process asks for."""


def run(settings: Settings, assignment: Assignment) -> int:
    """Be a worker until it is told to stop; return the exit status."""
    # What a connection leaves behind is no cycle; the collector only has to look now and then.
    gc.set_threshold(50_000, 20, 50)
    with (
        whole_life(settings.cpuprofile, settings.memprofile, assignment.index),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_serve(settings, assignment))


async def _serve(settings: Settings, assignment: Assignment) -> int:
    worker = Worker(settings, assignment, asyncio.get_running_loop())
    await worker.start()
    await worker.ending.wait()
    return await worker.end()


class Worker:
    """Own the sockets that one process accepts, and everything that serves them."""

    def __init__(
        self, settings: Settings, assignment: Assignment, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._settings = settings
        self._assignment = assignment
        self._loop = loop
        self._slot = slot = assignment.counters.bank(assignment.index, assignment.bank)
        self.ending = asyncio.Event()
        """Set when the worker was told to end."""
        self._retiring = False
        self._parent = os.getppid()
        self._files = files = _files(settings)
        self._client_door = Door(loop, assignment.client_socket, self._new_client)
        self._push_doors = [
            Door(loop, listener, self._new_push_connection)
            for listener in (assignment.push_socket, assignment.private_push_socket)
        ]
        self._restoring: asyncio.Task[None] | None = None
        # Whether Redis has confirmed the subscription, without which no confirmation arrives.
        self._subscribed = False
        # Number of the last SUBSCRIBE; the answer to an older one tells nothing.
        self._subscriptions = 0
        fence = Fence(assignment.incarnation)
        redis_time = RedisTime()
        self._sweeper = Sweeper(loop)
        self._profiler = Profiler(slot, assignment.profiles)
        self._verbosity = Verbosity(loop, self._on_level)
        self._worst_lag_us = 0
        self._worst_since = 0.0
        self._upstream = Upstream(
            settings,
            slot,
            self._sweeper,
            loop,
            _api_tls(settings),
            park=self._park,
            most_connections=files.api,
            outage=assignment.recent.outage(assignment.index, assignment.bank),
        )
        clients: dict[bytes, Client] = {}
        connecting: dict[bytes, Admission] = {}
        self._router = Router(clients, connecting)
        self._commands = RedisLink(
            assignment.redis_url,
            f"ws2api-{assignment.index}-commands",
            loop,
            self._sweeper,
            self._on_commands_up,
            self._on_commands_down,
            scripts=(*registry_module.SCRIPTS, *disconnects.SCRIPTS, *bus_module.SCRIPTS),
        )
        self._bus = Bus(
            self._commands,
            settings.redis_prefix,
            assignment.incarnation,
            slot,
            self._sweeper,
            redis_time,
            loop.call_soon,
            settings.push_timeout,
            self._router.route_remote,
            self._router.replace,
            self._on_probe,
            self._on_doubt,
        )
        self._router.bus = self._bus
        self._subscription = RedisLink(
            assignment.redis_url,
            f"ws2api-{assignment.index}-subscription",
            loop,
            self._sweeper,
            self._on_subscription_up,
            self._on_subscription_down,
            on_message=self._bus.on_message,
        )
        self._registry = Registry(
            self._commands, settings.redis_prefix, fence, redis_time, settings.api_timeout
        )
        self._outbox = Outbox(
            self._commands,
            settings.redis_prefix,
            fence,
            settings.max_pending_disconnects,
            settings.api_timeout,
            loop.call_soon,
        )
        self._lease = Lease(
            self._commands,
            settings.redis_prefix,
            fence,
            redis_time,
            (clients, connecting),
            loop,
            self._sweeper,
            self._on_forgotten,
        )
        self._probe = Probe(
            self._commands, self._bus.channel, slot, self._sweeper, self._subscription.reset
        )
        token = settings.push_token
        journal = Journal(
            slot,
            self._sweeper,
            assignment.recent.closes(assignment.index, assignment.bank),
            assignment.recent.errors(assignment.index, assignment.bank),
            logs.is_written("debug"),
        )
        self._push_hub = PushHub(
            slot=slot,
            sweeper=self._sweeper,
            route=self._router.route,
            max_message_size=int(settings.max_message_size),
            token=b"Bearer " + token.get_secret_value().encode() if token else None,
            totals=self._totals,
            connections=set(),
            paths=IDS[ClientPaths(settings.path).takes_several],
            share=files.pushes,
            doors=self._push_doors,
            on_surplus=self._on_push_surplus,
            has_room=lambda: self._hub.sockets < self._hub.most_clients,
            on_refused=journal.push_refused,
        )
        self._tracer = WorkerTracer(
            assignment.traces,
            assignment.traces.ring(assignment.index, assignment.bank),
            self._upstream,
            self._push_hub,
            self._sweeper,
            logs_requests=settings.log_requests,
        )
        self._hub = Hub(
            slot=slot,
            sweeper=self._sweeper,
            upstream=self._upstream,
            registry=self._registry,
            outbox=self._outbox,
            gate=Gate(settings.max_connecting, settings.handshake_timeout, slot, self._sweeper),
            encoder=RequestEncoder(settings.api),
            policy=HandshakePolicy(settings),
            push_url=assignment.push_url.encode("ascii"),
            worker=assignment.incarnation,
            max_in_flight=settings.max_in_flight,
            max_queue=settings.max_queue,
            max_message_size=int(settings.max_message_size),
            max_write_buffer=int(settings.max_write_buffer),
            ping_interval_s=settings.ping_interval,
            ping_timeout_s=settings.ping_timeout,
            handshake_timeout_s=settings.handshake_timeout,
            write_timeout_s=settings.write_timeout,
            reroute=self._router.route,
            most_clients=files.clients,
            most_refused=files.refused,
            door=self._client_door,
            serve_http=self._serve_http if settings.single_port else None,
            call_soon=loop.call_soon,
            journal=journal,
            trace_refusal=self._tracer.refused,
            limit=self._address_limit(),
            clients=clients,
            connecting=connecting,
            redis_time=redis_time,
        )
        self._drain = Drain(
            self._hub,
            self._upstream,
            self._outbox,
            loop,
            settings.shutdown_timeout,
            settings.drain_seconds,
            self._let_go_of_redis,
        )

    # Start.

    async def start(self) -> None:
        """Connect to Redis, listen, and say so in the slot."""
        slot, assignment = self._slot, self._assignment
        slot[c.PID] = os.getpid()
        slot[c.STARTED_S] = int(time.time())
        slot[c.STARTED_US] = time.monotonic_ns() // 1000
        slot[c.STATE] = c.STATE_STARTING
        slot[c.MOST_CLIENTS] = self._hub.most_clients
        self._loop.add_signal_handler(signal.SIGTERM, self._on_stop)
        self._loop.add_signal_handler(signal.SIGUSR2, self._on_retire)
        self._loop.add_signal_handler(signal.SIGUSR1, self._verbosity.rise)
        self._loop.add_signal_handler(signal.SIGINT, _ignore)  # the supervisor's affair
        self._sweeper.every_tick(self._beat)
        self._sweeper.every_tick(self._profiler.on_tick)
        self._sweeper.every_tick(self._tracer.on_tick)
        self._sweeper.every_tick(self._hub.drop_slow)
        self._sweeper.every_tick(self._hub.let_in)
        self._sweeper.every_tick(self._push_hub.make_room)
        self._sweeper.start()
        self._commands.start()
        self._subscription.start()
        deadline = self._loop.time() + _REDIS_START_S
        while not self._bus.is_open and self._loop.time() < deadline:
            await asyncio.sleep(_POLL_S)
        for door in (*self._push_doors, self._client_door):
            await door.open()
        self._beat(self._loop.time())
        slot[c.STATE] = c.STATE_SERVING
        _log.info("worker serves", incarnation=assignment.incarnation)

    def _new_client(self) -> Client:
        return Client(self._hub)

    def _new_push_connection(self) -> PushConnection:
        return self._tracer.new_push_connection()

    def _on_push_surplus(self, change: int) -> None:
        """Let a connection of the push port beyond its share take the place of a client."""
        if change > 0:
            self._hub.sockets += 1
        else:
            self._hub.socket_ended()

    def _serve_http(self, transport: asyncio.Transport, data: bytes) -> None:
        """Move a connection of the client port to the push side (--single-port)."""
        connection = self._tracer.new_push_connection(shows_totals=True)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        connection.data_received(data)

    def _totals(self) -> bytes:
        counters = self._assignment.counters
        return b"".join(
            f"{name} {counters.total(index)}\n".encode("ascii") for name, index in _TOTALS
        )

    def _beat(self, now: float) -> None:
        slot = self._slot
        slot[c.HEARTBEAT_US] = time.monotonic_ns() // 1000
        lag_us = int(self._sweeper.lag_s * 1e6)
        c.LOOP_LAG.observe(slot, lag_us)
        if lag_us >= self._worst_lag_us or now - self._worst_since > _WORST_LAG_S:
            self._worst_lag_us, self._worst_since = lag_us, now
        slot[c.WORST_LAG_US] = self._worst_lag_us

    def _address_limit(self) -> AddressLimit | None:
        its, limit = self._assignment, self._settings.max_connections_per_ip
        return AddressLimit(limit, its.addresses, its.index, its.bank) if limit else None

    # What an operator asks for.

    def _on_level(self) -> None:
        self._hub.journal.logs_connections = logs.is_written("debug")

    # Redis.

    def _on_commands_up(self) -> None:
        self._lease.enter()  # before anything that a reaper could take for a dead worker's
        if self._subscription.is_up:
            self._subscribe()
        self._on_redis_change()

    def _on_commands_down(self) -> None:
        """Let no ask come in: it could not be confirmed."""
        self._subscribed = False
        self._subscriptions += 1
        self._subscription.send(ignore, b"UNSUBSCRIBE", self._bus.channel)
        self._on_redis_change()

    def _on_subscription_up(self) -> None:
        if self._commands.is_up:
            self._subscribe()

    def _subscribe(self) -> None:
        self._subscriptions += 1
        number = self._subscriptions

        def on_reply(reply: object) -> None:
            if number == self._subscriptions:
                self._subscribed = not isinstance(reply, Exception)
                self._on_redis_change()

        self._subscription.send(on_reply, b"SUBSCRIBE", self._bus.channel)

    def _on_subscription_down(self) -> None:
        self._subscribed = False
        self._on_redis_change()

    def _on_redis_change(self) -> None:
        """Open or close the bus; enter the clients again when Redis is back."""
        is_up = self._commands.is_up and self._subscribed
        if is_up == self._bus.is_open:
            return
        self._slot[c.REDIS_UP] = int(is_up)
        if not is_up:
            self._bus.close()
            self._probe.close()
            return
        self._probe.open()
        if self._slot[c.STATE] >= c.STATE_SERVING:
            _log.info("Redis is back", clients=len(self._hub.clients))
            self._return()
        else:
            self._bus.open(returned=False)

    def _on_doubt(self) -> None:
        """Find out whether Redis has forgotten this worker, at once rather than in its turn."""
        self._lease.renew()

    def _on_forgotten(self) -> None:
        """Take it for the end of an outage that Redis has lost its data, though it was there."""
        if self._bus.is_open and self._slot[c.STATE] >= c.STATE_SERVING:
            clients = len(self._hub.clients)
            _log.warning("Redis has lost its data, entering all again", clients=clients)
            self._return()

    def _return(self) -> None:
        """Enter the clients again, and take no unknown id for gone until all workers have."""
        self._bus.open(returned=True)
        self._slot[c.REDIS_RECONNECTS] += 1
        self._slot[c.RESTORING] = 1
        if self._restoring is not None:
            self._restoring.cancel()
        self._restoring = self._loop.create_task(self._restore())

    def _on_probe(self, envelope: Envelope) -> None:
        self._probe.on_probe(envelope)

    async def _restore(self) -> None:
        """Make Redis agree with this worker; when it is lost again, its next return does it."""
        with contextlib.suppress(RedisUnavailable, hiredis.HiredisError):
            # Those that were given up for lost must not be entered again.
            await self._lease.check()
            # Ends first: an entry of an open connection goes only when that of its end is there.
            await self._outbox.restore(self._owed)
            await self._registry.restore(self._hub.clients, self._hub.connecting, self._deciding)
            self._slot[c.RESTORING] = 0

    def _owed(self) -> list[Client]:
        """List the connections that have ended and of which the API has yet to hear."""
        return [client for client in self._hub.live if client.is_owed]

    def _deciding(self) -> list[Client]:
        """List the connects that the API has been asked about, or is about to be."""
        return [
            client
            for client in self._hub.live
            if client.generation and ASKING <= client.state <= CLAIMING
        ]

    def _park(self, exchange: Exchange) -> bool:
        """Leave the DELETE of a client to the reapers."""
        client = exchange.owner
        assert isinstance(client, Client)
        return self._outbox.park(client)

    # Stop.

    def _let_go_of_redis(self) -> None:
        """Enter nothing any more, because nobody would take it out."""
        self._lease.stop()
        if self._restoring is not None and not self._restoring.done():
            self._restoring.cancel()
            if self._commands.is_up:
                self._outbox.enter(self._owed())

    def _on_retire(self) -> None:
        self._retiring = True
        self.ending.set()

    def _on_stop(self) -> None:
        self._drain.stop()
        self.ending.set()

    async def end(self) -> int:
        """Stop accepting, let what is in flight finish, tell clients and API, end.

        Returns:
            0, or 1 when there are ends of which nobody will tell the API.
        """
        hub = self._hub
        self._slot[c.STATE] = c.STATE_DRAINING
        _log.info("worker retires" if self._retiring else "worker stops", clients=len(hub.live))
        self._client_door.close()
        # A replacement takes the pushes, or a new supervisor may want the ports at once.
        if self._retiring or os.getppid() != self._parent:
            self._close_push_doors()
        if self._retiring:
            await self._drain.retire()
        unreported = await self._drain.finish(retiring=self._retiring)
        if unreported:
            _log.error("the API did not hear of every disconnect", missing=unreported)
        self._close_push_doors()
        for connection in list(self._push_hub.connections):
            connection.close_when_idle()
        deadline = self._loop.time() + self._drain.closing_s
        while (hub.live or self._push_hub.connections) and self._loop.time() < deadline:
            await asyncio.sleep(_POLL_S)
        for client in list(hub.live):
            client.abort()
        for connection in list(self._push_hub.connections):
            connection.abort()
        closing_s = self._drain.closing_s
        await asyncio.gather(self._commands.stop(closing_s), self._subscription.stop(closing_s))
        self._sweeper.stop()
        self._profiler.close()
        self._slot[c.STATE] = c.STATE_DOWN
        return 1 if unreported else 0

    def _close_push_doors(self) -> None:
        for door in self._push_doors:
            door.close()


def _api_tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.api.tls:
        return None
    return ssl.create_default_context(cafile=str(settings.api_ca) if settings.api_ca else None)


def _files(settings: Settings) -> Files:
    """Divide the limit of open files of this process."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        limit = sys.maxsize
    return Files(limit, settings.api_max_connections // settings.workers + 1)


def _ignore() -> None:
    """Leave a signal to the supervisor."""
