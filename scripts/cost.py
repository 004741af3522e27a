"""Print what a message, a push and an idle connection cost, beside Nchan on the same machine.

A short choice of what scripts/bench measures, for whoever works on the gateway: the figures that
have a target, each with whether it is met. Gateway and Nchan take turns, so that their ratio holds
when the machine is not quiet; a figure is the median of the rounds. Compare CPU within one run
only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from bench_ import BenchError, machine, messages, push, systems
from bench_.crowd import Crowd
from bench_.pushing import ADVERTISED, REMOTE
from bench_.systems import System, SystemOptions

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
    clients, in_flight = options.load
    load = messages.Load(clients, in_flight=in_flight)
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(systems.run_api())
        pairs = []
        for name in options.systems:
            setting = SystemOptions(options.workers, clients=clients)
            system = stack.enter_context(systems.REGISTRY[name](api.port, setting))
            crowd = stack.enter_context(Crowd(system.port, clients))
            crowd.connect()
            pairs.append((system, crowd))
        for system, crowd in pairs * options.rounds:
            done, seen = crowd.sample().done, systems.requests_seen(api)
            one = messages.measure_round(api, system, crowd, load, options)
            results.add(system.name, message_us=one["cpu_us"], messages_per_s=one["per_second"])
            results.count(
                system.name,
                replies=crowd.sample().done - done,
                api_requests=systems.requests_seen(api) - seen,
            )


def measure_pushes(options: argparse.Namespace, results: Results) -> None:
    """Take turns: pushes to a client of the other worker, pushes to the owner itself."""
    clients, options.in_flight = options.load
    with push.pushing("gateway", REMOTE, clients, size=30) as (system, crowd):
        for _ in range(options.rounds):
            for name, kind in (("remote", REMOTE), ("local", ADVERTISED)):
                first = crowd.sample()
                one = push.measure_round(system, crowd, kind, options)
                whole = crowd.sample() - first
                results.add(system.name, **{f"{name}_push_us": one["cpu_us"]})
                results.count(
                    system.name,
                    **{f"{name}_pushes": whole.done, f"{name}_frames": whole.frames},
                )
                if kind == REMOTE:
                    results.add(system.name, pushes_per_s=one["per_second"])


def measure_idle(options: argparse.Namespace, results: Results) -> None:
    """Take turns, afresh each time: connect clients that stay silent, and weigh them."""
    setting = SystemOptions(options.workers, clients=options.idle_clients)
    for _ in range(options.rounds):
        for name in options.systems:
            with (
                systems.run_api() as api,
                systems.REGISTRY[name](api.port, setting) as system,
                Crowd(system.port, options.idle_clients) as crowd,
            ):
                _weigh(system, crowd, options.warm_up, results)


def _weigh(system: System, crowd: Crowd, warm_up_s: float, results: Results) -> None:
    time.sleep(warm_up_s)
    kb, cpu_us = system.pss_kb(), sum(system.cpu())
    crowd.connect()
    time.sleep(warm_up_s)
    kb, cpu_us = system.pss_kb() - kb, sum(system.cpu()) - cpu_us
    results.add(system.name, idle_kb=kb / crowd.size, connect_us=cpu_us / crowd.size)
    results.count(system.name, idle_clients=crowd.size)


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
    parser.add_argument(
        "--no-nchan",
        dest="systems",
        action="store_const",
        const=["gateway"],
        default=["gateway", "nchan"],
        help="gateway only",
    )
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
    limits = machine.survey()
    if options.idle_clients > (most := options.workers * limits.worker_clients):
        options.idle_clients = most
        print(f"only {most} idle clients: a worker may have {limits.files} files", file=sys.stderr)
    if not shutil.which("nginx"):
        options.only = [phase for phase in options.only if phase == "push"]
        print("no nginx, so no messages, no idle clients: apt-get install nginx", file=sys.stderr)
    elif "nchan" in options.systems and not systems.NCHAN_MODULE.exists():
        options.systems = ["gateway"]
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
    except BenchError as error:
        print(f"cost: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"rounds": results.rounds, "counts": results.counts}, indent=2))
    else:
        print(table(options, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
