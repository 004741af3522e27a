"""Print the tables of docs/metrics.md, made from what /metrics shows; --write puts them there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Metric
from ws2api.gateway import counters as c
from ws2api.supervisor.exposition import create_registry

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
START, END = "<!-- metrics -->\n", "<!-- /metrics -->"
_SECTIONS = {  # by the part of the name that follows the prefix; the first that fits
    "Connections": ("connect", "closes", "handshakes", "protocol_errors"),
    "Messages": ("messages", "received", "sent", "clients", "write"),
    "Requests to the API": ("requests", "errors", "api", "breaker"),
    "Pushes": ("push",),
    "Redis": ("redis",),
    "Disconnects, and the reaper that tells the API of them": ("disconnects", "reaper"),
    "Workers and their processes": ("",),
}


def families(workers: int) -> list[Metric]:
    """Return all metrics of a gateway whose workers live."""
    counters = c.Counters(workers)
    for worker in range(workers):
        bank = counters.bank(worker, 0)
        bank[c.PID], bank[c.STATE] = os.getpid(), c.STATE_SERVING
    return list(create_registry(counters, 0.0).collect())


def exposed_name(family: Metric) -> str:
    """Return the name that queries use; of a histogram that without _bucket, _sum and _count."""
    return family.name + ("_total" if family.type == "counter" else "")


def series(workers: int) -> int:
    """Count the samples of one scrape."""
    return sum(len(family.samples) for family in families(workers))


def tables() -> str:
    """Return a table for each section in Markdown, a line for each metric."""
    rest = families(1)
    lines: list[str] = []
    for section, stems in _SECTIONS.items():
        chosen = [f for f in rest if f.name.removeprefix("ws2api_").startswith(stems)]
        rest = [family for family in rest if family not in chosen]
        lines += [f"### {section}", ""]
        lines += ["| name | type | labels | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(family) for family in sorted(chosen, key=exposed_name)]
        lines.append("")
    return "\n".join(lines)


def _row(family: Metric) -> str:
    cells = (f"`{exposed_name(family)}`", family.type, "; ".join(_labels(family)))
    return f"| {' | '.join(cells)} | {family.documentation} |"


def _labels(family: Metric) -> Iterator[str]:
    """Name the labels, with their values where these are fixed."""
    labels = family.samples[-1].labels  # of a histogram its sum, which has no bound
    for name in labels:
        values = dict.fromkeys(s.labels[name] for s in family.samples if name in s.labels)
        is_fixed = name != "worker" and family.name != "ws2api_build_info"
        yield f"`{name}`" + (f": {', '.join(values)}" if is_fixed else "")


def bound() -> str:
    """Return the sentence that says how many series there are."""
    of_gateway = 2 * series(1) - series(2)
    of_worker = series(1) - of_gateway
    eight, many = (f"{of_worker * n + of_gateway:,}" for n in (8, 64))
    return (
        f"Each worker has {of_worker} series and the gateway {of_gateway} more:"
        f" {eight} with 8 workers, {many} with 64.\n"
    )


def replace_tables(text: str) -> str:
    """Return the page's text with fresh tables between its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{PAGE.name} lacks {START.strip()} or {END}")
    return f"{before}{start}\n{bound()}\n{tables()}\n{end}{after}"


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update docs/metrics.md")
    if parser.parse_args().write:
        PAGE.write_text(replace_tables(PAGE.read_text()))
    else:
        print(bound(), tables(), sep="\n", end="")


if __name__ == "__main__":
    main()
