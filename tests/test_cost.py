"""The cost script runs and its counts add up; the figures themselves are nobody's promise here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "cost.py"
TINY = ["--seconds=0.3", "--warm-up=0.1", "--rounds=1", "--clients=20", "--in-flight=8"]
TINY += ["--idle-clients=20", "--no-nchan"]

pytestmark = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx plays the API")


def run_cost(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), *TINY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_reply_is_one_request_and_every_push_one_frame() -> None:
    counts = json.loads(run_cost("--json"))["counts"]["gateway"]
    assert counts["replies"] == counts["api_requests"] > 0
    assert counts["remote_pushes"] == counts["remote_frames"] > 0
    assert counts["local_pushes"] == counts["local_frames"] > 0
    assert counts["idle_clients"] == 20


def test_prints_a_table_with_the_targets() -> None:
    lines = run_cost("--only=idle").splitlines()
    assert lines[1].split()[-1] == "target"
    assert lines[2].startswith("KB per idle connection ")
    assert "at most 6: " in lines[2]


def test_wrong_figure_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only=speed"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no such figures: speed" in done.stderr
