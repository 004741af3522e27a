"""Plots can be drawn from any mixture of reports."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench
from bench_ import BenchError, plots, published
from bench_.report import Report, Row

LARGEST_BYTES = 80_000


def messages(system: str, cpu_us: float, **load: int) -> Row:
    figures = {"cpu_us": cpu_us, "p50_ms": 1.0, "p99_ms": 2.0, "p999_ms": cpu_us}
    return Row("messages", system, {**load, "bytes": 30}, figures, {})


def a_ramp(report: Report, name: str = "ramp") -> None:
    columns = ["seconds", "connections", "rps", "total"]
    columns += ["gateway_cores", "api_cores", "clients_cores", "gateway_mb"]
    rows = [
        [second, min(500, second * 100), second * 10, 0, 0.5, 0.2, 0.3, 100 + second]
        for second in range(1, 10)
    ]
    report.series(name, columns, [[float(value) for value in row] for row in rows])


def a_full_report() -> Report:
    report = Report()
    for in_flight in (1, 64, 1_000):
        report.add(messages("gateway", 20, in_flight=in_flight, clients=4_000))
        report.add(messages("nchan", 25, in_flight=in_flight, clients=4_000))
        report.add(messages("pushpin", 500, in_flight=in_flight, clients=4_000))
        report.add(messages("something else", 30, rate=in_flight * 10, clients=4_000))
    for workers in (1, 2, 4):
        load: dict[str, int | float | str] = {"workers": workers}
        report.add(Row("scale", "gateway", load, {"cpu_us": 20, "worker_mb": 30}, {}))
    a_ramp(report)
    return report


def test_draws_all_that_there_is(tmp_path: Path) -> None:
    drawn = plots.draw([a_full_report()], tmp_path / "plots")
    assert {path.name for path in drawn} == {
        "ramp.png",
        "ramp-resources.png",
        "latency.png",
        "cpu.png",
        "workers.png",
    }
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < LARGEST_BYTES


def test_draws_nothing_of_nothing(tmp_path: Path) -> None:
    idle = Report(rows=[Row("idle", "gateway", {"clients": 9}, {"idle_kb": 4.0}, {})])
    assert plots.draw([Report(), idle], tmp_path) == []


def test_connects_of_a_comparison_are_no_messages(tmp_path: Path) -> None:
    figures = {"cpu_us": 110.0, "p50_ms": 1.0}
    connects = Row("compare", "gateway", {"work": "connect", "clients": 9}, figures, {})
    assert plots.draw([Report(rows=[connects])], tmp_path) == []


def test_draws_idle_connections_of_several_numbers(tmp_path: Path) -> None:
    rows = [
        Row("idle", "gateway", {"clients": clients}, {"connection_kb": 3.0}, {})
        for clients in (1_000, 10_000)
    ]
    assert [path.name for path in plots.draw([Report(rows=rows)], tmp_path)] == ["idle.png"]


def test_draws_a_ramp_without_resources(tmp_path: Path) -> None:
    report = Report()
    report.series("ramp", ["seconds", "connections", "rps", "total"], [[1, 2, 3, 3], [2, 4, 5, 8]])
    assert [path.name for path in plots.draw([report], tmp_path)] == ["ramp.png"]


def test_whole_published_curve_takes_the_place_of_its_end_points(tmp_path: Path) -> None:
    report = Report()
    a_ramp(report)
    for curve in published.CURVES:
        rows = [[*list(point), 0.0] for point in curve.points]
        report.series(curve.file, ["seconds", "connections", "rps", "total"], rows)
    assert tmp_path / "ramp.png" in plots.draw([report], tmp_path)


def options(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    plots.add_arguments(parser)
    return parser.parse_args(list(arguments))


def test_draws_files_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "figures.json").write_text(a_full_report().as_json())
    (tmp_path / "ws2api_go.csv").write_text("seconds,connections,rps,total\n1,5,6,6\n")
    files = [str(tmp_path / "figures.json"), str(tmp_path / "ws2api_go.csv")]
    plots.run(options(*files, f"--plots={tmp_path}"), Report())
    assert str(tmp_path / "latency.png") in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("text", "why"), [("{}", "no report"), (Report().as_json(), "nothing"), (None, "No such file")]
)
def test_says_why_it_draws_nothing(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "figures.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BenchError, match=why):
        plots.run(options(str(file), f"--plots={tmp_path}"), Report())


def test_wants_to_know_where_to_draw(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["plots", "figures.json"])
    assert "required: --plots" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_takes_no_option_that_it_has_no_use_for(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["plots", "figures.json", "--plots=here", f"{option}=there"])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err
