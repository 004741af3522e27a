"""Messages with their answers: CPU, rate and latency, in a closed loop and paced."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench_ import BenchError, arguments, machine, systems
from bench_.crowd import Crowd
from bench_.display import Display
from bench_.measure import Figures, Rounds, measure_sending
from bench_.report import Report
from bench_.systems import System, SystemOptions


@dataclass(frozen=True, slots=True)
class Load:
    """Say what clients do.

    Attributes:
        clients: how many there are.
        bytes_each: size of a message, and of its answer.
        in_flight: messages under way in a closed loop; 0 when paced.
        rate: messages per second over all clients; 0 in a closed loop.
    """

    clients: int
    bytes_each: int = 30
    in_flight: int = 0
    rate: float = 0

    def describe(self) -> dict[str, int | float | str]:
        """Return it as a row of the report tells it."""
        bytes_each = {"bytes": self.bytes_each}
        if self.rate:
            return {"clients": self.clients, "rate": f"{self.rate:,g}", **bytes_each}
        return {"clients": self.clients, "in_flight": self.in_flight, **bytes_each}


STANDARD: Final = (
    Load(1, in_flight=1),
    Load(200, in_flight=64),
    Load(200, in_flight=64, bytes_each=1_024),
    Load(200, in_flight=64, bytes_each=65_536),
    Load(4_000, in_flight=1_000),
    Load(4_000, rate=8_000),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--clients", type=int, help="how many (default: as the load needs)")
    parser.add_argument(
        "--in-flight", type=arguments.integers, help="messages under way in a closed loop"
    )
    parser.add_argument("--rate", type=arguments.numbers, help="messages/s, paced evenly")
    parser.add_argument(
        "--bytes", type=arguments.integers, help="size of messages and answers (default: 30)"
    )
    arguments.add_systems(parser)
    arguments.add_workers(parser)
    arguments.add_rounds(parser)
    arguments.add_times(parser)


def loads(options: argparse.Namespace) -> list[Load]:
    """Return what was asked for, or the standard set."""
    if not (options.clients or options.in_flight or options.rate or options.bytes):
        return list(STANDARD)
    chosen = []
    for size in options.bytes or [30]:
        for in_flight in options.in_flight or ([] if options.rate else [64]):
            clients = options.clients or (1 if in_flight == 1 else max(200, 4 * in_flight))
            chosen.append(Load(clients, size, in_flight=min(in_flight, clients)))
        for rate in options.rate or []:
            chosen.append(Load(options.clients or 4_000, size, rate=rate))
    return chosen


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure each load."""
    chosen = loads(options)
    with Display(len(chosen) * len(options.systems) * options.rounds) as display:
        for load in chosen:
            _measure_load(load, options, report, display)


def _measure_load(
    load: Load, options: argparse.Namespace, report: Report, display: Display
) -> None:
    """Let the systems take turns, all of them connected from the beginning."""
    workers = machine.survey().fit_workers(options.workers, load.clients)
    setting = SystemOptions(workers, clients=load.clients, message_bytes=load.bytes_each)
    rounds = Rounds()
    with ExitStack() as stack:
        api = stack.enter_context(systems.run_api(load.bytes_each))
        pairs = []
        for name in options.systems:
            display.begin(f"{name}: {load.clients:,} clients connect")
            system = stack.enter_context(systems.REGISTRY[name](api.port, setting))
            crowd = Crowd(system.port, load.clients, message_bytes=load.bytes_each)
            stack.enter_context(crowd).connect()
            pairs.append((system, crowd))
        for system, crowd in pairs * options.rounds:
            display.begin(f"{system.name}: {_text(load)}")
            figures = measure_round(api, system, crowd, load, options)
            rounds.add(system.name, figures)
            display.end(**figures)
    for row in rounds.rows("messages", load.describe() | {"workers": workers}):
        report.add(row)


def measure_round(
    api: System, system: System, crowd: Crowd, load: Load, options: argparse.Namespace
) -> Figures:
    """Measure once, and compare what both ends have counted.

    Raises:
        BenchError: if a message was lost or doubled anywhere.
    """
    first, seen = crowd.sample(), systems.requests_seen(api)
    own = sum(crowd.cpu_us())
    if load.rate:
        crowd.send_paced(rate=load.rate)
    else:
        crowd.send_in_loop(load.in_flight)
    time.sleep(options.warm_up)
    figures = measure_sending(system, crowd, options.seconds)
    crowd.stop()
    crowd.check()
    whole = crowd.sample() - first
    seen = systems.requests_seen(api) - seen
    if not whole.done == whole.frames == seen:
        raise BenchError(
            f"{system.name}: {whole.done:,} answers, {whole.frames:,} frames, but {seen:,} requests"
        )
    if not load.rate:
        del figures["late"]  # nothing can be late in a closed loop
    return figures | {"generator_us": (sum(crowd.cpu_us()) - own) / whole.done}


def _text(load: Load) -> str:
    return " ".join(f"{value} {key}" for key, value in load.describe().items())
