"""Push over a connection without a socket, to clients without a router."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ws2api.gateway import counters as c
from ws2api.gateway import outcomes
from ws2api.gateway.ask import Ask
from ws2api.gateway.client_paths import IDS, ClientPaths
from ws2api.gateway.counters import Counters
from ws2api.gateway.envelope import CLOSE, DESCRIBE, PUSH
from ws2api.gateway.frames import BINARY, TEXT
from ws2api.gateway.push import PushConnection, PushHub
from ws2api.gateway.sweeper import Sweeper

IDLE_TIMEOUT_S = 75.0
LINGER_S = 2.0
MAX_PIPELINED = 256
MAX_MESSAGE_BYTES = 1000
MAX_HEAD_BYTES = 16_384
BINARY_TYPE = "application/octet-stream"


class FakeSweeper:
    """Be the clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.scheduled: list[float] = []

    def schedule(self, timed: object, delay_s: float) -> None:
        self.scheduled.append(delay_s)


class FakeTransport:
    """Note what is written; nothing may be after the end."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_reading = True
        self.eof_is_written = self.is_closed = self.is_aborted = False

    def write(self, data: bytes) -> None:
        assert data
        assert not self.is_at_its_end
        self.written.append(data)

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def get_extra_info(self, name: str) -> tuple[str, int] | None:
        return ("192.0.2.7", 4000) if name == "peername" else None

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.is_at_its_end
        self.eof_is_written = True

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True

    @property
    def is_at_its_end(self) -> bool:
        return self.eof_is_written or self.is_closed


@dataclass(frozen=True)
class Answer:
    """Hold one answer as the API reads it."""

    status: int
    headers: dict[str, str]
    body: bytes = field(default=b"")

    @property
    def is_last(self) -> bool:
        return self.headers.get("connection") == "close"


def read_answers(wire: bytes) -> list[Answer]:
    """Read answers strictly; 1xx ones have no body."""
    answers = []
    while wire:
        head, separator, wire = wire.partition(b"\r\n\r\n")
        assert separator
        status_line, *lines = head.decode("ascii").split("\r\n")
        version, status, phrase = status_line.split(" ", 2)
        assert version == "HTTP/1.1"
        assert phrase
        headers = dict(line.lower().split(": ", 1) for line in lines)
        assert len(headers) == len(lines)
        length = 0 if status.startswith("1") else int(headers["content-length"])
        assert len(wire) >= length
        answers.append(Answer(int(status), headers, wire[:length]))
        wire = wire[length:]
    return answers


class Api:
    """Be the API server at the other end of one connection to the push port.

    Args:
        route: answers the asks; None keeps them in `asks` for the test to finish.
    """

    def __init__(
        self,
        route: Callable[[Ask], None] | None = None,
        *,
        token: str | None = None,
        shows_totals: bool = False,
        paths: ClientPaths = IDS[False],
    ) -> None:
        self.slot = Counters(1).bank(0, 0)
        self.sweeper = FakeSweeper()
        self.asks: list[Ask] = []
        self.refused: list[tuple[bytes, int, str, str]] = []
        self._route = route
        self.hub = PushHub(
            slot=self.slot,
            sweeper=cast(Sweeper, self.sweeper),
            route=self._take,
            max_message_size=MAX_MESSAGE_BYTES,
            token=f"Bearer {token}".encode() if token else None,
            totals=lambda: b"connections_opened 7\n",
            connections=set(),
            paths=paths,
            on_refused=lambda *refusal: self.refused.append(refusal),
        )
        self.connection = PushConnection(self.hub, shows_totals)
        self.transport = FakeTransport()
        self.connection.connection_made(cast(Any, self.transport))

    def _take(self, ask: Ask) -> None:
        self.asks.append(ask)
        if self._route is not None:
            self._route(ask)

    def sends(self, *pieces: bytes) -> None:
        for piece in pieces:
            if self.transport.is_closed:
                return
            self.connection.data_received(piece)

    @property
    def wire(self) -> bytes:
        return b"".join(self.transport.written)

    @property
    def answers(self) -> list[Answer]:
        return read_answers(self.wire)

    @property
    def answer(self) -> Answer:
        (answer,) = self.answers
        return answer

    @property
    def ask(self) -> Ask:
        (ask,) = self.asks
        return ask

    def after(self, seconds: float) -> float:
        """Let time go by, and return what the connection says to its wheel."""
        self.sweeper.now += seconds
        return self.connection.on_tick(self.sweeper.now)


def counted(api: Api) -> dict[int, int]:
    """Return what is not 0, but for how long it took."""
    return {
        index: word
        for index, word in enumerate(api.slot)
        if word and c.METRICS[index].kind != "bucket"
    }


def ok(ask: Ask) -> None:
    ask.finish(outcomes.OK, b"")


def request(
    method: str = "POST",
    target: str = "/me",
    body: bytes = b"hi",
    /,
    *lines: str,
    version: str = "1.1",
    framing: str = "length",
) -> bytes:
    """Encode a request; further arguments are header lines."""
    head = [f"{method} {target} HTTP/{version}", "Host: push.example", *lines]
    if framing == "chunked":
        head.append("Transfer-Encoding: chunked")
        chunks = [body[i : i + 7] for i in range(0, len(body), 7)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    elif body or method == "POST":
        head.append(f"Content-Length: {len(body)}")
    return "".join(line + "\r\n" for line in [*head, ""]).encode("latin-1") + body


def get(target: str) -> bytes:
    return request("GET", target, b"")


def delete(target: str) -> bytes:
    return request("DELETE", target, b"")


UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split data; a cut is taken modulo the length."""
    positions = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(positions)]


def bytes_of(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# From request to ask.


def test_text_is_pushed() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", "grün".encode()))
    ask = api.ask
    assert (ask.kind, ask.client_id, ask.code) == (PUSH, b"me", TEXT)
    assert ask.payload.decode() == "grün"
    assert (ask.generation, ask.hops, ask.waited) == (0, 0, False)
    assert api.answer.status == 200
    assert api.answer.body == b"ok"


@pytest.mark.parametrize("type_", [BINARY_TYPE, "Application/Octet-Stream; x=y"])
def test_binary_is_pushed(type_: str) -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"\xff\0", f"Content-Type: {type_}"))
    assert (api.ask.code, api.ask.payload) == (BINARY, b"\xff\0")


def test_empty_message_is_pushed() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b""))
    assert (api.ask.kind, api.ask.payload) == (PUSH, b"")


def test_chunked_message_is_pushed() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"in pieces of seven bytes", framing="chunked"))
    assert api.ask.payload == b"in pieces of seven bytes"


def test_trailer_is_no_header() -> None:
    api = Api(ok)
    wire = request("POST", "/me", b"text", framing="chunked")
    api.sends(wire[:-2] + f"Content-Type: {BINARY_TYPE}\r\nWs2api-Generation: 5\r\n\r\n".encode())
    assert (api.ask.payload, api.ask.code, api.ask.generation) == (b"text", TEXT, 0)


def test_generation_is_passed_on() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", "ws2api-generation: 1700000000000000 "))
    assert api.ask.generation == 1_700_000_000_000_000


def test_client_is_described() -> None:
    api = Api(lambda ask: ask.finish(outcomes.OK, b'{"id": "me"}'))
    api.sends(get("/me"))
    assert (api.ask.kind, api.ask.client_id) == (DESCRIBE, b"me")
    assert api.answer.headers["content-type"] == "application/json"
    assert json.loads(api.answer.body) == {"id": "me"}


@pytest.mark.parametrize(
    ("query", "code", "reason"),
    [
        ("", 1000, ""),
        ("?code=4000", 4000, ""),
        ("?reason=gr%C3%BCn+eggs", 1000, "grün eggs"),
        ("?code=1001&reason=a%26b", 1001, "a&b"),
        ("?code=3000&code=4999", 4999, ""),
        ("?code=1014&other=x", 1014, ""),
        (f"?reason={'x' * 123}", 1000, "x" * 123),
    ],
)
def test_client_is_closed(query: str, code: int, reason: str) -> None:
    api = Api(ok)
    api.sends(delete("/me" + query))
    assert (api.ask.kind, api.ask.client_id) == (CLOSE, b"me")
    assert (api.ask.code, api.ask.payload.decode()) == (code, reason)
    assert api.answer.status == 200


def test_query_of_a_push_is_not_a_part_of_the_id() -> None:
    api = Api(ok)
    api.sends(request("POST", "/a%2Fb?c=d"))
    assert api.ask.client_id == b"a%2Fb"


# Outcomes.


@pytest.mark.parametrize(
    ("outcome", "status", "counter", "header"),
    [
        (outcomes.OK, 200, c.PUSHES_OK, None),
        (outcomes.NOT_FOUND, 404, c.PUSHES_NOT_FOUND, None),
        (outcomes.STALE, 412, c.PUSHES_STALE, None),
        (outcomes.TOO_SLOW, 429, c.PUSHES_TOO_SLOW, ("retry-after", "1")),
        (outcomes.UNAVAILABLE, 503, c.PUSHES_UNAVAILABLE, ("retry-after", "1")),
        (outcomes.TIMEOUT, 504, c.PUSHES_TIMEOUT, None),
    ],
)
def test_outcome_is_answered_and_counted(
    outcome: int, status: int, counter: int, header: tuple[str, str] | None
) -> None:
    api = Api(lambda ask: ask.finish(outcome, b""))
    api.sends(request())
    assert api.answer.status == status
    assert api.answer.body
    assert api.slot[counter] == 1
    assert counted(api) == {counter: 1}
    assert header is None or header in api.answer.headers.items()
    assert not api.answer.is_last


@pytest.mark.parametrize("outcome", [outcomes.OK, outcomes.NOT_FOUND, outcomes.UNAVAILABLE])
@pytest.mark.parametrize("wire", [get("/me"), delete("/me"), request("HEAD", "/me")])
def test_looking_up_and_closing_are_no_pushes(wire: bytes, outcome: int) -> None:
    api = Api(lambda ask: ask.finish(outcome, b""))
    api.sends(wire)
    assert api.wire.startswith(b"HTTP/1.1 ")
    assert counted(api) == {}


@pytest.mark.parametrize(
    ("wire", "noted"),
    [
        (request(), (b"me", 404, "no such client")),
        (request("POST", "/me", b"\xff"), (b"me", 400, "a text message must be UTF-8")),
        (request("POST", "/a/b"), (b"", 400, "the path must be one segment, the client id")),
        (get("/me"), None),
        (delete("/me"), None),
    ],
)
def test_refused_push_is_noted(wire: bytes, noted: tuple[bytes, int, str] | None) -> None:
    api = Api(lambda ask: ask.finish(outcomes.NOT_FOUND, b""))
    api.sends(wire)
    assert api.refused == ([(*noted, "192.0.2.7")] if noted else [])


def test_push_without_the_token_is_noted_by_the_id_that_it_meant() -> None:
    api = Api(ok, token="s3cret")
    api.sends(request())
    text = "a bearer token is required"
    assert api.refused == [(b"me", 401, text, "192.0.2.7")]


def test_push_that_is_done_is_not_noted() -> None:
    api = Api(ok)
    api.sends(request())
    assert api.refused == []


# How long it takes.


def observed(api: Api) -> tuple[int, int]:
    """Count the local and the remote pushes whose time was taken."""
    histograms = (c.LOCAL_PUSH_LATENCY, c.REMOTE_PUSH_LATENCY)
    local, remote = (sum(api.slot[each.first : each.sum_index]) for each in histograms)
    return local, remote


@pytest.mark.parametrize("outcome", [outcomes.OK, outcomes.NOT_FOUND, outcomes.TOO_SLOW])
def test_time_of_a_push_is_taken_where_its_client_is(outcome: int) -> None:
    api = Api(lambda ask: ask.finish(outcome, b""))
    api.sends(request())
    assert observed(api) == (1, 0)
    api.sends(request(), request())  # whose fields are known by now
    assert observed(api) == (3, 0)


def test_time_of_a_push_through_redis_is_told_apart() -> None:
    api = Api()
    for _ in range(2):
        api.sends(request())
        api.asks[-1].forwarded = True  # as the bus does
        api.asks[-1].finish(outcomes.OK, b"")
    assert observed(api) == (0, 2)


def test_time_is_taken_until_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = [10**15]
    monkeypatch.setattr("ws2api.gateway.push.monotonic_ns", lambda: now_ns[0])
    api = Api()
    api.sends(request())
    now_ns[0] += 3_000_000
    assert observed(api) == (0, 0)
    api.ask.finish(outcomes.OK, b"")
    assert api.slot[c.LOCAL_PUSH_LATENCY.sum_index] == 3_000


def test_push_whose_connection_has_gone_is_timed_too() -> None:
    api = Api()
    api.sends(request())
    api.connection.connection_lost(None)
    api.ask.finish(outcomes.OK, b"")
    assert observed(api) == (1, 0)


@pytest.mark.parametrize(
    "wire",
    [
        get("/me"),
        delete("/me"),
        get("/"),
        request("POST", "/a/b"),
        request("PUT", "/me"),
        delete("/me?code=1"),
        b"no HTTP\r\n\r\n",
        request("POST", "/me", b"x" * (MAX_MESSAGE_BYTES + 1)),
    ],
)
def test_what_is_no_push_is_not_timed(wire: bytes) -> None:
    """Whoever asks for the counters at GET / again and again must not make pushes look fast."""
    api = Api(ok, shows_totals=True)
    api.sends(wire)
    assert api.answers
    assert observed(api) == (0, 0)


def test_push_that_may_not_be_made_is_not_timed() -> None:
    api = Api(ok, token="secret")
    api.sends(request())
    assert api.answer.status == 401
    assert observed(api) == (0, 0)


def test_every_outcome_has_an_answer() -> None:
    numbers = [
        value for name, value in vars(outcomes).items() if name.isupper() and value in range(99)
    ]
    assert sorted(numbers) == list(range(len(outcomes.ANSWERS)))
    assert set(outcomes.HEADER_LINES) <= set(numbers)


def test_ask_must_be_given_an_end() -> None:
    with pytest.raises(NotImplementedError):
        Ask().finish(outcomes.OK, b"")


# Refusals that leave the connection open.


def assert_refused(api: Api, status: int, *, counter: int | None = c.PUSHES_BAD_REQUEST) -> None:
    """Expect a refusal; counter None: it is not counted, because it is of no push."""
    assert api.answer.status == status
    assert api.asks == []
    assert counted(api) == ({} if counter is None else {counter: 1})


def assert_still_serves(api: Api) -> None:
    assert not api.answers[-1].is_last
    assert not api.transport.is_at_its_end
    api.sends(request("POST", "/next"))
    assert api.asks[-1].client_id == b"next"


@pytest.mark.parametrize(
    "target", ["/", "/..", "/%2e", "/a/b", "/@all", f"/{'x' * 256}", "/a%4", "*"]
)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_target_that_is_no_client(method: str, target: str) -> None:
    api = Api()
    method = method if target != "*" else "OPTIONS"
    api.sends(request(method, target, b""))
    assert_refused(api, 400, counter=None if method in ("GET", "DELETE") else c.PUSHES_BAD_REQUEST)
    assert_still_serves(api)


@pytest.mark.parametrize("generation", ["", "x", "-1", "1.5", "1" * 19, "1 2"])
def test_generation_that_is_no_number(generation: str) -> None:
    api = Api()
    api.sends(request("POST", "/me", b"hi", f"Ws2api-Generation: {generation}"))
    assert_refused(api, 400)
    assert_still_serves(api)


def test_text_that_is_no_utf8() -> None:
    api = Api()
    api.sends(request("POST", "/me", b"\xff"))
    assert_refused(api, 400)
    assert_still_serves(api)


@pytest.mark.parametrize(
    "query",
    [
        *(f"code={code}" for code in (0, 999, 1004, 1005, 1006, 1010, 1015, 2999, 5000, 1 << 70)),
        "code=x",
        "code=",
        "code=1000.0",
        "code=1_000",
        "code=%201000",
        "code=%2B1000",
        "code=%EF%BC%91000",
        f"code={'1' * 5000}",
        f"reason={'x' * 124}",
        f"reason={'%C3%BC' * 62}",
        "reason=%FF",
        "reason=%ED%A0%80",
    ],
)
def test_close_that_may_not_be_sent(query: str) -> None:
    api = Api()
    api.sends(delete(f"/me?{query}"))
    assert_refused(api, 400, counter=None)
    assert_still_serves(api)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS"])
def test_other_methods(method: str) -> None:
    api = Api()
    api.sends(request(method, "/me"))
    assert_refused(api, 405)
    assert api.answer.headers["allow"] == "post, get, delete"
    assert_still_serves(api)


def test_head_is_answered_without_a_body() -> None:
    api = Api()
    api.sends(request("HEAD", "/me", b""), request("POST", "/next"))
    head, separator, rest = api.wire.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405 ")
    assert separator
    assert rest == b""
    assert api.ask.client_id == b"next"


# Refusals that end the connection.


def assert_refused_for_good(api: Api, status: int, counter: int = c.PUSHES_BAD_REQUEST) -> None:
    assert_refused(api, status, counter=counter)
    assert api.answer.is_last
    assert api.transport.eof_is_written
    api.sends(request())
    assert api.asks == []


@pytest.mark.parametrize("line", [None, "Bearer wrong", "Bearer s3cre", "s3cret", "Basic s3cret"])
def test_token_is_demanded(line: str | None) -> None:
    api = Api(ok, token="s3cret")
    api.sends(request("POST", "/me", b"hi", *([f"Authorization: {line}"] if line else [])))
    assert_refused_for_good(api, 401, c.PUSHES_UNAUTHORIZED)
    assert api.answer.headers["www-authenticate"] == "bearer"


def test_token_opens() -> None:
    api = Api(ok, token="s3cret")
    api.sends(request("POST", "/me", b"hi", "Authorization: Bearer s3cret") * 2)
    assert [answer.status for answer in api.answers] == [200, 200]


def test_web_page_may_not_push_without_a_token() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", "Origin: https://evil.example"))
    assert_refused_for_good(api, 401, c.PUSHES_UNAUTHORIZED)


def test_web_page_is_not_known_by_what_was_pushed_before() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi"))
    api.sends(request("POST", "/me", b"hi", "Origin: null"))
    assert [answer.status for answer in api.answers] == [200, 401]


def test_token_opens_to_whoever_has_it() -> None:
    api = Api(ok, token="s3cret")
    api.sends(request("POST", "/me", b"hi", "Origin: null", "Authorization: Bearer s3cret"))
    assert api.answer.status == 200


def test_token_of_one_request_is_not_that_of_the_next() -> None:
    api = Api(ok, token="s3cret")
    api.sends(request("POST", "/me", b"hi", "Authorization: Bearer s3cret"), request())
    assert [answer.status for answer in api.answers] == [200, 401]


def test_token_is_checked_before_the_body_is_sent() -> None:
    api = Api(token="s3cret")
    api.sends(request("POST", "/me", b"x" * 500)[:-500])
    assert_refused_for_good(api, 401, c.PUSHES_UNAUTHORIZED)


def test_largest_message_is_taken() -> None:
    for framing in ("length", "chunked"):
        api = Api(ok)
        api.sends(request("POST", "/me", b"x" * MAX_MESSAGE_BYTES, framing=framing))
        assert len(api.ask.payload) == MAX_MESSAGE_BYTES


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_larger_message_is_refused(framing: str) -> None:
    api = Api()
    api.sends(request("POST", "/me", b"x" * (MAX_MESSAGE_BYTES + 1), framing=framing))
    assert_refused_for_good(api, 413, c.PUSHES_TOO_LARGE)


@pytest.mark.parametrize("length", [str(MAX_MESSAGE_BYTES + 1), "9" * 18, "9" * 40])
def test_announced_size_is_enough_to_refuse(length: str) -> None:
    api = Api()
    api.sends(f"POST /me HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode())
    assert api.answer.status in (400, 413)
    assert api.answer.is_last
    assert api.asks == []


LARGE_HEADS = [
    request("POST", f"/{'x' * MAX_HEAD_BYTES}"),
    request("POST", "/me", b"hi", f"A: {'x' * MAX_HEAD_BYTES}"),
    request("POST", "/me", b"hi", *[f"A{i}: {'x' * 1000}" for i in range(20)]),
    request("POST", "/me", b"hi", *[f"A{i}: b" for i in range(101)]),
]


@pytest.mark.parametrize("head", LARGE_HEADS, ids=["url", "header", "headers", "many"])
def test_large_head_is_refused_in_any_split(head: bytes) -> None:
    for pieces in ([head], pieces_of(head, list(range(0, len(head), 999))), bytes_of(head)):
        api = Api(ok)
        api.sends(*pieces)
        assert_refused_for_good(api, 431)


@pytest.mark.parametrize(
    "start", [b"POST /", b"POST /me HTTP/1.1\r\nA", b"POST /me HTTP/1.1\r\nA: "]
)
def test_line_without_an_end_is_refused(start: bytes) -> None:
    api = Api()
    api.sends(start, *[b"x" * 1000] * 17)
    assert_refused_for_good(api, 431)


@pytest.mark.parametrize("start", [b"0\r\nA", b"0\r\nA: ", b"2\r\nhi\r\n0\r\nA: ", b"2;"])
def test_line_without_an_end_is_refused_in_a_chunked_body(start: bytes) -> None:
    api = Api()
    api.sends(request("POST", "/me", b"", framing="chunked").removesuffix(b"0\r\n\r\n"), start)
    api.sends(*[b"x" * 1000] * 17)
    assert_refused_for_good(api, 431)


def test_trailers_count_as_headers() -> None:
    api = Api()
    wire = request("POST", "/me", b"hi", framing="chunked")
    api.sends(wire.removesuffix(b"\r\n") + b"A: b\r\n" * 100 + b"\r\n")
    assert_refused_for_good(api, 431)


def test_largest_message_may_come_in_the_smallest_chunks() -> None:
    api = Api(ok)
    wire = request("POST", "/me", b"", framing="chunked").removesuffix(b"0\r\n\r\n")
    api.sends(wire, *[b"1\r\nx\r\n"] * MAX_MESSAGE_BYTES, b"0\r\n\r\n")
    assert api.ask.payload == b"x" * MAX_MESSAGE_BYTES
    assert_still_serves(api)


def test_line_without_an_end_is_refused_after_other_requests() -> None:
    api = Api(ok)
    api.sends(request() * 3 + b"POST /", *[b"x" * 1000] * 18)
    assert [answer.status for answer in api.answers] == [200, 200, 200, 431]


def test_head_that_is_cut_after_much_else_is_taken() -> None:
    api = Api(ok)
    data = request("POST", "/me", b"x" * 500) * 100
    assert len(data) > 2 * MAX_HEAD_BYTES
    api.sends(data[:-540], data[-540:])
    assert [answer.status for answer in api.answers] == [200] * 100


@pytest.mark.parametrize(
    "wire",
    [
        b"nonsense\r\n\r\n",
        b"POST\r\n\r\n",
        b"POST /me HTTP/1.1\nContent-Length: 2\n\nhi",
        b"POST /me HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /me HTTP/1.1\r\nContent-Length: -2\r\n\r\nhi",
        b"POST /me HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
        b"POST /me HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /me HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        b"POST /me HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /me HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /me HTTP/1.1\r\nA: b\r\n folded: c\r\n\r\n",
        b"POST /me HTTP/1.1\r\nA: b\0\r\n\r\n",
        b"POST /me HTTP/1.1\r\nA : b\r\n\r\n",
        b"POST /m\x01e HTTP/1.1\r\n\r\n",
        b"POST /me HTTP/1.2\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT me:80 HTTP/1.1\r\n\r\n",
    ],
)
def test_malformed_request_is_refused_in_any_split(wire: bytes) -> None:
    wire = wire.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nHost: a\r\n")
    for pieces in ([wire], bytes_of(wire)):
        api = Api()
        api.sends(*pieces)
        assert_refused_for_good(api, 400)


def test_requests_before_the_malformed_one_are_answered() -> None:
    api = Api(ok)
    api.sends(request() + b"nonsense\r\n\r\n" + request())
    assert [answer.status for answer in api.answers] == [200, 400]
    assert api.ask.client_id == b"me"


def test_refusal_waits_for_the_answers_before_it() -> None:
    api = Api()
    api.sends(request() + b"nonsense\r\n\r\n")
    assert api.wire == b""
    ok(api.ask)
    assert [answer.status for answer in api.answers] == [200, 400]
    assert api.transport.eof_is_written


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.sampled_from((request(), get("/me"), request(framing="chunked"), b"POST /", b"\r\n")),
        max_size=8,
    )
)
def test_random_bytes_are_answered_or_waited_for(pieces: list[bytes]) -> None:
    api = Api(ok)
    api.sends(*filter(None, pieces))
    assert all(answer.status in (200, 400, 404, 405) for answer in api.answers)
    assert not any(answer.is_last for answer in api.answers[:-1])
    assert not api.transport.is_at_its_end or api.answers[-1].is_last


# Any split.


def outcome_by_id(ask: Ask) -> None:
    """Answer so that each ask can be told from the others."""
    outcome = sum(ask.client_id) % 6
    ask.finish(outcome, ask.payload if outcome else b"")


wires = st.one_of(
    st.builds(
        lambda target, body, lines, framing: request("POST", target, body, *lines, framing=framing),
        st.sampled_from(("/a", "/b", "/c", "/d%20", "/e?f=g", "/..", "/x/y")),
        st.binary(max_size=60) | st.text(max_size=20).map(str.encode),
        st.sampled_from(
            ((), (f"Content-Type: {BINARY_TYPE}",), ("Ws2api-Generation: 5", "A: b"), UPGRADE)
        ),
        st.sampled_from(("length", "chunked")),
    ),
    st.sampled_from(
        (
            get("/a"),
            delete("/b?code=4000&reason=x"),
            delete("/b?code=1"),
            request("PUT", "/a"),
            request("GET", "/a", b"", *UPGRADE),
            request("POST", "/a", b"x" * (MAX_MESSAGE_BYTES + 1)),
            request("POST", "/a", b"last", "Connection: close"),
            request("POST", "/a", b"old", version="1.0"),
            request("POST", "http://a.example/f?g", b"by way of a proxy"),
            request("POST", "/a", b"chunks", "Connection: close", *UPGRADE, framing="chunked"),
            request("POST", "/a", b"x" * (MAX_MESSAGE_BYTES + 1), *UPGRADE, framing="chunked"),
            request("POST", "/a", b"", "Host: twice"),
            b"nonsense\r\n\r\n",
        )
    ),
)


def outcome_of(pieces: list[bytes]) -> tuple[bytes, list[tuple[object, ...]], bool]:
    api = Api(outcome_by_id)
    api.sends(*pieces)
    asks = [(a.kind, a.client_id, a.generation, a.code, a.payload) for a in api.asks]
    return api.wire, asks, api.transport.is_at_its_end


@settings(deadline=None, max_examples=200)
@given(st.lists(wires, min_size=1, max_size=5), st.lists(st.integers(0, 2000), max_size=6))
@example([request("POST", "/a", b"hi", *UPGRADE), request("POST", "/b")], [])
def test_any_split_gives_the_same_answers(requests: list[bytes], cuts: list[int]) -> None:
    data = b"".join(requests)
    assert outcome_of(pieces_of(data, cuts)) == outcome_of([data])


@settings(deadline=None, max_examples=40)
@given(st.lists(wires, min_size=1, max_size=3))
def test_byte_by_byte_gives_the_same_answers(requests: list[bytes]) -> None:
    data = b"".join(requests)
    assert outcome_of(bytes_of(data)) == outcome_of([data])


def test_answers_of_one_packet_are_written_together() -> None:
    api = Api(ok)
    api.sends(request() * 5)
    assert len(api.answers) == 5
    assert len(api.transport.written) == 1


# Pipelining.


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8).flatmap(lambda count: st.permutations(range(count))))
def test_answers_keep_the_order_of_the_requests(order: list[int]) -> None:
    api = Api()
    api.sends(b"".join(request("POST", f"/{i}") for i in range(len(order))))
    finished: set[int] = set()
    for number in order:
        api.asks[number].finish(outcomes.NOT_FOUND, b"%d" % number)
        finished.add(number)
        due = next(i for i in range(len(order) + 1) if i not in finished)
        assert [answer.body for answer in api.answers] == [b"%d" % i for i in range(due)]


def test_reading_stops_while_too_much_is_unanswered() -> None:
    api = Api()
    api.sends(request() * (MAX_PIPELINED - 1))
    assert api.transport.is_reading
    api.sends(request())
    assert not api.transport.is_reading
    for ask in api.asks[1:]:
        ok(ask)
    assert not api.transport.is_reading
    ok(api.asks[0])
    assert api.transport.is_reading
    assert len(api.answers) == MAX_PIPELINED


def test_reading_goes_on_when_a_packet_of_many_requests_is_answered() -> None:
    api = Api(ok)
    api.sends(request() * (3 * MAX_PIPELINED))
    assert len(api.answers) == 3 * MAX_PIPELINED
    assert api.transport.is_reading


def test_reading_stops_while_the_answers_are_not_read() -> None:
    api = Api(ok)
    api.connection.pause_writing()
    assert not api.transport.is_reading
    api.connection.resume_writing()
    assert api.transport.is_reading


def test_reading_goes_on_when_neither_answers_nor_requests_are_too_many() -> None:
    api = Api()
    api.sends(request() * MAX_PIPELINED)
    api.connection.pause_writing()
    api.connection.resume_writing()
    assert not api.transport.is_reading, "too many requests are unanswered"
    api.connection.pause_writing()
    for ask in api.asks:
        ok(ask)
    assert not api.transport.is_reading, "the answers are not read"
    api.connection.resume_writing()
    assert api.transport.is_reading


def test_closing_transport_is_not_asked_to_read() -> None:
    api = Api()
    api.connection.close_when_idle()
    api.connection.pause_writing()
    api.connection.resume_writing()
    assert api.transport.is_reading
    api.connection.connection_lost(None)
    api.connection.pause_writing()
    api.connection.resume_writing()


# Expect, Connection: close, HTTP/1.0, upgrades.


def test_continue_is_sent_before_the_body() -> None:
    api = Api(ok)
    wire = request("POST", "/me", b"hello", "Expect: 100-Continue")
    api.sends(wire[:-5])
    assert api.wire == b"HTTP/1.1 100 Continue\r\n\r\n"
    api.sends(wire[-5:])
    assert [answer.status for answer in api.answers] == [100, 200]
    assert api.ask.payload == b"hello"


def test_continue_is_not_sent_to_what_is_refused_anyway() -> None:
    api = Api(token="s3cret")
    api.sends(request("POST", "/me", b"hi", "Expect: 100-continue"))
    assert api.answer.status == 401
    api = Api()
    api.sends(request("POST", "/me", b"x" * 2000, "Expect: 100-continue")[:-2000])
    assert api.answer.status == 413


def test_continue_is_not_sent_to_old_clients() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", "Expect: 100-continue", version="1.0"))
    assert api.answer.status == 200


@pytest.mark.parametrize("last", [("1.1", "Connection: close"), ("1.0", "A: b")])
def test_connection_ends_after_the_last_request(last: tuple[str, str]) -> None:
    version, line = last
    api = Api()
    api.sends(request("POST", "/1"), request("POST", "/2", b"hi", line, version=version))
    api.sends(request("POST", "/3"))
    assert [ask.client_id for ask in api.asks] == [b"1", b"2"]
    ok(api.asks[1])
    assert not api.transport.is_at_its_end
    ok(api.asks[0])
    assert [answer.is_last for answer in api.answers] == [False, True]
    assert api.transport.eof_is_written


def test_old_client_may_keep_the_connection() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", "Connection: keep-alive", version="1.0"))
    assert api.answer.headers["connection"] == "keep-alive"
    assert api.answer.body == b"ok"
    assert_still_serves(api)
    assert "connection" not in api.answers[-1].headers, "HTTP/1.1 keeps it without a word"


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("body", [b"", b"hi", b"in more than one chunk"])
def test_offer_of_another_protocol_is_ignored(body: bytes, framing: str) -> None:
    wire = request("POST", "/me", body, *UPGRADE, framing=framing)
    for pieces in ([wire], bytes_of(wire), [wire[:-1], wire[-1:]]):
        api = Api(ok)
        api.sends(*pieces)
        assert (api.ask.kind, api.ask.client_id, api.ask.payload) == (PUSH, b"me", body)
        assert api.answer.status == 200
        assert_still_serves(api)


def test_requests_after_a_chunked_offer_of_another_protocol_are_read() -> None:
    api = Api(ok)
    wire = request("POST", "/me", b"first", *UPGRADE, "Ws2api-Generation: 5", framing="chunked")
    api.sends((wire + request("GET", "/next", b"") + wire) * 2)
    assert [(ask.client_id, ask.generation) for ask in api.asks] == [
        *((b"me", 5), (b"next", 0), (b"me", 5)),
        *((b"me", 5), (b"next", 0), (b"me", 5)),
    ]
    assert [answer.status for answer in api.answers] == [200] * 6


def test_last_request_may_offer_another_protocol_with_a_chunked_body() -> None:
    offer = ("Connection: close, Upgrade", "Upgrade: h2c")
    api = Api(ok)
    api.sends(request("POST", "/me", b"last", *offer, framing="chunked"))
    assert api.ask.payload == b"last"
    assert api.answer.is_last
    assert api.transport.eof_is_written


@pytest.mark.parametrize("end", [b"zz\r\n", b"5\r\nhell\r\n", b"2\r\nhi0\r\n\r\n"])
def test_malformed_chunks_of_one_that_offers_another_protocol(end: bytes) -> None:
    wire = request("POST", "/me", b"", *UPGRADE, framing="chunked").removesuffix(b"0\r\n\r\n")
    for pieces in ([wire + end], bytes_of(wire + end)):
        api = Api()
        api.sends(*pieces)
        assert_refused_for_good(api, 400)


def test_chunks_of_one_that_offers_another_protocol_are_bounded() -> None:
    api = Api()
    api.sends(request("POST", "/me", b"x" * 2000, *UPGRADE, framing="chunked"))
    assert_refused_for_good(api, 413, c.PUSHES_TOO_LARGE)
    api = Api()
    wire = request("POST", "/me", b"", *UPGRADE, framing="chunked").removesuffix(b"0\r\n\r\n")
    api.sends(wire, *[b"0\r\nA: ", *[b"b" * 1000] * 40])
    assert_refused_for_good(api, 431)


# Forms of a body that are not known here.


@pytest.mark.parametrize(
    "line",
    [
        "Content-Encoding: gzip",
        "Content-Encoding: identity, br",
        "content-encoding: x",
        "Content-Type: text/plain; charset=iso-8859-1",
        'Content-Type: application/json;charset="UTF-16"',
    ],
)
def test_message_in_another_form_is_refused(line: str) -> None:
    for framing in ("length", "chunked"):
        api = Api()
        api.sends(request("POST", "/me", b"hi", line, framing=framing))
        assert_refused(api, 415)
        is_coding = line.lower().startswith("content-encoding")
        expected = "identity" if is_coding else None
        assert api.answer.headers.get("accept-encoding") == expected
        assert_still_serves(api)


@pytest.mark.parametrize(
    "line",
    [
        "Content-Encoding: identity",
        "Content-Encoding:",
        "Content-Type: text/plain; charset=us-ascii",
        "Content-Type: text/plain; charset=UTF-8",
        f"Content-Type: {BINARY_TYPE}; charset=utf-16",
    ],
)
def test_message_in_a_form_that_is_known_is_pushed(line: str) -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", line), request("POST", "/me", b"hi", line))
    assert [ask.payload for ask in api.asks] == [b"hi", b"hi"]


def test_form_matters_to_messages_only() -> None:
    api = Api(ok)
    lines = ("Content-Encoding: gzip", "Content-Type: text/plain; charset=utf-16")
    api.sends(request("GET", "/me", b"", *lines), request("DELETE", "/me", b"", *lines))
    assert [ask.kind for ask in api.asks] == [DESCRIBE, CLOSE]


def test_type_that_only_begins_like_binary_is_text() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", f"Content-Type: {BINARY_TYPE}s"))
    assert api.ask.code == TEXT


@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: GZip", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: identity,chunked",),
    ],
)
def test_transfer_coding_that_is_not_known(lines: tuple[str, ...]) -> None:
    head = "".join(f"{line}\r\n" for line in ("POST /me HTTP/1.1", "Host: a", *lines, ""))
    wire = head.encode() + b"2\r\nhi\r\n0\r\n\r\n"
    for pieces in ([wire], bytes_of(wire)):
        api = Api()
        api.sends(*pieces)
        assert_refused_for_good(api, 501)


@pytest.mark.parametrize("upgrade", [(), UPGRADE], ids=["plain", "upgrade"])
@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: gzip",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding: chunked;a=b",),
        ("Transfer-Encoding: chunked, gzip",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: gzip"),
        ("Transfer-Encoding:",),
        ("Transfer-Encoding: chunked", "Content-Length: 2"),
        ("Content-Length: 2", "Transfer-Encoding: chunked"),
    ],
)
def test_body_whose_end_nobody_knows_is_refused(
    lines: tuple[str, ...], upgrade: tuple[str, ...]
) -> None:
    head = "".join(f"{line}\r\n" for line in ("POST /me HTTP/1.1", "Host: a", *upgrade, *lines, ""))
    wire = head.encode() + b"2\r\nhi\r\n0\r\n\r\n"
    for pieces in ([wire], bytes_of(wire)):
        api = Api()
        api.sends(*pieces)
        assert_refused_for_good(api, 400)


@pytest.mark.parametrize("upgrade", [(), UPGRADE], ids=["plain", "upgrade"])
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_old_client_has_no_transfer_coding(connection: str, upgrade: tuple[str, ...]) -> None:
    lines = (f"Connection: {connection}", *upgrade, "Transfer-Encoding: chunked", "", "")
    wire = "\r\n".join(("POST /me HTTP/1.0", *lines)).encode() + b"2\r\nhi\r\n0\r\n\r\n"
    for pieces in ([wire], bytes_of(wire)):
        api = Api()
        api.sends(*pieces)
        assert_refused_for_good(api, 400)


@pytest.mark.parametrize("value", ["Chunked", " , chunked", "chunked "])
def test_chunked_may_be_written_in_any_way(value: str) -> None:
    api = Api(ok)
    wire = f"POST /me HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {value}\r\n\r\n"
    api.sends(wire.encode() + b"2\r\nhi\r\n0\r\n\r\n")
    assert api.ask.payload == b"hi"


# Ids of several segments.


def test_id_may_have_several_segments_where_they_are_wanted() -> None:
    api = Api(ok)
    api.sends(request("POST", "/acme/CP1"))
    assert_refused(api, 400)
    api = Api(ok, paths=IDS[True])
    api.sends(request("POST", "/acme/CP1"), request("POST", "/acme/CP2"), get("/acme/%43P1?a/b"))
    assert [ask.client_id for ask in api.asks] == [b"acme/CP1", b"acme/CP2", b"acme/CP1"]
    api.sends(request("POST", "/acme//CP1"))
    assert api.answers[-1].body == b"the client id has an empty segment\n"


# Host, and what may stand once.


def test_absolute_target_names_the_client_by_its_path() -> None:
    api = Api(ok)
    api.sends(request("POST", "http://gateway.example:7002/me", b"hi"))
    assert (api.ask.kind, api.ask.client_id) == (PUSH, b"me")
    assert_still_serves(api)


@pytest.mark.parametrize("target", ["/me", "http://gateway.example/me"])
def test_host_must_be_there(target: str) -> None:
    api = Api()
    api.sends(f"POST {target} HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi".encode())
    assert_refused_for_good(api, 400)
    assert api.answer.body == b"the Host header is missing\n"


def test_old_client_needs_no_host() -> None:
    api = Api(ok)
    api.sends(b"POST /me HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi")
    assert api.ask.payload == b"hi"


def test_malformed_host_is_refused() -> None:
    api = Api()
    api.sends(b"GET /me HTTP/1.1\r\nHost: a/b\r\n\r\n")
    assert_refused_for_good(api, 400)


def test_fields_of_an_absolute_target_say_nothing_about_others() -> None:
    fields = b" HTTP/1.1\r\nHost: a/b\r\nContent-Length: 2\r\n\r\nhi"
    api = Api(ok)
    api.sends(b"POST http://a/me" + fields, b"POST /me" + fields)
    assert [answer.status for answer in api.answers] == [200, 400]


@pytest.mark.parametrize(
    "name",
    ["Host", "Authorization", "Content-Type", "Origin", "Ws2api-Generation", "Content-Length"],
)
def test_field_that_may_stand_once_is_refused_twice(name: str) -> None:
    for value in ("5", "6"):
        wire = request("GET", "/me", b"", f"{name}: 5", f"{name.lower()}: {value}")
        for pieces in ([wire], bytes_of(wire)):
            api = Api(ok)
            api.sends(*pieces)
            assert_refused_for_good(api, 400)


def test_right_token_does_not_help_beside_another() -> None:
    for tokens in (("s3cret", "x"), ("x", "s3cret"), ("s3cret", "s3cret")):
        api = Api(ok, token="s3cret")
        lines = [f"Authorization: Bearer {token}" for token in tokens]
        api.sends(request("POST", "/me", b"hi", *lines))
        assert_refused_for_good(api, 400)


@pytest.mark.parametrize("length", ["2 ", "2 \t", "0" * 30 + "2"])
def test_body_of_one_that_offers_another_protocol_is_no_request(length: str) -> None:
    api = Api(ok)
    api.sends(
        request("POST", "/me", b"", *UPGRADE).replace(b"Length: 0", f"Length: {length}".encode())
    )
    assert not api.asks
    api.sends(b"hi" + request("POST", "/me", b"next"))
    assert [ask.payload for ask in api.asks] == [b"hi", b"next"]
    assert_still_serves(api)


def test_token_is_demanded_of_one_that_offers_another_protocol() -> None:
    api = Api(token="s3cret")
    api.sends(request("POST", "/me", b"hi", *UPGRADE))
    assert_refused_for_good(api, 401, c.PUSHES_UNAUTHORIZED)


# The counters at GET /.


def test_totals_are_shown_where_they_are_wanted() -> None:
    api = Api(shows_totals=True)
    api.sends(get("/"))
    assert api.answer.status == 200
    assert api.answer.body == b"connections_opened 7\n"
    assert api.asks == []
    assert counted(api) == {}


def test_totals_want_the_token() -> None:
    api = Api(shows_totals=True, token="s3cret")
    api.sends(get("/"))
    assert api.answer.status == 401


@pytest.mark.parametrize("wire", [request("POST", "/"), get("/?x"), delete("/")])
def test_only_get_of_the_root_shows_totals(wire: bytes) -> None:
    api = Api(shows_totals=True)
    api.sends(wire)
    assert api.answer.status == 400


# The end.


def test_connection_is_known_until_it_is_lost() -> None:
    api = Api()
    assert api.hub.connections == {api.connection}
    api.connection.connection_lost(None)
    assert api.hub.connections == set()


def test_idle_connection_does_not_keep_the_last_message() -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"x" * 500, framing="chunked"))
    payload = api.asks.pop().payload
    assert not any(payload is value for value in gc.get_referents(vars(api.connection)))


def test_lost_connection_is_no_garbage() -> None:
    api = Api(ok)
    api.sends(request())
    api.asks.clear()
    connection = weakref.ref(api.connection)
    gc.disable()
    try:
        api.connection.connection_lost(None)
        del api.connection
        assert connection() is None
    finally:
        gc.enable()


def test_ask_under_way_outlives_its_connection() -> None:
    api = Api()
    api.sends(request())
    api.connection.connection_lost(None)
    ok(api.ask)
    assert api.wire == b""
    assert api.slot[c.PUSHES_OK] == 1


def test_end_of_an_idle_peer_closes() -> None:
    api = Api()
    assert not api.connection.eof_received()
    assert api.transport.is_closed


def test_end_of_a_peer_that_waits_closes_after_the_answer() -> None:
    api = Api()
    api.sends(request())
    assert api.connection.eof_received(), "the transport must stay open for writing"
    assert not api.transport.is_closed
    ok(api.ask)
    assert api.answer.is_last
    assert api.transport.is_closed


def test_half_a_request_is_dropped_at_the_end() -> None:
    api = Api()
    api.sends(request()[:-1])
    assert not api.connection.eof_received()
    assert api.asks == []
    assert api.transport.is_closed


def test_unread_bytes_are_given_time_before_the_close() -> None:
    api = Api()
    api.sends(b"nonsense\r\n\r\n")
    assert api.transport.eof_is_written
    assert not api.transport.is_closed
    assert api.sweeper.scheduled == [IDLE_TIMEOUT_S, LINGER_S]
    api.sends(b"x" * 1000)
    assert api.after(LINGER_S + 0.1) == LINGER_S
    assert api.transport.is_closed
    assert api.after(LINGER_S) == 0.0
    assert api.transport.is_aborted, "it does not read what is still to be written"


def test_peer_that_closes_while_it_is_waited_for() -> None:
    api = Api()
    api.sends(b"nonsense\r\n\r\n")
    assert not api.connection.eof_received()
    api.connection.connection_lost(None)
    assert api.after(LINGER_S) == 0.0


def test_silent_connection_is_closed() -> None:
    api = Api(ok)
    assert api.after(50.0) == pytest.approx(IDLE_TIMEOUT_S - 50.0)
    api.sends(request())
    assert api.after(50.0) == pytest.approx(IDLE_TIMEOUT_S - 50.0)
    assert api.after(25.0) == LINGER_S
    assert api.transport.is_closed


def test_connection_that_waits_for_an_answer_is_not_closed() -> None:
    api = Api()
    api.sends(request())
    assert api.after(2 * IDLE_TIMEOUT_S) > 0
    assert not api.transport.is_closed


def test_lost_connection_has_no_deadline() -> None:
    api = Api()
    api.connection.connection_lost(None)
    assert api.after(1.0) == 0.0


def test_idle_connection_closes_when_told() -> None:
    api = Api()
    api.connection.close_when_idle()
    assert api.transport.is_closed


def test_busy_connection_closes_after_its_answers_when_told() -> None:
    api = Api()
    api.sends(request())
    api.connection.close_when_idle()
    assert not api.transport.is_at_its_end
    ok(api.ask)
    assert api.answer.is_last
    assert api.transport.is_closed


def test_aborts() -> None:
    api = Api()
    api.connection.abort()
    assert api.transport.is_aborted
    api.connection.connection_lost(None)
    api.connection.abort()


# Known fields.


def learnt(*lines: str, body: bytes = b"hi", version: str = "1.1", token: str | None = None) -> Api:
    """Return the API after one push, the fields of which may be known from then on."""
    api = Api(ok, token=token)
    api.sends(request("POST", "/first", body, *lines, version=version))
    api.asks.clear()
    api.transport.written.clear()
    return api


def parsed_bytes(api: Api) -> list[bytes]:
    """Have noted what the parser of a connection gets to see."""
    noted: list[bytes] = []
    parse = api.connection._parse

    def note(data: bytes) -> None:
        noted.append(data)
        parse(data)

    api.connection._parse = note  # type: ignore[method-assign]
    return noted


@pytest.mark.parametrize("lines", [(), (f"Content-Type: {BINARY_TYPE}",), ("A: b", "A: c")])
def test_push_with_the_fields_of_one_before_is_not_parsed(lines: tuple[str, ...]) -> None:
    api = learnt(*lines)
    parsed = parsed_bytes(api)
    api.sends(request("POST", "/second", b"yo", *lines))
    assert parsed == []
    assert (api.ask.kind, api.ask.client_id, api.ask.payload) == (PUSH, b"second", b"yo")
    is_binary = any(BINARY_TYPE in line for line in lines)
    assert (api.ask.code, api.ask.generation) == (BINARY if is_binary else TEXT, 0)
    assert api.answer.status == 200


def test_fields_are_known_to_all_connections_of_a_worker() -> None:
    first = learnt()
    second = Api(ok)
    second.hub.known = first.hub.known
    parsed = parsed_bytes(second)
    second.sends(request("POST", "/second", b"yo"))
    assert parsed == []
    assert second.ask.payload == b"yo"


@pytest.mark.parametrize(
    "lines",
    [
        ("Ws2api-Generation: 7",),
        ("Expect: 100-continue",),
        ("Connection: close",),
        UPGRADE,
    ],
)
def test_fields_that_ask_for_more_are_parsed_each_time(lines: tuple[str, ...]) -> None:
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", *lines))
    assert len(api.asks) == 1
    assert len(api.hub.known) == 0


def test_fields_of_a_chunked_push_are_parsed_each_time() -> None:
    api = Api(ok)
    parsed = parsed_bytes(api)
    for _ in range(2):
        api.sends(request("POST", "/me", b"hi", framing="chunked"))
    assert len(parsed) == 2


def test_fields_of_http_1_0_are_parsed_each_time() -> None:
    api = learnt("Connection: keep-alive", version="1.0")
    parsed = parsed_bytes(api)
    api.sends(request("POST", "/me", b"hi", "Connection: keep-alive", version="1.0"))
    api.sends(request("POST", "/me", b"hi", "Connection: keep-alive"))
    assert len(parsed) == 2


def test_fields_with_a_wrong_token_stay_refused() -> None:
    api = Api(ok, token="secret")
    for _ in range(2):
        api.sends(request("POST", "/me", b"hi", "Authorization: Bearer wrong"))
    assert api.asks == []
    api = learnt("Authorization: Bearer secret", token="secret")
    api.sends(request("POST", "/me", b"hi", "Authorization: Bearer wrong!"))
    assert api.answer.status == 401


def test_pushes_with_known_fields_keep_their_place() -> None:
    api = Api()
    api.sends(request("POST", "/a", b"hi"), request("POST", "/b", b"hi"), get("/c"))
    api.sends(request("POST", "/d", b"hi"))
    for ask in reversed(api.asks):
        ask.finish(outcomes.OK, ask.client_id)
    assert [answer.body for answer in api.answers] == [b"a", b"b", b"c", b"d"]


def test_too_many_pushes_with_known_fields_are_not_read() -> None:
    api = Api()
    for _ in range(MAX_PIPELINED):
        assert api.transport.is_reading
        api.sends(request("POST", "/a", b"hi"))
    assert not api.transport.is_reading


REQUEST_LINES = [
    b"POST /me HTTP/1.1",
    b"POST /me?a=b HTTP/1.1",
    b"POST /m%C3%A9 HTTP/1.1",
    b"POST /m%c HTTP/1.1",
    b"POST /. HTTP/1.1",
    b"POST /.. HTTP/1.1",
    b"POST /%2e HTTP/1.1",
    b"POST /.a HTTP/1.1",
    b"POST /@me HTTP/1.1",
    b"POST / HTTP/1.1",
    b"POST /a/b HTTP/1.1",
    b"POST /a b HTTP/1.1",
    b"POST  /me HTTP/1.1",
    b"POST http://push.example/me HTTP/1.1",
    b"post /me HTTP/1.1",
    b"PUT /me HTTP/1.1",
    b"DELETE /me HTTP/1.1",
    b"GET /me HTTP/1.1",
    b"POST /me HTTP/1.0",
    b"POST /me HTTP/1.1 ",
    b"POST /me",
    b"POST /" + b"x" * 255 + b" HTTP/1.1",
    b"POST /" + b"x" * 256 + b" HTTP/1.1",
    b"POST /m\xe9 HTTP/1.1",
    b"POST /m\0 HTTP/1.1",
    b"POST /me HTTP/1.1\r\nX: y",
    b"\r\nPOST /me HTTP/1.1",
    b"",
]


@pytest.mark.parametrize("body", [b"hi", b"\xff\xfe", b"h", b"hi!", "é".encode()])
@pytest.mark.parametrize("line", REQUEST_LINES)
def test_known_fields_change_no_answer(line: bytes, body: bytes) -> None:
    plain = request("POST", "/first", b"hi")
    data = line + plain[plain.index(b"\r\n") : -2] + body
    api, stranger = learnt(), Api(ok)
    for each in (api, stranger):
        each.sends(data)
    assert api.wire == stranger.wire
    assert api.transport.eof_is_written == stranger.transport.eof_is_written
    said = [
        [(ask.kind, ask.client_id, ask.generation, ask.code, ask.payload) for ask in each.asks]
        for each in (api, stranger)
    ]
    assert said[0] == said[1]


@given(
    st.lists(st.tuples(st.sampled_from(["/a", "/b"]), st.binary(max_size=3)), max_size=6),
    st.lists(st.integers(0, 999)),
)
def test_known_fields_change_nothing_in_any_split(
    pushes: list[tuple[str, bytes]], cuts: list[int]
) -> None:
    wire = b"".join(request("POST", *push, f"Content-Type: {BINARY_TYPE}") for push in pushes)
    api = Api(ok)
    api.sends(*pieces_of(wire, cuts))
    assert [(ask.client_id, ask.payload) for ask in api.asks] == [
        (target[1:].encode(), body) for target, body in pushes
    ]
    assert len(api.answers) == len(pushes)


@pytest.mark.parametrize("body", [b"", b"hi"])
def test_beginning_of_a_push_with_known_fields_waits_for_its_end(body: bytes) -> None:
    data = request("POST", "/me", body, "Ws2api-Unknown: fields may follow")
    for cut in range(1, len(data)):
        api = learnt("Ws2api-Unknown: fields may follow", body=body)
        api.sends(data[:cut])
        assert api.asks == []
        api.sends(data[cut:])
        assert (api.ask.client_id, api.ask.payload) == (b"me", body)


def test_known_fields_are_bounded() -> None:
    api = Api(ok)
    for number in range(1_000):
        api.sends(request("POST", "/me", b"hi", f"Traceparent: {number}"))
    assert 0 < len(api.hub.known) <= 256
    api = Api(ok)
    api.sends(request("POST", "/me", b"hi", "A: " + "b" * 5_000))
    assert len(api.hub.known) == 0


# So many connections that files could run out.


class FakeDoor:
    """Be where connections come in."""

    is_shut = False

    def shut(self) -> None:
        self.is_shut = True

    def reopen(self) -> None:
        self.is_shut = False


class Crowd:
    """Have a share of two connections, and places of clients that may be had beyond it."""

    def __init__(self, *, places: int) -> None:
        self.places = places
        self.doors = [FakeDoor(), FakeDoor()]
        self.sweeper = FakeSweeper()
        self.hub = PushHub(
            slot=Counters(1).bank(0, 0),
            sweeper=cast(Sweeper, self.sweeper),
            route=ok,
            max_message_size=MAX_MESSAGE_BYTES,
            token=None,
            totals=lambda: b"",
            connections=set(),
            share=2,
            doors=cast(Any, self.doors),
            on_surplus=self._on_surplus,
            has_room=lambda: self.places > 0,
        )

    def _on_surplus(self, change: int) -> None:
        self.places -= change

    def enters(self, *data: bytes) -> PushConnection:
        connection = PushConnection(self.hub)
        connection.connection_made(cast(Any, FakeTransport()))
        for each in data:
            connection.data_received(each)
        return connection

    def after(self, seconds: float) -> None:
        self.sweeper.now += seconds
        self.hub.make_room(self.sweeper.now)

    @property
    def waits(self) -> bool:
        """Whether further connections wait."""
        first, second = self.doors
        assert first.is_shut == second.is_shut
        return first.is_shut


def is_closed(connection: PushConnection) -> bool:
    return cast(FakeTransport, connection._transport).is_closed


def test_connections_beyond_the_share_wait_when_clients_have_taken_all_else() -> None:
    crowd = Crowd(places=0)
    first = crowd.enters()
    assert not crowd.waits
    crowd.enters()
    assert crowd.waits
    first.connection_lost(None)
    assert not crowd.waits


def test_connections_beyond_the_share_take_places_of_clients_and_give_them_back() -> None:
    crowd = Crowd(places=2)
    connections = [crowd.enters() for _ in range(4)]
    assert crowd.places == 0
    assert crowd.waits
    for places in (1, 2, 2, 2):
        connections.pop().connection_lost(None)
        assert crowd.places == places
        assert not crowd.waits


def test_connections_that_wait_come_in_when_clients_have_left() -> None:
    crowd = Crowd(places=0)
    crowd.enters()
    crowd.enters()
    crowd.after(0.1)
    assert crowd.waits
    crowd.places += 1
    crowd.after(0.1)
    assert not crowd.waits


def test_one_that_is_idle_for_longest_goes_when_others_wait() -> None:
    crowd = Crowd(places=1)
    begun = crowd.enters(request()[:-1])
    longest = crowd.enters(request())
    crowd.sweeper.now += 0.5
    idle = crowd.enters(request())
    crowd.after(0.4)
    assert not is_closed(longest), "it may be about to be used"
    crowd.after(0.2)
    assert is_closed(longest)
    crowd.after(10)
    assert is_closed(idle)
    crowd.after(10)
    assert not is_closed(begun), "it is in the middle of a request"


def test_idle_ones_stay_while_nobody_waits() -> None:
    crowd = Crowd(places=1)
    idle = [crowd.enters(request()) for _ in range(2)]
    crowd.after(10)
    assert not any(map(is_closed, idle))
