"""Profile a worker while it works: where its time goes, and which lines hold its memory.

Python's own profilers, whose files the usual viewers open: cProfile writes pstats, tracemalloc its
snapshots. Either slows the worker down while it runs, and stops none of its traffic.
"""

from __future__ import annotations

import contextlib
import cProfile
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import structlog

from . import counters as c

CPU: Final = 1
MEMORY: Final = 2
KINDS: Final = {"cpu": CPU, "memory": MEMORY}

_FRAMES: Final = 8
"""Frames that are kept of each allocation's stack."""
_MOST_TRACE_BYTES: Final = 64 << 20
"""Of notes on memory, at run time: with more, writing them would hold up the clients for long."""

_log = structlog.get_logger()


class _Profile(Protocol):
    @property
    def is_full(self) -> bool:
        """Whether there should not be more of it."""

    def stop(self) -> None:
        """Stop, and forget it."""

    def write(self, path: Path) -> None:
        """Stop, and write the file."""


class CpuProfile:
    """Time every function, from now on."""

    is_full = False  # it grows with the code, not with the traffic

    def __init__(self) -> None:
        self._profile = cProfile.Profile()
        self._profile.enable()

    def stop(self) -> None:
        """Stop, and forget it."""
        self._profile.disable()

    def write(self, path: Path) -> None:
        """Stop, and write what `python -m pstats` reads."""
        self.stop()
        self._profile.dump_stats(path)


class MemoryProfile:
    """Note where memory is allocated, from now on."""

    def __init__(self) -> None:
        tracemalloc.start(_FRAMES)

    @property
    def is_full(self) -> bool:
        """Whether there should not be more of it."""
        return tracemalloc.get_tracemalloc_memory() >= _MOST_TRACE_BYTES

    def stop(self) -> None:
        """Stop, and forget it."""
        tracemalloc.stop()

    def write(self, path: Path) -> None:
        """Write what `tracemalloc.Snapshot.load` reads, and stop."""
        snapshot = tracemalloc.take_snapshot()
        self.stop()
        snapshot.dump(str(path))


@contextlib.contextmanager
def whole_life(cpu: Path | None, memory: Path | None, worker: int) -> Iterator[None]:
    """Profile a worker from start to end, into the files of the options with its number behind.

    Args:
        cpu: --cpuprofile; None for none.
        memory: --memprofile; None for none.
        worker: number of its slot.
    """
    profiles: list[tuple[_Profile, Path]] = []
    if memory is not None:
        profiles.append((MemoryProfile(), memory))
    if cpu is not None:
        profiles.append((CpuProfile(), cpu))
    try:
        yield
    finally:
        for profile, path in reversed(profiles):
            _write(profile, path.with_name(f"{path.name}.{worker}"))


class Profiler:
    """Make the profiles that the admin process asks for through the worker's counters.

    PROFILE_WANTED is the number of the one it wants, PROFILE_MS for how long. Either side sets that
    to 0: the admin process when nobody waits any more, the worker when it cannot do it.

    Args:
        slot: the worker's counters.
        folder: where the files go; the admin process picks them up by `file_of`.
    """

    def __init__(self, slot: memoryview, folder: Path) -> None:
        self._slot = slot
        self._folder = folder
        self._profile: _Profile | None = None
        self._number = 0
        self._ends_at = 0.0

    def on_tick(self, now: float) -> None:
        """Begin what was asked for; end what has taken its time, or what nobody waits for."""
        number = self._slot[c.PROFILE_WANTED]
        if self._profile is None:
            if number != self._number:
                self._begin(number, now)
        elif number != self._number or not self._slot[c.PROFILE_MS]:
            self._profile.stop()
            self._profile = None
            _log.info("profile called off")
        elif now >= self._ends_at or self._profile.is_full:
            self._end()

    def _begin(self, number: int, now: float) -> None:
        self._number = number
        slot = self._slot
        if not slot[c.PROFILE_MS]:
            return
        if _is_under_way(slot[c.PROFILE_KIND]):  # an option's, which this one would end
            _log.error("profile not made, there is one from start to end")
            slot[c.PROFILE_MS] = 0  # tells the admin process
            return
        self._ends_at = now + slot[c.PROFILE_MS] / 1000
        try:
            self._profile = CpuProfile() if slot[c.PROFILE_KIND] == CPU else MemoryProfile()
        except ValueError as error:  # of Python's own, which has room for one such tool
            _log.error("profile not made", reason=str(error))
            slot[c.PROFILE_MS] = 0
            return
        _log.info("profiling", kind=type(self._profile).__name__)

    def close(self) -> None:
        """End a profile early: the worker ends."""
        if self._profile is not None:
            self._end()

    def _end(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        if not _write(profile, file_of(self._folder, self._slot[c.PID], self._number)):
            self._slot[c.PROFILE_MS] = 0


def _is_under_way(kind: int) -> bool:
    if kind == MEMORY:
        return tracemalloc.is_tracing()
    monitoring = getattr(sys, "monitoring", None)  # what cProfile uses from Python 3.12 on
    is_monitored = monitoring and monitoring.get_tool(monitoring.PROFILER_ID) is not None
    return bool(is_monitored) or sys.getprofile() is not None


def file_of(folder: Path, pid: int, number: int) -> Path:
    """Name the file of a profile that was asked for."""
    return folder / f"{pid}-{number}"


def remove(path: Path) -> None:
    """Remove the file of a profile that was asked for, and what there is of it so far."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        _part_of(path).unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _write(profile: _Profile, path: Path) -> bool:
    """Write a profile in one step for whoever waits for the file; tell whether that was done."""
    part = _part_of(path)
    try:
        profile.write(part)
        os.replace(part, path)
    except OSError as error:
        _log.error("profile not written", path=str(path), reason=error.strerror)
        with contextlib.suppress(OSError):  # of a full disk
            part.unlink(missing_ok=True)
        return False
    _log.info("profile written", path=str(path))
    return True
