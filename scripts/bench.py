"""Measure the gateway, and its peers beside it, on this machine.

CPU is the user and system time of every process of the system under test, Redis included, and
memory their proportional set size, both from /proc. The clients and the API (an nginx that answers
constants) are processes of their own and do not count. Systems take turns, so that ratios hold when
the machine is not quiet. Compare figures within one run only.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

from bench_ import BenchError, machine
from bench_.display import warn
from bench_.report import Report

SCENARIOS: Final = {
    "messages": "messages with their answers, in a closed loop and paced",
    "connect": "connects, a storm of them, and closes",
    "push": "pushes: local, to another worker, through the advertised URL",
    "idle": "memory and CPU of idle connections",
    "ramp": "ws2api's published scenario: 250,000 clients, 25,000 messages/s; or a million",
    "compare": "the same work for all peers that this machine has",
    "scale": "1 to 32 workers at the same load",
    "plots": "nothing: draw what was measured before",
}


def parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Read the options of a scenario, and return them with its module."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        epilog="scenarios:\n"
        + "\n".join(f"  {name:10} {text}" for name, text in SCENARIOS.items())
        + "\n\nbench SCENARIO --help lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="bench SCENARIO [options]",
    )
    parser.add_argument("scenario", choices=SCENARIOS, metavar="SCENARIO", help="what to measure")
    name = parser.parse_args(arguments[:1]).scenario
    module = importlib.import_module(f"bench_.{name}")
    parser = argparse.ArgumentParser(
        prog=f"bench {name}", description=f"Measure {SCENARIOS[name]}."
    )
    module.add_arguments(parser)
    if name != "plots":  # it measures nothing that could be written
        parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
        parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there")
        parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNGs there")
    return module, parser.parse_args(arguments[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report, and return 1 when something went wrong."""
    scenario, options = parse(sys.argv[1:] if arguments is None else arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # so that the children end as well
        signal.signal(number, lambda *_: sys.exit(1))
    warn(machine.survey().describe())
    report = Report()
    status = 0
    try:
        scenario.run(options, report)
    except BenchError as error:
        warn(str(error))
        status = 1
    if report.rows or report.all_series:
        report.finish(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
