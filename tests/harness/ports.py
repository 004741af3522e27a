"""Find ports that stay free until a program under test listens on them."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Final

# Hypothesis seeds the common one: processes that run the same test would agree.
_RANDOM: Final = random.SystemRandom()
_LOWEST: Final = 10_000
# Ports that the kernel gives to whoever asks for any: each connection of another test takes one.
_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(*hosts: str) -> int:
    """Return a port that nothing listens on, and that the kernel gives to nobody meanwhile.

    Args:
        hosts: addresses at all of which it is free; only 127.0.0.1 if there are none.
    """
    highest = int(_RANGE.read_text().split()[0]) - 1
    while True:
        port = _RANDOM.randint(_LOWEST, highest)
        if all(_is_free(host, port) for host in hosts or ("127.0.0.1",)):
            return port


def free_ports(count: int) -> list[int]:
    """Return so many different ones."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _is_free(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True
