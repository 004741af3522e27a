"""Guard against slower code by a measurement: what a message costs beside the naive design.

Both are measured in the same run, so the ratio holds on machines of any speed; 0.15 to 0.25 has
been seen. The bound is far from that, so that no neighbour on the machine makes it fail. What
tests/test_work_per_message.py counts is exact, but sees neither the kernel nor code in C.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("rich", reason="the extra `bench`")

SCRIPT: Final = Path(__file__).parents[1] / "scripts" / "bench.py"
MOST: Final = 0.5


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx plays the API")
def test_message_costs_half_of_what_the_naive_design_takes_at_most(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "compare", "--systems=gateway,naive", "--works=narrow"]
    command += ["--rounds=1", "--seconds=1", "--warm-up=0.5", f"--json={report}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    cpu_us = {row["system"]: row["figures"]["cpu_us"] for row in rows}
    print(f"gateway {cpu_us['gateway']:.1f} µs, naive {cpu_us['naive']:.1f} µs per message")
    assert 0 < cpu_us["gateway"] <= MOST * cpu_us["naive"]
