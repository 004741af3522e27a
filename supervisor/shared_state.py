"""Hold what all processes of one gateway share beside their sockets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.counters import Counters
from ws2api.gateway.recent import Recent
from ws2api.gateway.traces import Traces


@dataclass(frozen=True, slots=True)
class SharedState:
    """Name the mappings that children inherit by fork.

    Attributes:
        recent: the latest ends of connections, and errors.
        addresses: connections by address.
        traces: who watches which clients, and what there is to see.
        profiles: folder in which workers leave the profiles that the admin process asked for.
    """

    counters: Counters
    recent: Recent
    addresses: AddressTable
    traces: Traces
    profiles: Path
