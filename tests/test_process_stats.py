"""Read what a real process uses."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from ws2api.supervisor import process_stats

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")


def test_reads_its_own() -> None:
    stats = process_stats.read(os.getpid())
    assert stats is not None
    assert stats.memory_bytes > 5 << 20
    assert stats.cpu_s > 0


def test_counts_files(tmp_path: Path) -> None:
    before = process_stats.read(os.getpid())
    with ExitStack() as files:
        for number in range(10):
            files.enter_context((tmp_path / str(number)).open("w"))
        after = process_stats.read(os.getpid())
    assert before is not None
    assert after is not None
    assert after.open_files == before.open_files + 10


def test_nothing_is_known_of_a_process_that_has_ended() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert process_stats.read(ended.pid) is None
