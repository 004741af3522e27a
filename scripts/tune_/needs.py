"""Work out what so many connections need of the kernel, and whether they have it: pure.

What a setting means is told by the kernel's Documentation/networking/ip-sysctl.rst,
networking/nf_conntrack-sysctl.rst and admin-guide/sysctl/; docs/tuning.md tells how to see in
operation that one is too low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

Numbers = tuple[int, ...]

FILES: Final = "nofile"
HUGE_PAGES: Final = "transparent_hugepage"
PORT_RANGE: Final = "net.ipv4.ip_local_port_range"
REUSE: Final = "net.ipv4.tcp_tw_reuse"

BACKLOG: Final = 4_096
"""Connections that each worker lets wait to be accepted."""
API_CONNECTIONS: Final = 1_000
"""Connections to the API over all workers, the default of --api-max-connections."""
OTHER_FILES: Final = 1_024
"""Files of a worker beside clients and connections to the API: pushes, Redis, its own."""
SYSTEM_FILES: Final = 65_536
SPREAD: Final = 1.25
"""How many more than its share of the clients a worker must bear: the kernel spreads them by a
hash, and when a worker dies its clients come to the others."""
RETURN_S: Final = 60
"""Time in which all clients come back after an outage."""
CONNECT_PACKETS: Final = 5
"""Packets that a connect brings, from the client and from the API."""
BUSY_S: Final = 0.1
"""The longest that a CPU does not take packets in."""
USUAL_PACKETS: Final = 1_000
"""What the kernel lets wait unless told otherwise."""
MESSAGE_INTERVAL_S: Final = 30
"""Time between two messages of a client."""
TIME_WAIT_S: Final = 60
PORTS: Final = (10_240, 65_535)
"""What is left for outgoing connections when the ports of common servers are left alone."""
PING_INTERVAL_S: Final = 30

GATEWAY_BYTES: Final = 2_300
"""Memory of the gateway per idle client."""
KERNEL_BYTES: Final = 3_800
"""Memory of the kernel per idle client: socket, inode, file, directory entry and epoll's entry."""
WORKER_BYTES: Final = 6_000_000
BASE_BYTES: Final = 85_000_000
"""Memory without clients: of each worker, and of what the workers share."""


@dataclass(frozen=True, slots=True)
class Plan:
    """State what the machine is for.

    Attributes:
        connections: clients at the same time, over all workers.
        workers: processes among which they are spread.
        redis: whether a Redis or Valkey that saves to disk runs on the same machine.
    """

    connections: int
    workers: int
    redis: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """Hold what a machine has at present.

    Attributes:
        sysctls: values by name; one that this kernel does not have is missing.
        files: limit of files per process, soft and hard.
        huge_pages: mode of transparent huge pages, None without them.
        memory_bytes: all memory.
        available_bytes: memory that could be had without swapping.
    """

    sysctls: Mapping[str, Numbers]
    files: tuple[int, int]
    huge_pages: str | None
    memory_bytes: int
    available_bytes: int
    page_bytes: int = 4_096


@dataclass(frozen=True, slots=True)
class Need:
    """Compare what is there with what is wanted, as the kernel's files have it."""

    key: str
    """Name of the sysctl, or FILES or HUGE_PAGES."""
    present: str
    wanted: str
    why: str
    is_met: bool


Rule = Callable[[Plan, Host], Need | None]
"""Tell a need, None where it does not arise."""


def needs(plan: Plan, host: Host) -> list[Need]:
    """Return everything that matters for a plan, met or not."""
    return [need for rule in _RULES if (need := rule(plan, host)) is not None]


def larger(key: str, one: Numbers, other: Numbers) -> Numbers:
    """Return what satisfies both."""
    if key == PORT_RANGE:
        return min(one[0], other[0]), max(one[1], other[1])
    if key == REUSE:  # 1 allows everything that 2 does, which is for loopback only
        return (1,) if (1,) in (one, other) else max(one, other)
    return tuple(max(pair) for pair in zip(one, other, strict=True))


def files_per_worker(connections: int, workers: int) -> int:
    """Return the limit of files that each worker needs."""
    share = math.ceil(SPREAD * connections / workers) + math.ceil(API_CONNECTIONS / workers)
    return math.ceil((share + OTHER_FILES) / 1_024) * 1_024


def fewest_workers(connections: int, limit: int) -> int | None:
    """Return how many workers a limit of files does for; None if no number is enough."""
    # What the first worker cannot do without is there for each.
    room = limit // 1_024 * 1_024 - OTHER_FILES
    if room < 2:
        return None
    workers = max(1, math.ceil((SPREAD * connections + API_CONNECTIONS) / room))
    while files_per_worker(connections, workers) > limit:  # what was rounded
        workers += 1
    return workers


def memory_bytes(plan: Plan) -> int:
    """Return what idle clients take, of gateway and kernel."""
    per_client = GATEWAY_BYTES + KERNEL_BYTES
    return plan.connections * per_client + plan.workers * WORKER_BYTES + BASE_BYTES


def _at_least(host: Host, key: str, wanted: Numbers, why: str) -> Need | None:
    present = host.sysctls.get(key)
    if present is None:
        return None
    enough = larger(key, present, wanted)
    return Need(key, _text(present), _text(enough), why, enough == present)


def _text(numbers: Numbers) -> str:
    return " ".join(map(str, numbers))


def _span(host: Host) -> int:
    """Count the ports of outgoing connections."""
    first, last = host.sysctls.get(PORT_RANGE, PORTS)
    return last - first + 1


# Files.


def _file_max(plan: Plan, host: Host) -> Need | None:
    count = plan.connections
    return _at_least(
        host,
        "fs.file-max",
        (3 * count + SYSTEM_FILES,),
        "files of all processes: one per client, and two in a proxy on this machine: "
        f"3 × {count:,} + {SYSTEM_FILES:,}",
    )


def _nr_open(plan: Plan, host: Host) -> Need | None:
    files = files_per_worker(plan.connections, plan.workers)
    return _at_least(host, "fs.nr_open", (files,), "no limit of files per process is above it")


def _files(plan: Plan, host: Host) -> Need:
    soft, hard = host.files
    files = files_per_worker(plan.connections, plan.workers)
    why = (
        "files of a worker: clients and a quarter more, the API, others: "
        f"({SPREAD} × {plan.connections:,} + {API_CONNECTIONS:,}) / {plan.workers:,} "
        f"+ {OTHER_FILES:,}"
    )
    if hard < files and (workers := fewest_workers(plan.connections, hard)) is not None:
        why += f"; or start {workers:,} workers, for which {hard:,} are enough"
    wanted = f"{max(soft, files)} {max(hard, files)}"
    # The supervisor raises the soft limit to the hard one by itself.
    return Need(FILES, f"{soft} {hard}", wanted, why, hard >= files)


def _epoll(plan: Plan, host: Host) -> Need | None:
    rest = 2 * API_CONNECTIONS
    return _at_least(
        host,
        "fs.epoll.max_user_watches",
        (plan.connections + rest,),
        f"connections that the processes of a user may watch: {plan.connections:,} + {rest:,}",
    )


# Connects.


def _somaxconn(_: Plan, host: Host) -> Need | None:
    return _at_least(
        host,
        "net.core.somaxconn",
        (BACKLOG,),
        f"caps the {BACKLOG:,} connections that each worker lets wait; more changes nothing",
    )


def _syn_backlog(_: Plan, host: Host) -> Need | None:
    if host.sysctls.get("net.ipv4.tcp_syncookies") != (0,):
        return None  # only without cookies does it bound anything
    return _at_least(
        host,
        "net.ipv4.tcp_max_syn_backlog",
        (BACKLOG,),
        f"connects that are half done per worker, as many as may wait: {BACKLOG:,}",
    )


def _packets(plan: Plan, host: Host) -> Need | None:
    per_second = plan.connections * CONNECT_PACKETS / RETURN_S
    waiting = math.ceil(per_second * BUSY_S)
    return _at_least(
        host,
        "net.core.netdev_max_backlog",
        (1 << (waiting - 1).bit_length() if waiting > USUAL_PACKETS else USUAL_PACKETS,),
        f"packets that wait for a CPU: when all come back within {RETURN_S} s, "
        f"{per_second:,.0f}/s × {BUSY_S} s",
    )


def _ports(plan: Plan, host: Host) -> Need | None:
    is_enough = max(plan.connections, API_CONNECTIONS) <= _span(host)
    span = PORTS[1] - PORTS[0] + 1
    return _at_least(
        host,
        PORT_RANGE,
        host.sysctls.get(PORT_RANGE, PORTS) if is_enough else PORTS,
        f"one per connection to the API, {API_CONNECTIONS:,}, and in a proxy on this machine one "
        f"per client, of {span:,} per address: {plan.connections / span:,.1f} addresses",
    )


def _reuse(plan: Plan, host: Host) -> Need | None:
    rate = plan.connections / MESSAGE_INTERVAL_S
    most = max(_span(host), PORTS[1] - PORTS[0] + 1) / TIME_WAIT_S
    if rate <= most:
        return None
    why = (
        f"a port rests {TIME_WAIT_S} s, with 1 one second; an API elsewhere that does not keep "
        f"connections gets {most:,.0f} requests/s else, a message per {MESSAGE_INTERVAL_S} s is "
        f"{rate:,.0f}"
    )
    return _at_least(host, REUSE, (1,), why)


def _orphans(plan: Plan, host: Host) -> Need | None:
    return _at_least(
        host,
        "net.ipv4.tcp_max_orphans",
        (plan.connections // 8,),
        "closed connections whose last bytes are under way, else they are reset: "
        f"an eighth of {plan.connections:,} when the gateway stops",
    )


# Tracking, only where its module is loaded.


def _tracked(plan: Plan) -> int:
    return 2 * (plan.connections + API_CONNECTIONS)


def _tracking(plan: Plan, host: Host) -> Need | None:
    return _at_least(
        host,
        "net.netfilter.nf_conntrack_max",
        (_tracked(plan),),
        "connections in the firewall's table, and those that left in the last two minutes: "
        f"2 × ({plan.connections:,} + {API_CONNECTIONS:,})",
    )


def _buckets(plan: Plan, host: Host) -> Need | None:
    return _at_least(
        host,
        "net.netfilter.nf_conntrack_buckets",
        (_tracked(plan) // 4,),
        "each is in that table twice: 8 in a bucket when it is full",
    )


def _tracking_time(_: Plan, host: Host) -> Need | None:
    return _at_least(
        host,
        "net.netfilter.nf_conntrack_tcp_timeout_established",
        (4 * PING_INTERVAL_S,),
        f"seconds after which a silent client is forgotten; it is pinged each {PING_INTERVAL_S} s",
    )


# Memory.


def _tcp_memory(plan: Plan, host: Host) -> Need | None:
    read = host.sysctls.get("net.ipv4.tcp_rmem", (4_096,))[0]
    write = host.sysctls.get("net.ipv4.tcp_wmem", (4_096,))[0]
    pages = math.ceil(plan.connections * (read + write) / host.page_bytes)
    most = host.memory_bytes // host.page_bytes // 3
    why = (
        "pages of all buffers, which shrink above the second: the least that tcp_rmem and tcp_wmem "
        f"grant, {plan.connections:,} × ({read:,} + {write:,}) / {host.page_bytes:,}"
    )
    if pages > most:
        pages = most
        why += ", but not more than half of the memory"
    # The kernel's own proportions.
    return _at_least(host, "net.ipv4.tcp_mem", (pages * 3 // 4, pages, pages * 3 // 2), why)


def _overcommit(plan: Plan, host: Host) -> Need | None:
    if not plan.redis:
        return None
    why = "Redis forks to save, which must not fail because both could outgrow the memory"
    return _at_least(host, "vm.overcommit_memory", (1,), why)  # who chose 2 knows what it means


def _huge_pages(plan: Plan, host: Host) -> Need | None:
    present = host.huge_pages
    if present is None or not plan.redis:
        return None
    why = "while Redis saves, a byte that changes would copy 2 MB; new versions opt out of it"
    wanted = "madvise" if present == "always" else present
    return Need(HUGE_PAGES, present, wanted, why, wanted == present)


_RULES: Final[tuple[Rule, ...]] = (
    _file_max,
    _nr_open,
    _files,
    _epoll,
    _somaxconn,
    _syn_backlog,
    _packets,
    _ports,
    _reuse,
    _orphans,
    _tracking,
    _buckets,
    _tracking_time,
    _tcp_memory,
    _overcommit,
    _huge_pages,
)


def unmet(all_needs: list[Need]) -> Iterator[Need]:
    """Yield what is too low."""
    return (need for need in all_needs if not need.is_met)
