"""Look at processes through /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ESTABLISHED = "01"  # the kernel's TCP_ESTABLISHED, as /proc/net/tcp prints it


@dataclass(frozen=True)
class Process:
    """Name one process for ever: an id that is used again has another start time."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        status = _read_stat(self.pid)
        return status is not None and status.started == self.started and status.state != "Z"

    @property
    def command(self) -> str:
        """The name of the program."""
        return Path(f"/proc/{self.pid}/comm").read_text().strip()


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    started: int


def _read_stat(pid: int) -> _Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _Stat(state=fields[0], parent=int(fields[1]), started=int(fields[19]))


def find_children(pid: int) -> list[Process]:
    """Return the living children of a process."""
    stats = {int(entry): _read_stat(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    return [
        Process(child, stat.started)
        for child, stat in stats.items()
        if stat and stat.parent == pid and stat.state != "Z"
    ]


def find_descendants(pid: int) -> list[Process]:
    """Return the living children of a process, their children, and so on."""
    children = find_children(pid)
    return children + [below for child in children for below in find_descendants(child.pid)]


def find_socket_owner(candidates: list[Process], local_port: int, remote_port: int) -> Process:
    """Return which process holds this end of a TCP connection on loopback."""
    inode = _find_socket_inode(local_port, remote_port)
    for process in candidates:
        if f"socket:[{inode}]" in _list_descriptors(process.pid):
            return process
    raise AssertionError(f"none of {candidates} holds {local_port} → {remote_port}")


def _find_socket_inode(local_port: int, remote_port: int) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_, inode = line.split()[:10]
        ports = int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)
        if ports == (local_port, remote_port) and state == ESTABLISHED:
            return inode
    raise AssertionError(f"no connection {local_port} → {remote_port}")


def _list_descriptors(pid: int) -> set[str]:
    folder = f"/proc/{pid}/fd"
    links: set[str] = set()
    try:
        descriptors = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):  # the process has ended
        return links
    for descriptor in descriptors:
        try:
            links.add(os.readlink(f"{folder}/{descriptor}"))
        except FileNotFoundError:  # closed since it was listed
            continue
    return links
