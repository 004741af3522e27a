"""Route asks between a client here, one that is connecting here, and the bus."""

from __future__ import annotations

from typing import Any, cast

import pytest
from ws2api.gateway import outcomes
from ws2api.gateway.ask import Ask
from ws2api.gateway.bus import Bus, RemoteAsk
from ws2api.gateway.envelope import PUSH, Envelope
from ws2api.gateway.frames import TEXT
from ws2api.gateway.router import Router

Outcome = tuple[int, bytes]
APPLIED: Outcome = (outcomes.OK, b"applied")
MAX_HOPS = 3


class FakeClient:
    """Be a client that is open or connecting here."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.applied: list[Ask] = []
        self.held: list[Ask] = []
        self.is_replaced = False

    def apply(self, ask: Ask) -> Outcome:
        self.applied.append(ask)
        return APPLIED

    def hold(self, ask: Ask) -> None:
        self.held.append(ask)

    def replace(self) -> None:
        self.is_replaced = True


class FakeBus:
    """Take what is forwarded and what is confirmed."""

    def __init__(self) -> None:
        self.forwarded: list[Ask] = []
        self.confirmed: list[tuple[RemoteAsk, int, bytes]] = []

    def forward(self, ask: Ask) -> None:
        self.forwarded.append(ask)

    def confirm(self, ask: RemoteAsk, outcome: int, body: bytes) -> None:
        self.confirmed.append((ask, outcome, body))


class LocalAsk(Ask):
    """Be an ask of this worker's push port."""

    def __init__(self, client_id: bytes = b"me", generation: int = 0, waited: bool = False) -> None:
        super().__init__(PUSH, client_id, generation, TEXT, b"hi", waited=waited)
        self.outcomes: list[Outcome] = []

    def finish(self, outcome: int, body: bytes) -> None:
        self.outcomes.append((outcome, body))


class Worker:
    """Hold a router with what it decides between."""

    def __init__(self) -> None:
        self.bus = FakeBus()
        self._clients: dict[bytes, FakeClient] = {}
        self._connecting: dict[bytes, FakeClient] = {}
        self.router = Router(cast(Any, self._clients), cast(Any, self._connecting))
        self.router.bus = cast(Bus, self.bus)

    def has_open(self, generation: int, client_id: bytes = b"me") -> FakeClient:
        client = self._clients[client_id] = FakeClient(generation)
        return client

    def has_connecting(self, generation: int, client_id: bytes = b"me") -> FakeClient:
        client = self._connecting[client_id] = FakeClient(generation)
        return client

    def remote_ask(self, generation: int = 0, hops: int = 0, waited: bool = False) -> RemoteAsk:
        envelope = Envelope(PUSH, 5, b"other", b"me", generation, TEXT, b"hi", hops, waited)
        return RemoteAsk(cast(Bus, self.bus), envelope)


@pytest.fixture
def worker() -> Worker:
    return Worker()


# Asks of the push port.


def test_client_that_is_here_is_asked(worker: Worker) -> None:
    client, ask = worker.has_open(17), LocalAsk()
    worker.router.route(ask)
    assert client.applied == [ask]
    assert ask.outcomes == [APPLIED]
    assert worker.bus.forwarded == []


def test_client_that_is_not_here_is_looked_for(worker: Worker) -> None:
    worker.has_open(17, b"somebody else")
    worker.has_connecting(18, b"a third one")
    ask = LocalAsk()
    worker.router.route(ask)
    assert worker.bus.forwarded == [ask]
    assert ask.outcomes == []


@pytest.mark.parametrize("generation", [16, 17])
def test_ask_for_this_or_an_older_generation_is_for_the_client_here(
    worker: Worker, generation: int
) -> None:
    client, ask = worker.has_open(17), LocalAsk(generation=generation)
    worker.router.route(ask)
    assert client.applied == [ask]


def test_ask_for_a_younger_generation_is_for_one_elsewhere(worker: Worker) -> None:
    client, ask = worker.has_open(17), LocalAsk(generation=18)
    worker.router.route(ask)
    assert client.applied == []
    assert worker.bus.forwarded == [ask]


# Asks of other workers.


def test_ask_of_another_worker_is_confirmed(worker: Worker) -> None:
    client, ask = worker.has_open(17), worker.remote_ask()
    worker.router.route_remote(ask)
    assert client.applied == [ask]
    assert worker.bus.confirmed == [(ask, *APPLIED)]


def test_ask_of_another_worker_for_a_younger_generation_is_judged_here(worker: Worker) -> None:
    client, ask = worker.has_open(17), worker.remote_ask(generation=18)
    worker.router.route_remote(ask)
    assert client.applied == [ask], "the client knows what is stale"


def test_client_that_has_moved_is_followed(worker: Worker) -> None:
    ask = worker.remote_ask()
    worker.router.route_remote(ask)
    assert worker.bus.forwarded == [ask]
    assert ask.hops == 1
    assert worker.bus.confirmed == []


def test_stale_mark_is_not_followed_back_to_this_worker(worker: Worker) -> None:
    ask = worker.remote_ask()
    worker.router.route_remote(ask)
    assert ask.waited, "no connect is being decided here"


@pytest.mark.parametrize("hops", range(MAX_HOPS))
def test_client_that_moves_often_is_followed(worker: Worker, hops: int) -> None:
    ask = worker.remote_ask(hops=hops)
    worker.router.route_remote(ask)
    assert (worker.bus.forwarded, ask.hops) == ([ask], hops + 1)


def test_client_that_moves_too_often_is_given_up(worker: Worker) -> None:
    ask = worker.remote_ask(hops=MAX_HOPS)
    worker.router.route_remote(ask)
    assert worker.bus.forwarded == []
    assert worker.bus.confirmed == [(ask, outcomes.NOT_FOUND, b"")]


def test_client_that_came_back_in_time_is_asked(worker: Worker) -> None:
    client, ask = worker.has_open(17), worker.remote_ask(hops=MAX_HOPS)
    worker.router.route_remote(ask)
    assert client.applied == [ask]


def test_hops_are_counted_for_an_ask_that_was_held_in_vain(worker: Worker) -> None:
    ask = worker.remote_ask(hops=1)
    worker.router.route(ask)
    assert (worker.bus.forwarded, ask.hops) == ([ask], 2)


# Clients whose connect is being decided.


@pytest.mark.parametrize("generation", [0, 18])
def test_ask_is_held_for_the_connect(worker: Worker, generation: int) -> None:
    old, new = worker.has_open(17), worker.has_connecting(18)
    local, remote = LocalAsk(generation=generation), worker.remote_ask(generation)
    worker.router.route(local)
    worker.router.route_remote(remote)
    assert new.held == [local, remote]
    assert old.applied == []
    assert worker.bus.forwarded == []


def test_ask_for_the_open_generation_is_not_held(worker: Worker) -> None:
    old, new = worker.has_open(17), worker.has_connecting(18)
    local, remote = LocalAsk(generation=17), worker.remote_ask(17)
    worker.router.route(local)
    worker.router.route_remote(remote)
    assert old.applied == [local, remote]
    assert new.held == []


def test_ask_that_has_waited_goes_to_the_open_connection(worker: Worker) -> None:
    old, new = worker.has_open(17), worker.has_connecting(18)
    local, remote = LocalAsk(waited=True), worker.remote_ask(waited=True)
    worker.router.route(local)
    worker.router.route_remote(remote)
    assert old.applied == [local, remote]
    assert new.held == []


def test_ask_that_has_waited_is_looked_for_elsewhere(worker: Worker) -> None:
    new = worker.has_connecting(18)
    local, remote = LocalAsk(waited=True), worker.remote_ask(waited=True)
    worker.router.route(local)
    worker.router.route_remote(remote)
    assert worker.bus.forwarded == [local, remote]
    assert new.held == []


def test_connect_of_another_client_holds_nothing(worker: Worker) -> None:
    client = worker.has_open(17)
    worker.has_connecting(18, b"somebody else")
    ask = LocalAsk()
    worker.router.route(ask)
    assert client.applied == [ask]


# Replacement.


def test_connection_that_has_to_give_way_is_replaced(worker: Worker) -> None:
    client = worker.has_open(17)
    worker.router.replace(b"me", 17)
    assert client.is_replaced


def test_connect_that_has_to_give_way_is_replaced(worker: Worker) -> None:
    old, new = worker.has_open(17), worker.has_connecting(18)
    worker.router.replace(b"me", 18)
    assert (old.is_replaced, new.is_replaced) == (False, True)


@pytest.mark.parametrize(("client_id", "generation"), [(b"me", 16), (b"me", 19), (b"you", 17)])
def test_other_connections_stay(worker: Worker, client_id: bytes, generation: int) -> None:
    old, new = worker.has_open(17), worker.has_connecting(18)
    worker.router.replace(client_id, generation)
    assert not old.is_replaced
    assert not new.is_replaced
