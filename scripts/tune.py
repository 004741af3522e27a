"""Show the kernel settings and limits that so many connections need, and set them with --apply.

Nothing is ever lowered. The exit status is 0 when all is met, 1 when something is too low, 2 when
the machine could not be read or changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tune_.host import SYSCTL_FILE, Changes, TuneError, apply, overridden, read
from tune_.needs import FILES, Host, Need, Plan, memory_bytes, needs, unmet

_ROOT: Final = Path("/")
_MOST: Final = 100_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    options = _parse(arguments)
    plan = Plan(options.connections, options.workers, options.redis == "yes")
    try:
        if options.apply and options.root == _ROOT and os.geteuid() != 0:
            raise TuneError("--apply changes the kernel's settings, which needs root: use sudo")
        host = read(options.root)
        before = needs(plan, host)
        changes = apply(before, options.root) if options.apply else None
        after = before if changes is None else needs(plan, read(options.root))
    except TuneError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_as_json(plan, host, after, changes), indent=2))
    else:
        _print_needs(plan, host, before)
        if changes is None:
            _print_advice(plan, before)
        else:
            _print_changes(changes, before, options.root)
    if changes is not None and changes.failed:
        return 2
    # The limit of files was written, but is that of this shell until the next login.
    written = {FILES} if changes is not None else set()
    return int(any(need.key not in written for need in unmet(after)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--connections",
        type=_count,
        required=True,
        metavar="N",
        help="clients at the same time, over all workers",
    )
    parser.add_argument(
        "--workers",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="what the gateway is started with; one per CPU unless given",
    )
    parser.add_argument(
        "--redis",
        choices=("yes", "no"),
        default="no",
        help="whether a Redis or Valkey of your own, which saves to disk, runs on this machine",
    )
    parser.add_argument(
        "--apply", action="store_true", help="set what is too low, now and in /etc for each boot"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--root", type=Path, default=_ROOT, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    digits = text.replace(",", "").replace("_", "")
    count = int(digits) if digits.isdecimal() else 0
    if not 1 <= count <= _MOST:
        raise argparse.ArgumentTypeError(f"not a number from 1 to {_MOST:,}: {text}")
    return count


def _print_needs(plan: Plan, host: Host, all_needs: list[Need]) -> None:
    print(f"For {plan.connections:,} connections and {plan.workers:,} workers:\n")
    width = max(len(need.key) for need in all_needs)
    for need in all_needs:
        mark, change = ("ok ", "") if need.is_met else ("LOW", f" → {need.wanted}")
        print(f"{mark}  {need.key:{width}}  {need.present}{change}")
        print(f"     {need.why}")
    print(
        f"\nMemory: idle clients take about {_gb(memory_bytes(plan))}, gateway and kernel; "
        f"{_gb(host.available_bytes)} of {_gb(host.memory_bytes)} are free."
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def _print_advice(plan: Plan, all_needs: list[Need]) -> None:
    low = list(unmet(all_needs))
    if not low:
        print("All is met.")
        return
    redis = " --redis yes" if plan.redis else ""
    command = f"scripts/tune --connections {plan.connections} --workers {plan.workers}{redis}"
    print(f"{len(low)} of {len(all_needs)} are too low; as root: {command} --apply")
    _print_unit(low)


def _print_unit(low: list[Need]) -> None:
    for need in low:
        if need.key == FILES:
            files = need.wanted.split()[1]
            print(
                f"The limit of files is another for a service: LimitNOFILE={files} in its unit; "
                f"and for this shell, as root: prlimit --pid $$ --nofile={files}"
            )


def _print_changes(changes: Changes, before: list[Need], root: Path) -> None:
    print()
    for line in changes.written:
        print(f"wrote {line}")
    for line in changes.failed:
        print(f"could not write {line}", file=sys.stderr)
    if changes.failed:
        print("In a container these settings belong to the host: set them there.", file=sys.stderr)
    if not changes.written and not changes.failed:
        print("Nothing was written: all is met.")
    low = list(unmet(before))
    _print_unit(low)
    for path, key in overridden((need.key for need in low), root):
        print(f"Mind that {path} sets {key} as well, and is read after /{SYSCTL_FILE} at boot.")


def _as_json(
    plan: Plan, host: Host, all_needs: list[Need], changes: Changes | None
) -> dict[str, object]:
    result: dict[str, object] = {
        **dataclasses.asdict(plan),
        "is_met": all(need.is_met for need in all_needs),
        "idle_memory_bytes": memory_bytes(plan),
        "available_memory_bytes": host.available_bytes,
        "needs": [dataclasses.asdict(need) for need in all_needs],
    }
    if changes is not None:
        result |= dataclasses.asdict(changes)
    return result


if __name__ == "__main__":
    sys.exit(main())
