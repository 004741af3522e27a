"""Profile a worker while it works: where its time goes, and which lines hold its memory.

Python's own profilers, whose files the usual viewers open: cProfile writes pstats, tracemalloc its
snapshots. Either slows the worker down while it runs, and stops none of its traffic; only the
writing of a snapshot holds it up, for a second or more per million of allocations.
"""

from __future__ import annotations

import contextlib
import cProfile
import os
import tracemalloc
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, Protocol

import structlog

from . import counters as c

CPU: Final = 1
MEMORY: Final = 2
KINDS: Final = {"cpu": CPU, "memory": MEMORY}

_FRAMES: Final = 8
"""Frames that are kept of each allocation's stack."""

_log = structlog.get_logger()


class _Profile(Protocol):
    def write(self, path: Path) -> None:
        """Stop, and write the file."""


class CpuProfile:
    """Time every function, from now on."""

    def __init__(self) -> None:
        self._profile = cProfile.Profile()
        self._profile.enable()

    def write(self, path: Path) -> None:
        """Stop, and write what `python -m pstats` reads."""
        self._profile.disable()
        self._profile.dump_stats(path)


class MemoryProfile:
    """Note where memory is allocated, from now on."""

    def __init__(self) -> None:
        tracemalloc.start(_FRAMES)

    def write(self, path: Path) -> None:
        """Write what `tracemalloc.Snapshot.load` reads, and stop."""
        snapshot = tracemalloc.take_snapshot()
        tracemalloc.stop()
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

    Args:
        slot: the worker's counters.
        folder: where the files go; the admin process picks them up by `file_of`.
        busy: kinds that `whole_life` makes already, of which there can be no two at once.
    """

    def __init__(self, slot: memoryview, folder: Path, busy: Collection[int] = ()) -> None:
        self._slot = slot
        self._folder = folder
        self._busy = busy
        self._profile: _Profile | None = None
        self._number = 0
        self._ends_at = 0.0

    def on_tick(self, now: float) -> None:
        """Begin what was asked for; end what has taken its time."""
        number = self._slot[c.PROFILE_WANTED]
        if self._profile is not None:
            if now >= self._ends_at or number != self._number:
                self._end()
        elif number != self._number:
            self._begin(number, now)

    def _begin(self, number: int, now: float) -> None:
        self._number = number
        if not number:
            return
        kind = self._slot[c.PROFILE_KIND]
        if kind in self._busy:
            _log.error("not profiled: the options have it done already")
            return
        self._ends_at = now + self._slot[c.PROFILE_MS] / 1000
        try:
            self._profile = CpuProfile() if kind == CPU else MemoryProfile()
        except ValueError as error:  # of Python's own, which has room for one such tool
            _log.error("not profiled", reason=str(error))
            return
        _log.info("profiling", kind=type(self._profile).__name__)

    def close(self) -> None:
        """End a profile early: the worker ends."""
        if self._profile is not None:
            self._end()

    def _end(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        _write(profile, file_of(self._folder, self._slot[c.PID], self._number))


def file_of(folder: Path, pid: int, number: int) -> Path:
    """Name the file of a profile that was asked for."""
    return folder / f"{pid}-{number}"


def _write(profile: _Profile, path: Path) -> None:
    """Write a profile in one step for whoever waits for the file."""
    part = path.with_name(f"{path.name}.part")
    try:
        profile.write(part)
        os.replace(part, path)
    except OSError as error:
        _log.error("profile not written", path=str(path), reason=error.strerror)
        with contextlib.suppress(OSError):
            part.unlink()
    else:
        _log.info("profile written", path=str(path))
