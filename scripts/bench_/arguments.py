"""Declare the options that several scenarios have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench_.systems import REGISTRY


def numbers(text: str) -> list[float]:
    """Read numbers with commas between."""
    values = [float(part) for part in text.split(",")]
    if min(values) <= 0:
        raise argparse.ArgumentTypeError("these must be above 0")
    return values


def integers(text: str) -> list[int]:
    """Read whole numbers with commas between."""
    return [int(value) for value in numbers(text)]


def names(text: str) -> list[str]:
    """Read names of systems with commas between."""
    chosen = text.split(",")
    if unknown := set(chosen) - set(REGISTRY):
        known = ", ".join(REGISTRY)
        raise argparse.ArgumentTypeError(f"no such system: {', '.join(unknown)} (but {known})")
    return chosen


def add_systems(
    parser: argparse.ArgumentParser, default: Sequence[str] = ("gateway", "nchan")
) -> None:
    """Add --systems."""
    parser.add_argument(
        "--systems",
        type=names,
        default=list(default),
        metavar="NAME,…",
        help=f"which of {', '.join(REGISTRY)} (default: {','.join(default)})",
    )


def add_rounds(parser: argparse.ArgumentParser, rounds: int = 3) -> None:
    """Add --rounds."""
    parser.add_argument("--rounds", type=int, default=rounds, help="turns (default: %(default)s)")


def add_times(parser: argparse.ArgumentParser) -> None:
    """Add --seconds and --warm-up."""
    parser.add_argument(
        "--seconds", type=float, default=5, help="length of a measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--warm-up", type=float, default=2, help="seconds in front of it (default: %(default)s)"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers", type=int, default=0, help="worker processes (default: as few as will do)"
    )
