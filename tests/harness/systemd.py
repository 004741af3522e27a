"""Boot this machine's systemd in namespaces of its own, over a throw-away copy of the root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from .processes import find_children
from .waiting import DEADLINE_S, until

TARGET: Final = """\
[Unit]
Description=Nothing but the journal
Requires=systemd-journald.service
After=systemd-journald.service
AllowIsolate=yes
"""

# Arguments: a folder, then folders to bind as FROM:TO. The copy of the root lies in memory.
BOOT: Final = """
set -e
folder=$1; shift
for procs in $CGROUPS; do echo 0 >"$procs/cgroup.procs"; done
mount -t tmpfs none "$folder/disk"
mkdir "$folder/disk/upper" "$folder/disk/work" "$folder/disk/root"
root=$folder/disk/root
mount -t overlay none -o "lowerdir=/,upperdir=$folder/disk/upper,workdir=$folder/disk/work" "$root"
cp -r "$folder/files/." "$root/"
: >"$root/etc/machine-id"
exec systemd-nspawn --quiet --register=no --keep-unit --directory="$root" --console=pipe \
    "--machine=ws2api-$$" "$@" --boot -- --unit=only-journal.target
"""


class NotPossible(Exception):
    """Say in a line why no systemd can boot here."""


class Machine:
    """Run systemd as process 1, on the network of this machine, until the context ends.

    Args:
        folder: an empty one, short of name.
        files: contents by absolute path.
        binds: what is shown read-only where.

    Raises:
        NotPossible: if this system does not let a systemd boot.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], binds: Mapping[Path, str]) -> None:
        missing = [name for name in ("systemd-nspawn", "nsenter") if shutil.which(name) is None]
        if missing or os.geteuid() != 0:
            raise NotPossible(f"needs root and systemd-container of Debian; missing: {missing}")
        (folder / "disk").mkdir()
        target = "/etc/systemd/system/only-journal.target"
        for path, text in {**files, target: TARGET}.items():
            copy = folder / "files" / path.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        self._log = folder / "log"
        self._cgroups = _make_cgroups()
        try:
            self._process = self._boot(folder, binds)
        except BaseException:
            self._remove_cgroups()
            raise
        try:
            self._await_boot()
        except BaseException:
            self.close()
            raise

    def _boot(self, folder: Path, binds: Mapping[Path, str]) -> subprocess.Popen[bytes]:
        shown = [f"--bind-ro={source}:{target}" for source, target in binds.items()]
        environment = {
            "CGROUPS": " ".join(map(str, self._cgroups)),
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
        }
        with self._log.open("wb") as log:
            return subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", BOOT, "sh", folder, *shown],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | environment,
            )

    def _await_boot(self) -> None:
        def has_booted() -> bool:
            if self._process.poll() is not None:
                raise NotPossible(f"systemd does not boot here: {self._log.read_text()}")
            return self.systemctl("is-active", "only-journal.target", check=False) == "active"

        try:
            until(has_booted, what="boot of systemd")
        except AssertionError as error:
            raise NotPossible(f"systemd does not boot here: {error}") from None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in the machine; return what it printed, without blank ends."""
        inits = find_children(self._process.pid)
        if not inits:
            return ""
        enter = ["nsenter", "--target", str(inits[0].pid), "--all", "--", *command]
        done = subprocess.run(
            enter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout.strip()

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl in the machine."""
        return self.run("systemctl", "--no-pager", *arguments, check=check)

    def show(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.systemctl("show", unit, "--value", "--property", name)

    def journal(self, unit: str) -> str:
        """Return what the unit has logged since it was started last."""
        started = f"_SYSTEMD_INVOCATION_ID={self.show(unit, 'InvocationID')}"
        return self.run("journalctl", "--no-pager", "--output=cat", started)

    def close(self) -> None:
        """Turn the machine off, and leave nothing of it."""
        for init in find_children(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(init.pid, signal.SIGKILL)
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(DEADLINE_S)
        self._remove_cgroups()

    def _remove_cgroups(self) -> None:
        for top in self._cgroups:
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()


def _make_cgroups() -> list[Path]:
    """Make a group in each hierarchy in which systemd keeps its own: nspawn leaves some behind."""
    made = []
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, name, path = line.split(":", 2)
        for _, where, kind, options, *_ in mounts:
            is_it = kind == "cgroup" and name in options.split(",") if name else kind == "cgroup2"
            if is_it and name in ("", "name=systemd"):
                group = Path(where) / path.lstrip("/") / f"ws2api-test-{os.getpid()}"
                try:
                    group.mkdir()
                except OSError as error:
                    raise NotPossible(f"no cgroup for a systemd: {error}") from None
                made.append(group)
    return made


def show_python(packages: Mapping[str, Path]) -> tuple[dict[Path, str], str]:
    """Show this interpreter where any user may read it, with these packages of the checkout.

    The interpreter of the tests may lie in a home folder, which a sandbox hides.

    Returns:
        What to bind, and the lines of a unit with which a PYTHON of /opt/python/bin finds all.
    """
    (others,) = Path(sys.prefix).glob("lib/python*/site-packages")
    binds = {Path(sys.base_prefix): "/opt/python", others: "/opt/packages"}
    binds |= {source: f"/opt/checkout/{name}" for name, source in packages.items()}
    path = "PYTHONPATH=/opt/checkout:/opt/packages"
    return binds, f"Environment=LD_LIBRARY_PATH=/opt/python/lib {path}"
