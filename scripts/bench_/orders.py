"""Give orders to a generator process, and let it obey them."""

from __future__ import annotations

import gc
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection

from bench_ import board
from bench_.clients import Clients
from bench_.plan import Plan
from bench_.pushing import Api, Pushing
from bench_.traffic import ClosedLoop, Closing, Connecting, Paced


@dataclass(frozen=True, slots=True)
class Connect:
    """Open connections; the fields are those of Connecting."""

    count: int
    at_once: int
    rate: float

    def obey(self, clients: Clients) -> None:
        clients.errand = Connecting(clients, self.count, self.at_once, self.rate)


@dataclass(frozen=True, slots=True)
class SendInLoop:
    """Keep so many messages in flight."""

    in_flight: int

    def obey(self, clients: Clients) -> None:
        clients.traffic = ClosedLoop(clients, self.in_flight)


@dataclass(frozen=True, slots=True)
class SendPaced:
    """Let each client send at this interval."""

    interval_s: float
    phase: float

    def obey(self, clients: Clients) -> None:
        clients.traffic = Paced(clients, self.interval_s, self.phase)


@dataclass(frozen=True, slots=True)
class Stop:
    """Send nothing more; answers still count."""

    def obey(self, clients: Clients) -> None:
        clients.traffic.stop()


@dataclass(frozen=True, slots=True)
class Close:
    """Close all connections."""

    at_once: int

    def obey(self, clients: Clients) -> None:
        clients.errand = Closing(clients, self.at_once)


@dataclass(frozen=True, slots=True)
class Push:
    """Push to the clients; the fields are those of Pushing.start."""

    kind: str
    in_flight: int
    port: int

    def obey(self, clients: Clients) -> None:
        assert isinstance(clients.traffic, Pushing)
        clients.traffic.start(self.kind, self.in_flight, self.port)


Order = Connect | SendInLoop | SendPaced | Stop | Close | Push


def serve(row: memoryview, plan: Plan, control: Connection) -> None:
    """Be a generator process: obey until the measuring process goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the measuring process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()  # nothing here makes cycles

    def obey() -> None:
        try:
            control.recv().obey(clients)
        except EOFError:
            clients.ended = True

    clients = Clients(row, plan, control.fileno(), obey)
    if plan.api:
        clients.traffic = Pushing(clients, Api(clients, plan.api), plan.answer)
    row[board.READY] = 1
    clients.run()
