"""Build up a crowd that talks all the while, and hold it: ws2api's published scenario, and more.

Each client sends a message as soon as its turn comes after its connect, and then at an interval,
all of them spread evenly; with --silent it waits until all are connected. The gateway runs with the
options that it has by itself, but for these:

    --workers         a process may have only so many files, so clients decide how many workers
                      there are, not CPUs; their memory and wake-ups are part of the figures
    --ping-interval   its default, 30 s, or twice the time between messages, in whole seconds, if
                      that is longer: who talks need not be pinged, and a million pings in 30 s are
                      33,333 a second

    --api-max-connections
                      20 per worker, see --api-connections: when the CPUs have no more to give,
                      requests in line cost less than requests on connections of their own

Clients connect as fast as they are let in, a bounded number at once: the fewer talk already, the
more CPU is there for connects.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench_ import BenchError, arguments, board, machine, systems
from bench_.board import Sample
from bench_.crowd import Crowd
from bench_.display import Display, warn
from bench_.measure import Figures, cpu_figures, latency_figures, look
from bench_.report import RAMP_COLUMNS, Report, Row
from bench_.systems import System, SystemOptions


@dataclass(frozen=True, slots=True)
class Preset:
    """Name a known load; the fields are those of the options."""

    clients: int
    within: float
    every: float


PRESETS: Final = {
    "ws2api": Preset(250_000, 60, 10),
    "million": Preset(1_000_000, 300, 30),
}
AT_ONCE: Final = 128
"""Connects under way at most: when the CPUs have no more to give, it is they that wait, and the
messages of those who are in already are still answered in time."""
API_CONNECTIONS: Final = 20
"""Per worker."""
REST_S: Final = 0.008
"""How long a process of clients rests before it looks for answers and sends what is due: it shares
the CPUs with the system under test, and clients of the real world bring CPUs of their own."""
AT_ONCE_SILENT: Final = 32
"""Per worker, as long as nobody talks: then each has more to do whenever it gets a CPU."""
PING_INTERVAL_S: Final = 30
"""The gateway's default, and the least here."""
PATIENCE_S: Final = 2.0
"""How long the end of a system may take: it would tell the API of each of its many clients, and
nobody counts any more."""
MEMORY_EVERY_S: Final = 15
"""Adding up the pages of many processes takes a while that is theirs."""
LINE_EVERY_S: Final = 10
"""Where there is no terminal to show progress on."""
COLUMNS: Final = [
    *RAMP_COLUMNS,
    *("errors", "late", "p99_ms"),
    *("gateway_cores", "api_cores", "clients_cores", "gateway_mb", "machine_mb"),
]
_LOOK_EVERY_S: Final = 0.02
LONGEST_P99_MS: Final = 1_000
ENOUGH: Final = 0.99
"""The share of the messages wanted that makes a load held."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="ws2api",
        help="ws2api: 250,000 clients within 60 s, each a message per 10 s; "
        "million: 1,000,000 within 300 s, each a message per 30 s (default: %(default)s)",
    )
    parser.add_argument("--clients", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--within", type=float, metavar="S", help="time to connect them all")
    parser.add_argument(
        "--silent",
        action="store_true",
        help="send nothing until all clients are connected",
    )
    parser.add_argument("--every", type=float, metavar="S", help="time between two messages of one")
    parser.add_argument(
        "--hold", type=float, metavar="S", default=30, help="(default: %(default)s)"
    )
    parser.add_argument("--bytes", type=int, default=30, help="of a message (default: %(default)s)")
    parser.add_argument(
        "--api-workers",
        type=int,
        default=2,
        help="of the API's nginx, which has to get its share of the CPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--api-connections",
        type=int,
        metavar="N",
        help=f"the gateway's --api-max-connections (default: {API_CONNECTIONS} per worker)",
    )
    arguments.add_workers(parser)
    arguments.add_systems(parser, ("gateway",))


def run(options: argparse.Namespace, report: Report) -> None:
    """Let each system have its ramp."""
    complete(options)
    limits = machine.survey()
    if options.clients > limits.connections:
        raise BenchError(
            f"{options.clients:,} clients are too many: memory and files are there for "
            f"{limits.connections:,}"
        )
    options.workers = options.workers or limits.workers_for(options.clients)
    options.api_connections = options.api_connections or API_CONNECTIONS * options.workers
    for name in options.systems:
        with ExitStack() as stack:
            Ramp(name, options, stack).run(report)


def complete(options: argparse.Namespace) -> None:
    """Take from the preset what was not given."""
    preset = PRESETS[options.preset]
    for name in ("clients", "within", "every"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(preset, name))


class Ramp:
    """Run one system, its API and its clients.

    Args:
        name: of the system.
        options: of the command line, complete.
        stack: ends what is begun here.
    """

    def __init__(self, name: str, options: argparse.Namespace, stack: ExitStack) -> None:
        self._options = options
        setting = SystemOptions(
            options.workers,
            max(PING_INTERVAL_S, math.ceil(2 * options.every)),  # nginx takes no fractions
            options.clients,
            message_bytes=options.bytes,
            arguments=(f"--api-max-connections={options.api_connections}",),
        )
        self._free_kb = machine.available_kb()
        self._api = stack.enter_context(systems.run_api(options.bytes, options.api_workers))
        self._system = stack.enter_context(systems.REGISTRY[name](self._api.port, setting))
        self._crowd = stack.enter_context(
            Crowd(self._system.port, options.clients, message_bytes=options.bytes, rest_s=REST_S)
        )
        self._meter = Meter(self._system, self._api, self._crowd, self._free_kb)
        self._display = stack.enter_context(Display(round(options.within + options.hold)))

    def run(self, report: Report) -> None:
        """Build up, hold, and note what was seen, even when it goes wrong in between."""
        try:
            built_s = self._build_up()
            figures = self._hold() | {"built_up_s": built_s}
        finally:
            self._system.patience_s = PATIENCE_S
            name = f"{self._system.name}, {self._options.clients:,} clients"
            name += ", silent at first" if self._options.silent else ""
            report.series(name, COLUMNS, self._meter.lines)
        load = {"clients": self._options.clients, "every_s": self._options.every}
        load |= {"workers": self._options.workers, "bytes": self._options.bytes}
        report.add(Row("ramp", self._system.name, load, figures, {}))
        self._judge(figures)
        self._settle()

    def _build_up(self) -> float:
        options, crowd = self._options, self._crowd
        begin = time.monotonic()
        if not options.silent:
            crowd.send_paced(interval_s=options.every)
        at_once = AT_ONCE_SILENT * options.workers if options.silent else AT_ONCE
        crowd.start_connecting(at_once=at_once)
        for _ in self._seconds(3 * options.within + 30):
            if self._meter.complete_s:
                if options.silent:
                    self._warm_up()
                return self._meter.complete_s
        raise BenchError(
            f"{crowd.settled:,} of {options.clients:,} clients are connected "
            f"after {time.monotonic() - begin:.0f} s"
        )

    def _warm_up(self) -> None:
        """Let every client have sent two messages, the first one, which touches what no byte has
        passed through yet and costs twice as much, at half the pace."""
        for slowness in 2, 1:
            self._crowd.send_paced(interval_s=slowness * self._options.every)
            for _ in self._seconds(slowness * self._options.every):
                pass

    def _hold(self) -> Figures:
        before, api_us, clients_us = look(self._system, self._crowd), *self._others_us()
        for _ in self._seconds(self._options.hold):
            pass
        after, api_end_us, clients_end_us = look(self._system, self._crowd), *self._others_us()
        window = after.sample - before.sample
        if not window.done:
            raise BenchError(f"{self._system.name} answers nothing; {self._system.errors()}")
        gateway_kb, machine_kb = self._meter.memory_kb()
        clients = self._options.clients
        return {
            "per_second": window.done / window.time_s,
            "errors": float(self._crowd.sample().errors),
            "late": float(window.late),
            **latency_figures(window.message_ns),
            **cpu_figures(before, after, window.done),
            "api_us": (api_end_us - api_us) / window.done,
            "clients_us": (clients_end_us - clients_us) / window.done,
            "gateway_kb": (gateway_kb - self._meter.empty_kb) / clients,
            "generator_kb": self._crowd.kb_per_client(),
            "machine_kb": machine_kb / clients,
        }

    def _settle(self) -> None:
        """Wait for the last answers, and compare what both ends have counted."""
        crowd = self._crowd
        if crowd.sample().errors:
            return
        crowd.stop()
        counted = crowd.settled + crowd.sum(board.DONE)
        if (seen := systems.requests_seen(self._api)) != counted:
            raise BenchError(
                f"{self._system.name}: {counted:,} connects and answers, but {seen:,} requests"
            )

    def _judge(self, figures: Figures) -> None:
        """Say whether the load was held."""
        options = self._options
        wanted = options.clients / options.every
        verdicts = {
            f"{options.clients:,} clients in {figures['built_up_s']:.0f} s": (
                figures["built_up_s"] <= options.within
            ),
            f"{figures['per_second']:,.0f} of {wanted:,.0f} messages/s": (
                figures["per_second"] >= ENOUGH * wanted
            ),
            f"{figures['errors']:,.0f} errors": not figures["errors"],
            f"p99 {figures['p99_ms']:,.0f} ms": figures["p99_ms"] < LONGEST_P99_MS,
        }
        said = ", ".join(f"{text}: {'met' if met else 'missed'}" for text, met in verdicts.items())
        warn(f"{self._system.name}: {said}")

    def _seconds(self, seconds: float) -> Iterator[None]:
        """Note a line each second, and let the caller look then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._meter.wait()
            self._tell(self._meter.lines[-1])
            yield

    def _tell(self, line: list[float]) -> None:
        second, connections, rps, _, errors = line[:5]
        text = f"{connections:,.0f} connections, {rps:,.0f} messages/s, {errors:,.0f} errors"
        self._display.begin(f"{self._system.name}: {text}")
        self._display.end()
        if not sys.stderr.isatty() and second % LINE_EVERY_S == 0:
            warn(f"{second:,.0f} s: {text}")

    def _others_us(self) -> tuple[float, float]:
        return sum(self._api.cpu()), sum(self._crowd.cpu_us())


class Meter:
    """Write a line of the series each second.

    Args:
        system: the one under test.
        api: what it asks.
        crowd: its clients.
        free_kb: memory that was available before any of them ran.
    """

    def __init__(self, system: System, api: System, crowd: Crowd, free_kb: int) -> None:
        self.lines: list[list[float]] = []
        self._system, self._api, self._crowd = system, api, crowd
        self._free_kb = free_kb
        self.empty_kb = system.pss_kb()
        """Memory of the system without clients."""
        self.complete_s = 0.0
        """When the last client was connected; 0 as long as it is not."""
        self._pss_kb = self.empty_kb
        self._sample = crowd.sample()
        self._begin = self._sample.time_s
        self._cpu = self._cores_us()

    def wait(self) -> None:
        """Wait for the end of the second, and note its line."""
        second = len(self.lines) + 1
        while (now := time.monotonic() - self._begin) < second:
            if not self.complete_s and self._crowd.settled >= self._crowd.size:
                self.complete_s = now
            time.sleep(min(_LOOK_EVERY_S, second - now))
        before, self._sample = self._sample, self._crowd.sample()
        self.lines.append(self._line(second, self._sample, self._sample - before))

    def memory_kb(self) -> tuple[int, int]:
        """Return the memory of the system under test, and by how much all memory in use grew."""
        self._pss_kb = self._system.pss_kb()
        return self._pss_kb, self._free_kb - machine.available_kb()

    def _line(self, second: int, now: Sample, window: Sample) -> list[float]:
        cpu, self._cpu = self._cpu, self._cores_us()
        cores = [(b - a) / 1e6 / window.time_s for a, b in zip(cpu, self._cpu, strict=True)]
        if second % MEMORY_EVERY_S == 0:
            self.memory_kb()
        return [
            second,
            now.opened - now.lost,
            window.done,
            now.done,
            now.errors,
            window.late,
            round(latency_figures(window.message_ns)["p99_ms"], 3) if window.done else 0,
            *(round(value, 3) for value in cores),
            round(self._pss_kb / 1024, 1),
            round((self._free_kb - machine.available_kb()) / 1024, 1),
        ]

    def _cores_us(self) -> list[float]:
        return [sum(self._system.cpu()), sum(self._api.cpu()), sum(self._crowd.cpu_us())]
