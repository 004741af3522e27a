"""Count the work of one message, push, connect: bytecodes and calls, the same on every machine.

    .venv/bin/python -m tests.harness.work                # all operations, counted
    .venv/bin/python -m tests.harness.work --functions    # and which functions the work is in
    .venv/bin/python -m tests.harness.work --run message 1000     # not counted, for perf, valgrind

`valgrind --tool=cachegrind --cache-sim=no` in front of the last counts the machine's instructions,
the harness' among them: subtract a run with 0.

A whole worker runs on a loop that has no sockets: what it writes to a transport is answered from
here in a later turn of the loop, and time stands still. Only the worker's code counts, not the
harness' and not asyncio's, which uvloop does in C; a call of either counts as a call of C. Redis is
away, so a connect is without what Redis has to do with it.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import gc
import itertools
import logging
import re
import selectors
import socket
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, Final, cast

import structlog
from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.counters import Counters
from ws2api.gateway.recent import Recent
from ws2api.gateway.settings import Settings
from ws2api.gateway.traces import Traces
from ws2api.gateway.worker import Assignment, Worker

from .looping import VirtualLoop

AT_ONCE: Final = 64
"""Clients that send in the same turn of the loop, for the operations that say so."""
CROWD: Final = 512
"""Clients among which what a tick takes for all of them together is divided."""

_TEXT: Final = b"thirty bytes of text, as bench"
_MASK: Final = b"\x37\xfa\x21\x3d"
_FRAME: Final = (
    bytes((0x81, 0x80 | len(_TEXT)))
    + _MASK
    + bytes(byte ^ _MASK[i % 4] for i, byte in enumerate(_TEXT))
)
_CLOSE: Final = b"\x88\x82" + _MASK + bytes((0x03 ^ _MASK[0], 0xE8 ^ _MASK[1]))
_ANSWER: Final = b"thirty bytes that are returned"
_UPGRADE: Final = (
    b"GET /client-%d HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
# What nginx says, and a header that many frameworks add.
_REPLY: Final = (
    b"HTTP/1.1 200 OK\r\nServer: nginx\r\nX-Request-Id: %07d\r\n"
    b"Content-Type: text/plain\r\nContent-Length: %d\r\nConnection: keep-alive\r\n\r\n%b"
)
_BODIES: Final = {b"GET": b"ok", b"POST": _ANSWER, b"DELETE": b""}
_REQUEST: Final = re.compile(rb"([A-Z]+) /client-\d+ .*?\r\n\r\n", re.DOTALL)
_LENGTH: Final = re.compile(rb"\r\nContent-Length: (\d+)\r\n")
_PUSH: Final = (
    b"POST /client-%d HTTP/1.1\r\nHost: gateway\r\nContent-Type: text/plain\r\n"
    b"X-Request-Id: %07d\r\nContent-Length: %d\r\n\r\n%b"
)

_PING: Final = b"\x89\x00"
_PONG: Final = b"\x8a\x80" + _MASK

PING_INTERVAL_S: Final = 30

_REPEATS: Final = 50
# A power of two: what is kept up to a power of two and then thrown away is as large afterwards.
_LONG_REPEATS: Final = 1024

_SCENERY: Final = (
    str(Path(__file__).parent),
    str(Path(asyncio.__file__).parent),
    selectors.__file__,
)


# The worker, and what surrounds it.


class End(asyncio.Transport):
    """Be the transport of one connection of the worker, and the peer at its other end.

    Args:
        role: "client", "api" or "push".
        on_write: what the peer does with the bytes that it gets.
    """

    __slots__ = ("_on_write", "is_closed", "loop", "protocol", "role", "unread", "writes")

    def __init__(
        self, loop: StillLoop, role: str, on_write: Callable[[End], None] | None = None
    ) -> None:
        super().__init__({"peername": ("127.0.0.1", 40_000)})
        self.loop = loop
        self._on_write = on_write
        self.role = role
        self.protocol: Any = None
        self.unread = b""
        self.writes = 0
        self.is_closed = False

    def opens(self, protocol: Any) -> None:
        """Be connected to a protocol of the worker."""
        self.protocol = protocol
        protocol.connection_made(self)

    def sends(self, data: bytes) -> None:
        """Have the worker read bytes in the next turn of the loop."""
        self.loop.call_soon(self._deliver, data)

    def _deliver(self, data: bytes) -> None:
        protocol = self.protocol
        if isinstance(protocol, asyncio.BufferedProtocol):
            while data:
                buffer = protocol.get_buffer(len(data))
                size = min(len(buffer), len(data))
                memoryview(cast(Any, buffer))[:size] = data[:size]
                protocol.buffer_updated(size)
                data = data[size:]
        elif not self.is_closed:
            protocol.data_received(data)

    def takes(self) -> bytes:
        """Return what the worker wrote since the last time."""
        unread, self.unread = self.unread, b""
        return unread

    # As the worker sees it.

    def write(self, data: Any) -> None:
        self.writes += 1
        self.unread += data
        if self._on_write is not None:
            self._on_write(self)

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.loop.call_soon(self.protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing waits here."""

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        raise AssertionError("no reason to pause")

    def resume_reading(self) -> None:
        raise AssertionError("no reason to have paused")

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        raise AssertionError("no reason to linger")


class StillLoop(VirtualLoop):
    """Be a loop without sockets, in which no time passes while anything is to be done."""

    def __init__(self) -> None:
        super().__init__()
        self.factories: dict[object, Callable[[], Any]] = {}
        """Listening socket → what makes the protocol of a connection."""
        self.ends: list[End] = []
        self.api_number: Callable[[], int] = lambda: 0
        """Tells what stands in a header of each request and reply of the API."""
        self._has_more = False

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        self._has_more = True
        return super().call_soon(callback, *args, context=context)

    def settle(self) -> None:
        """Turn until nothing is left to do but to wait."""
        while self._has_more:
            self._turn()

    def passes(self, seconds: float) -> None:
        """Let time go by in which the loop stands still, and do what is due at its end."""
        self.now += seconds
        self._turn()
        self.settle()

    def _turn(self) -> None:
        self._has_more = False
        super().call_soon(self.stop)
        self.run_forever()

    def new_end(self, role: str, on_write: Callable[[End], None] | None = None) -> End:
        end = End(self, role, on_write)
        self.ends.append(end)
        return end

    async def create_server(self, factory: Any, *_: Any, **options: Any) -> Any:
        self.factories[options["sock"]] = factory

    async def create_connection(self, factory: Any, *_: Any, **_options: Any) -> Any:
        end = self.new_end("api", _answer)
        end.opens(factory())
        return end, end.protocol

    async def create_unix_connection(self, *_: Any, **_options: Any) -> Any:
        raise ConnectionRefusedError("Redis is away")

    def add_signal_handler(self, *_: Any) -> None:
        """Nobody sends signals."""


def _pong(end: End) -> None:
    """Be a client: answer a ping, keep what else comes."""
    if end.unread == _PING:
        end.unread = b""
        end.sends(_PONG)


def _answer(end: End) -> None:
    """Be the API: answer each whole request."""
    while (request := _REQUEST.match(end.unread)) is not None:
        length = _LENGTH.search(request[0])
        size = request.end() + (int(length[1]) if length else 0)
        if len(end.unread) < size:
            return
        end.unread = end.unread[size:]
        body = _BODIES[request[1]]
        end.sends(_REPLY % (end.loop.api_number(), len(body), body))


class Rig:
    """Hold a worker that serves, and do with it what its peers do.

    Args:
        options: of the gateway.
    """

    def __init__(self, **options: Any) -> None:
        self.loop = StillLoop()
        self.loop.set_debug(False)
        self._sockets = [socket.socket() for _ in range(3)]
        # No connection to the API is replaced in the middle of a measurement.
        fixed = {"workers": 1, "ping_interval": PING_INTERVAL_S, "api_max_age": 0}
        settings = Settings(**{**fixed, **options})
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
        self._worker = Worker(settings, assignment, self.loop)
        self.loop.run_until_complete(self._worker.start())
        self._connected = 0
        self._push_end: End | None = None

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()
        for each in self._sockets:
            each.close()

    def new_client_end(self) -> End:
        """Return the end of a client that is yet to connect."""
        return self.loop.new_end("client", _pong)

    def connects(self, end: End | None = None) -> tuple[End, int]:
        """Connect a client and return its end and number."""
        end = end or self.new_client_end()
        self._connected += 1
        end.opens(self.loop.factories[self._sockets[0]]())
        end.sends(_UPGRADE % self._connected)
        self.loop.settle()
        assert end.takes().startswith(b"HTTP/1.1 101 "), "the client was not let in"
        return end, self._connected

    def leaves(self, end: End) -> None:
        """Close the connection of a client in good order."""
        end.sends(_CLOSE)
        self.loop.settle()
        assert end.is_closed
        assert end.takes() == b"\x88\x02\x03\xe8"

    def exchanges(self, ends: Sequence[End]) -> None:
        """Have clients send a message each in the same turn, and see all of them answered."""
        for end in ends:
            end.sends(_FRAME)
        self.loop.settle()
        for end in ends:
            assert end.takes() == b"\x81\x1e" + _ANSWER

    def pushes(self, clients: Sequence[tuple[End, int]]) -> None:
        """Push to clients of this worker, all in one packet."""
        count = 0
        request = b""
        for _, number in clients:
            request += _PUSH % (number, self.loop.api_number(), len(_TEXT), _TEXT)
            count += 1
        push_end = self._open_push_end()
        push_end.sends(request)
        self.loop.settle()
        for end, _ in clients:
            assert end.takes() == b"\x81\x1e" + _TEXT
        assert push_end.takes().count(b"HTTP/1.1 200 OK\r\n") == count

    def _open_push_end(self) -> End:
        """Return the API's connection to the push port, another one if it was idle for too long."""
        if self._push_end is None or self._push_end.is_closed:
            self._push_end = self.loop.new_end("push")
            self._push_end.opens(self.loop.factories[self._sockets[1]]())
        return self._push_end

    def rests(self) -> None:
        """Let the time go by after which each silent client is pinged, in steps."""
        for _ in range(3):  # so that a deadline in between is met in between
            self.loop.passes(PING_INTERVAL_S / 3 + 0.1)

    def writes(self, role: str) -> int:
        """Count the writes to transports of that role."""
        return sum(end.writes for end in self.loop.ends if end.role == role)


# Counting.

Operation = tuple[Callable[[], None], int]
"""What to do, and how many of what is to be told about it consists of."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Hold what one operation took."""

    bytecodes: float
    calls: float
    """Calls of functions in Python, whoever called them."""
    c_calls: float
    """Calls of functions in C by Python, and of what is in C in production."""
    client_writes: float
    api_writes: float
    push_writes: float
    blocks: float
    """Blocks of memory that are there afterwards and were not before, on average."""


class Tally:
    """Count while it is told to."""

    def __init__(self) -> None:
        self.bytecodes = collections.Counter[CodeType]()
        """How many were executed of each function."""
        self.calls = self.c_calls = 0

    def count_bytecodes(self, run: Callable[[], None]) -> None:
        """Count the bytecodes that are executed in a call."""
        if sys.version_info >= (3, 12):
            monitoring = sys.monitoring
            tool, event = monitoring.PROFILER_ID, monitoring.events.INSTRUCTION
            monitoring.use_tool_id(tool, "bytecodes")
            monitoring.register_callback(tool, event, self._on_instruction)
            monitoring.restart_events()
            monitoring.set_events(tool, event)
            try:
                run()
            finally:
                monitoring.set_events(tool, 0)
                monitoring.free_tool_id(tool)
        else:
            before = sys.gettrace()
            sys.settrace(self._on_trace)
            try:
                run()
            finally:
                sys.settrace(before)

    def count_calls(self, run: Callable[[], None]) -> None:
        """Count the functions that are called in a call."""
        before = sys.getprofile()
        sys.setprofile(self._on_profile)
        try:
            run()
        finally:
            sys.setprofile(before)

    def _on_instruction(self, code: CodeType, _: int) -> Any:
        if _is_scenery(code):
            return sys.monitoring.DISABLE if sys.version_info >= (3, 12) else None
        self.bytecodes[code] += 1
        return None

    def _on_trace(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            self.bytecodes[frame.f_code] += 1
        elif event == "call":
            if _is_scenery(frame.f_code):
                return None
            frame.f_trace_lines = False
            frame.f_trace_opcodes = True
        return self._on_trace

    def _on_profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "c_call":
            self.c_calls += not _is_scenery(frame.f_code)
        elif event == "call":
            if not _is_scenery(frame.f_code):
                self.calls += 1
            elif frame.f_back is not None:
                self.c_calls += not _is_scenery(frame.f_back.f_code)


def _is_scenery(code: CodeType) -> bool:
    return code.co_filename.startswith(_SCENERY)


def count(
    rig: Rig, operation: Operation, by_function: collections.Counter[str] | None = None
) -> Work:
    """Return what an operation takes.

    Args:
        by_function: filled with the bytecodes of each function, if given.
    """
    run, per = operation
    repeats = max(5, _REPEATS // per)

    def run_often() -> None:
        for _ in range(repeats):
            run()

    run_often()
    roles = ("client", "api", "push")
    before = [rig.writes(role) for role in roles]
    run()
    writes = [(rig.writes(role) - was) / per for role, was in zip(roles, before, strict=True)]
    tally = Tally()
    tally.count_bytecodes(run_often)
    tally.count_calls(run_often)
    if by_function is not None:
        for code, bytecodes in tally.bytecodes.items():
            where = f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_qualname}"
            by_function[where] = round(bytecodes / repeats / per)
    total = repeats * per
    return Work(
        tally.bytecodes.total() / total,
        tally.calls / total,
        tally.c_calls / total,
        *writes,
        blocks=_kept_blocks(rig, operation),
    )


def _kept_blocks(rig: Rig, operation: Operation) -> float:
    """Count the blocks that stay, without the help of the collector, when deadlines are over."""
    run, per = operation
    repeats = max(5, _LONG_REPEATS // per)
    sizes = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            for _ in range(repeats):
                run()
            rig.rests()
            sizes.append(sys.getallocatedblocks())
        return (sizes[2] - sizes[1]) / repeats / per
    finally:
        gc.enable()


def idle_bytes(clients: int = 500) -> float:
    """Return the bytes of Python's memory that an open client keeps.

    What the event loop's transport takes in C is not among them, nor is the kernel's part.
    """
    with Rig() as rig:
        for _ in range(AT_ONCE):
            rig.connects()
        ends = [rig.new_client_end() for _ in range(clients)]
        gc.collect()
        tracemalloc.start()
        try:
            for end in ends:
                rig.connects(end)
            gc.collect()
            return tracemalloc.get_traced_memory()[0] / clients
        finally:
            tracemalloc.stop()


def operations(rig: Rig) -> dict[str, Operation]:
    """Return what can be counted, by name."""
    clients = [rig.connects() for _ in range(AT_ONCE)]
    ends = [end for end, _ in clients]
    crowd = ends + [rig.connects()[0] for _ in range(CROWD - AT_ONCE)]
    coming = rig.new_client_end()

    def come_and_go() -> None:
        coming.is_closed = False
        rig.connects(coming)
        rig.leaves(coming)

    def be_pinged() -> None:
        before = rig.writes("client")
        rig.rests()
        assert rig.writes("client") == before + len(crowd)

    in_turn = itertools.cycle(clients)
    numbers = itertools.count(1)

    def push() -> None:
        rig.pushes([next(in_turn)])

    def otherwise(run: Callable[[], None]) -> Callable[[], None]:
        """Have no head of the API's be the same as one before."""

        def run_otherwise() -> None:
            rig.loop.api_number = lambda: next(numbers)
            run()
            rig.loop.api_number = lambda: 0

        return run_otherwise

    def message() -> None:
        rig.exchanges([next(in_turn)[0]])

    return {
        "message": (message, 1),
        f"message, {AT_ONCE} at once": (lambda: rig.exchanges(ends), AT_ONCE),
        "message, unknown head": (otherwise(message), 1),
        "push": (push, 1),
        "push, unknown head": (otherwise(push), 1),
        f"push, {AT_ONCE} at once": (lambda: rig.pushes(clients), AT_ONCE),
        "connect and close": (come_and_go, 1),
        "ping": (be_pinged, len(crowd)),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--functions", action="store_true", help="name the functions as well")
    parser.add_argument("--run", nargs=2, metavar=("OPERATION", "TIMES"), help="do not count")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with Rig() as rig:
        all_operations = operations(rig)
        if options.run:
            run, _ = all_operations[options.run[0]]
            for _ in range(int(options.run[1])):
                run()
            return
        names = [field.name for field in dataclasses.fields(Work)]
        print(f"{'':28}" + "".join(f"{name:>14}" for name in names))
        for name, operation in all_operations.items():
            by_function = collections.Counter[str]() if options.functions else None
            work = count(rig, operation, by_function)
            figures = "".join(f"{value:14.4g}" for value in dataclasses.astuple(work))
            print(f"{name:28}{figures}")
            for where, bytecodes in (by_function or {}).items():
                print(f"{'':28}{bytecodes:14}  {where}")
    print(f"{'idle client':28}{idle_bytes():14.0f} bytes kept")


if __name__ == "__main__":
    main()
