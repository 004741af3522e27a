"""Stop a worker in its tracks: the supervisor notices, kills and replaces it."""

from __future__ import annotations

import os
import signal

from harness.api import FakeApi, echo
from harness.waiting import DEADLINE_S, until

from .conftest import StartGateway


def test_worker_that_has_stopped_is_killed_and_replaced(
    api: FakeApi, start_gateway: StartGateway, client_id: str
) -> None:
    gateway = start_gateway(api=api.url, workers=2)
    victim = gateway.worker_of(gateway.connect(client_id))
    names = (f"{client_id}-{number}" for number in range(100))
    others = ((name, gateway.connect(name)) for name in names)
    other_id, other = next((n, o) for n, o in others if gateway.worker_of(o) != victim)
    os.kill(victim.pid, signal.SIGSTOP)
    until(lambda: gateway.admin_get("/readyz").status == 503, what="it is missed")
    until(lambda: not victim.is_alive, timeout_s=2 * DEADLINE_S, what="it is killed")
    [line] = [line for line in gateway.stderr.splitlines() if "stuck" in line]
    assert f"pid={victim.pid}" in line
    until(lambda: gateway.admin_get("/readyz").status == 200, what="it is replaced")
    assert gateway.count("worker_restarts") == 1
    api.on(other_id, "POST", echo)
    other.send("undisturbed")
    assert other.receive() == "undisturbed"
    again = gateway.connect(client_id)
    assert gateway.push_client().push(client_id, "as before").status == 200
    assert again.receive() == "as before"
