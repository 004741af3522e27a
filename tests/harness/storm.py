"""Be many clients that connect at once; run as a process, since each may hold only so many files.

    python -m harness.storm HOST PORT COUNT LOCAL_ADDRESS PREFIX

Prints a line of JSON when every client has been let in, or has failed, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import cast

import uvloop

from .waiting import DEADLINE_S
from .ws import upgrade_request

_RETRY_AFTER = re.compile(rb"\r\nRetry-After: (\d+)\r\n")
_PATIENCE_S = 60.0


class _Client(asyncio.Protocol):
    """Connect; come again when told so."""

    def __init__(self, storm: _Storm, name: str) -> None:
        self._storm = storm
        self._name = name
        self._answer = b""
        self._transport: asyncio.Transport | None = None
        self._is_settled = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(upgrade_request(f"/{self._name}"))

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._is_settled or b"\r\n\r\n" not in self._answer:
            return
        self._is_settled = True
        status = self._answer[9:12].decode()
        if status == "101":
            self._storm.settle("let in")
            return
        assert self._transport is not None
        self._transport.close()
        found = _RETRY_AFTER.search(self._answer)
        if status == "503" and found:
            self._storm.come_again(self._name, int(found[1]))
        else:
            self._storm.settle(f"answered {self._answer[:60]!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._storm.lost += self._is_settled and not self._storm.is_over
        if not self._is_settled:
            self._is_settled = True
            self._storm.settle(f"lost: {exc}")


class _Storm:
    """Count what becomes of the clients of this process."""

    def __init__(self, address: tuple[str, int], local_address: str) -> None:
        self._address = address
        self._local_address = local_address
        self._left = 0
        self._done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.outcomes: Counter[str] = Counter()
        self.turned_back = 0
        self.lost = 0
        self.is_over = False

    async def run(self, count: int, prefix: str) -> None:
        self._left = count
        for number in range(count):
            self._start(f"{prefix}{number}")
        async with asyncio.timeout(_PATIENCE_S):
            await self._done.wait()

    def come_again(self, name: str, after_s: float) -> None:
        self.turned_back += 1
        asyncio.get_running_loop().call_later(after_s, self._start, name)

    def settle(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._left -= 1
        if not self._left:
            self._done.set()

    def _start(self, name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, name: str) -> None:
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: _Client(self, name), *self._address, local_addr=(self._local_address, 0)
            )
        except OSError as error:
            self.settle(f"failed: {error}")


async def _main(host: str, port: str, count: str, local_address: str, prefix: str) -> None:
    storm = _Storm((host, int(port)), local_address)
    try:
        await storm.run(int(count), prefix)
    except TimeoutError:
        storm.outcomes["no answer"] += storm._left
    print(json.dumps(storm.outcomes | {"turned back": storm.turned_back}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    storm.is_over = True


class StormProcess:
    """Run this module in a process of its own.

    Args:
        address: the client port of the gateway.
        count: how many clients.
        number: tells the processes, their clients, and their addresses apart; from 1.
    """

    def __init__(self, address: tuple[str, int], count: int, number: int) -> None:
        arguments = [*address, count, f"127.0.0.{1 + number}", f"storm-{number}-"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.storm", *map(str, arguments)],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> StormProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def outcomes(self) -> Counter[str]:
        """Wait until every client was let in or has failed; return how many of each."""
        assert self._process.stdout is not None
        return Counter(json.loads(self._process.stdout.readline()))

    def leave(self) -> None:
        """End every connection."""
        self._process.communicate(timeout=4 * DEADLINE_S)


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(_main(*sys.argv[1:]))
