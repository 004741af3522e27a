"""Fuzz a part of the gateway that reads what others send, guided by coverage (atheris).

What is learnt about a target stays in a folder under the system's temporary directory, so that the
next run goes on from there; so do the inputs that something was found with. Exit status: 0 when
nothing was found, 1 when something was, 2 when it could not run.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import fuzz_

DEFAULT_S: Final = 60
MAX_INPUT_BYTES: Final = 4096
_SLOWEST_INPUT_S: Final = 10
_SAY_EVERY_S: Final = 5.0
_EXIT_INTERRUPTED: Final = 72
"""libFuzzer's exit status after Ctrl-C."""
_WORKER: Final = "--worker"

_FOUND: Final = re.compile(r"Test unit written to (.*)")
_STATUS: Final = re.compile(r"#(\d+)\s+[A-Za-z_]+\s+cov: (\d+) ft: \d+ corp: (\d+)")


@dataclass
class Progress:
    """Follow what libFuzzer prints."""

    target: str
    seconds: int
    executions: int = 0
    coverage: int = 0
    first_coverage: int = 0
    """Coverage that the seeds have, and what earlier runs have left."""
    inputs: int = 0
    found: list[str] = field(default_factory=list)
    """Files with inputs that something is wrong with."""
    others: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    """The last lines that are no status."""
    _began_at: float = field(default_factory=time.monotonic)
    _said_at: float = 0.0

    def take(self, line: str) -> None:
        """Read one line."""
        if found := _FOUND.search(line):
            self.found.append(found[1])
        match = _STATUS.match(line)
        if match is None:
            self.others.append(line)
            return
        self.executions, self.coverage, self.inputs = map(int, match.groups())
        if "INITED" in line:
            self.first_coverage = self.coverage
        if time.monotonic() - self._said_at > _SAY_EVERY_S:
            self.say()

    def say(self) -> None:
        """Print where it stands."""
        self._said_at = time.monotonic()
        print(
            f"{self.target}: {self._said_at - self._began_at:5.0f} of {self.seconds} s, "
            f"{self.executions:,} executions, coverage {self.first_coverage} → {self.coverage}, "
            f"{self.inputs} inputs kept",
            flush=True,
        )


def run(target: str, seconds: int) -> int:
    """Fuzz in a process of its own, which libFuzzer ends as it likes; return the exit status."""
    folder = Path(tempfile.gettempdir()) / "ws2api-fuzz" / target
    findings, learnt = folder / "findings", folder / "learnt"
    findings.mkdir(parents=True, exist_ok=True)
    learnt.mkdir(exist_ok=True)
    worker = [sys.executable, __file__, _WORKER, target, str(seconds), str(findings), str(learnt)]
    progress = Progress(target, seconds)
    with subprocess.Popen(worker, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stderr is not None
        with contextlib.suppress(KeyboardInterrupt):  # which the worker gets as well, and ends
            for line in child.stderr:
                progress.take(line.rstrip("\n"))
    progress.say()
    for path in progress.found:
        print(f"{target}: found {path}\n    again: scripts/fuzz {target} --replay {path}")
    if progress.found:
        return 1
    if child.returncode not in (0, _EXIT_INTERRUPTED):
        print(*progress.others, sep="\n", file=sys.stderr)
        print(f"{target}: the worker ended with {child.returncode}", file=sys.stderr)
        return 2
    print(f"{target}: nothing found; what was learnt is in {learnt}")
    return 0


def work(target: str, seconds: int, findings: Path, learnt: Path) -> None:
    """Be the process that fuzzes; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["ws2api", "websockets"]):
        module = fuzz_.load(target)
    dictionary = learnt.with_name("dictionary")
    dictionary.write_text("".join(f'"{_escape(token)}"\n' for token in module.DICTIONARY))
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={_SLOWEST_INPUT_S}",
        f"-dict={dictionary}",
        f"-artifact_prefix={findings}/",
        "-print_funcs=0",
    ]
    # libFuzzer adds to the first folder, and only reads the second.
    atheris.Setup([sys.argv[0], *options, str(learnt), str(fuzz_.CORPUS / target)], module.check)
    atheris.Fuzz()


def _escape(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


def replay(target: str, path: Path) -> int:
    """Run one input, without atheris; return the exit status."""
    try:
        fuzz_.load(target).check(path.read_bytes())
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    print(f"{target}: nothing wrong with {path}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=[*fuzz_.TARGETS], metavar="TARGET")
    parser.add_argument("seconds", nargs="?", type=int, default=DEFAULT_S, metavar="SECONDS")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input, and no other")
    arguments = parser.parse_args()
    if arguments.target is None and not arguments.list:
        parser.error("name a target, or --list them")
    if arguments.seconds < 1:
        parser.error("SECONDS must be at least 1")
    if arguments.replay is not None and not arguments.replay.is_file():
        parser.error(f"there is no file {arguments.replay}")
    return arguments


def main() -> int:
    """Do what the command line says, and return the exit status."""
    if sys.argv[1:2] == [_WORKER]:
        target, seconds, findings, learnt = sys.argv[2:]
        work(target, int(seconds), Path(findings), Path(learnt))
    arguments = _parse()
    if arguments.list:
        for name, description in fuzz_.TARGETS.items():
            print(f"{name:10} {description}")
        return 0
    if arguments.replay is not None:
        return replay(arguments.target, arguments.replay)
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        print(f"scripts/fuzz: atheris is not installed: {error}", file=sys.stderr)
        print("pip has wheels of it for CPython on Linux: pip install atheris", file=sys.stderr)
        return 2
    return run(arguments.target, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
