"""Read what a machine has, and give it what it lacks, for now and for the next boot."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tune_.needs import FILES, HUGE_PAGES, Host, Need, Numbers, larger, unmet

_READ: Final = (
    "fs.epoll.max_user_watches",
    "fs.file-max",
    "fs.nr_open",
    "net.core.netdev_max_backlog",
    "net.core.somaxconn",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_max_orphans",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_mem",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_tw_reuse",
    "net.ipv4.tcp_wmem",
    "net.netfilter.nf_conntrack_buckets",
    "net.netfilter.nf_conntrack_max",
    "net.netfilter.nf_conntrack_tcp_timeout_established",
    "vm.overcommit_memory",
)
_TRACKING: Final = "net.netfilter."

_HUGE_PAGES_FILE: Final = "sys/kernel/mm/transparent_hugepage/enabled"
_NAME: Final = "90-ws2api.conf"
SYSCTL_FILE: Final = f"etc/sysctl.d/{_NAME}"
LIMITS_FILE: Final = f"etc/security/limits.d/{_NAME}"
MODULES_FILE: Final = f"etc/modules-load.d/{_NAME}"
TEMPORARY_FILE: Final = f"etc/tmpfiles.d/{_NAME}"
_SYSCTL_FOLDERS: Final = ("etc/sysctl.d", "run/sysctl.d", "usr/lib/sysctl.d")

_HEAD: Final = "# Written by scripts/tune of ws2api, see docs/tuning.md there.\n"


class TuneError(Exception):
    """Say why the machine could not be read or changed."""


def read(root: Path) -> Host:
    """Read the machine whose files are under `root`.

    Raises:
        TuneError: if it is no Linux.
    """
    limits = _text(root / "proc/self/limits")
    memory = _text(root / "proc/meminfo")
    found = re.search(r"^Max open files\s+(\S+)\s+(\S+)", limits or "", re.M)
    if found is None or memory is None:
        raise TuneError(f"{root / 'proc'} does not tell limits and memory; this is for Linux only")
    values = {key: _text(sysctl_path(root, key)) for key in _READ}
    mode = re.search(r"\[(\w+)\]", _text(root / _HUGE_PAGES_FILE) or "")
    return Host(
        sysctls={key: _numbers(value) for key, value in values.items() if value is not None},
        files=(_limit(found[1]), _limit(found[2])),
        huge_pages=mode[1] if mode else None,
        memory_bytes=_memory(memory, "MemTotal"),
        available_bytes=_memory(memory, "MemAvailable"),
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
    )


def sysctl_path(root: Path, key: str) -> Path:
    """Return the file of a sysctl."""
    return root / "proc/sys" / key.replace(".", "/")


def _text(path: Path) -> str | None:
    """Return what a file holds, None where there is none or it is nobody's business."""
    try:
        return path.read_text()
    except OSError:
        return None


def _numbers(text: str) -> Numbers:
    return tuple(int(part) for part in text.split())


def _limit(text: str) -> int:
    return 1 << 30 if text == "unlimited" else int(text)


def _memory(text: str, name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB", text, re.M)
    return int(found[1]) * 1_024 if found else 0


@dataclass(slots=True)
class Changes:
    """Note what was done.

    Attributes:
        written: a line for each file that was written.
        failed: a line for each that could not be.
    """

    written: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def write(self, path: Path, text: str, what: str) -> bool:
        """Write a file and note it; return whether that could be done."""
        try:
            if not path.is_relative_to("/proc") and not path.is_relative_to("/sys"):
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            self.failed.append(f"{path}: {error.strerror}")
            return False
        self.written.append(f"{path}: {what}")
        return True


def apply(all_needs: Iterable[Need], root: Path) -> Changes:
    """Write what is too low, to the kernel at once and to /etc for the next boot."""
    changes = Changes()
    low = list(unmet(list(all_needs)))
    sysctls = {need.key: need for need in low if need.key not in (FILES, HUGE_PAGES)}
    set_now = {
        key: _numbers(need.wanted)
        for key, need in sysctls.items()
        if changes.write(sysctl_path(root, key), f"{need.wanted}\n", _change(need))
    }
    if set_now:
        _persist_sysctls(changes, root, set_now)
    for need in low:
        if need.key == FILES:
            _persist_files(changes, root, need)
        elif need.key == HUGE_PAGES:
            path = root / _HUGE_PAGES_FILE
            if changes.write(path, need.wanted, _change(need)):
                line = f"w /{_HUGE_PAGES_FILE} - - - - {need.wanted}"
                changes.write(root / TEMPORARY_FILE, f"{_HEAD}{line}\n", line)
    return changes


def _change(need: Need) -> str:
    return f"{need.wanted}, was {need.present}"


def _persist_sysctls(changes: Changes, root: Path, raised: dict[str, Numbers]) -> None:
    path = root / SYSCTL_FILE
    kept = dict(_assignments(_text(path) or ""))
    for key, value in raised.items():
        kept[key] = larger(key, value, kept[key]) if len(kept.get(key, ())) == len(value) else value
    lines = [f"{key} = {' '.join(map(str, value))}\n" for key, value in sorted(kept.items())]
    changes.write(path, _HEAD + "".join(lines), ", ".join(sorted(raised)))
    if any(key.startswith(_TRACKING) for key in raised):
        # Its sysctls are there only when it is loaded, and sysctl.d is read once (sysctl.d(5)).
        text = f"{_HEAD}nf_conntrack\n"
        changes.write(root / MODULES_FILE, text, "nf_conntrack, before its sysctls are set at boot")


def _persist_files(changes: Changes, root: Path, need: Need) -> None:
    path = root / LIMITS_FILE
    before = re.findall(r"nofile\s+(\d+)", _text(path) or "")
    files = max([int(need.wanted.split()[1]), *map(int, before)])
    # A star does not stand for root (limits.conf(5)).
    lines = [
        f"{who:4} {which} nofile {files}\n" for who in ("*", "root") for which in ("soft", "hard")
    ]
    changes.write(path, _HEAD + "".join(lines), f"nofile {files}, for who logs in from now on")


def overridden(keys: Iterable[str], root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that are read after ours at boot and set the same, and what they set."""
    wanted = set(keys)
    seen: set[str] = set()
    for folder in _SYSCTL_FOLDERS:
        for path in sorted((root / folder).glob("*.conf")):
            # A file of the same name in an earlier folder goes before (sysctl.d(5)).
            if path.name > _NAME and path.name not in seen:
                seen.add(path.name)
                for key, _ in _assignments(_text(path) or ""):
                    if key in wanted:
                        yield path, key


def _assignments(text: str) -> Iterator[tuple[str, Numbers]]:
    """Yield what a file of sysctl.d sets to numbers."""
    for line in text.splitlines():
        found = re.fullmatch(r"\s*-?([\w./-]+)\s*=\s*([\d\s]+)", line)
        if found:
            yield found[1].replace("/", "."), _numbers(found[2])
