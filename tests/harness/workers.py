"""Look at the workers of a gateway: which processes they are, and what they use."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .gateway import GatewayProcess


def worker_pids(gateway: GatewayProcess) -> list[int]:
    """Return the process ids of the workers, in the order of their slots."""
    status = json.loads(gateway.admin_get("/status").body)
    return [worker["pid"] for worker in status["workers"]]


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has in use."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found, pid
    return int(found[1]) * 1024
