"""Run a gateway as a user of Redis who has the rights that the pages name, and no others."""

from __future__ import annotations

import os
import signal

from harness.api import FakeApi
from harness.valkey import ValkeyProcess
from harness.waiting import until
from redis import Redis

from .conftest import StartGateway


def test_least_rights(
    own_api: FakeApi, start_gateway: StartGateway, valkey: ValkeyProcess, client_id: str
) -> None:
    rights = ("resetchannels", "~ws2api:*", "&ws2api:*", "+@all", "-@dangerous", "+info", "-client")
    with Redis.from_url(valkey.url) as redis:
        redis.execute_command("ACL", "SETUSER", "gw", "on", ">secret", *rights)
        url = valkey.url.replace("unix://", "unix://gw:secret@")
        gateway = start_gateway(api=own_api.url, redis=url, workers=2)
        clients = {f"{client_id}-{n}": gateway.connect(f"{client_id}-{n}") for n in range(8)}
        pushes = gateway.push_client()
        for name, client in clients.items():
            assert pushes.push(name, "hello").status == 200
            assert client.receive() == "hello"
        victim = gateway.worker_of(clients[f"{client_id}-0"])
        lost = {name for name, client in clients.items() if gateway.worker_of(client) == victim}
        os.kill(victim.pid, signal.SIGKILL)
        for name in lost:
            own_api.wait_for_one(name, "DELETE")
        until(lambda: gateway.admin_get("/readyz").status == 200)
        until(lambda: gateway.count("disconnects_pending") == 0)
        refused = [line for line in gateway.stderr.splitlines() if "refuse" in line]
        assert not refused
        assert {each["object"] for each in redis.acl_log()} <= {"client|setname", "client|setinfo"}
