"""Put clients, API and pushes together: traffic in which every message has a number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .ledger import Ledger
from .loop_thread import LoopThread
from .traffic_api import TrafficApi
from .traffic_clients import Stay
from .traffic_fleet import Fleet
from .traffic_pushes import Pusher
from .waiting import until

if TYPE_CHECKING:
    from .gateway import GatewayProcess


class Traffic:
    """Run an API, and later clients, in one thread.

    The API is there at once, so that a gateway can be started with its URL; `attach` creates the
    clients' side when the gateway's port is known.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.thread = self._stack.enter_context(LoopThread("traffic"))
        self.api = TrafficApi(self.thread)
        self._stack.callback(self.api.end)
        self.fleet: Fleet
        self.pusher: Pusher

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        assert not self.api.violations, self.api.violations

    @contextmanager
    def attach(self, gateway: GatewayProcess) -> Iterator[Traffic]:
        """Begin anew with no clients, at this gateway's client port; in the end all leave."""
        self.fleet = Fleet(self.thread, gateway.clients_address)
        self.pusher = Pusher(self.thread)
        self.api.forget_all()
        try:
            yield self
            self.fleet.end()
            self.settle_ends()
        finally:
            self.fleet.end()
            self.pusher.end()

    def owner_of(self, stay: Stay) -> tuple[str, int]:
        """Return the push address of the worker that has a connection."""
        life = self.api.lives[stay.client_id, stay.generation]
        url = urlsplit(life.push_url)
        assert url.hostname and url.port, life
        return url.hostname, url.port

    def settle(self) -> None:
        """Wait until no open connection has an unanswered message, and every end was reported."""
        until(lambda: not self.fleet.unanswered, what="every message answered")
        self.settle_ends()

    def settle_ends(self) -> None:
        """Wait until every end was reported."""
        until(lambda: not self.unreported(), what="a DELETE for every connection that has ended")

    def unreported(self) -> list[str]:
        """Name the connections that have ended without a DELETE; replaced ones do not count."""

        def find() -> list[str]:
            ledger = self._compare({})
            problems = ledger.disconnects.problems
            return [problem for problem in problems if problem.startswith("no DELETE")]

        return self.thread.call(find)

    def ledger(self, **allowances: int) -> Ledger:
        """Compare what both sides have seen so far; see `Ledger` for what may be allowed."""

        def compare() -> Ledger:
            ledger = self._compare(allowances)
            assert ledger.accounts  # settled here, while nothing moves
            return ledger

        return self.thread.call(compare)

    def _compare(self, allowances: dict[str, int]) -> Ledger:
        return Ledger(
            list(self.api.lives.values()),
            [stay for client in self.fleet.clients.values() for stay in client.stays],
            self.pusher.records,
            **allowances,
        )
