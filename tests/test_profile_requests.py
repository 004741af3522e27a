"""Ask a worker for profiles through its counters, and let either side go away meanwhile."""

from __future__ import annotations

import asyncio
import pstats
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.waiting import DEADLINE_S
from ws2api.gateway import counters as c
from ws2api.gateway import profiling
from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.profiling import Profiler
from ws2api.gateway.recent import Recent
from ws2api.gateway.settings import load
from ws2api.gateway.traces import Traces
from ws2api.supervisor.errors import RequestError
from ws2api.supervisor.operations import Operations
from ws2api.supervisor.shared_state import SharedState

PID = 4711


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """Leave no profiler running."""
    yield
    is_profiled = sys.getprofile() is not None
    is_traced = tracemalloc.is_tracing()
    sys.setprofile(None)
    tracemalloc.stop()
    assert not (is_profiled or is_traced)


@pytest.fixture
def shared(tmp_path: Path) -> SharedState:
    """Return what one worker shares that serves."""
    counters = c.Counters(1)
    slot = counters.bank(0, 0)
    slot[c.STATE], slot[c.PID], slot[c.FORK] = c.STATE_SERVING, PID, 1
    return SharedState(counters, Recent(1, c.BANKS), AddressTable(1), Traces(1, c.BANKS), tmp_path)


@pytest.fixture
def slot(shared: SharedState) -> memoryview:
    return shared.counters.bank(0, 0)


@pytest.fixture
def profiler(shared: SharedState, slot: memoryview) -> Profiler:
    return Profiler(slot, shared.profiles)


def want(slot: memoryview, kind: int = profiling.CPU, ms: int = 1000) -> None:
    slot[c.PROFILE_KIND], slot[c.PROFILE_MS] = kind, ms
    slot[c.PROFILE_WANTED] += 1


def is_running(kind: int) -> bool:
    return sys.getprofile() is not None if kind == profiling.CPU else tracemalloc.is_tracing()


@pytest.mark.parametrize("kind", [profiling.CPU, profiling.MEMORY])
class TestWorker:
    def test_writes_when_the_time_is_over(
        self, shared: SharedState, slot: memoryview, profiler: Profiler, kind: int
    ) -> None:
        profiler.on_tick(1.0)
        assert not is_running(kind)
        want(slot, kind)
        profiler.on_tick(2.0)
        profiler.on_tick(2.9)
        assert is_running(kind)
        assert not list(shared.profiles.iterdir())
        profiler.on_tick(3.0)
        assert not is_running(kind)
        (path,) = shared.profiles.iterdir()
        assert path.name == f"{PID}-1"
        if kind == profiling.CPU:
            pstats.Stats(str(path))
        else:
            tracemalloc.Snapshot.load(str(path))
        profiler.on_tick(9.0)
        assert not is_running(kind)

    def test_stops_when_nobody_waits_any_more(
        self, shared: SharedState, slot: memoryview, profiler: Profiler, kind: int
    ) -> None:
        want(slot, kind)
        profiler.on_tick(1.0)
        assert is_running(kind)
        slot[c.PROFILE_MS] = 0
        profiler.on_tick(1.1)
        assert not is_running(kind)
        profiler.on_tick(9.0)
        assert not list(shared.profiles.iterdir())

    def test_makes_the_one_that_was_asked_for_last(
        self, shared: SharedState, slot: memoryview, profiler: Profiler, kind: int
    ) -> None:
        want(slot, kind, ms=300_000)
        profiler.on_tick(1.0)
        want(slot, kind)
        profiler.on_tick(1.1)
        profiler.on_tick(1.2)
        profiler.on_tick(2.2)
        assert not is_running(kind)
        assert [path.name for path in shared.profiles.iterdir()] == [f"{PID}-2"]

    def test_does_not_begin_what_was_called_off(
        self, slot: memoryview, profiler: Profiler, kind: int
    ) -> None:
        want(slot, kind)
        slot[c.PROFILE_MS] = 0
        profiler.on_tick(1.0)
        assert not is_running(kind)

    def test_leaves_nothing_where_it_cannot_write(
        self, shared: SharedState, slot: memoryview, profiler: Profiler, kind: int
    ) -> None:
        want(slot, kind)
        profiler.on_tick(1.0)
        shared.profiles.rmdir()
        profiler.on_tick(9.0)
        assert not is_running(kind)
        assert slot[c.PROFILE_MS] == 0
        shared.profiles.mkdir()

    def test_does_not_end_the_one_of_an_option(
        self, tmp_path: Path, slot: memoryview, profiler: Profiler, kind: int
    ) -> None:
        path = tmp_path / "profile"
        options = (path, None) if kind == profiling.CPU else (None, path)
        with profiling.whole_life(*options, worker=0):
            want(slot, kind)
            profiler.on_tick(1.0)
            assert slot[c.PROFILE_MS] == 0
            profiler.on_tick(9.0)
            assert is_running(kind)
        assert [each.name for each in tmp_path.iterdir()] == ["profile.0"]


def test_notes_on_memory_are_bounded(
    shared: SharedState,
    slot: memoryview,
    profiler: Profiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiling, "_MOST_TRACE_BYTES", 1 << 20)
    want(slot, profiling.MEMORY, ms=300_000)
    profiler.on_tick(1.0)
    profiler.on_tick(1.1)
    assert not list(shared.profiles.iterdir())
    kept = [bytearray(100 + i % 7) for i in range(20_000)]
    profiler.on_tick(1.2)
    (path,) = shared.profiles.iterdir()
    snapshot = tracemalloc.Snapshot.load(str(path))
    assert sum(each.count for each in snapshot.statistics("filename")) >= len(kept)


class TestAdmin:
    def test_tells_that_the_worker_has_ended(self, shared: SharedState) -> None:
        async def run() -> None:
            operations = Operations(shared, load([]))
            task = asyncio.create_task(operations.profile(0, "cpu", 300))
            await asyncio.sleep(0)
            assert shared.counters.bank(0, 0)[c.PROFILE_MS] == 300_000
            shared.counters.settle(0, 0)
            with pytest.raises(RequestError, match="it has ended meanwhile"):
                await asyncio.wait_for(task, DEADLINE_S)

        asyncio.run(run())

    def test_tells_that_the_worker_could_not(self, shared: SharedState, slot: memoryview) -> None:
        async def run() -> None:
            operations = Operations(shared, load([]))
            task = asyncio.create_task(operations.profile(0, "cpu", 300))
            await asyncio.sleep(0)
            slot[c.PROFILE_MS] = 0
            with pytest.raises(RequestError, match="log says why"):
                await asyncio.wait_for(task, DEADLINE_S)

        asyncio.run(run())

    def test_returns_what_a_worker_wrote_before_it_ended(self, shared: SharedState) -> None:
        async def run() -> bytes:
            operations = Operations(shared, load([]))
            task = asyncio.create_task(operations.profile(0, "cpu", 300))
            await asyncio.sleep(0)
            (shared.profiles / f"{PID}-1").write_bytes(b"profile")
            shared.counters.settle(0, 0)
            return await asyncio.wait_for(task, DEADLINE_S)

        assert asyncio.run(run()) == b"profile"
        assert not list(shared.profiles.iterdir())

    def test_calls_off_what_nobody_waits_for(self, shared: SharedState, slot: memoryview) -> None:
        async def run() -> None:
            operations = Operations(shared, load([]))
            task = asyncio.create_task(operations.profile(0, "memory", 300))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        assert slot[c.PROFILE_MS] == 0

    def test_calls_off_what_a_dead_one_waited_for(
        self, shared: SharedState, slot: memoryview
    ) -> None:
        want(slot)
        (shared.profiles / f"{PID}-1").write_bytes(b"profile")
        Operations(shared, load([]))
        assert slot[c.PROFILE_MS] == 0
        assert not list(shared.profiles.iterdir())

    def test_successor_of_a_profiled_worker_can_be_profiled(self, shared: SharedState) -> None:
        async def run() -> None:
            operations = Operations(shared, load([]))
            first = asyncio.create_task(operations.profile(0, "cpu", 300))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="already"):
                await operations.profile(0, "cpu", 1)
            successor = shared.counters.bank(0, 1)
            shared.counters.bank(0, 0)[c.STATE] = c.STATE_DRAINING
            successor[c.STATE], successor[c.PID] = c.STATE_SERVING, PID + 1
            second = asyncio.create_task(operations.profile(0, "cpu", 300))
            await asyncio.sleep(0)
            for number, task in enumerate((first, second)):
                (shared.profiles / f"{PID + number}-1").write_bytes(b"%d" % number)
                assert await asyncio.wait_for(task, DEADLINE_S) == b"%d" % number

        asyncio.run(run())
