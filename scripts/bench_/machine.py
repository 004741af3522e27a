"""Find out what this machine will bear, and say so before a scenario begins."""

from __future__ import annotations

import math
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench_ import addresses
from bench_.display import warn

SOCKETS_EACH: Final = 18_000
"""Clients of one generator process at most."""
OWN_FILES: Final = 500
"""Files that a generator process needs for other things than clients, generously."""
WORKER_FILES: Final = 1_500
"""Files that a worker of the gateway needs besides: connections to the API, pushes, Redis."""
WORKER_SHARE: Final = 0.85
"""How full a worker may be on average: the kernel spreads connections by a hash, so unevenly."""
KB_EACH: Final = 18
"""Memory of one idle connection, all of it: both ends, and the kernel's buffers."""
DEFAULT_NR_OPEN: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """Hold the limits.

    Attributes:
        cores: CPUs that this process may use.
        memory_kb: memory that is available.
        files: file descriptors that a process may have.
        system_files: what the whole system may have (fs.file-max).
        ports: ports for one source address and one destination.
    """

    cores: int
    memory_kb: int
    files: int
    system_files: int
    ports: int

    @property
    def worker_clients(self) -> int:
        """Clients that one worker should have on average, and at most."""
        return max(1, int(WORKER_SHARE * (self.files - min(WORKER_FILES, self.files // 2))))

    @property
    def generator_clients(self) -> int:
        """Clients that one generator process may have."""
        return max(1, min(SOCKETS_EACH, self.files - OWN_FILES))

    @property
    def connections(self) -> int:
        """Clients that the memory and the system's file limit bear, both ends counted."""
        return min(self.memory_kb // KB_EACH, self.system_files // 2 - 10_000)

    def workers_for(self, clients: int) -> int:
        """Return how many workers so many clients need."""
        return max(1, math.ceil(clients / self.worker_clients))

    def processes_for(self, clients: int) -> int:
        """Return how many generator processes so many clients need."""
        return max(1, math.ceil(clients / self.generator_clients))

    def fit_clients(self, clients: int) -> int:
        """Cut down what the machine cannot hold, and say so."""
        if clients <= self.connections:
            return clients
        warn(f"{clients:,} clients are too many for this machine; it will be {self.connections:,}")
        return self.connections

    def fit_workers(self, asked: int, clients: int) -> int:
        """Return how many workers to start, and say so when those asked for are too few.

        Args:
            asked: how many are wished for; 0 for as few as will do.
            clients: how many they are to hold.
        """
        needed = self.workers_for(clients)
        if asked and asked < needed:
            warn(
                f"{asked} workers are too few for {clients:,} clients, as a process may have "
                f"{self.files:,} files; it will be {needed}"
            )
        return max(asked, needed)

    def describe(self) -> str:
        """Say it in a line."""
        return (
            f"{self.cores} cores, {self.memory_kb / 2**20:.1f} GiB available, "
            f"{self.files:,} files per process, {self.ports:,} ports per source address: "
            f"{self.worker_clients:,} clients per worker, {self.connections:,} connections at most"
        )


def survey() -> Machine:
    """Raise the soft limit of files as far as it goes, and read the others."""
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_kb=available_kb(),
        files=_raise_file_limit(),
        system_files=int(Path("/proc/sys/fs/file-max").read_text()),
        ports=addresses.ports_per_address(),
    )


def available_kb() -> int:
    """Return the memory that could be had without swapping."""
    match = re.search(r"^MemAvailable: +(\d+)", Path("/proc/meminfo").read_text(), re.M)
    assert match
    return int(match[1])


def _raise_file_limit() -> int:
    """Raise the soft limit to the hard one, and that as far as root may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    for limit in (most, hard):
        if limit == resource.RLIM_INFINITY:
            limit = DEFAULT_NR_OPEN
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
        except (ValueError, PermissionError, OSError):
            continue
        return limit
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
