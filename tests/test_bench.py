"""Each scenario of the benchmark runs and its counts add up; the figures are nobody's promise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_.systems import NCHAN_MODULE

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"
TINY = ["--seconds=0.3", "--warm-up=0.1", "--rounds=1"]

needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx plays the API")
needs_nchan = pytest.mark.skipif(not NCHAN_MODULE.exists(), reason="there is no Nchan")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def rows(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    done = bench(*arguments, "--json", folder / "report.json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())["rows"]
    return found


@needs_nginx
@needs_nchan
def test_messages_of_two_systems_side_by_side(tmp_path: Path) -> None:
    options = ["--clients=20", "--in-flight=8", "--bytes=30,65536", *TINY]
    found = rows(tmp_path, "messages", *options)
    assert [(row["system"], row["load"]["bytes"]) for row in found] == [
        ("gateway", 30),
        ("nchan", 30),
        ("gateway", 65_536),
        ("nchan", 65_536),
    ]
    for row in found:
        figures = row["figures"]
        assert row["load"] | {"bytes": 0} == {
            "clients": 20, "in_flight": 8, "bytes": 0, "workers": 1
        }  # fmt: skip
        assert figures["per_second"] > 0
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["p999_ms"]


@needs_nginx
def test_paced_messages(tmp_path: Path) -> None:
    options = ["--clients=50", "--rate=500", "--systems=gateway", *TINY]
    [row] = rows(tmp_path, "messages", *options)
    assert row["load"]["rate"] == "500"
    assert row["figures"]["per_second"] > 0


@needs_nginx
def test_connects_closes_and_a_storm(tmp_path: Path) -> None:
    options = ["--clients=60", "--storm=80", "--at-once=20", "--systems=gateway", "--rounds=1"]
    connect, close, storm = rows(tmp_path, "connect", *options)
    assert [row["scenario"] for row in (connect, close, storm)] == ["connect", "close", "storm"]
    assert connect["figures"]["per_second"] > 0
    assert close["figures"]["deletes"] == 60
    assert storm["load"]["clients"] == 80
    assert storm["figures"]["errors"] == 0


def test_pushes_of_each_kind(tmp_path: Path) -> None:
    found = rows(tmp_path, "push", "--clients=40", "--in-flight=8", *TINY)
    assert [row["load"]["kind"] for row in found] == ["local", "remote", "advertised"]
    for row in found:
        assert row["figures"]["per_second"] > 0
        assert row["figures"]["p50_ms"] > 0


@needs_nginx
def test_idle_clients_are_weighed_and_pinged(tmp_path: Path) -> None:
    options = ["--clients=2000", "--ping-interval=1", "--seconds=2", "--warm-up=0.1"]
    [row] = rows(tmp_path, "idle", *options, "--systems=gateway")
    figures = row["figures"]
    assert figures["pings"] > 0
    assert figures["generator_kb"] < 2
    assert 0 < figures["connection_kb"] < 100


@needs_nginx
def test_more_workers_share_the_clients(tmp_path: Path) -> None:
    one, two = rows(tmp_path, "scale", "--workers=1,2", "--clients=60", "--in-flight=8", *TINY)
    assert one["figures"]["fewest_clients"] == one["figures"]["most_clients"] == 60
    assert one["figures"]["of_first"] == 1
    assert two["figures"]["fewest_clients"] + two["figures"]["most_clients"] == 60
    assert two["figures"]["worker_mb"] > 0


@needs_nginx
def test_prints_a_table_and_what_the_machine_bears() -> None:
    done = bench("messages", "--clients=10", "--in-flight=1", "--systems=gateway", *TINY)
    assert done.returncode == 0, done.stderr
    assert "messages: medians" in done.stdout
    assert "CPU, µs" in done.stdout
    assert "files per process" in done.stderr


def test_help_lists_the_scenarios() -> None:
    done = bench("--help")
    assert done.returncode == 0
    for scenario in ("messages", "connect", "push", "idle", "ramp", "compare", "scale"):
        assert f"\n  {scenario} " in done.stdout


def test_an_unknown_scenario_is_an_error() -> None:
    done = bench("speed")
    assert done.returncode == 2
    assert "invalid choice: 'speed'" in done.stderr


def test_an_unknown_kind_of_push_is_an_error() -> None:
    done = bench("push", "--kinds=sideways")
    assert done.returncode == 2
    assert "no such kind" in done.stderr
