"""Open and shut the door to a listening socket, while clients come."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from typing import cast

import pytest
from harness.looping import holds, in_loop
from ws2api.gateway.door import Door

CROWD = 50


class House:
    """Have a door, and count who comes in."""

    def __init__(self, most: int = CROWD) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=CROWD)
        self.listener.setblocking(False)
        self.door = Door(asyncio.get_running_loop(), self.listener.dup(), lambda: Guest(self))
        self.most = most
        self.guests: list[asyncio.Transport] = []
        self._callers: list[socket.socket] = []

    def calls(self, count: int = 1) -> None:
        """Let clients connect; the kernel sees to it, whoever accepts."""
        self._callers += [
            socket.create_connection(self.listener.getsockname()) for _ in range(count)
        ]

    def close(self) -> None:
        self.door.close()
        self.listener.close()
        for transport in self.guests:
            transport.abort()
        for caller in self._callers:
            caller.close()


class Guest(asyncio.Protocol):
    """Be a connection; that of the last for whom there is room shuts the door."""

    def __init__(self, house: House) -> None:
        self._house = house

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._house.guests.append(cast(asyncio.Transport, transport))
        if len(self._house.guests) >= self._house.most:
            self._house.door.shut()


@contextlib.contextmanager
def house(most: int = CROWD) -> Iterator[House]:
    it = House(most)
    try:
        yield it
    finally:
        it.close()


async def several_turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@in_loop
async def test_shutting_keeps_out_the_very_next_one() -> None:
    with house(most=7) as it:
        it.calls(CROWD)  # before anything is accepted
        await it.door.open()
        await holds(lambda: it.guests)
        await several_turns()
        assert len(it.guests) == 7
        assert it.door.is_shut


@in_loop
async def test_those_who_wait_come_in_when_it_is_opened_again() -> None:
    with house(most=1) as it:
        await it.door.open()
        it.calls(CROWD)
        for count in range(1, 10):
            await holds(lambda count=count: len(it.guests) == count)
            await several_turns()
            assert len(it.guests) == count
            it.most = count + 1
            it.door.reopen()
        it.most = CROWD
        await holds(lambda: len(it.guests) == CROWD)


@in_loop
async def test_no_file_is_left_behind() -> None:
    with house() as it:
        await it.door.open()
        before = open_files()
        for _ in range(20):
            it.door.shut()
            it.door.shut()
            it.door.reopen()
            it.door.reopen()
            await several_turns()
        assert open_files() == before


@in_loop
async def test_opening_that_was_begun_is_called_off() -> None:
    with house() as it:
        await it.door.open()
        it.door.shut()
        it.door.reopen()
        it.door.shut()
        it.calls()
        await several_turns()
        assert not it.guests
        it.door.reopen()
        await holds(lambda: it.guests)


@pytest.mark.parametrize("when", ["open", "shut", "opening"])
@in_loop
async def test_closed_door_stays_closed(when: str) -> None:
    with house() as it:
        await it.door.open()
        await several_turns()
        before = open_files()
        if when != "open":
            it.door.shut()
        if when == "opening":
            it.door.reopen()
        it.door.close()
        it.door.reopen()
        it.door.shut()
        it.door.close()
        it.calls()
        await several_turns()
        assert not it.guests
        assert open_files() == before, "its own is closed, the caller's is open"
