"""Connects with the API's GET and the claim in Redis, a storm of them, and closes with DELETE."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from typing import Final

from bench_ import BenchError, arguments, machine, systems
from bench_.crowd import Crowd
from bench_.display import Display
from bench_.measure import Figures, Rounds, cpu_figures, latency_figures, look, redis_figures
from bench_.report import Report
from bench_.systems import System, SystemOptions

QUIET_S: Final = 0.5
"""When the API has heard nothing for so long, no DELETE is on its way any more."""
STORM_TIMEOUT_S: Final = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--clients", type=int, default=10_000, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--at-once", type=int, default=64, help="connects under way (default: %(default)s)"
    )
    parser.add_argument(
        "--storm",
        type=int,
        default=10_000,
        help="clients that come all at once, 0 for no storm (default: %(default)s)",
    )
    arguments.add_systems(parser)
    arguments.add_workers(parser)
    arguments.add_rounds(parser)


def run(options: argparse.Namespace, report: Report) -> None:
    """Let the systems take turns with connects, closes and a storm."""
    most = max(options.clients, options.storm)
    workers = machine.survey().fit_workers(options.workers, most)
    kinds = ("connect", "close", "storm") if options.storm else ("connect", "close")
    rounds = {kind: Rounds() for kind in kinds}
    steps = len(kinds) * len(options.systems) * options.rounds
    with ExitStack() as stack:
        display = stack.enter_context(Display(steps))
        api = stack.enter_context(systems.run_api())
        setting = SystemOptions(workers, clients=most)
        running = [
            stack.enter_context(systems.REGISTRY[name](api.port, setting))
            for name in options.systems
        ]
        for system in running * options.rounds:
            _take_turn(api, system, options, rounds, display)
    for kind, collected in rounds.items():
        load: dict[str, int | float | str] = (
            {"clients": options.storm}
            if kind == "storm"
            else {"clients": options.clients, "at_once": options.at_once}
        )
        for row in collected.rows(kind, load | {"workers": workers}):
            report.add(row)


def _take_turn(
    api: System,
    system: System,
    options: argparse.Namespace,
    rounds: dict[str, Rounds],
    display: Display,
) -> None:
    with Crowd(system.port, options.clients) as crowd:
        display.begin(f"{system.name}: {options.clients:,} connects")
        figures = measure_connects(system, crowd, options.at_once)
        rounds["connect"].add(system.name, figures)
        display.end(**figures)
        display.begin(f"{system.name}: {options.clients:,} closes")
        figures = measure_closes(api, system, crowd, options.at_once)
        rounds["close"].add(system.name, figures)
        display.end(**figures)
    if options.storm:
        with Crowd(system.port, options.storm) as crowd:
            display.begin(f"{system.name}: a storm of {options.storm:,}")
            figures = measure_storm(system, crowd)
            rounds["storm"].add(system.name, figures)
            display.end(**figures)
            crowd.close(at_once=256)
        _wait_for_quiet(api)


def measure_connects(system: System, crowd: Crowd, at_once: int) -> Figures:
    """Connect a crowd, some at a time."""
    before = look(system, crowd)
    crowd.connect(at_once=at_once)
    elapsed_s = time.monotonic() - before.sample.time_s
    after = look(system, crowd)
    return (
        cpu_figures(before, after, crowd.size)
        | redis_figures(before, after, crowd.size)
        | {"per_second": crowd.size / elapsed_s}
        | latency_figures((after.sample - before.sample).connect_ns)
    )


def measure_closes(api: System, system: System, crowd: Crowd, at_once: int) -> Figures:
    """Close a connected crowd, and wait until the API has heard of it where it ever does."""
    seen = systems.requests_seen(api)
    before = look(system, crowd)
    crowd.close(at_once=at_once)
    closed_s = time.monotonic() - before.sample.time_s
    deletes = _wait_for_quiet(api) - seen
    after = look(system, crowd)
    figures = cpu_figures(before, after, crowd.size) | redis_figures(before, after, crowd.size)
    crowd.check()
    if deletes not in (0, crowd.size):
        raise BenchError(f"{system.name}: {crowd.size:,} closes, but {deletes:,} requests")
    return figures | {"per_second": crowd.size / closed_s, "deletes": deletes}


def measure_storm(system: System, crowd: Crowd) -> Figures:
    """Let a crowd come all at once, and see when the last one is in, or turned away."""
    before = look(system, crowd)
    crowd.start_connecting(at_once=crowd.size)
    crowd.wait_until(
        lambda: crowd.settled == crowd.size,
        f"{system.name}: the storm does not end",
        STORM_TIMEOUT_S,
    )
    after = look(system, crowd)
    window = after.sample - before.sample
    return (
        cpu_figures(before, after, crowd.size)
        | {"all_in_s": window.time_s, "errors": window.errors}
        | latency_figures(window.connect_ns)
    )


def _wait_for_quiet(api: System) -> int:
    """Return how many requests the API has seen once no more come."""
    seen, since_s = systems.requests_seen(api), time.monotonic()
    while time.monotonic() - since_s < QUIET_S:
        time.sleep(0.02)
        if (now := systems.requests_seen(api)) != seen:
            seen, since_s = now, time.monotonic()
    return seen
