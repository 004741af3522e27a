"""Draw reports as PNG files: ramps over time, latency and cost against load, cost by system."""

from __future__ import annotations

import argparse
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")  # no display is needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from PIL import Image

from bench_ import BenchError, published
from bench_.report import Report, Row, Series, load, load_text

_COLOURS: Final = {
    "gateway": "#1f5fbf",
    "nchan": "#d9730d",
    "ws2api": "#2a9d8f",
    "pushpin": "#8e5bb5",
    "naive": "#8a8a8a",
}
_OTHER_COLOURS: Final = ("#c0392b", "#6b8e23", "#b5838d", "#264653", "#e9b44c")
_PUBLISHED_COLOURS: Final = ("#2a9d8f", "#8e5bb5", "#d9730d")
_PERCENTILES: Final = {"p50_ms": "-", "p99_ms": "--", "p999_ms": ":"}
_STYLE: Final[Any] = {
    "figure.dpi": 100,
    "font.size": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_PARTS: Final = (("-", "#1f5fbf"), (":", "#d9730d"), ("--", "#8a8a8a"))
_RESOURCES: Final = ("gateway_cores", "api_cores", "clients_cores", "gateway_mb")

Points = Sequence[tuple[float, float, float]]
"""Seconds, connections, messages a second."""

_THOUSANDS: Final = FuncFormatter(lambda value, _: f"{value:,.10g}")
_LEGEND_LETTERS: Final = 130
"""What fits in a line below a plot."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench plots`, which draws what was measured before."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="what --json wrote; or a ramp as CSV, such as those in ws2api's repository",
    )
    parser.add_argument(
        "--plots", type=Path, required=True, metavar="FOLDER", help="write PNGs there"
    )


def run(options: argparse.Namespace, report: Report) -> None:
    """Draw, and say which files there are now.

    Raises:
        BenchError: a file is no report, or there is nothing in them to draw.
    """
    try:
        reports = [load(file) for file in options.files]
    except (OSError, ValueError) as error:
        raise BenchError(str(error)) from error
    drawn = draw(reports, options.plots)
    if not drawn:
        raise BenchError("these files have nothing that could be drawn")
    print(*drawn, sep="\n")


def draw(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Draw all that these reports have figures for, and return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for report in reports for row in report.rows]
    ramps = [series for report in reports for series in report.all_series if series.is_ramp()]
    with pyplot.rc_context(_STYLE):
        drawn = {
            "ramp": _ramp(ramps),
            "ramp-resources": _resources(ramps),
            "latency": _latency(rows),
            "cpu": _bars(rows),
            "idle": _idle(rows),
            "workers": _workers(rows),
        }
        paths = []
        for name, figure in drawn.items():
            if figure:
                paths.append(folder / f"{name}.png")
                _save(figure, paths[-1])
                pyplot.close(figure)
    return paths


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours, which takes half the space."""
    drawn = io.BytesIO()
    figure.savefig(drawn, facecolor="white")
    Image.open(drawn).convert("RGB").quantize(96).save(path, optimize=True)


def _ramp(ramps: list[Series]) -> Figure | None:
    """Show connections and messages over time, beside what others published."""
    if not ramps:
        return None
    figure, (left, right) = _panels(2)
    _name(left, "WebSockets open over time", "seconds", "connections")
    _name(right, "messages answered over time", "seconds", "messages per second")
    colours = itertools.cycle((_COLOURS["gateway"], *_OTHER_COLOURS))
    whole = {series.name: series for series in ramps}
    for series in ramps:
        if series.name not in {curve.file for curve in published.CURVES}:
            _draw_ramp(left, right, _points(series), series.name, color=next(colours))
    for curve, colour in zip(published.CURVES, _PUBLISHED_COLOURS, strict=True):
        if curve.file in whole:
            points, look = _points(whole[curve.file]), {}
            label = f"{curve.name}: published"
        else:
            points, look = curve.points, {"linestyle": "--", "marker": "o"}
            label = f"{curve.name}: published end points"
        _draw_ramp(left, right, points, label, color=colour, linewidth=1.2, markersize=4, **look)
    _legend_below(figure, left)
    where: dict[str, Any] = {
        "transform": right.transAxes,
        "ha": "right",
        "size": 8,
        "color": "#777777",
    }
    right.text(0.995, 0.02, f"published: {published.SOURCE}", **where)
    return figure


def _draw_ramp(left: Axes, right: Axes, points: Points, label: str, **look: Any) -> None:
    seconds, connections, messages = zip(*points, strict=True)
    left.plot(seconds, connections, label=label, **look)
    right.plot(seconds, messages, label=label, **look)


def _points(series: Series) -> Points:
    columns = (series.column(name) for name in ("seconds", "connections", "rps"))
    return list(zip(*columns, strict=True))


def _resources(ramps: list[Series]) -> Figure | None:
    """Show CPU and memory against connections, while they are built up."""
    ramps = [series for series in ramps if {*_RESOURCES} <= {*series.columns}]
    if not ramps:
        return None
    figure, (left, right) = _panels(2)
    _name(left, "CPU while connections are built up; a dot: held", "connections", "cores in use")
    _name(right, "memory of the system, Redis included; a dot: held", "connections", "GB (PSS)")
    for series, colour in zip(ramps, itertools.cycle((_COLOURS["gateway"], *_OTHER_COLOURS))):
        parts = {"gateway": series.name, "api": "API", "clients": "clients"}
        for (part, name), (dashes, own) in zip(parts.items(), _PARTS, strict=True):
            alone = len(ramps) == 1
            look: dict[str, Any] = {"linestyle": dashes, "color": own if alone else colour}
            look["label"] = name if alone or part == "gateway" else f"{name} of {series.name}"
            _draw_by_connections(left, series, f"{part}_cores", 1, look)
        look = {"color": colour, "label": series.name}
        _draw_by_connections(right, series, "gateway_mb", 1_000, look)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend()
    return figure


def _draw_by_connections(
    axis: Axes, series: Series, column: str, unit: float, look: dict[str, Any]
) -> None:
    """Draw a line for the time of building up, and a dot for the median of holding."""
    connections = series.column("connections")
    values = [value / unit for value in series.column(column)]
    most = max(connections)
    points = [(x, y) for x, y in zip(connections, values, strict=True) if x < most]
    # What is looked at only now and then stands still in between.
    changed = [point for i, point in enumerate(points) if not i or point[1] != points[i - 1][1]]
    axis.plot([x for x, _ in changed], [y for _, y in changed], **look)
    held = statistics.median(y for x, y in zip(connections, values, strict=True) if x == most)
    axis.plot([most], [held], "o", color=look["color"], markersize=5)


def _latency(rows: list[Row]) -> Figure | None:
    """Show percentiles against requests in flight, and against a paced rate."""
    rows = [row for row in _messages(rows) if "p50_ms" in row.figures]
    titles = {
        "in_flight": ("latency, closed loop", "messages in flight"),
        "rate": ("latency, paced evenly over the clients", "messages per second asked for"),
    }
    panels = {key: _smallest([row for row in rows if _number(row, key)]) for key in titles}
    panels = {
        key: chosen
        for key, chosen in panels.items()
        if len({_number(row, key) for row in chosen}) > 1
    }
    if not panels:
        return None
    systems = _systems([row for chosen in panels.values() for row in chosen])
    percentiles = dict(list(_PERCENTILES.items())[: 3 if len(systems) <= 3 else 2])
    figure, axes = _panels(len(panels))
    for axis, (key, chosen) in zip(axes, panels.items(), strict=True):
        title, below = titles[key]
        _name(axis, title, below, "ms")
        _draw_latency(axis, key, chosen, percentiles)
    handles = [Line2D([], [], color=_colour(system), label=system) for system in systems]
    for key, dashes in percentiles.items():
        look: dict[str, Any] = {"color": "#555555", "linestyle": dashes}
        name = key.removesuffix("_ms").replace("p999", "p99.9")
        handles.append(Line2D([], [], label=name, **look))
    _legend_below(figure, axes[0], handles)
    return figure


def _draw_latency(axis: Axes, key: str, rows: list[Row], percentiles: dict[str, str]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_THOUSANDS)
    for system, of_system in _grouped(rows, lambda row: row.system):
        of_system.sort(key=lambda row: _number(row, key))
        loads = [_number(row, key) for row in of_system]
        look: dict[str, Any] = {"color": _colour(system), "marker": "o", "markersize": 4}
        for percentile, dashes in percentiles.items():
            axis.plot(loads, [row.figures[percentile] for row in of_system], dashes, **look)
    places = sorted({_number(row, key) for row in rows})
    axis.set_xticks(places, [load_text(place) for place in places])
    values = [row.figures[percentile] for row in rows for percentile in percentiles]
    lowest, highest = (math.log10(value) for value in (min(values), max(values)))
    axis.set_ylim(10 ** math.floor(lowest), 10 ** math.ceil(highest))
    axis.minorticks_off()


def _bars(rows: list[Row]) -> Figure | None:
    """Show the CPU of a message, a bar for each system, grouped by load."""
    rows = [row for row in _messages(rows) if "cpu_us" in row.figures]
    works = _grouped(rows, _work_text)
    if not works:
        return None
    figure, (axis,) = _panels(1)
    _name(axis, "CPU per message", "", "µs, user and system")
    width = 0.8 / max(len(of_work) for _, of_work in works)
    top = _cut(row.figures["cpu_us"] for row in rows)
    order = _systems(rows)
    for place, (_, of_work) in enumerate(works):
        of_work.sort(key=lambda row: order.index(row.system))
        for i, row in enumerate(of_work):
            x = place + width * (i - (len(of_work) - 1) / 2)
            _bar(axis, x, width * 0.92, row, top)
    axis.set_ylim(0, top * 1.08)
    axis.set_xlim(-0.6, len(works) - 0.4)
    axis.set_xticks(range(len(works)), [text for text, _ in works])
    axis.grid(visible=False, axis="x")
    handles = [axis.bar([0], [0], color=_colour(system), label=system) for system in order]
    _legend_below(figure, axis, handles)
    return figure


def _bar(axis: Axes, x: float, width: float, row: Row, top: float) -> None:
    """Draw a bar with its value on it; inside, if the bar goes on beyond the plot."""
    value = row.figures["cpu_us"]
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    axis.bar(x, min(value, top * 1.08), width, color=_colour(row.system))
    if value > top:
        style: dict[str, Any] = {"rotation": 90, "va": "top", "color": "white"}
        axis.text(x, top * 1.06, f"{text} →", ha="center", size=9, **style)
    else:
        axis.text(x, value + top * 0.01, text, ha="center", size=8.5, color="#333333")


def _idle(rows: list[Row]) -> Figure | None:
    """Show memory and CPU against idle connections."""
    rows = [row for row in rows if row.scenario == "idle" and "connection_kb" in row.figures]
    if len({_number(row, "clients") for row in rows}) < 2:
        return None
    figure, (left, right) = _panels(2)
    _name(left, "memory of idle connections", "connections", "MB (PSS) above none")
    _name(right, "CPU of idle connections with pings", "connections", "% of a core")
    for system, of_system in _grouped(rows, lambda row: row.system):
        of_system.sort(key=lambda row: _number(row, "clients"))
        clients = [_number(row, "clients") for row in of_system]
        kb = [row.figures["connection_kb"] for row in of_system]
        percent = [row.figures.get("core_percent", math.nan) for row in of_system]
        look: dict[str, Any] = {"color": _colour(system), "marker": "o", "label": system}
        left.plot(clients, [n * each / 1_000 for n, each in zip(clients, kb, strict=True)], **look)
        right.plot(clients, percent, **look)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend()
    return figure


def _workers(rows: list[Row]) -> Figure | None:
    """Show CPU per message and memory per worker against the number of workers."""
    rows = [row for row in rows if row.scenario == "scale" and "cpu_us" in row.figures]
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: _number(row, "workers"))
    figure, (left, right) = _panels(2)
    _name(left, "CPU per message, the same load for all", "workers", "µs, user and system")
    _name(right, "memory per worker", "workers", "MB (PSS)")
    workers = [_number(row, "workers") for row in rows]
    look: dict[str, Any] = {"color": _COLOURS["gateway"], "marker": "o"}
    left.plot(workers, [row.figures["cpu_us"] for row in rows], **look)
    right.plot(workers, [row.figures.get("worker_mb", math.nan) for row in rows], **look)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(workers, [load_text(count) for count in workers])
        axis.set_ylim(bottom=0)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = pyplot.figure(figsize=(12, 4.8))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])


def _name(axis: Axes, title: str, below: str, left: str) -> None:
    axis.set_title(title, loc="left", fontweight="bold", size=11.5)
    axis.set_xlabel(below)
    axis.set_ylabel(left)
    axis.xaxis.set_major_formatter(_THOUSANDS)
    axis.yaxis.set_major_formatter(_THOUSANDS)


def _legend_below(figure: Figure, axis: Axes, handles: Iterable[Any] | None = None) -> None:
    handles = list(handles or axis.get_legend_handles_labels()[0])
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = max(1, min(len(handles), _LEGEND_LETTERS // (longest + 6)))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns)


def _messages(rows: list[Row]) -> list[Row]:
    """Choose the rows about messages; of the same work of the same system, the last one."""
    chosen = [row for row in rows if row.scenario in ("messages", "compare")]
    chosen = [row for row in chosen if row.load.get("in_flight") or row.load.get("rate")]
    return list({(_work_text(row), row.system): row for row in chosen}.values())


def _smallest(rows: list[Row]) -> list[Row]:
    """Choose the rows with the smallest messages: a line through several sizes means nothing."""
    sizes = [_number(row, "bytes") for row in rows]
    return [row for row in rows if _number(row, "bytes") == min(sizes)]


def _grouped(rows: list[Row], key: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _systems(rows: list[Row]) -> list[str]:
    """Return the systems in a lasting order: the known ones first."""
    known = list(_COLOURS)
    names = dict.fromkeys(row.system for row in rows)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def _colour(system: str) -> str:
    if system in _COLOURS:
        return _COLOURS[system]
    return _OTHER_COLOURS[sum(system.encode()) % len(_OTHER_COLOURS)]


def _number(row: Row, key: str) -> float:
    value = row.load.get(key, 0)
    return 0.0 if isinstance(value, str) else float(value)


def _work_text(row: Row) -> str:
    parts = {
        "rate": "{}/s paced",
        "in_flight": "{} in flight",
        "clients": "{} clients",
        "bytes": "{} bytes",
    }
    lines = [
        text.format(load_text(row.load[key])) for key, text in parts.items() if row.load.get(key)
    ]
    return "\n".join(lines)


def _cut(values: Iterator[float] | Iterable[float]) -> float:
    """Return where to cut bars off, so that one giant does not flatten the others."""
    ordered = sorted(values)
    below = [value for value in ordered if value <= 4 * ordered[len(ordered) // 2]]
    return below[-1] if below[-1] == ordered[-1] else below[-1] * 1.25
