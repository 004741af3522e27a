"""Print what a message, a push and an idle connection cost, beside Nchan on the same machine.

CPU is the user and system time of every process of the system under test, from /proc: the
gateway's supervisor, workers, admin process and embedded Valkey, or Nchan's master and worker.
The load generator and the API (an nginx that answers constants) are processes of their own and do
not count. Gateway and Nchan take turns, so that their ratio holds when the machine is not quiet;
a figure is the median of the rounds. Compare CPU within one run only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import signal
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cost_ import CostError, systems
from cost_.load import LOCAL, MESSAGES, REMOTE, Generator, Load, MessageLoad, PushLoad
from cost_.systems import System

PHASES: Final = ("messages", "push", "idle")
LOADS: Final = {"narrow": (200, 64), "wide": (4_000, 1_000)}  # clients, requests in flight


@dataclass(frozen=True, slots=True)
class Figure:
    """Describe a line of the table."""

    key: str
    text: str
    target: float | None = None
    """What the gateway may cost at most; None when nothing was promised."""
    below_nchan: bool = False
    narrow: bool = True
    """Whether the target was set for the narrow load; the comparison holds for any."""


FIGURES: Final = (
    Figure("message_us", "CPU µs per message", 24, below_nchan=True),
    Figure("messages_per_s", "messages/s"),
    Figure("remote_push_us", "CPU µs per push to another worker", 30),
    Figure("local_push_us", "CPU µs per push to the owner"),
    Figure("pushes_per_s", "pushes/s to another worker"),
    Figure("idle_kb", "KB per idle connection", 6, narrow=False),
    Figure("connect_us", "CPU µs per connect"),
)


@dataclass(slots=True)
class Results:
    """Collect what the rounds gave."""

    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Figure's key -> system -> a value per round."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """System -> what was counted at both ends -> how many, over all rounds."""

    def add(self, system: str, **values: float) -> None:
        """Note the figures of one round, and say them on stderr."""
        for key, value in values.items():
            self.rounds.setdefault(key, {}).setdefault(system, []).append(value)
        said = "  ".join(f"{key} {value:,.1f}" for key, value in values.items())
        print(f"{system:8} {said}", file=sys.stderr, flush=True)

    def count(self, system: str, **values: int) -> None:
        """Add to the counts of a system."""
        counts = self.counts.setdefault(system, {})
        for key, value in values.items():
            counts[key] = counts.get(key, 0) + value

    def of(self, key: str, system: str) -> list[float]:
        """Return the values of the rounds; empty when there was none."""
        return self.rounds.get(key, {}).get(system, [])


def measure_messages(options: argparse.Namespace, results: Results) -> None:
    """Take turns: messages through the gateway, messages through Nchan."""
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(systems.run_api())
        contenders = [stack.enter_context(systems.run_gateway(api.port, options.workers))]
        if options.nchan:
            contenders.append(stack.enter_context(systems.run_nchan(api.port)))
        pairs = [
            (system, stack.enter_context(Generator(MessageLoad, system.port, *options.load)))
            for system in contenders
        ]
        for system, generator in pairs * options.rounds:
            seen = systems.requests_seen(api)
            one = generator.measure(system, MESSAGES, options.warm_up, options.seconds)
            seen = systems.requests_seen(api) - seen - 1
            results.add(system.name, message_us=one.cpu_us, messages_per_s=one.per_second)
            results.count(system.name, replies=one.count, api_requests=seen)
            if seen != one.count:
                raise CostError(f"{system.name}: {one.count} replies, but {seen} requests")


def measure_pushes(options: argparse.Namespace, results: Results) -> None:
    """Take turns: pushes to a client of the other worker, pushes to the owner itself."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=4096) as api,
        systems.run_gateway(api.getsockname()[1], workers=2) as system,
        Generator(PushLoad, api, system.port, *options.load) as generator,
    ):
        for _ in range(options.rounds):
            one = generator.measure(system, REMOTE, options.warm_up, options.seconds)
            results.add(system.name, remote_push_us=one.cpu_us, pushes_per_s=one.per_second)
            results.count(system.name, remote_pushes=one.count, remote_frames=one.frames)
            one = generator.measure(system, LOCAL, options.warm_up, options.seconds)
            results.add(system.name, local_push_us=one.cpu_us)
            results.count(system.name, local_pushes=one.count, local_frames=one.frames)
        generator.expect_end()
        system.stop()  # while the API is still there to hear the last DELETEs


def measure_idle(options: argparse.Namespace, results: Results) -> None:
    """Take turns, afresh each time: connect clients that stay silent, and weigh them."""
    for _ in range(options.rounds):
        with systems.run_api() as api:
            with systems.run_gateway(api.port, options.workers) as system:
                _weigh(system, options, results)
            if options.nchan:
                with systems.run_nchan(api.port) as system:
                    _weigh(system, options, results)


def _weigh(system: System, options: argparse.Namespace, results: Results) -> None:
    time.sleep(options.warm_up)
    kb, cpu_us = system.memory_kb(), system.cpu_us()
    with Generator(Load, system.port, options.idle_clients):
        time.sleep(options.warm_up)
        kb, cpu_us = system.memory_kb() - kb, system.cpu_us() - cpu_us
    clients = options.idle_clients
    results.add(system.name, idle_kb=kb / clients, connect_us=cpu_us / clients)
    results.count(system.name, idle_clients=clients)


def table(options: argparse.Namespace, results: Results) -> str:
    """Put the medians beside each other, with the targets and whether they are met."""
    lines = [
        "{} clients, {} in flight, workers: {}".format(*options.load, options.workers),
        f"{'median (lowest – highest)':34}{'gateway':>26}{'nchan':>26}{'ratio':>7}  target",
    ]
    for figure in FIGURES:
        ours, nchan = (results.of(figure.key, name) for name in ("gateway", "nchan"))
        if ours:
            # Rounds that followed each other met the same weather: compare those.
            ratios = [a / b for a, b in zip(ours, nchan, strict=True)] if nchan else []
            line = f"{figure.text:34}{_spread(ours):>26}{_spread(nchan):>26}"
            line += f"{statistics.median(ratios):>7.2f}" if ratios else f"{'–':>7}"
            applies = options.load == LOADS["narrow"] or not figure.narrow
            lines.append(f"{line}  {_verdict(figure, applies, ours, ratios)}".rstrip())
    return "\n".join(lines)


def _spread(rounds: list[float]) -> str:
    if not rounds:
        return "–"
    middle, low, high = (
        f"{value:,.0f}" if value >= 1_000 else f"{value:.1f}"
        for value in (statistics.median(rounds), min(rounds), max(rounds))
    )
    return f"{middle} ({low} – {high})"


def _verdict(figure: Figure, applies: bool, ours: list[float], ratios: list[float]) -> str:
    judged = []
    if figure.target is not None and applies:
        judged.append((f"at most {figure.target:g}", statistics.median(ours) <= figure.target))
    if figure.below_nchan and ratios:
        judged.append(("below nchan", statistics.median(ratios) < 1))
    return ", ".join(f"{target}: {'met' if met else 'missed'}" for target, met in judged)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options; `load` becomes the pair of clients and requests in flight."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--load", choices=LOADS, default="narrow", help="clients and in flight")
    parser.add_argument("--clients", type=int, help="clients (narrow: 200, wide: 4000)")
    parser.add_argument("--in-flight", type=int, help="requests in flight (narrow: 64, wide: 1000)")
    parser.add_argument("--idle-clients", type=int, default=5_000, help="clients that stay silent")
    parser.add_argument("--seconds", type=float, default=5, help="length of a measurement")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds in front of it")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure")
    parser.add_argument("--workers", type=int, default=1, help="for messages and idle clients")
    parser.add_argument("--only", default=",".join(PHASES), help="a choice of %(default)s")
    parser.add_argument("--no-nchan", dest="nchan", action="store_false", help="gateway only")
    parser.add_argument("--json", action="store_true", help="print all rounds and counts as JSON")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PHASES):
        parser.error(f"no such figures: {', '.join(unknown)}")
    clients, in_flight = LOADS[options.load]
    clients = options.clients or clients
    options.load = clients, min(options.in_flight or in_flight, clients)
    return options


def prepare(options: argparse.Namespace) -> None:
    """Allow as many files as may be, and leave out what this machine cannot do."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.idle_clients > most - 1_000:
        options.idle_clients = most - 1_000
        print(f"only {options.idle_clients} idle clients: RLIMIT_NOFILE is {most}", file=sys.stderr)
    if not shutil.which("nginx"):
        options.only = [phase for phase in options.only if phase == "push"]
        print("no nginx, so no messages, no idle clients: apt-get install nginx", file=sys.stderr)
    elif options.nchan and not systems.NCHAN_MODULE.exists():
        options.nchan = False
        print("no Nchan to compare: apt-get install libnginx-mod-nchan", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 when counts do not add up."""
    options = parse(arguments)
    prepare(options)
    for number in (signal.SIGINT, signal.SIGTERM):  # so that the children end as well
        signal.signal(number, lambda *_: sys.exit(1))
    results = Results()
    try:
        if "messages" in options.only:
            measure_messages(options, results)
        if "push" in options.only:
            measure_pushes(options, results)
        if "idle" in options.only:
            measure_idle(options, results)
    except CostError as error:
        print(f"cost: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"rounds": results.rounds, "counts": results.counts}, indent=2))
    else:
        print(table(options, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
