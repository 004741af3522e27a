"""Run a program on a terminal of its own, and see what a person would."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from .waiting import DEADLINE_S


class Terminal:
    """Run a command on a pseudo-terminal until the context ends.

    Args:
        command: the program and its arguments.
        folder: where it runs.
        environment: variables to add to those of the test.

    Attributes:
        shown: all that the program has written, escape sequences and all.
    """

    def __init__(
        self, command: Sequence[str], *, folder: Path | None = None, **environment: str
    ) -> None:
        self.shown = ""
        self._screen, other_end = pty.openpty()
        try:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=other_end,
                stdout=other_end,
                stderr=other_end,
                start_new_session=True,
                env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"} | environment,
            )
        except BaseException:
            os.close(self._screen)
            raise
        finally:
            os.close(other_end)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        os.close(self._screen)

    def write(self, text: str) -> None:
        """Type."""
        os.write(self._screen, text.encode())

    def read_until(self, pattern: str) -> str:
        """Wait until what was written since the last call matches; return that."""
        deadline, shown = time.monotonic() + DEADLINE_S, ""
        while not re.search(pattern, shown):
            assert time.monotonic() < deadline, f"no {pattern!r} in {shown!r}"
            piece = self._read()
            assert piece != "", f"ended without {pattern!r}: {shown!r}"
            shown += piece or ""
        return shown

    def read_to_end(self) -> int:
        """Wait until the program ends; return its exit status."""
        deadline = time.monotonic() + DEADLINE_S
        while self._read() != "":
            assert time.monotonic() < deadline, f"does not end: {self.shown[-2000:]!r}"
        return self.process.wait(DEADLINE_S)

    def _read(self) -> str | None:
        """Return what has come; None if nothing did for a while, an empty text at the end."""
        if not select.select([self._screen], [], [], 0.1)[0]:
            return None
        try:
            data = os.read(self._screen, 1 << 16)
        except OSError:  # Linux' way to say that the program has closed its end
            return ""
        text = data.decode(errors="replace")
        self.shown += text
        return text
