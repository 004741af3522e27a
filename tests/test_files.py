"""Divide limits of open files, small and large."""

from __future__ import annotations

import sys

import pytest
from ws2api.gateway.files import Files

LIMITS = [64, 100, 200, 256, 300, 512, 1024, 4096, 65_536, 1 << 20, sys.maxsize]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("to_api", [2, 51, 1001])
def test_shares_leave_what_a_worker_needs_for_itself(limit: int, to_api: int) -> None:
    files = Files(limit, to_api)
    shares = files.clients, files.api, files.refused, files.pushes
    assert min(shares) >= 1
    assert sum(shares) == limit - 32, "with two Redis links and three listeners it has 20 open"
    assert files.api <= to_api
    assert files.clients > sum(shares) / 2


def test_few_files_are_shared_and_many_are_nearly_all_for_clients() -> None:
    few, many = Files(300, 1001), Files(100_000, 1001)
    assert (few.clients, few.api, few.pushes, few.refused) == (152, 67, 33, 16)
    assert (many.clients, many.api) == (100_000 - 1001 - 256, 1001)


@pytest.mark.parametrize("limit", [0, 1, 20, 32, 33])
def test_hopeless_limit_is_no_error(limit: int) -> None:
    files = Files(limit, 1001)
    assert min(files.clients, files.api, files.refused, files.pushes) >= 1
