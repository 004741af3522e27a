"""Let happen to a gateway what its metrics tell apart, and read them."""

from __future__ import annotations

from typing import Final

from prometheus_client.parser import text_string_to_metric_families as parse

from .api import FakeApi, Reply, echo
from .gateway import GatewayProcess
from .push import PushClient
from .waiting import until
from .ws import Op

BEGINS_ANEW: Final = "ws2api_worker_cpu_seconds_total"
"""The only counter that is a process' and not its worker's."""

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(gateway: GatewayProcess) -> Series:
    """Return every series of /metrics, over a connection of its own."""
    connection = PushClient(gateway.admin_address)
    families = parse(connection.request("GET", "/metrics").text)
    connection.close()
    samples = [sample for family in families for sample in family.samples]
    series = {(one.name, tuple(sorted(one.labels.items()))): one.value for one in samples}
    assert len(series) == len(samples), "a series is there twice"
    return series


def only_growing(series: Series) -> Series:
    """Leave out gauges, and what describes a process."""
    ends = ("_total", "_bucket", "_sum", "_count")
    return {
        key: value
        for key, value in series.items()
        if key[0].endswith(ends) and key[0] != BEGINS_ANEW
    }


def make_traffic(gateway: GatewayProcess, api: FakeApi) -> None:
    """Let happen what can happen to a client, a request and a push."""
    api.on("talks", "POST", echo)
    client = gateway.connect("talks")
    for message in ("one", b"two"):
        client.send(message)
        assert client.receive() == message

    def pushed(path: str) -> int:
        return gateway.count("push_duration_seconds_count", path=path)

    local, remote = pushed("local"), pushed("remote")
    while pushed("local") == local or pushed("remote") == remote:
        assert gateway.push_client().push("talks", "pushed").status == 200
        assert client.receive() == "pushed"
    push = gateway.push_client()
    assert push.push("nobody", "pushed").status == 404
    assert push.push("talks", "pushed", generation=1).status == 412
    assert push.request("POST", "/", b"x").status == 400
    assert push.delete("talks", code=4242).status == 200
    client.assert_closed(4242)

    api.on("refused", "GET", Reply("go away", status=401))
    assert gateway.handshake("refused").status == 401
    assert gateway.handshake("..").status == 400
    api.on("broken", "GET", Reply(status=500))
    assert gateway.handshake("broken").status == 502

    failed = gateway.count("errors", cause="status")
    api.on("unlucky", "POST", Reply(status=500))
    unlucky = gateway.connect("unlucky")
    unlucky.send("met with a 500")
    until(lambda: gateway.count("errors", cause="status") > failed)
    breaker = gateway.connect("breaks-the-protocol")
    breaker.send_frame(Op.TEXT, b"\xff")
    breaker.assert_closed(1007)
    gateway.connect("hangs-up").hang_up()
    gateway.connect("says-good-bye").close(1000)
    unlucky.close(3999)
    until(lambda: not gateway.count("connections_open"))
    until(lambda: not gateway.count("disconnects_waiting"))
