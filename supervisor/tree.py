"""Fork the children, watch them, restart them, replace them, stop them.

One loop waits for a signal or for the next thing that is due. Signal handlers only enqueue; there
is no thread and no event loop, so that forking stays sound for as long as the supervisor lives.
"""

from __future__ import annotations

import gc
import secrets
import signal
import time
from functools import partial
from typing import Final

import structlog
from ws2api.gateway import counters as c
from ws2api.gateway import logs

from . import process
from .children import Child, Incarnation
from .configuration import ReloadRefused
from .embedded import EmbeddedServer
from .ending import Ending
from .errors import EXIT_OK, EXIT_UNCLEAN, GaveUpError, StartError
from .parts import Parts
from .restart_policy import EXIT_BOOT_FAILED, CrashLoop, Verdict
from .roll import RETIRE, Roll, Stage
from .signals import SignalQueue
from .watch import sign_of_life

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
VERBOSE: Final = signal.SIGUSR1
"""Tells every process to log more for a while."""
ORDERS_WAIT: Final = signal.SIGUSR2
"""Tells that the admin process has written what it wants replaced into the shared counters."""

_SERVER_START_TIMEOUT_S: Final = 10.0
_HELPER_STOP_TIMEOUT_S: Final = 5.0
_DUMP_S: Final = 0.5
"""Time that a stuck worker has to write its stack to stderr."""
_POLL_S: Final = 0.02
"""How often a worker's state is looked at while one is expected to begin serving."""

_log = structlog.get_logger()


class Tree:
    """Keep the children of one supervisor alive until it is told to stop.

    Args:
        parts: what the children do.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._instance = secrets.token_hex(4)
        self._signals = SignalQueue(
            (*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD, VERBOSE, ORDERS_WAIT)
        )
        self._workers = [
            Child(f"worker {index}", self._fork_worker, slot=index)
            for index in range(parts.counters.workers)
        ]
        self._admin = Child("admin", self._fork_admin)
        self._server = (
            Child("valkey", partial(self._fork_server, parts.server)) if parts.server else None
        )
        self._by_pid: dict[int, Incarnation] = {}
        self._roll = Roll(self._spawn, self._serves)
        self._stage = Stage.IDLE
        self._is_reload_wanted = False
        # Whether the current or last roll brings new settings.
        self._is_reload = False
        # Times that each worker was to be replaced, as far as that was seen to.
        self._replaced = [0] * parts.counters.workers
        # Monotonic time at which this process logs as before.
        self._calm_at: float | None = None
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
            self._wait(_POLL_S)
            self._reap()
            if child.process is None:
                raise StartError(f"redis: the embedded server ended: {server.last_words()}")
            if time.monotonic() >= deadline:
                raise StartError("redis: the embedded server does not answer")

    def _step(self) -> None:
        """Do what is due, then wait for a signal or for what is due next."""
        now = time.monotonic()
        self._kill_overdue(now)
        if now >= self._parts.watch.due_at:
            self._look(now)
        if self._announced:
            self._go_on_rolling(now)
        if self._calm_at is not None and now >= self._calm_at:
            self._calm_at = None
            logs.restore_level()
        self._pass_on_verbose()
        for child in self._children():
            if child.due_at is not None and child.due_at <= now:
                self._fork(child)
        if not self._announced and all(self._is_served(worker) for worker in self._workers):
            self._announced = True
            self._parts.announce()
            self._parts.notifier.ready(self._describe())
        self._wait(self._time_left_s(now))
        self._reap()
        if self._give_up_reason:
            raise GaveUpError(self._give_up_reason)

    def _time_left_s(self, now: float) -> float:
        """Say how long nothing is due, if no signal comes."""
        dues = [self._parts.watch.due_at]
        dues += [child.due_at for child in self._children() if child.due_at is not None]
        dues += [one.kill_at for one in self._by_pid.values() if one.kill_at is not None]
        if self._calm_at is not None:
            dues.append(self._calm_at)
        if not self._announced or self._roll.stage is Stage.REPLACING:
            dues.append(now + _POLL_S)
        return max(0.0, min(dues) - now)

    def _wait(self, timeout_s: float) -> None:
        """Wait for a signal or the end of the time; every wait of this process is here."""
        notifier = self._parts.notifier
        now = time.monotonic()
        notifier.beat(now)
        for number in self._signals.wait(min(timeout_s, notifier.beat_at - now)):
            if number in STOP_SIGNALS:
                self._stop_signals += 1
            elif number == signal.SIGHUP:
                self._is_reload_wanted = True
            elif number == VERBOSE:
                self._log_more()

    def _log_more(self) -> None:
        """Write debug lines for a while, in every process that was not told already."""
        logs.raise_level()
        self._calm_at = time.monotonic() + logs.RAISED_S
        for one in self._by_pid.values():
            one.owes_verbose = True
        self._pass_on_verbose()

    def _pass_on_verbose(self) -> None:
        """Tell those who have begun to serve: who boots does not listen yet.

        One that is forked meanwhile logs more from its birth, and learns by this when to stop.
        """
        for one in self._by_pid.values():
            if one.owes_verbose and one.child is not self._server and self._has_served(one):
                one.owes_verbose = False
                one.send(VERBOSE)

    def _children(self) -> list[Child]:
        servers = [self._server] if self._server is not None else []
        return [*self._workers, self._admin, *servers]

    def _bank(self, one: Incarnation) -> memoryview:
        return self._parts.counters.bank(one.child.slot or 0, one.bank)

    def _serves(self, one: Incarnation) -> bool:
        """Tell whether a process does its work; only workers say when they begin."""
        return one.child.slot is None or self._bank(one)[c.STATE] == c.STATE_SERVING

    def _has_served(self, one: Incarnation) -> bool:
        """Tell whether a process has come so far, also when it drains by now."""
        return one.child.slot is None or self._bank(one)[c.STATE] >= c.STATE_SERVING

    def _is_served(self, worker: Child) -> bool:
        return worker.process is not None and self._serves(worker.process)

    def _describe(self) -> str:
        count = len(self._workers)
        return "1 worker serves" if count == 1 else f"{count} workers serve"

    # Reloading.

    def _go_on_rolling(self, now: float) -> None:
        """Take the next steps of a roll; begin another if one is wanted and none is under way."""
        self._roll.step(now)
        before, self._stage = self._stage, self._roll.stage
        if before is Stage.REPLACING and self._stage is not before:
            self._end_replacing()
        has_drained = before is not Stage.IDLE and self._stage is Stage.IDLE
        if has_drained and not self._roll.failure:
            _log.info("the old workers have ended")
            self._parts.notifier.status(self._describe())
        if self._stage is Stage.IDLE:
            if self._is_reload_wanted:
                self._is_reload_wanted = False
                self._reload(now)
            else:
                self._replace_wanted(now)
        self._parts.counters.host[c.ROLLING] = int(self._stage is not Stage.IDLE)

    def _replace_wanted(self, now: float) -> None:
        """Replace the workers that the admin process wants replaced, with the same settings."""
        wanted = list(self._parts.counters.host[c.REPLACE_WANTED :])
        if wanted == self._replaced:
            return
        chosen = [w for w in self._workers if wanted[w.slot or 0] != self._replaced[w.slot or 0]]
        self._replaced = wanted
        _log.info("replacing on request", workers=[worker.slot for worker in chosen])
        self._roll.begin(chosen, now)
        self._stage = Stage.REPLACING
        self._is_reload = False

    def _reload(self, now: float) -> None:
        self._parts.notifier.reloading("reading the configuration")
        try:
            self._parts.configuration.reload()
        except ReloadRefused as error:
            _log.error("reload refused", reason=str(error))
            self._parts.counters.host[c.RELOADS_REFUSED] += 1
            self._parts.notifier.ready(f"reload refused: {error}")
            return
        self._is_reload = True
        # Whoever was to be replaced is so by this.
        self._replaced = list(self._parts.counters.host[c.REPLACE_WANTED :])
        _log.info("replacing the workers one by one", workers=len(self._workers))
        self._roll.begin([*self._workers, self._admin], now)
        self._stage = Stage.REPLACING
        self._parts.notifier.status("replacing the workers one by one")

    def _end_replacing(self) -> None:
        """Tell how it went; the old workers may have yet to end."""
        if self._is_reload:
            outcome = c.RELOADS_FAILED if self._roll.failure else c.RELOADS_DONE
            self._parts.counters.host[outcome] += 1
        if self._roll.failure:
            if self._is_reload:
                self._parts.configuration.revert()
            _log.error("replacing stopped, the old workers stay", reason=self._roll.failure)
            self._parts.notifier.ready(f"replacing stopped: {self._roll.failure}")
        else:
            _log.info("all workers are replaced" if self._is_reload else "replaced on request")
            self._parts.notifier.ready(f"{self._describe()}, the old ones drain")

    # Forking.

    def _fork(self, child: Child) -> None:
        """Give a child that has no process one, or try that again later."""
        child.process = self._spawn(child)
        child.due_at = None
        if child.process is None:
            child.due_at = time.monotonic() + child.backoff.after_end(0.0)

    def _spawn(self, child: Child) -> Incarnation | None:
        """Fork a process of a child; return None if there is no room for one."""
        settings = self._parts.configuration.settings
        one = Incarnation(
            child,
            number=child.forks,
            bank=child.free_bank,
            generation=self._roll.generation,
            started_at=time.monotonic(),
            stop_s=_HELPER_STOP_TIMEOUT_S if child.slot is None else settings.shutdown_timeout,
            drain_s=settings.drain_seconds,
            owes_verbose=self._calm_at is not None,
        )
        if child.slot is not None:  # before the fork: whoever finds a trace of it finds it alive
            self._bank(one)[c.FORK] = one.number + 1
        try:
            one.pid = child.fork(one)
        except OSError as error:  # it may pass
            _log.error("cannot fork", child=child.name, reason=error.strerror)
            self._settle(one)
            return None
        child.forks += 1
        self._by_pid[one.pid] = one
        _log.debug("forked", child=child.name, pid=one.pid)
        return one

    def _fork_worker(self, one: Incarnation) -> int:
        return process.fork(partial(self._be_worker, one))

    def _fork_admin(self, _: Incarnation) -> int:
        return process.fork(self._be_admin)

    def _fork_server(self, server: EmbeddedServer, _: Incarnation) -> int:
        return server.start()

    def _be_worker(self, one: Incarnation) -> int:
        """Run in the forked child of a slot."""
        index = one.child.slot or 0
        self._signals.close()
        structlog.contextvars.bind_contextvars(worker=index)
        try:
            incarnation = f"{self._instance}-{index}-{one.number}"
            return self._parts.run_worker(index, one.bank, incarnation)
        except BaseException:
            _log.critical("worker ended by an exception", exc_info=True)
            return process.EXIT_EXCEPTION if self._has_served(one) else EXIT_BOOT_FAILED

    def _be_admin(self) -> int:
        """Run in the forked child for the admin port."""
        self._signals.close()
        structlog.contextvars.bind_contextvars(process="admin")
        return self._parts.run_admin(self._instance)

    # Watching.

    def _look(self, now: float) -> None:
        """Condemn the workers whose loop has stopped."""
        signs = {
            pid: sign_of_life(self._bank(one))
            for pid, one in self._by_pid.items()
            if one.child.slot is not None and not one.is_condemned
        }
        for pid, silent_s in self._parts.watch.look(now, signs).items():
            self._condemn(self._by_pid[pid], silent_s, now)

    def _condemn(self, one: Incarnation, silent_s: float, now: float) -> None:
        _log.error(
            "stuck, to be killed",
            child=one.child.name,
            pid=one.pid,
            silent_s=round(silent_s, 1),
            booting=not sign_of_life(self._bank(one)),
        )
        one.is_condemned = True
        one.send(signal.SIGQUIT)  # its stack goes to stderr, see process.fork
        one.kill_by(now + _DUMP_S)

    def _kill_overdue(self, now: float) -> None:
        for one in self._by_pid.values():
            if one.kill_at is not None and one.kill_at <= now:
                if not one.is_condemned:
                    _log.warning("not ended in time, killed", child=one.child.name, pid=one.pid)
                one.kill()

    # Reaping.

    def _reap(self) -> None:
        for pid, exit_code in process.reap():
            one = self._by_pid.pop(pid, None)
            if one is not None:  # as process 1 of a container it also inherits strangers
                one.pid = None
                self._ended(one, exit_code)

    def _ended(self, gone: Incarnation, exit_code: int) -> None:
        """Settle what a process leaves, and say what becomes of its child."""
        now = time.monotonic()
        child, how = gone.child, process.describe_exit(exit_code)
        has_served = self._has_served(gone)
        self._settle(gone)
        if self._stopping:
            self._judge_end(gone, exit_code, has_served=has_served)
        elif gone is child.former:
            child.former = None
            # One that was still booting has no handler for RETIRE, and nothing to lose either.
            is_well = exit_code == 0 or (exit_code == -RETIRE and not has_served)
            log = _log.info if is_well else _log.error
            log("old worker ended", child=child.name, how=how)
        elif gone is child.successor:
            child.successor = None
            _log.error("died before it served", child=child.name, how=how)
            self._roll.lost(gone, how, now)
        elif gone.is_leaving:
            child.process, child.due_at = None, now
        else:
            self._died(gone, exit_code, now)
            if not has_served:
                self._roll.lost(gone, how, now)

    def _settle(self, gone: Incarnation) -> None:
        if gone.child.slot is not None:
            self._parts.counters.settle(gone.child.slot, gone.bank)
            self._parts.addresses.settle(gone.child.slot, gone.bank)

    def _died(self, gone: Incarnation, exit_code: int, now: float) -> None:
        """Let the successor take over, or say when a process is forked in place of a dead one."""
        child, how = gone.child, process.describe_exit(exit_code)
        lifetime_s = now - gone.started_at
        if child.slot is not None:
            # Before the fork, so that the replacement finds it.
            self._parts.counters.bank(child.slot, 0)[c.RESTARTS] += 1
        child.process, child.successor = child.successor, None
        if child.process is not None:
            _log.error("died, its successor boots already", child=child.name, how=how)
            return
        delay_s = child.backoff.after_end(lifetime_s)
        child.due_at = now + delay_s
        _log.error(
            "died, to be restarted",
            child=child.name,
            how=how,
            lifetime_s=round(lifetime_s, 1),
            delay_s=delay_s,
        )
        if child.slot is None:
            return
        others_serve = self._announced and any(map(self._is_served, self._workers))
        verdict = self._crash_loop.judge(
            lifetime_s=lifetime_s, exit_code=exit_code, others_serve=others_serve
        )
        if verdict is Verdict.GIVE_UP:
            self._give_up_reason = f"the workers cannot start; {child.name} ended last: {how}"

    # Stopping.

    def _stop(self) -> None:
        """End the children: the workers, who need the others; then the admin port; then Redis."""
        self._stopping = True
        self._stop_signals = max(1, self._stop_signals)  # what comes from here on hurries
        self._parts.notifier.stopping("the workers end")
        self._parts.stop_listening()
        self._end(*self._workers)
        self._end(self._admin)
        if self._parts.server is not None and self._server is not None:
            self._end(self._server)
            self._parts.server.remove()

    def _end(self, *children: Child) -> None:
        """End all processes of some children, however long the roll may still have had."""
        processes = [one for one in self._by_pid.values() if one.child in children]
        ending = Ending(processes, time.monotonic())
        while not ending.is_over(now := time.monotonic()):
            self._wait(ending.step(now, self._stop_signals))
            self._reap()

    def _judge_end(self, gone: Incarnation, exit_code: int, *, has_served: bool) -> None:
        """Take note of a process that did not end as it was told to."""
        child = gone.child
        # One that was still booting has no handler for SIGTERM, and nothing to lose either.
        is_early = exit_code == -signal.SIGTERM and (child is self._admin or not has_served)
        if exit_code != 0 and not is_early and child is not self._server:
            self._clean = False
            how = process.describe_exit(exit_code)
            _log.error("did not end cleanly", child=child.name, how=how)
