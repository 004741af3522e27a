"""Pushes: at the worker that has the client, at another one, and through the advertised URL."""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from bench_ import BenchError, arguments, board
from bench_.crowd import Crowd
from bench_.display import Display
from bench_.measure import Figures, Rounds, measure_sending
from bench_.pushing import ADVERTISED, LOCAL, REMOTE
from bench_.report import Report
from bench_.systems import REGISTRY, System, SystemOptions

WORKERS: Final = {LOCAL: 1, REMOTE: 2, ADVERTISED: 2}
"""Kinds, and how many workers each is measured with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--kinds",
        type=_kinds,
        default=list(WORKERS),
        metavar="KIND,…",
        help=f"which of {', '.join(WORKERS)} (default: all)",
    )
    parser.add_argument("--clients", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument(
        "--in-flight", type=int, default=64, help="connections that push (default: %(default)s)"
    )
    parser.add_argument(
        "--bytes", type=arguments.integers, default=[30], help="size of a push (default: 30)"
    )
    arguments.add_systems(parser, ["gateway"])
    arguments.add_rounds(parser)
    arguments.add_times(parser)


def _kinds(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(WORKERS):
        raise argparse.ArgumentTypeError(f"no such kind: {', '.join(unknown)}")
    return chosen


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure each kind and size."""
    work = [(kind, size) for size in options.bytes for kind in options.kinds]
    with Display(len(work) * len(options.systems) * options.rounds) as display:
        for kind, size in work:
            rounds = Rounds()
            for name in options.systems:
                with pushing(name, kind, options.clients, size) as (system, crowd):
                    for _ in range(options.rounds):
                        display.begin(f"{name}: {kind} pushes of {size:,} bytes")
                        figures = measure_round(system, crowd, kind, options)
                        rounds.add(name, figures)
                        display.end(**figures)
            load: dict[str, int | float | str] = {"kind": kind, "workers": WORKERS[kind]}
            load |= {"clients": options.clients, "in_flight": options.in_flight, "bytes": size}
            for row in rounds.rows("push", load):
                report.add(row)


@contextmanager
def pushing(name: str, kind: str, clients: int, size: int) -> Iterator[tuple[System, Crowd]]:
    """Run a system whose API is in the generator, with clients connected."""
    setting = SystemOptions(WORKERS[kind], clients=clients, message_bytes=size)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=4_096) as api,
        REGISTRY[name](api.getsockname()[1], setting) as system,
    ):
        api.setblocking(False)
        if not system.push_ports:
            raise BenchError(f"{name} takes no pushes")
        with Crowd(system.port, clients, message_bytes=size, api=api) as crowd:
            crowd.connect()
            if crowd.sum(board.OWNERS) < WORKERS[kind] and kind != LOCAL:
                raise BenchError(
                    f"{name}: only {crowd.sum(board.OWNERS)} worker has clients, or tells where to "
                    "push to them; try again with more --clients"
                )
            yield system, crowd
            crowd.close()  # while the API is still there to hear of it
            system.stop()


def measure_round(system: System, crowd: Crowd, kind: str, options: argparse.Namespace) -> Figures:
    """Measure once, and see to it that each push was one frame.

    Raises:
        BenchError: if it was not.
    """
    first = crowd.sample()
    crowd.push(kind, options.in_flight, system.push_ports[0])
    time.sleep(options.warm_up)
    figures = measure_sending(system, crowd, options.seconds, redis=True)
    crowd.stop()
    crowd.wait_until(
        lambda: crowd.sum(board.FRAMES) - first.frames >= crowd.sum(board.DONE) - first.done,
        f"{system.name}: frames are missing",
        5,
    )
    crowd.check()
    whole = crowd.sample() - first
    if whole.frames != whole.done:
        raise BenchError(f"{system.name}: {whole.done:,} pushes, but {whole.frames:,} frames")
    figures.pop("late")
    return figures
