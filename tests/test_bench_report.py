"""What a benchmark found reaches its reader: as tables, JSON and CSV."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_ import report
from bench_.report import Report, Row

WORK: dict[str, int | float | str] = {"clients": 200, "in_flight": 64, "bytes": 30}


@dataclass
class Destinations:
    json: Path | None = None
    csv: Path | None = None
    plots: Path | None = None


def a_report() -> Report:
    found = Report()
    spread = {"cpu_us": (23.0, 25.0)}
    found.add(Row("messages", "nchan", WORK, {"cpu_us": 24.0, "per_second": 41_000.0}, spread))
    found.add(Row("messages", "gateway", WORK, {"cpu_us": 18.0, "p50_ms": 1.5}, {}))
    found.add(Row("idle", "gateway", {"clients": 5_000}, {"idle_kb": 4.25}, {}))
    found.series(
        "ramp", ["seconds", "connections", "rps", "total", "gateway_mb"], [[1, 9, 2, 2, 7]]
    )
    return found


def test_says_what_and_how_it_compares(capsys: pytest.CaptureFixture[str]) -> None:
    a_report().finish(Destinations())
    printed = capsys.readouterr().out
    assert "messages: medians" in printed
    assert "18 ×0.75" in printed
    assert "23 – 25" in printed
    assert "idle, KB" in printed
    assert "4.25" in printed


def test_compares_only_the_same_work() -> None:
    found = a_report()
    nchan, gateway, idle = found.rows
    assert found.ratio(gateway, "cpu_us") == 0.75
    assert found.ratio(nchan, "cpu_us") is None
    assert found.ratio(gateway, "p50_ms") is None
    assert found.ratio(idle, "idle_kb") is None


def test_prefers_the_ratio_of_the_rounds() -> None:
    found = a_report()
    found.add(Row("messages", "naive", WORK, {"cpu_us": 120.0, "cpu_us_ratio": 5.2}, {}))
    assert found.ratio(found.rows[-1], "cpu_us") == 5.2


def test_reads_back_what_it_wrote(tmp_path: Path) -> None:
    written = a_report()
    written.finish(Destinations(json=tmp_path / "figures.json"))
    read = report.load(tmp_path / "figures.json")
    assert read == written


def test_leaves_out_what_is_not_a_number() -> None:
    found = Report()
    found.add(Row("messages", "gateway", WORK, {"cpu_us": 18.0, "p50_ms": math.nan}, {}))
    assert found.rows[0].figures == {"cpu_us": 18.0}


def test_names_no_host(tmp_path: Path) -> None:
    assert set(report.describe_machine()) == {"cores", "cpu", "memory_gib", "kernel", "python"}


def test_writes_rows_and_ramps_as_csv(tmp_path: Path) -> None:
    a_report().finish(Destinations(csv=tmp_path / "figures.csv"))
    with (tmp_path / "figures.csv").open() as file:
        first, second, third = csv.DictReader(file)
    assert (first["system"], first["cpu_us"], first["cpu_us_low"]) == ("nchan", "24.0", "23.0")
    assert (second["p50_ms"], second["cpu_us_low"]) == ("1.5", "")
    assert (third["clients"], third["in_flight"], third["idle_kb"]) == ("5000", "", "4.25")
    ramp = (tmp_path / "figures-ramp.csv").read_text().splitlines()
    assert ramp == ["seconds,connections,rps,total", "1,9,2,2"]


def test_reads_the_files_that_ws2api_publishes(tmp_path: Path) -> None:
    file = tmp_path / "ws2api_php_swow.csv"
    file.write_text("seconds,connections,qps,total\n1,0,0,0\n2,915,1827,1827\n")
    (series,) = report.load(file).all_series
    assert series.name == "ws2api_php_swow"
    assert series.column("rps") == [0, 1827]
    assert series.column("gateway_mb") == []


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{}"), ("a.json", "no"), ("a.csv", "a,b\n1,2\n"), ("b.csv", "")]
)
def test_refuses_what_is_no_report(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        report.load(tmp_path / name)


def test_numbers_keep_three_digits() -> None:
    values = [0.08123, 4.256, 21.62, 99.96, 999.7, 41_234.5]
    assert [report.number(value) for value in values] == [
        "0.0812",
        "4.26",
        "21.6",
        "100",
        "1,000",
        "41,234",
    ]


def test_headings_are_words_and_units() -> None:
    keys = ["cpu_us", "p999_ms", "connect_us", "per_second", "in_flight"]
    assert [report.heading(key) for key in keys] == [
        "CPU, µs",
        "p99.9, ms",
        "connect, µs",
        "per second",
        "in flight",
    ]
