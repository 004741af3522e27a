"""Profile this process, and open the files as their viewers do."""

from __future__ import annotations

import errno
import os
import pstats
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs
from ws2api.gateway import counters as c
from ws2api.gateway import profiling
from ws2api.gateway.counters import Counters
from ws2api.gateway.profiling import CPU, MEMORY, Profiler, file_of, whole_life

PID = 4711


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    """Leave no profiler behind, and bring that of a coverage tool back."""
    was_tracing, profiler = tracemalloc.is_tracing(), sys.getprofile()
    if was_tracing:
        pytest.skip("tracemalloc traces the tests themselves (-X tracemalloc)")
    yield
    assert not tracemalloc.is_tracing()
    assert sys.getprofile() is profiler


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """Catch what is logged, whatever the level."""
    former = structlog.get_config()
    structlog.reset_defaults()
    with capture_logs() as lines:
        yield lines
    structlog.configure(**former)


def work_that_shows() -> int:
    return sum(number * number for number in range(1000))


def allocate_what_shows() -> list[bytes]:
    return [b"%d" % number * 100 for number in range(1000)]


def functions_of(path: Path) -> set[str]:
    """Name the functions in a file of cProfile."""
    return {name for _, _, name in pstats.Stats(str(path)).stats}  # type: ignore[attr-defined]


def bytes_of_this_file(path: Path) -> int:
    """Count what a snapshot of tracemalloc found allocated by this file."""
    snapshot = tracemalloc.Snapshot.load(str(path))
    own = snapshot.filter_traces([tracemalloc.Filter(True, __file__, all_frames=True)])
    return sum(statistic.size for statistic in own.statistics("filename"))


# From start to end.


def test_nothing_is_written_without_the_options(tmp_path: Path, lines: list[Any]) -> None:
    with whole_life(None, None, 0):
        assert not tracemalloc.is_tracing()
        assert sys.getprofile() is None
    assert not list(tmp_path.iterdir())
    assert not lines


def test_both_profiles_of_a_life(tmp_path: Path, lines: list[Any]) -> None:
    with whole_life(tmp_path / "cpu", tmp_path / "memory.out", 3):
        work_that_shows()
        kept = allocate_what_shows()
    assert kept
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.3", "memory.out.3"}
    assert "work_that_shows" in functions_of(tmp_path / "cpu.3")
    assert bytes_of_this_file(tmp_path / "memory.out.3") > 100_000
    assert [line["event"] for line in lines] == ["profile written"] * 2


def test_life_that_ends_in_an_exception_is_written_too(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_life(tmp_path / "cpu", None, 0):
            work_that_shows()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "work_that_shows" in functions_of(tmp_path / "cpu.0")


def test_replacement_writes_over_the_file_of_its_predecessor(tmp_path: Path) -> None:
    for function in (allocate_what_shows, work_that_shows):
        with whole_life(tmp_path / "cpu", None, 0):
            function()
    assert "work_that_shows" in functions_of(tmp_path / "cpu.0")
    assert "allocate_what_shows" not in functions_of(tmp_path / "cpu.0")


@pytest.mark.parametrize("kind", ["cpu", "memory"])
def test_file_that_cannot_be_written_is_named_and_nothing_else_happens(
    tmp_path: Path, lines: list[Any], kind: str
) -> None:
    path = tmp_path / "missing" / "file"
    with whole_life(path if kind == "cpu" else None, path if kind == "memory" else None, 0):
        work_that_shows()
    assert lines == [
        {
            "event": "profile not written",
            "log_level": "error",
            "path": f"{path}.0",
            "reason": os.strerror(errno.ENOENT),
        }
    ]


def test_folder_in_the_place_of_the_file(tmp_path: Path, lines: list[Any]) -> None:
    (tmp_path / "cpu.0").mkdir()
    with whole_life(tmp_path / "cpu", None, 0):
        work_that_shows()
    assert [line["reason"] for line in lines] == [os.strerror(errno.EISDIR)]
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.0"], "a part is left"


def test_full_disk_leaves_no_part(
    tmp_path: Path, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(profiling.MemoryProfile, "write", write)
    with whole_life(None, tmp_path / "memory", 0):
        pass
    tracemalloc.stop()
    assert [line["reason"] for line in lines] == [os.strerror(errno.ENOSPC)]
    assert not list(tmp_path.iterdir())


# On request.


class Asked:
    """Be the admin process: ask through the counters; and the loop: tick."""

    def __init__(self, folder: Path) -> None:
        self.slot = Counters(1).bank(0, 0)
        self.slot[c.PID] = PID
        self.folder = folder
        self.profiler = Profiler(self.slot, folder)
        self.now = 1000.0

    def asks(self, kind: int, seconds: float) -> Path:
        self.slot[c.PROFILE_KIND], self.slot[c.PROFILE_MS] = kind, int(seconds * 1000)
        self.slot[c.PROFILE_WANTED] += 1
        return file_of(self.folder, PID, self.slot[c.PROFILE_WANTED])

    def ticks(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.profiler.on_tick(self.now)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def test_nothing_happens_unasked(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    for _ in range(3):
        asked.ticks(1.0)
    assert sys.getprofile() is None
    assert not asked.files


def test_cpu_profile_for_some_seconds(tmp_path: Path, lines: list[Any]) -> None:
    asked = Asked(tmp_path)
    path = asked.asks(CPU, 2.0)
    asked.ticks()
    work_that_shows()
    asked.ticks(1.9)
    assert not asked.files
    asked.ticks(0.1)
    allocate_what_shows()
    assert asked.files == [path.name]
    assert "work_that_shows" in functions_of(path)
    assert "allocate_what_shows" not in functions_of(path)
    asked.ticks(5.0)
    assert asked.files == [path.name]
    assert [line["event"] for line in lines] == ["profiling", "profile written"]


def test_memory_profile_for_some_seconds(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    path = asked.asks(MEMORY, 2.0)
    asked.ticks()
    kept = allocate_what_shows()
    asked.ticks(2.0)
    assert bytes_of_this_file(path) > 100_000
    assert kept


def test_one_after_another(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    for number, kind in enumerate((CPU, MEMORY, CPU), 1):
        path = asked.asks(kind, 1.0)
        asked.ticks()
        asked.ticks(1.0)
        assert path.exists()
        assert len(asked.files) == number


def test_another_request_calls_the_first_off(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    first = asked.asks(CPU, 300.0)
    asked.ticks()
    second = asked.asks(MEMORY, 1.0)
    asked.ticks(0.1)
    assert sys.getprofile() is None
    assert not first.exists()
    asked.ticks(0.1)
    assert tracemalloc.is_tracing()
    asked.ticks(1.0)
    assert second.exists()


def test_worker_that_ends_writes_what_it_has(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    path = asked.asks(CPU, 300.0)
    asked.ticks()
    work_that_shows()
    asked.profiler.close()
    assert "work_that_shows" in functions_of(path)
    asked.profiler.close()


@pytest.mark.parametrize("kind", [CPU, MEMORY])
def test_request_leaves_the_profile_of_the_options_alone(
    tmp_path: Path, lines: list[Any], kind: int
) -> None:
    (tmp_path / "asked").mkdir()
    asked = Asked(tmp_path / "asked")
    path = tmp_path / "life"
    with whole_life(path if kind == CPU else None, path if kind == MEMORY else None, 0):
        asked.asks(kind, 1.0)
        asked.ticks()
        asked.ticks(1.0)
        work_that_shows()
        kept = allocate_what_shows()
    assert kept
    assert not asked.files
    assert [line["event"] for line in lines if line["log_level"] == "error"] == [
        "profile not made, there is one from start to end"
    ]
    if kind == CPU:
        assert "work_that_shows" in functions_of(tmp_path / "life.0")
    else:
        assert bytes_of_this_file(tmp_path / "life.0") > 100_000


def test_tool_that_is_in_the_way_stops_nobody(
    tmp_path: Path, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ValueError("Another profiling tool is already active")

    monkeypatch.setattr(profiling, "CpuProfile", refuse)
    asked = Asked(tmp_path)
    asked.asks(CPU, 1.0)
    for _ in range(3):
        asked.ticks(1.0)
    assert not asked.files
    assert [line["event"] for line in lines] == ["profile not made"]
