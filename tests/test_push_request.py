"""Make asks of requests without a connection, and answers of outcomes."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway import outcomes
from ws2api.gateway.ask import Ask
from ws2api.gateway.envelope import CLOSE, DESCRIBE, PUSH
from ws2api.gateway.frames import BINARY, TEXT
from ws2api.gateway.push_request import encode_answer, fill

ALLOWED_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)} - {1010}


def filled(
    method: str = "POST",
    target: str = "/me",
    generation: bytes | None = None,
    *,
    binary: bool = False,
    body: bytes = b"hi",
) -> Ask:
    """Fill an ask, which must be sound."""
    ask = Ask(kind=-1)
    assert fill(ask, method.encode(), target.encode(), generation, binary, body) is None
    return ask


def refusal(method: str = "POST", target: str = "/me", body: bytes = b"hi") -> int:
    """Return the outcome of a request that is not sound; its text ends a line."""
    refused = fill(Ask(), method.encode(), target.encode(), None, False, body)
    assert refused is not None
    outcome, text = refused
    assert not text or (text.endswith(b"\n") and text.count(b"\n") == 1)
    return outcome


def test_methods_say_what_is_asked() -> None:
    push = filled(body="grün".encode())
    assert (push.kind, push.client_id, push.code, push.payload) == (
        PUSH,
        b"me",
        TEXT,
        "grün".encode(),
    )
    assert filled(binary=True, body=b"\xff").code == BINARY
    assert filled("GET", "/me").kind == DESCRIBE
    close = filled("DELETE", "/me?code=4000&reason=bye")
    assert (close.kind, close.code, close.payload) == (CLOSE, 4000, b"bye")
    assert refusal("PUT") == refusal("") == outcomes.METHOD_NOT_ALLOWED


@pytest.mark.parametrize(
    "target", ["", "/", "me", "/a/b", "/@x", "/%2e%2E", "/a%zz", "http://a/b/c"]
)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "PUT"])
def test_target_must_name_a_client(method: str, target: str) -> None:
    assert refusal(method, target) == outcomes.BAD_REQUEST


@pytest.mark.parametrize(("value", "number"), [(b"0", 0), (b"17", 17), (b"9" * 18, 10**18 - 1)])
def test_generation_is_read(value: bytes, number: int) -> None:
    for method in ("POST", "GET", "DELETE"):
        assert filled(method, "/me", value).generation == number
    assert filled().generation == 0


@pytest.mark.parametrize("value", [b"", b"x", b"-1", b"1 ", b"1" * 19, "²".encode("latin-1")])
def test_generation_that_is_none_is_refused(value: bytes) -> None:
    assert fill(Ask(), b"POST", b"/me", value, False, b"") is not None


@given(st.binary(max_size=50))
def test_text_is_utf8_and_binary_is_anything(body: bytes) -> None:
    assert filled(binary=True, body=body).payload == body
    try:
        body.decode()
    except UnicodeDecodeError:
        assert refusal(body=body) == outcomes.BAD_REQUEST
    else:
        assert filled(body=body).payload == body


@settings(deadline=None)
@given(st.integers(0, 70000), st.text(max_size=130))
def test_close_is_asked_for_with_what_may_be_sent(code: int, reason: str) -> None:
    target = f"/me?code={code}&reason={quote(reason, safe='', errors='surrogatepass')}"
    if code not in ALLOWED_CODES or len(reason.encode(errors="surrogatepass")) > 123:
        assert refusal("DELETE", target) == outcomes.BAD_REQUEST
        return
    ask = filled("DELETE", target)
    assert (ask.code, ask.payload.decode()) == (code, reason)


@given(st.text("0123456789abcdef%=&;+ _-", max_size=60))
def test_any_query_is_a_close_or_a_refusal(query: str) -> None:
    ask = Ask()
    refused = fill(ask, b"DELETE", f"/me?{query}".encode(), None, False, b"")
    if refused is None:
        assert ask.code in ALLOWED_CODES
        assert len(ask.payload.decode().encode()) <= 123
    else:
        assert refused[0] == outcomes.BAD_REQUEST


# Answers.

NUMBERS = range(len(outcomes.ANSWERS))


@pytest.mark.parametrize("outcome", NUMBERS)
@pytest.mark.parametrize("body", [b"", b"own text\n", b'{"a": 1}'])
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("with_body", [False, True])
def test_answer_is_whole(outcome: int, body: bytes, is_last: bool, with_body: bool) -> None:
    wire = encode_answer(outcome, body, is_last=is_last, with_body=with_body)
    head, _, rest = wire.partition(b"\r\n\r\n")
    status_line, *lines = head.split(b"\r\n")
    assert status_line == b"HTTP/1.1 " + outcomes.ANSWERS[outcome][0]
    fields = dict(line.split(b": ", 1) for line in lines)
    assert len(fields) == len(lines)
    expected = body or outcomes.ANSWERS[outcome][1]
    assert int(fields[b"Content-Length"]) == len(expected)
    # One that answers a HEAD promises the length of a body that does not come.
    assert rest == (expected if with_body else b"")
    assert (fields.get(b"Connection") == b"close") == is_last
    is_json = body.startswith(b"{")
    assert fields[b"Content-Type"].startswith(b"application/json" if is_json else b"text/plain")
