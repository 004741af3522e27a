"""Let the two connections of a worker to Redis come and go in any order."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.counters import Counters
from ws2api.gateway.errors import RedisNotAsked
from ws2api.gateway.recent import Recent
from ws2api.gateway.settings import Settings
from ws2api.gateway.traces import Traces
from ws2api.gateway.worker import Assignment, Worker

SUBSCRIBED = [b"subscribe", b"ws2api:w:worker", 1]


class Link:
    """Be a connection to Redis that is up when the test says so, and answers when it does."""

    def __init__(self) -> None:
        self.is_up = False
        self.sent: list[bytes] = []
        self._waiting: list[Callable[[object], None]] = []

    def send(self, callback: Callable[[object], None], *command: bytes) -> None:
        if self.is_up:
            self.sent.append(command[0])
            self._waiting.append(callback)
        else:
            callback(RedisNotAsked("Redis is away"))

    def answers(self, reply: object) -> None:
        self._waiting.pop(0)(reply)


class Rig:
    """Hold a worker whose connections to Redis the test makes and breaks."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._sockets = [socket.socket() for _ in range(3)]
        assignment = Assignment(
            index=0,
            bank=0,
            incarnation="worker",
            client_socket=self._sockets[0],
            push_socket=self._sockets[1],
            private_push_socket=self._sockets[2],
            push_url="http://push",
            redis_url="unix:///none",
            counters=Counters(1),
            recent=Recent(1, 1),
            addresses=AddressTable(1),
            traces=Traces(1, 1),
            profiles=Path(),
        )
        self._worker = Worker(Settings(workers=1), assignment, self.loop)
        self.commands, self.subscription = Link(), Link()
        self._worker._commands = cast(Any, self.commands)
        self._worker._subscription = cast(Any, self.subscription)

    @property
    def takes_asks(self) -> bool:
        return self._worker._bus.is_open

    def has_commands(self, up: bool = True) -> None:
        self.commands.is_up = up
        (self._worker._on_commands_up if up else self._worker._on_commands_down)()

    def has_subscription(self, up: bool = True) -> None:
        self.subscription.is_up = up
        (self._worker._on_subscription_up if up else self._worker._on_subscription_down)()

    def close(self) -> None:
        self.loop.close()
        for each in self._sockets:
            each.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_nothing_is_taken_before_it_can_be_confirmed(rig: Rig) -> None:
    rig.has_subscription()
    assert rig.subscription.sent == []
    rig.has_commands()
    assert rig.subscription.sent == [b"SUBSCRIBE"]
    assert not rig.takes_asks
    rig.subscription.answers(SUBSCRIBED)
    assert rig.takes_asks


def test_subscription_may_be_the_last_to_come(rig: Rig) -> None:
    rig.has_commands()
    assert not rig.takes_asks
    rig.has_subscription()
    rig.subscription.answers(SUBSCRIBED)
    assert rig.takes_asks


def test_nothing_is_taken_any_more_that_could_not_be_confirmed(rig: Rig) -> None:
    rig.has_commands()
    rig.has_subscription()
    rig.subscription.answers(SUBSCRIBED)
    rig.has_commands(False)
    assert rig.subscription.sent == [b"SUBSCRIBE", b"UNSUBSCRIBE"]
    assert not rig.takes_asks
    rig.subscription.answers([b"unsubscribe", b"ws2api:w:worker", 0])
    rig.has_commands()
    assert not rig.takes_asks
    rig.subscription.answers(SUBSCRIBED)
    assert rig.takes_asks


def test_answer_to_a_subscription_that_was_ended_opens_nothing(rig: Rig) -> None:
    rig.has_commands()
    rig.has_subscription()
    rig.has_commands(False)
    rig.has_commands()
    assert rig.subscription.sent == [b"SUBSCRIBE", b"UNSUBSCRIBE", b"SUBSCRIBE"]
    rig.subscription.answers(SUBSCRIBED)
    assert not rig.takes_asks
    rig.subscription.answers([b"unsubscribe", b"ws2api:w:worker", 0])
    rig.subscription.answers(SUBSCRIBED)
    assert rig.takes_asks


def test_subscription_that_is_lost_closes_what_the_commands_cannot_open(rig: Rig) -> None:
    rig.has_commands()
    rig.has_subscription()
    rig.subscription.answers(SUBSCRIBED)
    rig.has_subscription(False)
    assert not rig.takes_asks
    rig.has_commands(False)
    rig.has_commands()
    assert not rig.takes_asks
    rig.has_subscription()
    assert not rig.takes_asks
