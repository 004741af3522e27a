"""Send DELETEs to a real server, and compare each with what a worker sends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness.api import Answer, Drop, FakeApi, Hold, Raw, Reply, Request
from harness.certificates import make_certificate
from harness.waiting import until
from ws2api.gateway.http_wire import RequestEncoder
from ws2api.gateway.settings import load
from ws2api.supervisor import api_client
from ws2api.supervisor.api_client import ApiClient, Outcome, Verdict
from ws2api.supervisor.disconnect_queue import Disconnect

BORN = 1_700_000_000_000_001


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api
    assert not api.violations


def end(client_id: str, reason: str = "bye", code: int = 1000) -> Disconnect:
    return Disconnect(b"1-0", client_id.encode(), BORN, code, reason.encode())


def report(url: str, *disconnects: Disconnect, options: tuple[str, ...] = ()) -> list[Outcome]:
    """Report disconnects one after another, by one client."""
    settings = load(["--api", url, *options])

    async def report_all() -> list[Outcome]:
        client = ApiClient(settings, 4)
        try:
            return [await client.report(disconnect) for disconnect in disconnects]
        finally:
            await client.close()

    return asyncio.run(report_all())


class TestRequest:
    @pytest.mark.parametrize("path", ["", "/base", "/a%20b/%2E", "/~x/"])
    @pytest.mark.parametrize(
        "client_id", ["ann", "a%20b", "%2e%2E", "%c3%BC", "~._-", "x" * 255, "%25%00", "a%2Fb"]
    )
    @pytest.mark.parametrize("reason", ["", "worker lost", "größer 🎉"])
    def test_is_that_of_a_worker(self, path: str, client_id: str, reason: str) -> None:
        """The same line, headers and body; the order of the headers is of no meaning."""
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}{path}"

            async def exchange() -> bytes:
                seen = bytearray()

                async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    seen.extend(await reader.readuntil(b"\r\n\r\n"))
                    seen.extend(await reader.readexactly(len(reason.encode())))
                    writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                    await writer.drain()
                    writer.close()

                async with await asyncio.start_server(serve, sock=listener):
                    client = ApiClient(load(["--api", url]), 1)
                    outcome = await client.report(end(client_id, reason, 4123))
                    assert outcome.verdict is Verdict.TAKEN
                    await client.close()
                return bytes(seen)

            wire = asyncio.run(exchange())
        encoder = RequestEncoder(load(["--api", url]).api)
        expected = encoder.disconnect(client_id.encode(), BORN, 4123, reason.encode())
        assert parts(wire) == parts(expected)

    def test_names_the_host_as_the_option_does(self) -> None:
        with FakeApi() as api:
            url = api.url.replace("127.0.0.1", "LocalHost")
            [outcome] = report(url, end("ann"))
            # The harness knows itself by its number only, and tells what it got instead.
            assert outcome.verdict is Verdict.BROKEN
            assert api.violations
            assert f"LocalHost:{api.port}" in api.violations[0]

    def test_reuses_its_connection(self, api: FakeApi) -> None:
        report(api.url, *(end(f"ann-{number}") for number in range(5)))
        requests = [api.wait_for_one(f"ann-{number}", "DELETE") for number in range(5)]
        assert {request.connection for request in requests} == {0}

    def test_keeps_no_cookie(self, api: FakeApi) -> None:
        api.on("ann", "DELETE", Reply(headers={"Set-Cookie": "a=b; Path=/"}))
        report(api.url, end("ann"), end("ann"))
        for request in api.wait_for("ann", "DELETE", count=2):
            assert "Cookie" not in request.headers

    def test_goes_through_no_proxy(self, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
        monkeypatch.setenv("no_proxy", "")
        assert report(api.url, end("ann"))[0].verdict is Verdict.TAKEN


class TestVerdict:
    @pytest.mark.parametrize(
        ("status", "verdict"),
        [
            (200, Verdict.TAKEN),
            (204, Verdict.TAKEN),
            (299, Verdict.TAKEN),
            (301, Verdict.REFUSED),
            (307, Verdict.REFUSED),
            (404, Verdict.REFUSED),
            (500, Verdict.REFUSED),
            (502, Verdict.REFUSED),
            (503, Verdict.BROKEN),
        ],
    )
    def test_follows_the_status(self, api: FakeApi, status: int, verdict: Verdict) -> None:
        line = f"HTTP/1.1 {status} Whatever\r\nLocation: /elsewhere\r\n".encode()
        api.on("ann", "DELETE", Raw(line + b"Content-Length: 0\r\n\r\n"))
        [outcome] = report(api.url, end("ann"))
        assert outcome.verdict is verdict
        assert outcome.reason == f"status {status}"
        assert len(api.requests("ann")) == 1
        assert not api.requests("elsewhere")

    @pytest.mark.parametrize(
        ("answer", "verdict"),
        [
            (Drop(), Verdict.BROKEN),
            (Drop(reset=True), Verdict.BROKEN),
            (Raw(b"HTTP/1.1 2", then_close=True), Verdict.BROKEN),
            (Raw(b"SSH-2.0-OpenSSH\r\n", then_close=True), Verdict.REFUSED),
            (Reply("x" * 3_000_000), Verdict.TAKEN),
            (Reply("ok", framing="chunked", chop=1), Verdict.TAKEN),
            (Reply("ok", framing="eof"), Verdict.TAKEN),
            (
                Raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx"),
                Verdict.TAKEN,
            ),
            (
                Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", then_close=True),
                Verdict.TAKEN,
            ),
            (
                Raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n"),
                Verdict.TAKEN,
            ),
        ],
    )
    def test_bears_what_servers_do(self, api: FakeApi, answer: Answer, verdict: Verdict) -> None:
        api.on("ann", "DELETE", answer)
        first, second = report(api.url, end("ann"), end("bob"))
        assert first.verdict is verdict, first
        assert second.verdict is Verdict.TAKEN

    def test_late(self, api: FakeApi) -> None:
        held = Hold(Reply())
        api.on("ann", "DELETE", held)
        [outcome] = report(api.url, end("ann"), options=("--api-timeout", "200ms"))
        assert outcome.verdict is Verdict.LATE
        held.release()

    def test_late_with_the_body_of_a_good_answer_is_good(self, api: FakeApi) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
        api.on("ann", "DELETE", Raw(head))
        [outcome] = report(api.url, end("ann"), options=("--api-timeout", "200ms"))
        assert outcome.verdict is Verdict.TAKEN

    def test_nobody_listens(self) -> None:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            [outcome] = report(f"http://127.0.0.1:{reserved.getsockname()[1]}/", end("ann"))
        assert outcome.verdict is Verdict.UNREACHABLE
        assert outcome.reason

    def test_nobody_accepts(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            address = listener.getsockname()
            with socket.socket() as first, socket.socket() as second:
                first.connect(address)
                second.setblocking(False)
                second.connect_ex(address)  # now the queue is full
                [outcome] = report(
                    f"http://127.0.0.1:{address[1]}/",
                    end("ann"),
                    options=("--api-connect-timeout", "200ms"),
                )
        assert outcome.verdict is Verdict.UNREACHABLE

    def test_a_name_that_is_none(self) -> None:
        [outcome] = report("http://does-not-exist.invalid/", end("ann"))
        assert outcome.verdict is Verdict.UNREACHABLE


class TestTls:
    def test_trusts_whom_the_option_names(self, tmp_path: Path) -> None:
        known, unknown = make_certificate(tmp_path, "known"), make_certificate(tmp_path, "unknown")
        with FakeApi(tls=known.server_context()) as api:
            trusting = ("--api-ca", str(known.certificate))
            wary = ("--api-ca", str(unknown.certificate))
            assert report(api.url, end("ann"), options=trusting)[0].verdict is Verdict.TAKEN
            assert report(api.url, end("bob"), options=wary)[0].verdict is Verdict.UNREACHABLE
            assert report(api.url, end("cid"))[0].verdict is Verdict.UNREACHABLE
            until(lambda: api.requests("ann", "DELETE"))
            assert not api.requests("bob")
            assert not api.requests("cid")


def parts(wire: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Split a request into its line, its sorted headers, and its body."""
    head, _, body = wire.partition(b"\r\n\r\n")
    line, *headers = head.split(b"\r\n")
    return line, sorted(headers), body


def test_request_is_what_the_harness_reads(api: FakeApi) -> None:
    report(api.url, end("ann", "worker lost", 1006))
    request: Request = api.wait_for_one("ann", "DELETE")
    assert (request.generation, request.close_code, request.text) == (BORN, 1006, "worker lost")


def test_connections_reach_no_great_age(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name leads elsewhere after an API has moved; what is under way is brought to its end."""
    clock = iter([0.0, 1.0, 50.0, 61.0, 61.0, 62.0])
    monkeypatch.setattr(api_client, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    report(api.url, *[end("ann")] * 4)
    connections = [request.connection for request in api.requests("ann")]
    assert connections == [0, 0, 1, 1]
