"""Page through the registry of a real server, whose hashes are small and large."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from harness.valkey import ValkeyProcess
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from ws2api.gateway.disconnects import LEASES
from ws2api.gateway.settings import load
from ws2api.supervisor.clients import Clients

# A hash of up to some hundred fields is one piece to HSCAN, which gives it whole.
SIZES = {"host1-0-0": 3, "host1-1-0": 120, "host2-0-7": 1_500, "host2-1-0": 0}
IDS = {worker: {f"{worker}:{n}" for n in range(size)} for worker, size in SIZES.items()}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with (
        ValkeyProcess(tmp_path_factory.mktemp("redis")) as valkey,
        Redis.from_url(valkey.url) as redis,
    ):
        redis.zadd(f"ws2api:{LEASES}", dict.fromkeys(SIZES, 1.0))
        for worker, ids in IDS.items():
            if ids:
                redis.hset(f"ws2api:w:{worker}", mapping=dict.fromkeys(ids, 5))
        yield valkey.url


def pages(url: str, *limits: int, worker: str = "") -> list[list[dict[str, Any]]]:
    """Return all pages, with these limits in turn; none is larger than it may be."""

    async def read() -> list[list[dict[str, Any]]]:
        settings = load([])
        async with AsyncRedis.from_url(url) as redis:
            clients = Clients(settings, settings.push_listen, redis)
            found, cursor = [], ""
            while not found or cursor is not None:
                limit = limits[len(found) % len(limits)]
                page = await clients.page(limit, cursor, worker)
                assert len(page["clients"]) <= limit
                found.append(page["clients"])
                cursor = page["cursor"]
            return found

    return asyncio.run(read())


@pytest.mark.parametrize("limits", [(1000,), (100,), (7,), (1, 50), (300, 2)])
def test_pages_hold_no_more_than_asked_for_and_nobody_twice(
    url: str, limits: tuple[int, ...]
) -> None:
    listed = [client["id"] for page in pages(url, *limits) for client in page]
    assert len(listed) == len(set(listed))
    assert set(listed) == set.union(*IDS.values())


@pytest.mark.parametrize("worker", SIZES)
def test_pages_of_one_worker(url: str, worker: str) -> None:
    listed = [client for page in pages(url, 40, worker=worker) for client in page]
    assert {client["id"] for client in listed} == IDS[worker]
    assert all(client["worker"] == worker for client in listed)


def test_number_means_the_worker_of_each_host(url: str) -> None:
    listed = [client["id"] for page in pages(url, 1000, worker="1") for client in page]
    assert set(listed) == IDS["host1-1-0"] | IDS["host2-1-0"]
