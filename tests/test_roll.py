"""Roll over children whose processes are none: who is forked, who is told to go, and when."""

from __future__ import annotations

import signal
from itertools import pairwise

import pytest
from ws2api.supervisor.children import Child, Incarnation
from ws2api.supervisor.roll import RETIRE, TRIES, Roll, Stage

DRAIN_S, STOP_S = 60.0, 30.0


class FakeProcess(Incarnation):
    """Note the signals that it is sent."""

    def __init__(self, child: Child, generation: int) -> None:
        super().__init__(
            child,
            child.forks,
            child.free_bank,
            generation,
            started_at=0.0,
            stop_s=STOP_S,
            drain_s=DRAIN_S,
            pid=1,
        )
        child.forks += 1
        self.serves = False
        self.sent: list[signal.Signals] = []

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)


class World:
    """Hold two workers and a helper, all of which serve, and the roll over them."""

    def __init__(self) -> None:
        self.roll = Roll(self.spawn, lambda one: isinstance(one, FakeProcess) and one.serves)
        self.has_room = True
        self.workers = [Child(f"worker {slot}", lambda _: 1, slot=slot) for slot in range(2)]
        self.helper = Child("admin", lambda _: 1)
        for child in (*self.workers, self.helper):
            child.process = FakeProcess(child, 0)
            child.process.serves = True

    def spawn(self, child: Child) -> FakeProcess | None:
        return FakeProcess(child, self.roll.generation) if self.has_room else None

    def begin(self) -> None:
        self.roll.begin([*self.workers, self.helper], 0.0)
        self.roll.step(0.0)


def fake(process: Incarnation | None) -> FakeProcess:
    assert isinstance(process, FakeProcess)
    return process


@pytest.fixture
def world() -> World:
    world = World()
    world.begin()
    return world


def test_next_worker_has_its_turn_when_the_replacement_serves(world: World) -> None:
    first, second = world.workers
    old = fake(first.process)
    assert (old.sent, second.successor) == ([], None)
    new = fake(first.successor)
    new.serves = True
    world.roll.step(5.0)
    assert (first.process, first.former, first.successor) == (new, old, None)
    assert old.sent == [RETIRE]
    assert old.kill_at == 5.0 + DRAIN_S + STOP_S
    assert second.successor is not None
    assert new.bank != old.bank


def test_helper_comes_last_and_makes_room(world: World) -> None:
    for child in world.workers:
        fake(child.successor).serves = True
        world.roll.step(0.0)
    old = fake(world.helper.process)
    world.roll.step(1.0)
    assert old.sent == [signal.SIGTERM]
    assert old.is_leaving
    assert old.kill_at == STOP_S
    assert world.roll.stage is Stage.REPLACING
    world.helper.process = FakeProcess(world.helper, world.roll.generation)
    world.helper.process.serves = True
    world.roll.step(2.0)
    assert world.roll.stage is Stage.DRAINING
    for child in world.workers:
        child.former = None
    assert world.roll.stage is Stage.IDLE
    assert world.roll.failure == ""


def test_fresh_process_is_left_alone(world: World) -> None:
    first, second = world.workers
    first.process, first.successor = first.successor, None  # the old one has died
    world.roll.step(0.0)
    assert second.successor is None
    fake(first.process).serves = True
    world.roll.step(0.0)
    assert fake(first.process).sent == []
    assert second.successor is not None


def test_replacements_that_die_are_tried_again_more_and_more_slowly(world: World) -> None:
    child = world.workers[0]
    now, tried_at = 0.0, [0.0]
    while not world.roll.failure:
        gone = fake(child.successor)
        child.successor = None
        world.roll.lost(gone, "exit status 3", now)
        while child.successor is None and not world.roll.failure:
            now += 0.01
            world.roll.step(now)
        tried_at.append(now)
    pauses = [later - earlier for earlier, later in pairwise(tried_at)]
    assert len(pauses) == TRIES
    assert pauses[:-1] == sorted(pauses[:-1])
    assert pauses[-2] > 2 * pauses[0] > 0
    assert world.roll.stage is Stage.IDLE
    assert fake(child.process).sent == []


def test_no_room_for_a_process_counts_as_a_try() -> None:
    world = World()
    world.has_room = False
    world.begin()
    for second in range(1, 100):
        world.roll.step(float(second))
    assert world.roll.failure == ("worker 0 could not be replaced, there is no room for a process")
    assert world.workers[0].process is not None


def test_deaths_of_others_do_not_count(world: World) -> None:
    for _ in range(TRIES):
        world.roll.lost(fake(world.workers[1].process), "exit status 3", 0.0)
        world.roll.lost(fake(world.workers[0].process), "killed by SIGKILL", 0.0)
    assert world.roll.failure == ""


def test_dead_children_need_not_wait_for_the_new_settings() -> None:
    world = World()
    world.workers[1].process, world.workers[1].due_at = None, 1e9
    world.begin()
    assert world.workers[1].due_at == 0.0


def test_next_roll_is_another_generation(world: World) -> None:
    world.workers[0].successor = None
    world.roll.begin([], 0.0)
    world.begin()
    assert world.roll.generation == 3
    assert fake(world.workers[0].successor).generation == 3
