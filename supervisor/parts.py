"""Say what the children of a supervisor do, so that the tree of them need not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.counters import Counters

from .configuration import Configuration
from .embedded import EmbeddedServer
from .notify import Notifier
from .watch import Watch


@dataclass(frozen=True, slots=True)
class Parts:
    """Hold what the tree needs; `cli` composes it of the real things.

    Attributes:
        counters: the shared mapping; its slots are the workers to fork.
        addresses: counts connections by address; what a dead worker had counted is wiped.
        configuration: the settings in force; it is told to read them again on SIGHUP.
        run_worker: runs in a forked child, given the slot, the bank of counters and the
            incarnation's unique id, and returns its exit status.
        run_admin: likewise for the admin process, given what the ids of all incarnations of this
            supervisor begin with.
        server: the embedded Valkey; None when Redis is somebody else's.
        announce: called once, when all workers serve for the first time.
        stop_listening: called before workers are told to end, so that no connection waits in the
            queue of a socket that nobody will accept from again.
        notifier: hears of every change.
        watch: finds stuck workers.
    """

    counters: Counters
    addresses: AddressTable
    configuration: Configuration
    run_worker: Callable[[int, int, str], int]
    run_admin: Callable[[str], int]
    server: EmbeddedServer | None
    announce: Callable[[], None]
    stop_listening: Callable[[], None] = lambda: None
    notifier: Notifier = field(default_factory=Notifier)
    watch: Watch = field(default_factory=Watch)
