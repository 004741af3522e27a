"""Run a program beside the gateway: the demo API, an example, the script that starts both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.waiting import DEADLINE_S, until

ROOT = Path(__file__).parent.parent.parent


def listens(port: int) -> bool:
    """Tell whether something accepts connections on a loopback port."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _heed_interrupts() -> None:
    """Let SIGINT mean something: where the suite runs in a shell's background it is ignored.

    A program inherits that, and bash sets no trap for a signal that was ignored when it began.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Program:
    """Run a command until the context ends, then terminate it.

    Args:
        command: the program and its arguments; started in the project's folder.
        port: wait until something listens there; None does not wait.
        environment: variables to add to the clean environment.
    """

    def __init__(self, command: Sequence[str], *, port: int | None, **environment: str) -> None:
        self._output, name = tempfile.mkstemp()
        os.unlink(name)  # the descriptor is all that is needed
        kept = {name: v for name, v in os.environ.items() if not name.startswith("WS2API_")}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=kept | {"PYTHONUNBUFFERED": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        try:
            if port is not None:
                until(lambda: self._has_ended or listens(port), what=f"port {port}")
                assert not self._has_ended, self.output
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._has_ended:
            self.process.terminate()
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise
        finally:
            os.close(self._output)

    def stop(self, number: signal.Signals) -> int:
        """Send a signal and return the exit status that it leads to."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    @property
    def _has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def output(self) -> str:
        """What the program has printed so far."""
        return os.pread(self._output, 1 << 20, 0).decode()

    def wait_for_output(self, text: str) -> None:
        """Wait until the program has printed this."""
        try:
            until(lambda: text in self.output or self._has_ended, what=repr(text))
            assert text in self.output
        except AssertionError as error:
            raise AssertionError(f"{error}; the program printed:\n{self.output}") from None
