"""Fork the children, watch them, restart them, stop them.

One loop waits for a signal or for the next thing that is due. Signal handlers only enqueue; there
is no thread and no event loop, so that forking stays sound for as long as the supervisor lives.
"""

from __future__ import annotations

import gc
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog
from ws2api.gateway import counters as c

from . import process
from .children import Child, Roll
from .embedded import EmbeddedServer
from .errors import EXIT_OK, EXIT_UNCLEAN, GaveUpError, StartError
from .restart_policy import EXIT_BOOT_FAILED, CrashLoop, Verdict
from .signals import SignalQueue

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_SERVER_START_TIMEOUT_S: Final = 10.0
_HELPER_STOP_TIMEOUT_S: Final = 5.0
_REAP_TIMEOUT_S: Final = 5.0
_POLL_S: Final = 0.02
"""How often a worker's state is looked at while one is expected to begin serving."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """Say what the children do; `cli` composes it of the real ones.

    Attributes:
        counters: the shared mapping; its slots are the workers to fork.
        run_worker: runs in a forked child, given the slot and the incarnation's unique id, and
            returns its exit status.
        run_admin: likewise for the admin process.
        server: the embedded Valkey; None when Redis is somebody else's.
        announce: called once, when all workers serve for the first time.
        stop_listening: called before workers are told to end, so that no connection waits in the
            queue of a socket that nobody will accept from again.
    """

    counters: c.Counters
    run_worker: Callable[[int, str], int]
    run_admin: Callable[[], int]
    server: EmbeddedServer | None
    announce: Callable[[], None]
    stop_listening: Callable[[], None] = lambda: None


class Tree:
    """Keep the children of one supervisor alive until it is told to stop.

    Args:
        parts: what the children do.
        shutdown_timeout_s: seconds that a worker has between SIGTERM and SIGKILL.
    """

    def __init__(self, parts: Parts, *, shutdown_timeout_s: float) -> None:
        self._parts = parts
        self._shutdown_timeout_s = shutdown_timeout_s
        self._instance = secrets.token_hex(4)
        self._signals = SignalQueue((*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD))
        self._workers = [
            Child(f"worker {index}", partial(self._fork_worker, index), slot=index)
            for index in range(parts.counters.workers)
        ]
        self._admin = Child("admin", partial(self._fork_admin, parts.run_admin))
        self._server = Child("valkey", parts.server.start) if parts.server else None
        self._by_pid: dict[int, Child] = {}
        self._roll = Roll(shutdown_timeout_s, self._serves)
        self._crash_loop = CrashLoop()
        self._announced = False
        self._give_up_reason = ""
        self._clean = True
        self._stop_signals = 0
        self._stopping = False

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit status, 0 if all workers ended cleanly.

        Raises:
            StartError: if the embedded server does not start.
            GaveUpError: if workers cannot start.
        """
        with self._signals:
            try:
                self._start()
                while not self._stop_signals:
                    self._step()
            finally:
                self._stop()
        return EXIT_OK if self._clean else EXIT_UNCLEAN

    def _start(self) -> None:
        if self._parts.server is not None and self._server is not None:
            self._fork(self._server)
            self._await_server(self._server, self._parts.server)
        # What is alive now stays in pages that all children share: a collector that never looks
        # at an object never writes to its page.
        gc.collect()
        gc.freeze()
        now = time.monotonic()
        for child in (*self._workers, self._admin):
            child.due_at = now

    def _await_server(self, child: Child, server: EmbeddedServer) -> None:
        """Wait for the embedded server's first answer, so that workers find it."""
        deadline = time.monotonic() + _SERVER_START_TIMEOUT_S
        while not server.answers() and not self._stop_signals:
            self._handle_signals(_POLL_S)
            self._reap()
            if child.pid is None:
                raise StartError(f"redis: the embedded server ended: {server.last_words()}")
            if time.monotonic() >= deadline:
                raise StartError("redis: the embedded server does not answer")

    def _step(self) -> None:
        """Do what is due, then wait for a signal or for what is due next."""
        now = time.monotonic()
        for child in self._children():
            if child.due_at is not None and child.due_at <= now:
                self._fork(child)
        if not self._announced and all(map(self._serves, self._workers)):
            self._announced = True
            self._parts.announce()
        if self._announced:
            self._roll.step(now)
        self._handle_signals(self._time_left_s(now))
        self._reap()
        if self._give_up_reason:
            raise GaveUpError(self._give_up_reason)

    def _time_left_s(self, now: float) -> float | None:
        """Say how long nothing is due; None for as long as no signal comes."""
        dues = [child.due_at for child in self._children() if child.due_at is not None]
        if not self._announced or self._roll.under_way:
            dues.append(now + _POLL_S)
        return max(0.0, min(dues) - now) if dues else None

    def _handle_signals(self, timeout_s: float | None) -> None:
        for number in self._signals.wait(timeout_s):
            if number in STOP_SIGNALS:
                self._stop_signals += 1
            elif number == signal.SIGHUP:
                _log.info("replacing the workers one by one")
                self._roll.begin(self._workers)

    def _children(self) -> list[Child]:
        servers = [self._server] if self._server is not None else []
        return [*self._workers, self._admin, *servers]

    def _serves(self, child: Child) -> bool:
        """Tell whether a worker serves; the slot of one that died says so no more."""
        slot = self._parts.counters.slot(child.slot or 0)
        return bool(slot[c.STATE] == c.STATE_SERVING)

    # Forking.

    def _fork(self, child: Child) -> None:
        child.started_at = time.monotonic()
        try:
            child.pid = child.fork()
        except OSError as error:  # no room for a process: it may pass
            _log.error("cannot fork", child=child.name, reason=error.strerror)
            child.due_at = child.started_at + child.backoff.after_end(0.0)
            return
        child.due_at = None
        child.forks += 1
        self._by_pid[child.pid] = child
        _log.debug("forked", child=child.name, pid=child.pid)

    def _fork_worker(self, index: int) -> int:
        incarnation = f"{self._instance}-{index}-{self._workers[index].forks}"
        return process.fork(partial(self._be_worker, index, incarnation))

    def _fork_admin(self, run_admin: Callable[[], int]) -> int:
        return process.fork(partial(self._be_admin, run_admin))

    def _be_worker(self, index: int, incarnation: str) -> int:
        """Run in the forked child of a slot."""
        self._signals.close()
        structlog.contextvars.bind_contextvars(worker=index)
        try:
            return self._parts.run_worker(index, incarnation)
        except BaseException:
            _log.critical("worker ended by an exception", exc_info=True)
            state = self._parts.counters.slot(index)[c.STATE]
            return EXIT_BOOT_FAILED if state < c.STATE_SERVING else process.EXIT_EXCEPTION

    def _be_admin(self, run_admin: Callable[[], int]) -> int:
        """Run in the forked child for the admin port."""
        self._signals.close()
        structlog.contextvars.bind_contextvars(process="admin")
        return run_admin()

    # Reaping.

    def _reap(self) -> None:
        for pid, exit_code in process.reap():
            child = self._by_pid.pop(pid, None)
            if child is not None:  # as process 1 of a container it also inherits strangers
                child.pid = None
                self._ended(child, exit_code)

    def _ended(self, child: Child, exit_code: int) -> None:
        """Settle what a child leaves, and say when its replacement is due."""
        now = time.monotonic()
        state = c.STATE_DOWN
        if child.slot is not None:
            slot = self._parts.counters.slot(child.slot)
            state = slot[c.STATE]
            self._parts.counters.settle(child.slot)
            if not self._stopping:
                slot[c.RESTARTS] += 1  # before the fork, so that the replacement finds it
        if self._stopping:
            # One that was still booting has no handler for SIGTERM, and nothing to lose either.
            early = exit_code == -signal.SIGTERM and state < c.STATE_SERVING
            if child.slot is not None and exit_code != 0 and not early:
                self._clean = False
                _log.error(
                    "did not end cleanly", child=child.name, how=process.describe_exit(exit_code)
                )
        elif child.retiring:
            child.retiring = False
            child.due_at = now
        else:
            self._died(child, exit_code, now)

    def _died(self, child: Child, exit_code: int, now: float) -> None:
        lifetime_s = now - child.started_at
        delay_s = child.backoff.after_end(lifetime_s)
        child.due_at = now + delay_s
        how = process.describe_exit(exit_code)
        _log.error(
            "died, to be restarted",
            child=child.name,
            how=how,
            lifetime_s=round(lifetime_s, 1),
            delay_s=delay_s,
        )
        if child.slot is None:
            return
        others_serve = self._announced and any(map(self._serves, self._workers))
        verdict = self._crash_loop.judge(
            lifetime_s=lifetime_s, exit_code=exit_code, others_serve=others_serve
        )
        if verdict is Verdict.GIVE_UP:
            self._give_up_reason = f"the workers cannot start; {child.name} ended last: {how}"

    # Stopping.

    def _stop(self) -> None:
        """End the children: the workers, who need the others; then the admin port; then Redis."""
        self._stopping = True
        self._stop_signals = max(0, self._stop_signals - 1)  # from here on, those that hurry
        self._parts.stop_listening()
        self._end(self._workers, self._shutdown_timeout_s)
        self._end([self._admin], _HELPER_STOP_TIMEOUT_S)
        if self._parts.server is not None and self._server is not None:
            self._end([self._server], _HELPER_STOP_TIMEOUT_S)
            self._parts.server.remove()

    def _end(self, children: Sequence[Child], timeout_s: float) -> None:
        """Send SIGTERM and wait; after the timeout or a second signal SIGKILL and reap."""
        _send(children, signal.SIGTERM)
        self._await_ends(children, timeout_s, hurry=True)
        if any(child.pid is not None for child in children):
            _send(children, signal.SIGKILL)
            self._await_ends(children, _REAP_TIMEOUT_S, hurry=False)

    def _await_ends(self, children: Sequence[Child], timeout_s: float, *, hurry: bool) -> None:
        deadline = time.monotonic() + timeout_s
        self._reap()
        while any(child.pid is not None for child in children):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or (hurry and self._stop_signals):
                return
            self._handle_signals(left_s)
            self._reap()


def _send(children: Sequence[Child], number: signal.Signals) -> None:
    for child in children:
        child.send(number)
