"""Order the tests, and let none of them depend on how busy the machine is.

The slowest files start first, so that no process is left alone with one of them at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

# An example that takes its time is no fault: the machine may be busy.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

TESTS: Final = Path(__file__).parent

SLOWEST: Final = (
    "e2e/test_worker_lost.py",
    "e2e/test_haproxy.py",
    "test_tree.py",
    "test_bench.py",
    "e2e/test_guides.py",
    "e2e/test_reload.py",
    "e2e/test_workers.py",
    "test_cost.py",
    "e2e/test_api_faults.py",
    "test_dashboard.py",
    "e2e/test_redis_faults.py",
    "test_reaper.py",
    "e2e/test_nginx.py",
    "e2e/test_close.py",
    "e2e/test_ctl.py",
    "e2e/test_stop.py",
    "e2e/test_dashboard.py",
    "e2e/test_storm.py",
    "e2e/test_prometheus.py",
)
"""As `--durations` told. What stands here, and where, changes nothing but the time of all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put these files first, then the other tests of whole processes, then the rest."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(TESTS).as_posix()
        if name in SLOWEST:
            return SLOWEST.index(name)
        return len(SLOWEST) + (not name.startswith("e2e/"))

    items.sort(key=place)
