"""Push numbered messages over many connections in one loop, and note each outcome."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from .loop_thread import LoopThread
from .traffic_clients import push

LONGEST_PUSH_S = 20.0
"""After this time no answer counts as none; the gateway's own limit is far shorter."""

_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n", re.I)


@dataclass(frozen=True, slots=True)
class PushRecord:
    """Hold one push and its outcome."""

    number: int
    client_id: str
    status: int
    """Of the answer; 0 when the connection ended without one."""


class PushConnection(asyncio.Protocol):
    """Keep one connection to a push port; one request at a time.

    Args:
        address: of the push port.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: asyncio.Future[int] | None = None

    async def push(self, client_id: str, body: bytes) -> int:
        """Push, and return the status of the answer; 0 when there is none."""
        loop = asyncio.get_running_loop()
        if self._transport is None:
            try:
                await loop.create_connection(lambda: self, *self._address)
            except OSError:
                return 0
        assert self._transport is not None
        self._answer = loop.create_future()
        self._buffer = b""
        head = f"POST /{client_id} HTTP/1.1\r\nHost: push\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)
        return await self._answer

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if end and self._answer is not None:
            length = _LENGTH.search(head + b"\r\n")
            if length and len(body) >= int(length[1]) and not self._answer.done():
                self._answer.set_result(int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(0)


class Pusher:
    """Number pushes, and remember what became of each.

    Args:
        thread: whose loop pushes.
    """

    def __init__(self, thread: LoopThread) -> None:
        self._thread = thread
        self._connections: dict[tuple[str, int], list[PushConnection]] = {}
        self._number = 0
        self.records: list[PushRecord] = []

    def push_at_once(self, pushes: Iterable[tuple[tuple[str, int], str]]) -> list[PushRecord]:
        """Push to all these clients at these addresses at the same time; return the records."""
        return self._thread.run(self._push_at_once(list(pushes)))

    async def push(self, address: tuple[str, int], client_id: str) -> PushRecord:
        """Push the next number; to be awaited in the loop's thread."""
        self._number += 1
        number = self._number
        free = self._connections.setdefault(address, [])
        connection = free.pop() if free else PushConnection(address)
        try:
            async with asyncio.timeout(LONGEST_PUSH_S):
                status = await connection.push(client_id, push(number))
            free.append(connection)
        except TimeoutError:
            connection.close()
            status = 0
        record = PushRecord(number, client_id, status)
        self.records.append(record)
        return record

    def end(self) -> None:
        """Close every connection."""
        if not self._thread.loop.is_closed():
            self._thread.run(self._end())

    async def _push_at_once(self, pushes: list[tuple[tuple[str, int], str]]) -> list[PushRecord]:
        return await asyncio.gather(*(self.push(*one) for one in pushes))

    async def _end(self) -> None:
        for free in self._connections.values():
            for connection in free:
                connection.close()
        await asyncio.sleep(0.01)
