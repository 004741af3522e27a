"""Weigh the gateway's processes: open files and memory of each, when nobody is connected."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soak_.world import World

SPARE_FILES: Final = 3
"""More open files than at the start that are no leak: a connection that is about to close."""
SPARE_SHARE: Final = 0.3
SPARE_BYTES: Final = 24 << 20
"""Growth of a process that is no leak: allocators keep what a busy time has needed."""


@dataclass(frozen=True)
class Weight:
    """Hold what a process has in use; of several, the most that one of them has."""

    files: int
    memory_bytes: int
    """Proportional set size: a page that is shared counts in parts."""


def weigh(world: World) -> dict[str, Weight]:
    """Weigh the processes by what they do."""
    roles = {
        "supervisor": [world.gateway.pid],
        "worker": world.worker_pids(),
        "admin": [world.gateway.find_admin().pid],
    }
    world.gateway.disconnect_all()
    return {role: _weigh_heaviest(pids) for role, pids in roles.items()}


def _weigh_heaviest(pids: list[int]) -> Weight:
    return Weight(
        max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        max(_memory_bytes(pid) for pid in pids),
    )


def _memory_bytes(pid: int) -> int:
    found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert found, pid
    return int(found[1]) * 1024


def compare(before: dict[str, Weight], after: dict[str, Weight]) -> list[str]:
    """Say what has grown by more than it may."""
    problems = []
    for role, start in before.items():
        end = after[role]
        if end.files > start.files + SPARE_FILES:
            problems.append(f"{role}: {start.files} open files have become {end.files}")
        if end.memory_bytes > start.memory_bytes * (1 + SPARE_SHARE) + SPARE_BYTES:
            grown = (end.memory_bytes - start.memory_bytes) >> 20
            problems.append(f"{role}: grown by {grown} MiB")
    return problems
