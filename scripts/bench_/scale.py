"""The same load on more and more workers: cost per message, balance, memory of a worker."""

from __future__ import annotations

import argparse
import json
import statistics
import urllib.request
from typing import Any

from bench_ import BenchError, arguments, proc, systems
from bench_.crowd import Crowd
from bench_.display import Display
from bench_.measure import Figures, Rounds
from bench_.messages import Load, measure_round
from bench_.report import Report
from bench_.systems import System, SystemOptions, run_gateway


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--workers",
        type=arguments.integers,
        default=[1, 2, 4, 8, 16, 32],
        help="numbers of workers (default: 1,2,4,8,16,32)",
    )
    parser.add_argument(
        "--clients", type=int, default=4_000, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--in-flight", type=int, default=1_000, help="messages under way (default: %(default)s)"
    )
    parser.add_argument("--bytes", type=int, default=30, help="size (default: %(default)s)")
    arguments.add_rounds(parser)
    arguments.add_times(parser)


def run(options: argparse.Namespace, report: Report) -> None:
    """Start each number of workers afresh in each round, so that none idles beside another."""
    load = Load(options.clients, options.bytes, min(options.in_flight, options.clients))
    rounds: dict[int, Rounds] = {workers: Rounds() for workers in options.workers}
    with (
        systems.run_api(options.bytes) as api,
        Display(options.rounds * len(options.workers)) as display,
    ):
        for _ in range(options.rounds):
            base_us = 0.0
            for workers in options.workers:
                display.begin(f"{workers} workers")
                figures = _measure(api, workers, load, options)
                base_us = base_us or figures["cpu_us"]
                figures["of_first"] = figures["cpu_us"] / base_us
                rounds[workers].add("gateway", figures)
                display.end(**figures)
    for workers, collected in rounds.items():
        for row in collected.rows("scale", load.describe() | {"workers": workers}):
            report.add(row)


def _measure(api: System, workers: int, load: Load, options: argparse.Namespace) -> Figures:
    setting = SystemOptions(workers, clients=load.clients, message_bytes=load.bytes_each)
    with (
        run_gateway(api.port, setting) as system,
        Crowd(system.port, load.clients, message_bytes=load.bytes_each) as crowd,
    ):
        crowd.connect()
        figures = measure_round(api, system, crowd, load, options)
        return figures | balance(read_status(system)["workers"])


def read_status(system: System) -> dict[str, Any]:
    """Ask the gateway's admin port about its workers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{system.admin_port}/status") as answer:
        status: dict[str, Any] = json.load(answer)
        return status


def balance(workers: list[dict[str, Any]]) -> Figures:
    """Return how unevenly clients are spread, and what a worker weighs.

    Raises:
        BenchError: a worker was replaced meanwhile, so that the figures tell nothing.
    """
    if any(worker["restarts"] for worker in workers):
        raise BenchError("a worker died")
    connections = [worker["connections"] for worker in workers]
    return {
        "fewest_clients": min(connections),
        "most_clients": max(connections),
        "worker_mb": statistics.mean(proc.pss_kb(worker["pid"]) for worker in workers) / 1024,
    }
