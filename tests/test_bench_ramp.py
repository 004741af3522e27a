"""A small ramp builds up, holds and tells of each second."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_ import BenchError, ramp, systems
from bench_.report import RAMP_COLUMNS, Report
from bench_.systems import NCHAN_MODULE, System, SystemOptions

needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx plays the API")


def options(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    ramp.add_arguments(parser)
    return parser.parse_args(list(arguments))


@needs_nginx
def test_builds_up_holds_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    ramp.run(options("--clients=200", "--within=2", "--every=0.5", "--hold=2"), report)
    (row,) = report.rows
    (series,) = report.all_series
    assert row.load == {"clients": 200, "every_s": 0.5, "workers": 1, "bytes": 30}
    assert row.figures["errors"] == 0
    assert row.figures["per_second"] > 0
    assert tuple(series.columns[:4]) == RAMP_COLUMNS
    assert len(series.rows) >= 4
    assert all(len(line) == len(series.columns) for line in series.rows)
    assert series.column("connections")[-1] == 200
    assert series.column("total")[-1] == sum(series.column("rps"))
    assert "0 errors: met" in capsys.readouterr().err


@needs_nginx
@pytest.mark.skipif(not NCHAN_MODULE.exists(), reason="there is no Nchan")
def test_pings_at_whole_seconds_as_nginx_wants_them() -> None:
    report = Report()
    ramp.run(options("--clients=200", "--every=15.25", "--hold=1", "--systems=nchan"), report)
    (row,) = report.rows
    assert row.system == "nchan"
    assert row.figures["errors"] == 0


@needs_nginx
def test_does_not_wait_for_a_gentle_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = systems.REGISTRY["gateway"]
    ended = []

    @contextmanager
    def watch(port: int, setting: SystemOptions) -> Iterator[System]:
        with run(port, setting) as system:
            yield system
            ended.append(system.patience_s)

    monkeypatch.setitem(systems.REGISTRY, "gateway", watch)
    ramp.run(options("--clients=20", "--every=0.5", "--hold=1"), Report())
    assert ended == [ramp.PATIENCE_S]


def test_preset_gives_what_is_not_given() -> None:
    chosen = options("--preset=million", "--every=60")
    ramp.complete(chosen)
    assert (chosen.clients, chosen.within, chosen.every) == (1_000_000, 300, 60)


def test_says_what_the_machine_cannot_bear() -> None:
    with pytest.raises(BenchError, match="are too many"):
        ramp.run(options("--clients=1000000000"), Report())
