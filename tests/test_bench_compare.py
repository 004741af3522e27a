"""The comparison of the peers runs, and judges by what it measured."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_ import BenchError, compare, systems
from bench_.compare import Comparison
from bench_.measure import Rounds
from bench_.report import Report
from rich.console import Console

needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx plays the API")


def options(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    compare.add_arguments(parser)
    tiny = ["--rounds=1", "--seconds=0.2", "--warm-up=0.1", "--scale=0.01"]
    return parser.parse_args([*tiny, *arguments])


def a_comparison(**cpu_us: list[float]) -> Comparison:
    comparison = Comparison(list(cpu_us), options())
    rounds = Rounds()
    for system, values in cpu_us.items():
        for value in values:
            rounds.add(system, {"cpu_us": value, "per_second": 1e6 / value})
    comparison._rounds["narrow"] = rounds
    comparison._loads["narrow"] = {"work": "narrow", "clients": 200}
    return comparison


def printed(comparison: Comparison) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(comparison.table())
    return captured.get()


@needs_nginx
def test_gives_all_the_same_work(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    compare.run(options("--systems=gateway,naive", "--works=narrow,idle,connect"), report)
    assert [(row.load["work"], row.system) for row in report.rows] == [
        (work, system) for work in ("narrow", "idle", "connect") for system in ("gateway", "naive")
    ]
    report.finish(Namespace(json=None, csv=None, plots=None))
    assert "KB per idle connection" in capsys.readouterr().out


def test_ratio_is_the_median_of_the_rounds() -> None:
    comparison = a_comparison(gateway=[10, 40, 90], nchan=[20, 50, 100])
    gateway, _ = comparison.rows("narrow")
    assert gateway.figures["cpu_us_ratio"] == 0.8
    assert gateway.figures["per_second_ratio"] == 1.25


@pytest.mark.parametrize(("ours", "verdict"), [(20, "met"), (21, "missed")])
def test_says_whether_the_target_is_met(ours: float, verdict: str) -> None:
    assert f"≤ 0.80 × nchan: {verdict}" in printed(a_comparison(gateway=[ours], nchan=[25]))


def test_judges_nothing_without_the_base() -> None:
    assert "met" not in printed(a_comparison(gateway=[20], naive=[100]))


@needs_nginx
def test_peer_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_broken(port: int, options: systems.SystemOptions) -> ExitStack:
        raise BenchError("it burst")

    monkeypatch.setitem(systems.REGISTRY, "broken", run_broken)
    report = Report()
    compare.run(options("--systems=broken,gateway", "--works=alone"), report)
    assert [row.system for row in report.rows] == ["gateway"]


@needs_nginx
def test_gateway_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_broken(port: int, options: systems.SystemOptions) -> ExitStack:
        raise BenchError("it burst")

    monkeypatch.setitem(systems.REGISTRY, "gateway", run_broken)
    with pytest.raises(BenchError, match="gateway, alone: it burst"):
        compare.run(options("--systems=gateway", "--works=alone"), Report())


@pytest.mark.parametrize("wrong", ["--systems=nobody", "--works=nothing"])
def test_unknown_names_are_refused(wrong: str) -> None:
    with pytest.raises(BenchError, match=r"no nobody here|no such work: nothing"):
        compare.run(options(wrong), Report())
