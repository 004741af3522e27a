"""Read what a process uses from /proc, see proc(5); on other systems there is nothing to read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
# Fields behind the name of the program, which may hold spaces and ends with a parenthesis.
_UTIME: Final = 11
_STIME: Final = 12


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """Tell what a process uses.

    Attributes:
        memory_bytes: resident, pages that are shared with others among it.
        cpu_s: user and system time since its start.
    """

    memory_bytes: int
    open_files: int
    cpu_s: float


def read(pid: int) -> ProcessStats | None:
    """Return what a process uses; None if it has ended, or the system does not tell."""
    folder = _PROC / str(pid)
    try:
        pages = int((folder / "statm").read_text().split()[1])
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        files = _count_files(folder / "fd")
    except (OSError, IndexError, ValueError):
        return None
    ticks = int(fields[_UTIME]) + int(fields[_STIME])
    return ProcessStats(pages * _PAGE_BYTES, files, ticks / _TICKS_PER_S)


def _count_files(folder: Path) -> int:
    # From Linux 6.2 on the size of the folder is the number of files, without the listing of what
    # may be a hundred thousand.
    return os.stat(folder).st_size or len(os.listdir(folder))
