"""Build what is disturbed: a gateway, its Valkey and its API behind proxies, and clients."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
from harness.fault_proxy import FaultProxy
from harness.gateway import GatewayProcess
from harness.http_messages import Response
from harness.push import PushClient
from harness.traffic import Traffic
from harness.traffic_api import ApiAnswer, ApiRequest, accept_and_echo
from harness.valkey import ValkeyProcess
from prometheus_client.parser import text_string_to_metric_families

from soak_ import SoakError

API_TIMEOUT_S: Final = 10
_POLL_S: Final = 0.2
READY_S: Final = 90.0
"""The longest that the gateway may take to be ready again after a fault."""

OPTIONS: Final[dict[str, str | int]] = {
    "api_timeout": f"{API_TIMEOUT_S}s",
    "push_timeout": "2s",
    "write_timeout": "5s",
    "max_write_buffer": "64KiB",
    "handshake_timeout": "10s",
    "ping_interval": "10s",
    "drain_seconds": "4s",
    "shutdown_timeout": "30s",
}


@dataclass
class World:
    """Hold everything that runs."""

    gateway: GatewayProcess
    traffic: Traffic
    valkey: ValkeyProcess
    to_api: FaultProxy
    to_redis: FaultProxy
    workers: int

    def status(self) -> dict[str, Any]:
        """Return what /status tells."""
        status: dict[str, Any] = json.loads(self._ask_admin("/status").body)
        return status

    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker["pid"] for worker in self.status()["workers"]]

    def count(self, name: str) -> int:
        """Sum a metric over the workers."""
        families = text_string_to_metric_families(self._ask_admin("/metrics").text)
        names = {f"ws2api_{name}", f"ws2api_{name}_total"}
        return int(sum(s.value for family in families for s in family.samples if s.name in names))

    def is_all_reported(self) -> bool:
        """Tell whether the API has heard of every end."""
        return not self.traffic.unreported()

    def is_ready(self) -> bool:
        """Tell whether /readyz is green."""
        try:
            return self._ask_admin("/readyz").status == 200
        except SoakError:
            return False

    def await_ready(self) -> None:
        """Wait until the gateway is ready."""
        self.wait_until(self.is_ready, "the gateway to be ready", READY_S)

    def wait_until(self, holds: Callable[[], object], what: str, timeout_s: float) -> None:
        """Wait until something holds.

        Raises:
            SoakError: if it does not in time, or the gateway has ended.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            if not self.gateway.is_running:
                raise SoakError("the supervisor has ended")
            if time.monotonic() > deadline:
                raise SoakError(f"not within {timeout_s:.0f} s: {what}")
            time.sleep(_POLL_S)

    def registered(self) -> set[str]:
        """Ask Valkey itself which clients it knows."""
        path = self.valkey.url.removeprefix("unix://")
        try:
            with redis.Redis(unix_socket_path=path) as connection:
                keys = connection.keys("ws2api:c:*")
        except redis.RedisError:
            return set()
        return {key.decode().removeprefix("ws2api:c:") for key in keys}

    def present(self) -> set[str]:
        """Return the ids of the clients that are connected."""
        clients = self.traffic.fleet.clients.values()
        return self.traffic.thread.call(
            lambda: {client.client_id for client in clients if client.is_open}
        )

    def _ask_admin(self, path: str) -> Response:
        """Ask, and ask again while the admin process is being replaced."""
        deadline = time.monotonic() + READY_S
        while True:
            connection = PushClient(self.gateway.admin_address)
            try:
                return connection.request("GET", path)
            except (OSError, EOFError) as error:
                if time.monotonic() > deadline or not self.gateway.is_running:
                    raise SoakError(f"the admin port does not answer: {error}") from None
                time.sleep(0.1)
            finally:
                connection.close()


def answer(request: ApiRequest) -> ApiAnswer:
    """Answer well; every other client may have its messages repeated."""
    given = accept_and_echo(request)
    if request.method != "GET" or not may_be_repeated(request.client_id):
        return given
    return ApiAnswer(given.body, headers=f"{given.headers}Ws2api-Retry: safe\r\n")


def may_be_repeated(client_id: str) -> bool:
    """Tell whether the API says of a client that its messages may come twice."""
    return int(client_id.partition("~")[0].rpartition("-")[2]) % 2 == 0


@contextmanager
def build(workers: int) -> Iterator[World]:
    """Start it all, and in the end see the gateway stop in good order."""
    with (
        tempfile.TemporaryDirectory(prefix="ws2api-soak-") as folder,
        ValkeyProcess(Path(folder)) as valkey,
        FaultProxy(Path(valkey.url.removeprefix("unix://"))) as to_redis,
        Traffic() as traffic,
        FaultProxy(traffic.api.address) as to_api,
        GatewayProcess(
            api=f"http://127.0.0.1:{to_api.port}/",
            redis=f"redis://127.0.0.1:{to_redis.port}/0",
            workers=workers,
            **OPTIONS,
        ) as gateway,
        traffic.attach(gateway),
    ):
        traffic.api.behaviour = answer
        yield World(gateway, traffic, valkey, to_api, to_redis, workers)
        to_api.restore()
        to_redis.restore()
