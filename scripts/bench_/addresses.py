"""Choose addresses to connect from: one has only as many ports as ip_local_port_range gives."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final

FIRST: Final = int(ipaddress.IPv4Address("127.1.0.1"))
LAST: Final = int(ipaddress.IPv4Address("127.254.255.254"))
PORTS_EACH: Final = 8_000
"""Connections from one address: the kernel finds a free port quickest while most are free."""


def ports_per_address() -> int:
    """Return how many ports the kernel hands out for one source address and one destination."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return high - low + 1


def sources(connections: int, offset: int, each: int | None = None) -> list[str]:
    """Return loopback addresses for so many connections to one destination.

    Args:
        connections: how many there will be at once.
        offset: where to begin, so that processes, and runs that follow each other, do not share
            addresses whose ports may still be in TIME_WAIT.
        each: connections per address; None for as many as are quickly found.
    """
    each = each or max(1, min(PORTS_EACH, ports_per_address() - ports_per_address() // 8))
    count = max(1, -(-connections // each))
    room = LAST - FIRST + 1
    return [str(ipaddress.IPv4Address(FIRST + (offset + i) % room)) for i in range(count)]
