"""Disturb at random: the API, Redis, and the gateway's processes.

Two lanes run side by side. One disturbs the API all the time; the other disturbs either Redis or a
process, never both, because what Redis forgets while a worker dies is promised to nobody.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from harness.fault_proxy import Direction, FaultProxy
from harness.traffic_api import ApiAnswer, ApiRequest, Gate

from soak_ import SoakError
from soak_.world import API_TIMEOUT_S, READY_S, World
from soak_.world import answer as answer_well

Fault = Callable[[], None]

PAUSE_S: Final = (1.0, 5.0)
_SETTLED_S: Final = 120.0
"""The longest that the API may take to have heard of every end, once it answers."""


class Lane(threading.Thread):
    """Disturb one thing after the other until told to stop.

    Args:
        name: of the thread.
        faults: what to choose from; each undoes what it has done.
        seed: makes the same choices again.
    """

    def __init__(self, name: str, faults: dict[str, tuple[Fault, int]], seed: int) -> None:
        super().__init__(name=name, daemon=True)  # when interrupted, nobody waits for it
        self._faults = faults
        self._random = random.Random(f"{name} {seed}")
        self._is_over = threading.Event()
        self.done: Counter[str] = Counter()
        self.now = ""
        """What is being done, empty in a pause."""
        self.error: Exception | None = None

    def run(self) -> None:
        """Go on until `stop`, or until a fault cannot be undone."""
        names = list(self._faults)
        weights = [weight for _, weight in self._faults.values()]
        while not self._is_over.wait(self._random.uniform(*PAUSE_S)):
            self.now = self._random.choices(names, weights)[0]
            try:
                self._faults[self.now][0]()
            except Exception as error:
                self.error = SoakError(f"{self.now}: {error!r}")
                return
            self.done[self.now] += 1
            self.now = ""

    def stop(self) -> None:
        """Let the fault that is under way come to its end, and no other begin."""
        self._is_over.set()
        self.join()


class ApiFaults:
    """Know how to disturb the API.

    Nothing but a hanging API may take longer than the gateway's timeout for it: what was held back
    and arrives after that, when the next message is long under way, would be out of order by right.
    """

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._api = world.traffic.api
        self._proxy = world.to_api
        self._random = random.Random(f"api {seed}")
        self.lock = threading.Lock()
        """Held while the API is disturbed, and for a moment after."""

    def all(self) -> dict[str, tuple[Fault, int]]:
        """Return what can be done, with how often it is to be chosen."""
        faults: dict[str, tuple[Fault, int]] = {
            "API refuses": (self._refuse, 3),
            "API ends": (self._end, 3),
            "API resets all": (self._proxy.reset, 3),
            "API's answers are lost": (self._lose_answers, 3),
            "API's answers are cut off": (self._cut_answers, 3),
            "API is frozen": (self._freeze, 3),
            "API is slow": (self._slow, 2),
            "API swallows": (self._swallow, 2),
            "API answers 503": (lambda: self._answer(503), 3),
            "API answers 500": (lambda: self._answer(500), 1),
            "API hangs for some": (lambda: self._hang(3), 2),
            "API hangs for long": (lambda: self._hang(API_TIMEOUT_S + 2), 1),
            "API is away for long": (self._be_away_for_long, 1),
        }
        return {name: (self._locked(fault), weight) for name, (fault, weight) in faults.items()}

    def _locked(self, fault: Fault) -> Fault:
        def disturb() -> None:
            with self.lock:
                fault()

        return disturb

    def _last(self, least_s: float, most_s: float) -> None:
        time.sleep(self._random.uniform(least_s, most_s))

    def _refuse(self) -> None:
        self._proxy.refuse()
        self._proxy.reset()
        self._last(0.3, 3)
        self._proxy.restore()

    def _end(self) -> None:
        self._proxy.refuse()
        self._api.close()
        self._last(0.3, 3)
        self._api.open()
        self._proxy.restore()

    def _be_away_for_long(self) -> None:
        self._proxy.refuse()
        self._api.close()
        self._last(API_TIMEOUT_S + 1, API_TIMEOUT_S + 5)
        self._api.open()
        self._proxy.restore()

    def _lose_answers(self) -> None:
        self._proxy.reset_after(self._random.choice((0, 1, 50)), count=self._random.randint(1, 10))
        self._last(0.1, 1)
        self._proxy.restore()

    def _cut_answers(self) -> None:
        self._proxy.truncate(self._random.choice((0, 1, 50)), count=self._random.randint(1, 10))
        self._last(0.1, 1)
        self._proxy.restore()

    def _freeze(self) -> None:
        self._proxy.freeze(self._random.choice([*Direction, Direction.BOTH]))
        self._last(0.3, 3)
        self._proxy.thaw()

    def _slow(self) -> None:
        self._proxy.delay(self._random.uniform(0.05, 0.5))
        self._last(1, 4)
        self._proxy.restore()

    def _swallow(self) -> None:
        self._proxy.drop()
        self._last(0.3, 2)
        self._proxy.restore()

    def _answer(self, status: int) -> None:
        def fail(request: ApiRequest) -> ApiAnswer:
            return ApiAnswer(status=status)

        self._api.behaviour = fail
        self._last(0.3, 3)
        self._api.behaviour = answer_well

    def _hang(self, seconds: float) -> None:
        share = self._random.choice((2, 3, 10))
        gate: Gate = self._api.hold(lambda request: hash(request.client_id) % share == 0)
        time.sleep(seconds)
        gate.open()
        self._api.thread.call(self._api.gates.remove, gate)


class OtherFaults:
    """Know how to disturb Redis and the processes."""

    def __init__(self, world: World, api: ApiFaults, seed: int) -> None:
        self._world = world
        self._api = api
        self._proxy: FaultProxy = world.to_redis
        self._random = random.Random(f"others {seed}")
        self.workers_killed = 0

    def all(self) -> dict[str, tuple[Fault, int]]:
        """Return what can be done, with how often it is to be chosen."""
        redis: dict[str, tuple[Fault, int]] = {
            "Redis refuses": (self._refuse, 3),
            "Redis resets all": (self._proxy.reset, 2),
            "Redis is frozen": (lambda: self._freeze(0.3, 3), 2),
            "Redis is frozen for long": (lambda: self._freeze(8, 12), 1),
            "Redis is slow": (self._slow, 1),
            "Valkey is killed": (self._kill_valkey, 2),
        }
        faults: dict[str, tuple[Fault, int]] = {
            "worker is killed": (self._kill_worker, 5),
            "worker stands still": (self._stop_worker, 3),
            "admin process is killed": (self._kill_admin, 1),
            "SIGHUP": (self._reload, 2),
        }
        recovering = {name: (self._recover_from(fault), w) for name, (fault, w) in redis.items()}
        return faults | recovering

    def _last(self, least_s: float, most_s: float) -> None:
        time.sleep(self._random.uniform(least_s, most_s))

    # Redis.

    def _recover_from(self, fault: Fault) -> Fault:
        """Let nothing else happen before Redis knows every client again."""

        def disturb() -> None:
            fault()
            self._world.await_ready()
            self._world.wait_until(self._all_are_registered, "every client in Redis", READY_S)

        return disturb

    def _all_are_registered(self) -> bool:
        return self._world.present() <= self._world.registered()

    def _refuse(self) -> None:
        self._proxy.refuse()
        self._proxy.reset()
        self._last(0.3, 5)
        self._proxy.restore()

    def _freeze(self, least_s: float, most_s: float) -> None:
        self._proxy.freeze()
        self._last(least_s, most_s)
        self._proxy.thaw()

    def _slow(self) -> None:
        self._proxy.delay(self._random.uniform(0.01, 0.1))
        self._last(1, 4)
        self._proxy.restore()

    def _kill_valkey(self) -> None:
        """Let Redis forget everything, at a moment when nothing stands in it that would be lost."""
        with self._api.lock:  # else disconnects could wait in Redis
            self._world.wait_until(self._nothing_is_owed, "every end to be reported", _SETTLED_S)
            self._world.valkey.stop()
            self._last(0.1, 3)
            self._world.valkey.start()

    def _nothing_is_owed(self) -> bool:
        return not self._world.count("disconnects_pending") and self._world.is_all_reported()

    # Processes.

    def _kill_worker(self) -> None:
        os.kill(self._random.choice(self._world.worker_pids()), signal.SIGKILL)
        self.workers_killed += 1
        self._world.await_ready()

    def _stop_worker(self) -> None:
        pid = self._random.choice(self._world.worker_pids())
        os.kill(pid, signal.SIGSTOP)
        try:
            self._last(1, 3)
        finally:
            os.kill(pid, signal.SIGCONT)
        self._world.await_ready()

    def _kill_admin(self) -> None:
        os.kill(self._world.gateway.find_admin().pid, signal.SIGKILL)
        self._world.await_ready()

    def _reload(self) -> None:
        before = set(self._world.worker_pids())
        os.kill(self._world.gateway.pid, signal.SIGHUP)
        self._world.wait_until(
            lambda: not before & set(self._world.worker_pids()), "new workers", READY_S
        )
        self._world.await_ready()
