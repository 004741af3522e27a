"""Give all peers that this machine has the same work, and put what it cost beside each other.

The systems take turns, round by round. A ratio is the median of the ratios of rounds that followed
each other, which met the same weather. What a peer cannot do is said, and is no error.
"""

from __future__ import annotations

import argparse
import statistics
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.table import Table
from rich.text import Text

from bench_ import BenchError, arguments, connect, idle, machine, messages, peers, systems
from bench_.crowd import Crowd
from bench_.display import Display, warn
from bench_.measure import Figures, Rounds
from bench_.messages import Load
from bench_.report import BASE, Report, Row, number, times
from bench_.systems import System, SystemOptions

OURS: Final = "gateway"
NO_PINGS_S: Final = 3_600
CONNECTS_AT_ONCE: Final = 64
CHANCES: Final = 2
"""A system that has failed as often at a work gets no more turns at it."""

WORKS: Final = {
    "narrow": Load(200, in_flight=64),
    "wide": Load(4_000, in_flight=1_000),
    "paced": Load(4_000, rate=8_000),
    "alone": Load(1, in_flight=1),
    "idle": Load(10_000),
    "connect": Load(5_000),
}


@dataclass(frozen=True, slots=True)
class Line:
    """Describe a line of the table.

    Attributes:
        text: what the table calls it.
        work: what was done.
        key: the figure of it.
        at_most: what the gateway may cost; None when nothing was promised.
        of: by system, the share of its cost that the gateway may cost.
    """

    text: str
    work: str
    key: str
    at_most: float | None = None
    of: dict[str, float] = field(default_factory=dict)


LINES: Final = (
    Line("CPU µs per message, 64 in flight", "narrow", "cpu_us", of={"nchan": 0.80}),
    Line("messages/s", "narrow", "per_second"),
    Line("CPU µs per message, 1,000 in flight", "wide", "cpu_us", of={"nchan": 0.75}),
    Line("messages/s", "wide", "per_second"),
    Line("CPU µs per message, 8,000/s paced", "paced", "cpu_us", of={"nchan": 1.0}),
    Line("messages/s", "paced", "per_second"),
    Line("p99 ms", "paced", "p99_ms"),
    Line("p50 ms, one client alone", "alone", "p50_ms", of={"nchan": 1.0, "ws2api": 0.6}),
    Line("KB per idle connection", "idle", "connection_kb", 4.5, of={"nchan": 0.4}),
    Line("CPU µs per connect", "connect", "cpu_us", 150),
    Line("connects/s", "connect", "per_second"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--ws2api", type=Path, metavar="PATH", help="the binary of ws2api in Go")
    parser.add_argument(
        "--systems", metavar="NAME,…", help="a choice of them (default: all that are here)"
    )
    parser.add_argument(
        "--works", default=",".join(WORKS), metavar="NAME,…", help="a choice of %(default)s"
    )
    parser.add_argument(
        "--scale", type=float, default=1, help="share of the clients (default: %(default)s)"
    )
    arguments.add_workers(parser)
    arguments.add_rounds(parser)
    arguments.add_times(parser)


def run(options: Namespace, report: Report) -> None:
    """Do all works, and print one table."""
    works, names = _choose(options)
    comparison = Comparison(names, options)
    with Display(len(works) * len(names) * options.rounds) as display:
        for work in works:
            comparison.do(work, display)
            for row in comparison.rows(work):
                report.add(row)
    report.show("compare", comparison.table())
    if ours := comparison.failures_of([OURS]):
        raise BenchError("; ".join(ours))


def _choose(options: Namespace) -> tuple[list[str], list[str]]:
    """Return the works and the systems that were asked for.

    Raises:
        BenchError: something of that is not there.
    """
    missing = peers.register(options.ws2api)
    names = options.systems.split(",") if options.systems else list(systems.REGISTRY)
    if unknown := [name for name in names if name not in systems.REGISTRY]:
        raise BenchError("; ".join([f"no {name} here" for name in unknown] + missing))
    if not options.systems:
        for text in missing:
            warn(f"not compared: {text}")
    works = options.works.split(",")
    if unknown := [work for work in works if work not in WORKS]:
        raise BenchError(f"no such work: {', '.join(unknown)} (but {', '.join(WORKS)})")
    return works, names


class Comparison:
    """Do works with systems, and keep what came out.

    Args:
        names: of the systems.
        options: of the command line.
    """

    def __init__(self, names: list[str], options: Namespace) -> None:
        self.failures: dict[tuple[str, str], str] = {}
        """What a system said when it first failed at a work."""
        self._names = names
        self._options = options
        self._rounds: dict[str, Rounds] = {}
        self._loads: dict[str, dict[str, int | float | str]] = {}

    def do(self, work: str, display: Display) -> None:
        """Let the systems take turns; one that fails is started afresh, or left out in the end."""
        load = _scaled(WORKS[work], self._options.scale)
        workers = self._options.workers or machine.survey().workers_for(load.clients)
        setting = SystemOptions(workers, NO_PINGS_S, load.clients, load.bytes_each)
        self._rounds[work] = Rounds()
        described = load.describe() if load.in_flight or load.rate else {"clients": load.clients}
        self._loads[work] = {"work": work, **described, "workers": workers}
        measure = {"idle": self._idle, "connect": self._connect}.get(work, self._messages)
        with ExitStack() as stack:
            for_ws2api = "ws2api" in self._names
            api = stack.enter_context(peers.run_api(load.bytes_each, for_ws2api=for_ws2api))
            turns = [Turn(name, api, setting, load, measure, stack) for name in self._names]
            for _ in range(self._options.rounds):
                for turn in [turn for turn in turns if turn.failures < CHANCES]:
                    display.begin(f"{turn.name}: {work}")
                    try:
                        figures = turn.take()
                        self._rounds[work].add(turn.name, figures)
                        display.end(**figures)
                    except BenchError as error:
                        self._fail(work, turn, error)
                        display.end()

    def _fail(self, work: str, turn: Turn, error: BenchError) -> None:
        turn.failures += 1
        turn.end()
        self.failures.setdefault((turn.name, work), str(error))
        warn(f"{turn.name} could not do {work}: {error}")

    def _messages(self, turn: Turn) -> Figures:
        system = turn.system()
        return messages.measure_round(turn.api, system, turn.crowd(), turn.load, self._options)

    def _idle(self, turn: Turn) -> Figures:
        """Weigh a system that has just started: memory that was freed before would hide some."""
        turn.end()
        watch = Namespace(
            warm_up=self._options.warm_up, seconds=self._options.warm_up, ping_interval=NO_PINGS_S
        )
        figures = idle.measure_idle(turn.system(), turn.load.clients, watch)
        turn.end()
        return figures

    def _connect(self, turn: Turn) -> Figures:
        with Crowd(turn.system().port, turn.load.clients) as crowd:
            figures = connect.measure_connects(turn.system(), crowd, CONNECTS_AT_ONCE)
            connect.measure_closes(turn.api, turn.system(), crowd, CONNECTS_AT_ONCE)
        return figures

    # What came out

    def rows(self, work: str) -> list[Row]:
        """Return the medians of a work, the ratios to the base among them."""
        found = []
        for row in self._rounds[work].rows("compare", self._loads[work]):
            for line in LINES:
                ratio = self._ratio(work, line.key, row.system, BASE)
                if line.work == work and ratio is not None and row.system != BASE:
                    row.figures[f"{line.key}_ratio"] = ratio
            found.append(row)
        return found

    def _ratio(self, work: str, key: str, system: str, base: str) -> float | None:
        """Return the median of the rounds' ratios."""
        rounds = self._rounds[work].figures
        pairs = zip(rounds.get(system, []), rounds.get(base, []), strict=False)
        ratios = [a[key] / b[key] for a, b in pairs if key in a and b.get(key)]
        return statistics.median(ratios) if ratios else None

    def table(self) -> Table:
        """Put the systems beside each other, and the gateway's targets beside them."""
        table = Table(header_style="", caption_justify="left", caption_style="")
        table.add_column("")
        for name in self._names:
            table.add_column(name, justify="right")
        table.add_column(f"target for the {OURS}")
        for line in LINES:
            if line.work in self._rounds:
                cells = [self._cell(line, name) for name in self._names]
                table.add_row(line.text, *cells, self._verdicts(line))
        notes = [f"medians, lowest – highest of {self._options.rounds}; × {BASE}"]
        if self._options.scale != 1:
            notes.append(f"clients, messages in flight and rate: × {self._options.scale:g}")
        table.caption = Text("\n".join(notes + self.failures_of(self._names)))
        return table

    def failures_of(self, names: list[str]) -> list[str]:
        """Return what these systems could not do, and why."""
        return [
            f"{name}, {work}: {why}" for (name, work), why in self.failures.items() if name in names
        ]

    def _cell(self, line: Line, system: str) -> Text:
        rounds = self._rounds[line.work].figures.get(system)
        if not rounds:
            return Text("–", style="dim")
        values = [one[line.key] for one in rounds]
        text = Text(number(statistics.median(values)))
        ratio = self._ratio(line.work, line.key, system, BASE)
        if ratio is not None and system != BASE:
            text.append(f" ×{times(ratio)}", style="cyan")
        if len(values) > 1:
            text.append(f"\n{number(min(values))} – {number(max(values))}", style="dim")
        return text

    def _verdicts(self, line: Line) -> Text:
        """Say of each target whether it is met; nothing of one that could not be judged."""
        judged: list[tuple[str, bool]] = []
        ours = [one[line.key] for one in self._rounds[line.work].figures.get(OURS, [])]
        if ours and line.at_most is not None:
            judged.append((f"≤ {line.at_most:g}", statistics.median(ours) <= line.at_most))
        for base, share in line.of.items():
            ratio = self._ratio(line.work, line.key, OURS, base)
            if ratio is not None:
                judged.append((f"≤ {share:.2f} × {base}", ratio <= share))
        text = Text()
        for target, met in judged:
            text.append("\n" if text else "").append(f"{target}: ")
            text.append("met" if met else "missed", style="green" if met else "bold red")
        return text


class Turn:
    """Hold a system at work, and its crowd, from one of its turns to the next.

    Args:
        name: of the system.
        api: what it asks.
        setting: how it runs.
        load: what its clients do.
        measure: takes the figures of a turn.
        stack: ends what this begins.
    """

    def __init__(
        self,
        name: str,
        api: System,
        setting: SystemOptions,
        load: Load,
        measure: Callable[[Turn], Figures],
        stack: ExitStack,
    ) -> None:
        self.name = name
        self.api = api
        self.load = load
        self.failures = 0
        self._setting = setting
        self._measure = measure
        self._stack = stack.enter_context(ExitStack())
        self._system: System | None = None
        self._crowd: Crowd | None = None

    def take(self) -> Figures:
        """Measure once."""
        return self._measure(self)

    def system(self) -> System:
        """Return the system, started when it is asked for first."""
        if not self._system:
            run = systems.REGISTRY[self.name]
            self._system = self._stack.enter_context(run(self.api.port, self._setting))
        return self._system

    def crowd(self) -> Crowd:
        """Return its clients, connected when they are asked for first."""
        if not self._crowd:
            load = self.load
            crowd = Crowd(self.system().port, load.clients, message_bytes=load.bytes_each)
            self._crowd = self._stack.enter_context(crowd)
            self._crowd.connect()
        return self._crowd

    def end(self) -> None:
        """End both, so that the next turn begins afresh."""
        self._stack.close()
        self._system = self._crowd = None


def _scaled(load: Load, scale: float) -> Load:
    def some(count: int) -> int:
        return max(1, round(count * scale)) if count else 0

    clients = some(load.clients)
    return Load(clients, load.bytes_each, some(load.in_flight), load.rate * scale)
