"""Collect figures, print them as tables, and write them as JSON, CSV and plots."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

BASE: Final = "nchan"
"""The system that the others are compared with, where it did the same work."""
RAMP_COLUMNS: Final = ("seconds", "connections", "rps", "total")
"""The columns of ws2api's published files; a series that begins with them is a ramp."""
_UNITS: Final = {"us": "µs", "ms": "ms", "kb": "KB", "mb": "MB", "s": "s"}
_UNCOMPARED: Final = {"user_us", "system_us", "per_second"}  # the whole CPU says it all
_MOST_COLUMNS: Final = 12
_PIPED_WIDTH: Final = 180  # where there is no terminal whose width could be asked for


@dataclass(frozen=True, slots=True)
class Row:
    """Hold what one system made of one load.

    Attributes:
        scenario: the work: messages, connect, push, …
        system: who did it: gateway, nchan, …
        load: how much of it, as `{"clients": 200, "in_flight": 64, "bytes": 30}`.
        figures: what came out, medians over the rounds; the key's end is its unit. A key that ends
            in `_ratio` is the median of the rounds' ratios to the base, and goes before a ratio of
            medians.
        spread: the lowest and the highest round of a figure.
    """

    scenario: str
    system: str
    load: dict[str, int | float | str]
    figures: dict[str, float]
    spread: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """Hold a table of numbers that belong to one run, such as a line each second."""

    name: str
    columns: list[str]
    rows: list[list[float]]

    def is_ramp(self) -> bool:
        """Tell whether it shows connections and messages over time."""
        return tuple(self.columns[:4]) == RAMP_COLUMNS

    def column(self, name: str) -> list[float]:
        """Return the values of a column; empty when there is none of that name."""
        if name not in self.columns:
            return []
        place = self.columns.index(name)
        return [row[place] for row in self.rows]


class Destinations(Protocol):
    """Name the files to write; None is for none."""

    @property
    def json(self) -> Path | str | None: ...
    @property
    def csv(self) -> Path | str | None: ...
    @property
    def plots(self) -> Path | str | None: ...


@dataclass(slots=True)
class Report:
    """Gather rows and series, and bring them to the reader in the end."""

    command: str = field(default_factory=lambda: _command())
    date: str = field(default_factory=lambda: _now())
    machine: dict[str, int | float | str] = field(default_factory=lambda: describe_machine())
    rows: list[Row] = field(default_factory=list)
    all_series: list[Series] = field(default_factory=list)
    _tables: dict[str, Table] = field(default_factory=dict, init=False, repr=False, compare=False)

    def add(self, row: Row) -> None:
        """Take a row in, without what is not a number because nothing was there to count."""
        figures = {key: value for key, value in row.figures.items() if math.isfinite(value)}
        self.rows.append(replace(row, figures=figures))

    def series(self, name: str, columns: list[str], rows: list[list[float]]) -> None:
        """Take a series in; its name becomes part of a file's name."""
        self.all_series.append(Series(name, columns, rows))

    def show(self, scenario: str, table: Table) -> None:
        """Print this table in place of the usual one of the scenario's rows."""
        self._tables[scenario] = table

    def finish(self, options: Destinations) -> None:
        """Print the tables on stdout, and write what was asked for."""
        print_tables(self)
        if options.json:
            Path(options.json).write_text(self.as_json())
        if options.csv:
            write_csv(self, Path(options.csv))
        if options.plots:
            from bench_ import plots  # matplotlib takes a second to load

            plots.draw([self], Path(options.plots))

    def as_json(self) -> str:
        """Return all of it as text that `load` understands."""
        kept = {key: getattr(self, key) for key in ("command", "date", "machine")}
        kept |= {key: [asdict(one) for one in getattr(self, key)] for key in ("rows", "all_series")}
        return json.dumps(kept, indent=1) + "\n"

    def ratio(self, row: Row, key: str) -> float | None:
        """Return a figure's ratio to the base at the same work; None where there is none."""
        if f"{key}_ratio" in row.figures:
            return row.figures[f"{key}_ratio"]
        for other in self.rows:
            same = (other.scenario, other.load) == (row.scenario, row.load)
            if same and other.system == BASE != row.system and other.figures.get(key):
                return row.figures[key] / other.figures[key]
        return None


def _command() -> str:
    name = Path(sys.argv[0]).name.removesuffix(".py")
    return shlex.join([name, *sys.argv[1:]])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe_machine() -> dict[str, int | float | str]:
    """Return what the figures depend on, without the name of the host."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu[1] if cpu else platform.machine(),
        "memory_gib": round(memory_bytes / (1 << 30), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def load(path: Path) -> Report:
    """Read back what `finish` wrote as JSON, or a CSV with the columns of a ramp.

    Raises:
        ValueError: it is neither.
    """
    if path.suffix == ".csv":
        return _load_ramp(path)
    try:
        read: dict[str, Any] = json.loads(path.read_text())
        return Report(
            read["command"],
            read["date"],
            read["machine"],
            [Row(**row | {"spread": _pairs(row["spread"])}) for row in read["rows"]],
            [Series(**series) for series in read["all_series"]],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no report: {error!r}") from error


def _pairs(spread: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    return {key: (low, high) for key, (low, high) in spread.items()}


def _load_ramp(path: Path) -> Report:
    with path.open(newline="") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    columns = ["rps" if name == "qps" else name for name in header]  # one of ws2api's says so
    series = Series(path.stem, columns, [[float(value) for value in line] for line in lines])
    if not series.is_ramp():
        raise ValueError(f"{path} has the columns {header}, not {', '.join(RAMP_COLUMNS)}")
    return Report("", "", {}, [], [series])


def write_csv(report: Report, path: Path) -> None:
    """Write the rows to the path, and each series beside it, its name added to the file's name."""
    if report.rows:
        with path.open("w", newline="") as file:
            _write_rows(report.rows, file)
    for series in report.all_series:
        name = re.sub(r"\W+", "-", series.name)
        beside = path.with_stem(f"{path.stem}-{name}") if report.rows else path
        width = len(RAMP_COLUMNS) if series.is_ramp() else len(series.columns)
        with beside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(series.columns[:width])
            writer.writerows([f"{value:.10g}" for value in row[:width]] for row in series.rows)


def _write_rows(rows: list[Row], file: TextIO) -> None:
    loads = _keys(row.load for row in rows)
    figures = _keys(row.figures for row in rows)
    spreads = _keys(row.spread for row in rows)
    header: list[str] = ["scenario", "system", *loads]
    for key in figures:
        header += [key, f"{key}_low", f"{key}_high"] if key in spreads else [key]
    writer = csv.writer(file)
    writer.writerow(header)
    for row in rows:
        line: list[Any] = [row.scenario, row.system, *(row.load.get(key, "") for key in loads)]
        for key in figures:
            line.append(row.figures.get(key, ""))
            line += row.spread.get(key, ("", "")) if key in spreads else ()
        writer.writerow(line)


def _keys(mappings: Iterable[dict[str, Any]]) -> list[str]:
    """Return all keys, in the order in which they first appear."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def print_tables(report: Report) -> None:
    """Print a table for each scenario on stdout."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    for scenario in dict.fromkeys(row.scenario for row in report.rows):
        rows = [row for row in report.rows if row.scenario == scenario]
        own = report._tables.get(scenario)
        if not own:
            based = any(row.system == BASE for row in rows)
            title = f"{scenario}: medians, lowest – highest round" + f", × {BASE}" * based
            console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(own or _table(report, rows))
        console.print()
    if report.rows:
        machine = ", ".join(f"{key} {value}" for key, value in report.machine.items())
        console.print(Text(f"{report.date}, {machine}", style="dim"), soft_wrap=True)


def _table(report: Report, rows: list[Row]) -> Table:
    """Give each row a line; or each figure one, when there are few rows of many figures."""
    table = Table(header_style="")
    loads = _keys(row.load for row in rows)
    figures = [key for key in _keys(row.figures for row in rows) if not key.endswith("_ratio")]
    lines: list[list[Text]] = [[Text(heading(key)) for key in ("system", *loads, *figures)]]
    for row in rows:
        line = [Text(row.system)]
        line += [Text(load_text(row.load[key]) if key in row.load else "–") for key in loads]
        lines.append(line + [_cell(report, row, key) for key in figures])
    if len(lines[0]) > _MOST_COLUMNS > 2 * len(rows):
        lines = [list(line) for line in zip(*lines, strict=True)]
    for i, name in enumerate(lines[0]):
        table.add_column(name, justify="right" if i else "left")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _cell(report: Report, row: Row, key: str) -> Text:
    if key not in row.figures:
        return Text("–", style="dim")
    text = Text(number(row.figures[key]))
    if key not in _UNCOMPARED and (ratio := report.ratio(row, key)) is not None:
        text.append(f" ×{times(ratio)}", style="cyan")
    low, high = row.spread.get(key, (0, 0))
    if low != high:
        text.append(f"\n{number(low)} – {number(high)}", style="dim")
    return text


def load_text(value: float | str) -> str:
    """Write a part of a load; 10000 as 10,000."""
    return value if isinstance(value, str) else f"{value:,.10g}"


def heading(key: str) -> str:
    """Turn the key of a figure into words and its unit: `p999_ms` into `p99.9, ms`."""
    words, _, unit = key.rpartition("_")
    if not words or unit not in _UNITS:
        return key.replace("_", " ")
    words = {"p999": "p99.9", "cpu": "CPU"}.get(words, words.replace("_", " "))
    return f"{words}, {_UNITS[unit]}"


def number(value: float) -> str:
    """Write a number with three digits, or all those in front of the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def times(ratio: float) -> str:
    """Write a ratio."""
    return f"{ratio:.2f}" if ratio < 9.995 else number(ratio)
