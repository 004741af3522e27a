"""The short form of the benchmark runs its parts; the figures are nobody's promise here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the extra `bench`")

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = ["--systems=gateway", "--rounds=1", "--seconds=0.2", "--warm-up=0.1"]


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    """Put the script beside a `bench` that installs nothing while other tests run.

    It compares with a tenth of the clients, since the figures are nobody's promise, and writes into
    the file `runs` what it was asked for, a line each time.
    """
    bench = tmp_path / "bench"
    bench.write_text(
        f'#!/bin/sh\necho "$@" >>"{tmp_path}/runs"\n'
        '[ "$1" != compare ] || set -- "$@" --scale=0.1\n'
        f'exec "{sys.executable}" "{SCRIPTS}/bench.py" "$@"\n'
    )
    bench.chmod(0o755)
    link = tmp_path / "cost"
    link.symlink_to(SCRIPTS / "cost")
    return link


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx plays the API")
def test_prints_messages_memory_connects_and_pushes(cost: Path) -> None:
    done = subprocess.run([cost, *TINY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in (
        "CPU µs per message, 64 in flight",
        "CPU µs per message, 1,000 in flight",
        "KB per idle connection",
        "CPU µs per connect",
        "push: medians",
    ):
        assert line in done.stdout


def test_passes_arguments_on_and_ends_with_the_first_failure(cost: Path) -> None:
    command = [cost, "--systems=nobody"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no nobody here" in done.stderr
    (only,) = (cost.parent / "runs").read_text().splitlines()
    assert only.startswith("compare ")
    assert only.endswith(" --systems=nobody")
