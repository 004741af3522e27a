"""Read /metrics of a gateway that has seen everything: what is counted, what survives a process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Final

import pytest
from harness.api import FakeApi, Reply
from harness.every_traffic import Series, make_traffic, only_growing, scrape
from harness.gateway import GatewayProcess
from harness.prometheus import needs_promtool, promtool
from harness.waiting import until
from harness.workers import worker_pids
from harness.ws import Op, WsClient, close_payload

WORKERS: Final = 2
ALL_CODES: Final = (*range(1000, 1015), *range(3000, 5000))
GROUPS: Final = ("3xxx", "4xxx")

GARBAGE: Final = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /../etc HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /someone HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
    b"GET /a?worker=7&code=4242 HTTP/1.1\r\nHost: x\r\nws2api_worker: 99\r\n\r\n",
    b"BREW /%00 HTTP/9.9\r\n\r\n",
    b'GET /x"}{evil="1 HTTP/1.1\r\nHost: x\r\n\r\n',
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    b"\x00\xff\xfe\r\n\r\n",
)


@pytest.fixture(scope="module")
def watched_api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


@pytest.fixture(scope="module")
def watched(watched_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run a gateway that has seen all kinds of traffic."""
    with GatewayProcess(api=watched_api.url, workers=WORKERS, ping_interval=0) as gateway:
        make_traffic(gateway, watched_api)
        yield gateway


class TestMetrics:
    @needs_promtool
    def test_promtool_finds_nothing_to_complain_about(self, watched: GatewayProcess) -> None:
        assert promtool("check", "metrics", text=watched.admin_get("/metrics").text) == ""

    def test_traffic_is_told_apart(self, watched: GatewayProcess) -> None:
        """Look whether the traffic was of all kinds, for what the other tests see of it."""
        for labels in (
            {"name": "closes", "cause": "client", "code": "3xxx"},
            {"name": "closes", "cause": "api", "code": "4xxx"},
            {"name": "closes", "cause": "lost", "code": "1006"},
            {"name": "closes", "cause": "protocol", "code": "1007"},
            {"name": "handshakes_refused", "status": "401"},
            {"name": "handshakes_refused", "status": "502"},
            {"name": "errors", "cause": "status"},
            {"name": "pushes", "outcome": "ok"},
            {"name": "pushes", "outcome": "not_found"},
            {"name": "pushes", "outcome": "stale"},
            {"name": "pushes", "outcome": "bad_request"},
        ):
            assert watched.count(**labels), labels
        counted = scrape(watched)
        for name in ("connect_duration_seconds", "loop_lag_seconds"):
            assert sum(v for (n, _), v in counted.items() if n == f"ws2api_{name}_count")
        for name, label, values in (
            ("api_request_duration_seconds", "event", ("connect", "message", "disconnect")),
            ("push_duration_seconds", "path", ("local", "remote")),
        ):
            for value in values:
                found = [
                    count
                    for (series, labels), count in counted.items()
                    if series == f"ws2api_{name}_count" and (label, value) in labels
                ]
                assert len(found) == WORKERS
                assert sum(found), (name, value)


class TestRestarts:
    """No counter of a worker may ever fall, whatever becomes of its process."""

    @pytest.fixture
    def restless(self, own_api: FakeApi) -> Iterator[GatewayProcess]:
        with GatewayProcess(api=own_api.url, workers=WORKERS, drain_seconds="1s") as gateway:
            make_traffic(gateway, own_api)
            yield gateway

    def test_counters_survive_a_kill(self, restless: GatewayProcess) -> None:
        for _ in range(WORKERS):
            restless.connect(f"stays-{_}")

        def kill_each() -> None:
            for number in range(WORKERS):
                old = worker_pids(restless)[number]
                os.kill(old, signal.SIGKILL)
                until(lambda number=number, old=old: self._is_back(restless, number, old))

        before, after = self._watch(restless, kill_each)
        name = "ws2api_worker_restarts_total"
        assert self._of_workers(before, name) == [0] * WORKERS
        assert self._of_workers(after, name) == [1] * WORKERS

    def test_counters_survive_a_rolling_restart(self, restless: GatewayProcess) -> None:
        old = worker_pids(restless)
        client = restless.connect("moves")

        def roll() -> None:
            os.kill(restless.pid, signal.SIGHUP)
            client.assert_closed(1012)
            until(lambda: "the old workers have ended" in restless.stderr)

        before, after = self._watch(restless, roll)
        assert not set(worker_pids(restless)) & set(old)
        assert sum(self._of_workers(after, "ws2api_worker_restarts_total")) == 0
        name = "ws2api_connections_opened_total"
        assert self._of_workers(before, name) == self._of_workers(after, name)
        assert sum(self._of_workers(after, name)) > 0

    def _is_back(self, gateway: GatewayProcess, number: int, old: int) -> bool:
        return (
            worker_pids(gateway)[number] not in (None, old)
            and gateway.count("workers_serving") == WORKERS
        )

    def _watch(self, gateway: GatewayProcess, act: Callable[[], None]) -> tuple[Series, Series]:
        """Scrape without pause while something happens; return the first and the last scrape."""
        is_over = threading.Event()
        falls: list[object] = []
        scrapes = [only_growing(scrape(gateway))]

        def watch() -> None:
            while not is_over.is_set():
                scrapes.append(only_growing(scrape(gateway)))
                earlier, later = scrapes[-2:]
                falls.extend(key for key in earlier if later.get(key, -1) < earlier[key])

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            act()
        finally:
            is_over.set()
            watcher.join()
        assert len(scrapes) > 2
        assert falls == []
        last = only_growing(scrape(gateway))
        assert all(last[key] >= value for key, value in scrapes[-1].items())
        return scrapes[0], last

    def _of_workers(self, series: Series, name: str) -> list[float]:
        return [value for (found, _), value in sorted(series.items()) if found == name]


class TestCardinality:
    @pytest.fixture
    def unchanged(self, watched: GatewayProcess) -> Iterator[GatewayProcess]:
        """Find the same series after a test as before it."""
        before = scrape(watched).keys()
        yield watched
        watched.disconnect_all()
        until(lambda: not watched.count("connections_open"))
        assert scrape(watched).keys() == before

    def test_does_not_grow_with_clients(self, unchanged: GatewayProcess) -> None:
        for number in range(300):
            unchanged.connect(f"client-{number}-%C3%A9-{'x' * (number % 200)}")
        assert unchanged.count("connections_open") == 300

    def test_does_not_grow_with_close_codes(self, unchanged: GatewayProcess) -> None:
        def counted() -> list[int]:
            return [unchanged.count("closes", cause="client", code=code) for code in GROUPS]

        before = counted()
        for code in ALL_CODES:
            self._leave(unchanged, code)
        until(lambda: counted() == [count + 1000 for count in before])

    def _leave(self, gateway: GatewayProcess, code: int) -> None:
        client = WsClient(gateway.open_stream(), "/leaves")
        client.send_frame(Op.CLOSE, close_payload(code))
        client.stream.read_to_end()
        client.stream.close()

    def test_does_not_grow_with_garbage(self, unchanged: GatewayProcess) -> None:
        for garbage in GARBAGE:
            for address in (unchanged.clients_address, unchanged.pushes_address):
                stream = unchanged.push_client(address).stream
                stream.write(garbage)
                stream.socket.shutdown(1)
                stream.read_to_end()
        for number in range(50):
            unchanged.admin_get(f"/metrics?name[]=x{number}")
            unchanged.admin_get(f"/nowhere/{number}")
            unchanged.push_client().push(f"nobody-{number}", "?")

    def test_does_not_grow_with_what_the_api_answers(
        self, unchanged: GatewayProcess, watched_api: FakeApi
    ) -> None:
        for status in [each.value for each in HTTPStatus if each >= 400]:
            watched_api.on(f"gets-{status}", "GET", Reply("no", status=status))
            unchanged.handshake(f"gets-{status}")
