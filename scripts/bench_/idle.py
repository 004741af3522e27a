"""Idle connections: what each weighs, and what it costs to ping them."""

from __future__ import annotations

import argparse
import math
import time
from typing import Final

from bench_ import BenchError, arguments, machine, systems
from bench_.crowd import Crowd
from bench_.display import Display
from bench_.machine import available_kb
from bench_.measure import Figures, Rounds, look
from bench_.report import Report
from bench_.systems import REGISTRY, System, SystemOptions

NO_PINGS_S: Final = 20
"""How long to watch clients that are not pinged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--clients", type=arguments.integers, default=[10_000], help="how many (default: 10000)"
    )
    parser.add_argument(
        "--ping-interval",
        type=int,
        default=20,
        help="seconds from ping to ping of a silent client, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0,
        help="how long to watch them (default: two intervals of pings)",
    )
    parser.add_argument(
        "--warm-up", type=float, default=2, help="seconds in front of it (default: %(default)s)"
    )
    arguments.add_systems(parser)
    arguments.add_workers(parser)
    arguments.add_rounds(parser, 1)


def run(options: argparse.Namespace, report: Report) -> None:
    """Take turns, afresh each time: connect clients that stay silent, weigh and watch them."""
    limits = machine.survey()
    for clients in map(limits.fit_clients, options.clients):
        workers = limits.fit_workers(options.workers, clients)
        setting = SystemOptions(workers, options.ping_interval, clients)
        rounds = Rounds()
        with Display(options.rounds * len(options.systems)) as display:
            for _ in range(options.rounds):
                for name in options.systems:
                    display.begin(f"{name}: {clients:,} idle clients, {workers} workers")
                    with systems.run_api() as api, REGISTRY[name](api.port, setting) as system:
                        figures = measure_idle(system, clients, options)
                    rounds.add(name, figures)
                    display.end(**figures)
        load: dict[str, int | float | str] = {"clients": clients, "workers": workers}
        for row in rounds.rows("idle", load | {"ping_every": f"{options.ping_interval} s"}):
            report.add(row)


def measure_idle(system: System, clients: int, options: argparse.Namespace) -> Figures:
    """Connect, weigh after the warm-up, and watch pings for a time.

    Raises:
        BenchError: if a client was lost meanwhile.
    """
    time.sleep(options.warm_up)
    with Crowd(system.port, clients) as crowd:
        kb, free_kb = system.pss_kb(), available_kb()
        crowd.connect(at_once=256, timeout_s=60 + clients / 500)
        time.sleep(options.warm_up)
        figures = {
            "connection_kb": (system.pss_kb() - kb) / clients,
            "all_memory_kb": (free_kb - available_kb()) / clients,
            "generator_kb": crowd.kb_per_client(),
        }
        before = look(system, crowd)
        time.sleep(options.seconds or 2 * options.ping_interval or NO_PINGS_S)
        after = look(system, crowd)
        crowd.check()
    window = after.sample - before.sample
    cpu_s = (after.user_us + after.system_us - before.user_us - before.system_us) / 1e6
    if not window.pings and 0 < 2 * options.ping_interval <= window.time_s:
        raise BenchError(f"{system.name} sends no pings")
    return figures | {
        "cpu_per_ping_us": cpu_s * 1e6 / window.pings if window.pings else math.nan,
        "pings": window.pings,
        "cpu_s_per_minute": cpu_s * 60 / window.time_s,
        "core_percent": cpu_s * 100 / window.time_s,
    }
