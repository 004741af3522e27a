"""Read from /proc what processes use: CPU, and memory in proportional shares."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Final

TICK_US: Final = 1e6 / os.sysconf("SC_CLK_TCK")


def cpu_us(pid: int) -> tuple[float, float]:
    """Return user and system time of a process, those of children waited for included."""
    _, user, system = _stat(pid)
    return user, system


def pss_kb(pid: int) -> int:
    """Return the proportional set size: a page that n processes share counts 1/n in each.

    Pages of files are left out: they do not grow with connections, and how they are shared out
    changes with whatever else runs the same Python.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", text, re.M))


def name(pid: int) -> str:
    """Return the name of its program; empty when it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def tree(root: int) -> dict[int, tuple[float, float]]:
    """Return the processes of a tree, and of each its user and system time."""
    times: dict[int, tuple[float, float]] = {}
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            pid = int(path.name)
            parent, user, system = _stat(pid)
            times[pid] = user, system
            children[parent].append(pid)
    found = [root]
    for pid in found:  # grows while it is walked
        found += children[pid]
    return {pid: times[pid] for pid in found if pid in times}


def _stat(pid: int) -> tuple[int, float, float]:
    """Return the parent, and user and system time in µs; see proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, waited_user, waited_system = (int(field) * TICK_US for field in fields[11:15])
    return int(fields[1]), user + waited_user, system + waited_system
