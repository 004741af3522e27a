"""Drive a crowd of clients in processes of their own, from the process that measures."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Final

from bench_ import BenchError, addresses, frames, machine, orders, proc
from bench_.board import CLOSED, DONE, LOST, OPENED, READY, REFUSED, SENT, UNEXPECTED, Board, Sample
from bench_.plan import Plan

_fork = multiprocessing.get_context("fork")
_runs: Final = itertools.count()
_addresses_used = 0


class Crowd:
    """Own the generator processes; use it as a context manager.

    Args:
        port: of the system under test, on 127.0.0.1.
        clients: how many there can be.
        message_bytes: size of what a client says.
        answer_bytes: size of what it hears; None for the same.
        rest_s: lets a process do more at a time and use less CPU, at the price of such a latency.
        processes: generator processes; None for as many as the file limit asks for.
        api: a listening socket where the generator is the API as well, for `push`; it is then one
            process.
    """

    def __init__(
        self,
        port: int,
        clients: int,
        *,
        message_bytes: int = 30,
        answer_bytes: int | None = None,
        rest_s: float = 0.0,
        processes: int | None = None,
        api: socket.socket | None = None,
    ) -> None:
        limits = machine.survey()
        self.size = clients
        processes = 1 if api else processes or limits.processes_for(clients)
        self._board = Board(processes)
        sizes = list(shares(clients, processes))
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._controls: list[Connection] = []
        self._idle_kb = 0
        plans = _plans(port, sizes, message_bytes, answer_bytes, limits.files)
        for index, plan in enumerate(replace(plan, api=api, rest_s=rest_s) for plan in plans):
            ours, theirs = _fork.Pipe()
            self._controls.append(ours)
            arguments = (self._board.row(index), plan, theirs, self._controls)
            self._processes.append(_fork.Process(target=_be_generator, args=arguments, daemon=True))

    def __enter__(self) -> Crowd:
        for process in self._processes:
            process.start()
        self.wait_until(
            lambda: self._board.sum(READY) == len(self._processes), "generators do not start", 20
        )
        self._idle_kb = self._memory_kb()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    # Orders

    def connect(
        self,
        *,
        count: int | None = None,
        at_once: int = 64,
        rate: float = 0,
        timeout_s: float = 120,
    ) -> None:
        """Connect clients and wait until all of them are in.

        Args:
            count: how many; None for all that are left.
            at_once: connects under way at most; as many as clients for a storm.
            rate: connects per second at most; 0 for no such bound.
            timeout_s: how long that may take.
        """
        settled = self.settled
        goal = settled + self.start_connecting(count=count, at_once=at_once, rate=rate)
        self.wait_until(lambda: self.settled >= goal, "clients are not connected", timeout_s)
        if refused := self._board.sum(REFUSED):
            raise BenchError(f"{refused:,} connects of {self.size:,} failed")

    def start_connecting(
        self, *, count: int | None = None, at_once: int = 64, rate: float = 0
    ) -> int:
        """Let clients connect, do not wait, and return how many that will be."""
        count = min(count or self.size, self.size - self.settled)
        parts = len(self._controls)
        windows = list(shares(max(at_once, parts), parts))
        for index, part in enumerate(shares(count, parts)):
            self._order(index, orders.Connect(part, windows[index], rate / parts))
        return count

    def send_in_loop(self, in_flight: int) -> None:
        """Keep so many messages in flight from now on."""
        for index, part in enumerate(shares(in_flight, len(self._controls))):
            self._order(index, orders.SendInLoop(part))

    def send_paced(self, *, rate: float = 0, interval_s: float = 0) -> None:
        """Let clients send evenly: so many messages a second in all, or each at an interval.

        Those that connect later join in; then only `interval_s` keeps its meaning.
        """
        interval_s = interval_s or self.size / rate
        for index in range(len(self._controls)):
            self._order(index, orders.SendPaced(interval_s, index / len(self._controls)))

    def push(self, kind: str, in_flight: int, port: int = 0) -> None:
        """Push to the clients over so many connections; see Pushing.start."""
        self._order(0, orders.Push(kind, in_flight, port))

    def stop(self, timeout_s: float = 20) -> None:
        """Send nothing more, and wait for the answers that are still due."""
        for index in range(len(self._controls)):
            self._order(index, orders.Stop())
        time.sleep(0.05)  # what was due at this very moment is sent
        self.wait_until(
            lambda: self._board.sum(SENT) == self._board.sum(DONE),
            "messages remain unanswered",
            timeout_s,
        )

    def close(self, *, at_once: int = 64, timeout_s: float = 120) -> None:
        """Close all clients and wait until the server has done so, too."""
        for index, part in enumerate(shares(max(at_once, 1), len(self._controls))):
            self._order(index, orders.Close(max(1, part)))
        self.wait_until(
            lambda: self._board.sum(CLOSED) + self._board.sum(LOST) >= self._board.sum(OPENED),
            "clients are not closed",
            timeout_s,
        )

    # What is seen

    @property
    def settled(self) -> int:
        """Connects that have come to an end, good or bad."""
        return self._board.sum(OPENED) + self._board.sum(REFUSED)

    def sum(self, word: int) -> int:
        """Read one counter of the board, as board.DONE."""
        return self._board.sum(word)

    def sample(self) -> Sample:
        """Read all counters and latencies."""
        return self._board.sample()

    def check(self) -> None:
        """Raise when anything went wrong that clients could see."""
        words = {"refused": REFUSED, "lost": LOST, "unexpected": UNEXPECTED}
        seen = {name: self._board.sum(word) for name, word in words.items()}
        if any(seen.values()):
            raise BenchError("clients: " + ", ".join(f"{n:,} {name}" for name, n in seen.items()))

    def kb_per_client(self) -> float:
        """Return by how much the generator has grown, per open connection."""
        return (self._memory_kb() - self._idle_kb) / max(1, self._board.sum(OPENED))

    def cpu_us(self) -> tuple[float, float]:
        """Return the user and system time of the generator."""
        pairs = [proc.cpu_us(process.pid or 0) for process in self._processes]
        return sum(user for user, _ in pairs), sum(system for _, system in pairs)

    def wait_until(self, holds: Callable[[], bool], otherwise: str, timeout_s: float) -> None:
        """Wait for something, unless a generator dies or time runs out.

        Raises:
            BenchError: in these two cases.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            if not all(process.is_alive() for process in self._processes):
                raise BenchError(f"{otherwise}: a generator died")
            if time.monotonic() > deadline:
                raise BenchError(f"{otherwise} after {timeout_s:g} s: {self._counts()}")
            time.sleep(0.005)

    def _counts(self) -> str:
        words = {"opened": OPENED, "refused": REFUSED, "lost": LOST, "closed": CLOSED}
        words |= {"sent": SENT, "answered": DONE, "unexpected": UNEXPECTED}
        return ", ".join(f"{name} {self._board.sum(word):,}" for name, word in words.items())

    def _order(self, index: int, order: orders.Order) -> None:
        self._controls[index].send(order)

    def _memory_kb(self) -> int:
        return sum(proc.pss_kb(process.pid or 0) for process in self._processes)


def shares(total: int, parts: int) -> Iterator[int]:
    """Split a number into parts that differ by one at most."""
    for index in range(parts):
        yield total * (index + 1) // parts - total * index // parts


def _plans(
    port: int, sizes: list[int], message_bytes: int, answer_bytes: int | None, files: int
) -> Iterator[Plan]:
    global _addresses_used
    # Names of their own, so that no client of a former crowd is replaced by one of this.
    paths = f"/c{os.getpid() % 10_000}-{next(_runs)}-{{}}"
    begin = 0
    for size in sizes:
        offset = os.getpid() * 64 + _addresses_used
        sources = addresses.sources(size, offset)
        _addresses_used += len(sources)
        yield Plan(
            target=("127.0.0.1", port),
            paths=paths,
            numbers=range(begin, begin + size),
            sources=sources,
            message=frames.question(message_bytes),
            answer=frames.answer(message_bytes if answer_bytes is None else answer_bytes),
            files=files,
        )
        begin += size


def _be_generator(
    row: memoryview, plan: Plan, control: Connection, foreign: list[Connection]
) -> None:
    """Be the child: the measuring process's ends would keep the pipes open after its death."""
    for connection in foreign:
        connection.close()
    orders.serve(row, plan, control)
