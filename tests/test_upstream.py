"""Send exchanges to an API on loopback: connections, attempts, deadlines, the end."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import zlib
from collections.abc import Callable

import pytest
from harness.looping import in_loop
from harness.upstream import (
    API_TIMEOUT_S,
    IDLE_LIMIT_S,
    LONGEST_BACKOFF_S,
    SURPLUS_S,
    TICK_S,
    Arrived,
    Gateway,
    gateway,
)
from ws2api.gateway import counters as c
from ws2api.gateway.errors import (
    ApiAbandoned,
    ApiDisconnected,
    ApiReplyInvalid,
    ApiTimeout,
    ApiUnreachable,
)
from ws2api.gateway.exchange import CONNECT, DISCONNECT, MESSAGE

# One exchange.


@in_loop
async def test_sends_a_request_and_passes_the_answer_on() -> None:
    async with gateway() as gw:
        sent = gw.posts("a%20b")
        request = await gw.api.next()
        assert (request.method, request.name) == ("POST", "a%20b")
        request.answers(200, b"answer")
        await sent.is_answered(200, b"answer")
        assert gw.slot[c.REQUESTS_SUCCEEDED] == 1
        assert gw.slot[c.API_CONNECTIONS] == 1


@pytest.mark.parametrize(
    ("event", "status", "is_success"),
    [
        (CONNECT, 200, True),
        (CONNECT, 204, False),
        (CONNECT, 403, False),
        (CONNECT, 503, False),
        (MESSAGE, 200, True),
        (MESSAGE, 204, True),
        (MESSAGE, 201, False),
        (MESSAGE, 404, False),
        (MESSAGE, 500, False),
        (DISCONNECT, 200, True),
        (DISCONNECT, 204, True),
        (DISCONNECT, 299, True),
    ],
)
@in_loop
async def test_counts_success_as_the_contract_has_it(
    event: int, status: int, is_success: bool
) -> None:
    async with gateway() as gw:
        sent = gw.submits(event, "a")
        (await gw.api.next()).answers(status)
        await sent.is_answered(status)
        assert gw.slot[c.REQUESTS_SUCCEEDED] == is_success
        assert gw.slot[c.REQUESTS_RETRIED] == 0


@in_loop
async def test_reply_in_pieces() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        for piece in (b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 4\r\n\r\n12", b"34"):
            assert not sent.is_done
            request.sends(piece)
            await gw.api.nothing_more_arrives()
        await sent.is_answered(200, b"1234")


@in_loop
async def test_only_a_connect_wants_the_headers() -> None:
    async with gateway(api_max_connections=1) as gw:
        connect, message = gw.connects(), gw.posts()
        (await gw.api.next()).answers(200, b"ok", "Set-Cookie: a=b")
        assert (b"set-cookie", b"a=b") in (await connect.reply()).headers
        (await gw.api.next()).answers(200, b"", "Set-Cookie: a=b")
        assert (await message.reply()).headers == []


# The pool.


@in_loop
async def test_connection_is_used_again() -> None:
    async with gateway() as gw:
        assert (await gw.exchanges()).number == (await gw.exchanges()).number == 0
        assert gw.shows(connections=1, idle=1)


@in_loop
async def test_connection_used_last_is_used_first() -> None:
    async with gateway() as gw:
        numbers = await gw.warms_up(3)
        assert gw.shows(connections=3, idle=3)
        for number in reversed(numbers):
            gw.posts()
            assert (await gw.api.next()).number == number


@in_loop
async def test_owner_may_send_the_next_from_within_the_answer() -> None:
    async with gateway() as gw:
        first = gw.posts("first")
        first.then = lambda: gw.posts("second") and None
        (await gw.api.next()).answers()
        second = await gw.api.next()
        assert (second.name, second.number) == ("second", 0)
        second.answers()
        await gw.sent[1].is_answered()


@pytest.mark.parametrize(
    "limits", [{"api_max_connections": 2}, {"api_max_connections": 7, "workers": 4}, {"files": 2}]
)
@in_loop
async def test_no_more_connections_than_allowed(limits: dict[str, int]) -> None:
    async with gateway(**limits) as gw:
        sent = [gw.posts(f"{i}") for i in range(6)]
        requests = [await gw.api.next() for _ in range(2)]
        await gw.api.nothing_more_arrives()
        assert gw.shows(connections=2, idle=0, queued=4)
        for i in range(2, 6):
            request = requests.pop(0)
            request.answers()
            requests.append(await gw.api.next())
            assert requests[-1].name == f"{i}", "first come, first served"
            assert requests[-1].number == request.number
        for request in requests:
            request.answers()
        for each in sent:
            await each.is_answered()
        assert gw.shows(connections=2, idle=2, queued=0)
        assert len(gw.api.connections) == 2


@in_loop
async def test_one_connection_is_allowed_even_to_one_of_many_workers() -> None:
    async with gateway(api_max_connections=1, workers=8) as gw:
        await gw.exchanges()


@in_loop
async def test_answer_is_whole_though_its_connection_serves_the_next_already() -> None:
    async with gateway(api_max_connections=1) as gw:
        first, second = gw.posts("first"), gw.posts("second")
        (await gw.api.next()).answers(200, b"to the first")
        await first.is_answered(200, b"to the first")
        (await gw.api.next()).answers(200, b"to the second")
        await second.is_answered(200, b"to the second")


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1, 1), (2, 2), (9, 3)])
@in_loop
async def test_no_more_idle_connections_than_allowed(limit: int, kept: int) -> None:
    async with gateway(api_max_idle=limit) as gw:
        await gw.warms_up(3)
        gw.advance(SURPLUS_S)
        assert gw.shows(connections=kept, idle=kept)
        assert gw.slot[c.API_CONNECTIONS] == kept


@in_loop
async def test_surplus_connections_that_are_in_use_now_and_then_stay() -> None:
    async with gateway(api_max_idle=1) as gw:
        await gw.warms_up(3)
        for _ in range(5):
            gw.advance(SURPLUS_S / 2)
            assert gw.shows(connections=3)
            await gw.warms_up(3)
            assert gw.loop.dialled == 3
        gw.advance(SURPLUS_S)
        assert gw.shows(connections=1, idle=1)


@in_loop
async def test_no_connection_is_reused_where_none_may_be_idle() -> None:
    async with gateway(api_max_idle=0) as gw:
        await gw.exchanges()
        assert gw.shows(connections=0, idle=0)


@in_loop
async def test_idle_connections_are_divided_among_the_workers() -> None:
    for limit, share in ((4, 2), (3, 2), (1, 1), (0, 0)):
        async with gateway(api_max_idle=limit, workers=2) as gw:
            await gw.warms_up(3)
            gw.advance(SURPLUS_S)
            assert gw.shows(idle=share)


@in_loop
async def test_connection_that_was_idle_for_long_is_closed() -> None:
    async with gateway() as gw:
        old, young = await gw.warms_up(2)
        gw.advance(30)
        assert (await gw.exchanges()).number == young
        gw.advance(IDLE_LIMIT_S - 30 + 1)
        await gw.api.connections[old].lost.wait()
        assert gw.shows(connections=1, idle=1)
        assert (await gw.exchanges()).number == young


@in_loop
async def test_connection_that_the_api_ends_is_not_used_again() -> None:
    async with gateway() as gw:
        first = await gw.exchanges("a", "Connection: close")
        await first.is_given_up()
        assert gw.shows(connections=0, idle=0)
        assert (await gw.exchanges("b")).number == 1


@in_loop
async def test_answer_that_ends_with_its_connection() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"HTTP/1.0 200 OK\r\n\r\nuntil the ")
        request.sends(b"end")
        request.hangs_up()
        await sent.is_answered(200, b"until the end")
        assert gw.shows(connections=0)


@in_loop
async def test_idle_connection_that_ends_is_forgotten() -> None:
    async with gateway() as gw:
        (number,) = await gw.warms_up(1)
        gw.api.connections[number].transport.close()
        await gw.comes_to_show(connections=0, idle=0)
        assert gw.slot[c.API_CONNECTIONS] == 0
        assert (await gw.exchanges()).number == 1


@in_loop
async def test_connection_with_bytes_that_nobody_asked_for_is_dropped() -> None:
    async with gateway() as gw:
        (number,) = await gw.warms_up(1)
        gw.api.connections[number].transport.write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await gw.comes_to_show(connections=0, idle=0)
        assert gw.slot[c.API_REPLIES_INVALID] == 0


@in_loop
async def test_bytes_behind_the_answer_cost_the_connection_only() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n")
        await sent.is_answered(200, b"ok")
        await request.is_given_up()
        assert gw.shows(connections=0)


@in_loop
async def test_repr_is_a_diagnosis() -> None:
    async with gateway(api_max_connections=1) as gw:
        gw.posts()
        gw.posts()
        assert repr(gw.upstream) == (
            f"<Upstream http://127.0.0.1:{gw.api.port}/ connections=0 idle=0"
            f" connecting=1 <Line queued=2 retries=0 <Departures disconnects_queued=0"
            f" disconnects_sent=0 disconnects_retries=0>> <Breaker closed failures=0 window=0>>"
        )
        gw.advance(TICK_S)
        assert gw.slot[c.API_QUEUE] == 2
        (await gw.api.next()).answers(503)
        await gw.comes_to_show(connections=1, idle=0, connecting=0, queued=0, retries=1)
        gw.advance(TICK_S)
        assert gw.slot[c.API_QUEUE] in (0, 1)


# A connection that ends before the answer.


async def assert_idle_end_is_made_good(gw: Gateway, event: int = MESSAGE) -> None:
    """Have the idle connection end while a request is on its way; it arrives on another."""
    gw.api.connections[-1].ends_unnoticed()
    sent = gw.submits(event, "next")
    again = await gw.api.next()
    assert again.name == "next"
    assert again.number == len(gw.api.connections) - 1 > 0
    again.answers(200, b"at last")
    await sent.is_answered(200, b"at last")
    assert gw.slot[c.REQUESTS_RETRIED] == 1
    await gw.api.nothing_more_arrives()


@pytest.mark.parametrize("event", [CONNECT, MESSAGE, DISCONNECT])
@in_loop
async def test_request_on_a_connection_closed_while_idle_is_sent_again(event: int) -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        await assert_idle_end_is_made_good(gw, event)


@in_loop
async def test_large_request_on_a_connection_closed_while_idle_is_sent_again() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        gw.api.connections[-1].ends_unnoticed()
        sent = gw.posts(size_bytes=3_000_000)
        request = await gw.api.next()
        assert len(request.body) == 3_000_000
        request.answers()
        await sent.is_answered()


@in_loop
async def test_last_answer_is_not_taken_for_the_next_when_the_connection_ends() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        (await gw.api.next()).answers(204)
        await sent.is_answered(204)
        await assert_idle_end_is_made_good(gw)


@in_loop
async def test_request_on_a_spare_connection_closed_while_idle_is_sent_again() -> None:
    async with gateway() as gw:
        too_late = gw.posts()
        gw.advance(API_TIMEOUT_S + 1)
        await too_late.fails(ApiTimeout)
        await gw.comes_to_show(connections=1, idle=1)
        await assert_idle_end_is_made_good(gw)


@in_loop
async def test_request_that_is_sent_again_goes_before_those_that_wait() -> None:
    async with gateway(api_max_connections=1) as gw:
        await gw.warms_up(1)
        gw.api.connections[-1].ends_unnoticed()
        first, second = gw.posts("first"), gw.posts("second")
        for sent, name in ((first, "first"), (second, "second")):
            request = await gw.api.next()
            assert request.name == name
            request.answers()
            await sent.is_answered()


@in_loop
async def test_request_on_a_connection_that_was_reset_before_it_was_written_is_sent_again() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        await gw.api.connections[-1].resets()
        sent = gw.posts("next")
        request = await gw.api.next()
        assert request.number == 1
        request.answers()
        await sent.is_answered()


@pytest.mark.parametrize("event", [CONNECT, MESSAGE])
@pytest.mark.parametrize("end", [Arrived.hangs_up, Arrived.resets])
@in_loop
async def test_request_that_arrived_on_a_used_connection_is_not_sent_again(
    event: int, end: Callable[[Arrived], None]
) -> None:
    async with gateway() as gw:
        await gw.warms_up(3)
        sent = gw.submits(event, "a")
        end(await gw.api.next())
        await sent.fails(ApiDisconnected)
        await gw.api.nothing_more_arrives()
        assert gw.slot[c.REQUESTS_RETRIED] == 0


@in_loop
async def test_disconnect_that_arrived_on_a_used_connection_is_sent_again() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        sent = gw.reports("a")
        (await gw.api.next()).hangs_up()
        await gw.settles()
        again = await gw.tries_again()
        assert (again.method, again.name) == ("DELETE", "a")
        again.answers()
        await sent.is_answered()


@in_loop
async def test_nobody_finds_a_connection_idle_whose_end_was_seen() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        [connection] = gw.api.connections
        connection.ends_unnoticed()
        while not gw.shows(connections=0, idle=0):
            await asyncio.sleep(0)
        assert (await gw.exchanges()).number == 1
        assert gw.slot[c.REQUESTS_RETRIED] == 0


@pytest.mark.parametrize("event", [CONNECT, MESSAGE])
@in_loop
async def test_request_on_a_fresh_connection_is_not_sent_again(event: int) -> None:
    async with gateway() as gw:
        sent = gw.submits(event, "a")
        (await gw.api.next()).hangs_up()
        await sent.fails(ApiDisconnected)
        await gw.api.nothing_more_arrives()
        assert gw.slot[c.REQUESTS_FAILED] == 1


@in_loop
async def test_request_is_not_sent_again_when_a_byte_of_the_answer_came() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"H")
        request.hangs_up()
        await sent.fails(ApiDisconnected)
        await gw.api.nothing_more_arrives()


@in_loop
async def test_answer_that_is_cut_off_is_none() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        request.hangs_up()
        await sent.fails(ApiDisconnected)


@in_loop
async def test_others_that_wait_are_served_when_a_connection_ends() -> None:
    async with gateway(api_max_connections=1) as gw:
        first, second = gw.posts("first"), gw.posts("second")
        (await gw.api.next()).hangs_up()
        await first.fails(ApiDisconnected)
        request = await gw.api.next()
        assert request.name == "second"
        request.answers()
        await second.is_answered()


# Further attempts.


@in_loop
async def test_message_is_sent_again_after_503() -> None:
    async with gateway() as gw:
        sent = gw.posts("a")
        request = await gw.api.next()
        for attempt in range(4):
            request.answers(503, b"overloaded")
            await gw.comes_to_show(retries=1)
            assert gw.slot[c.REQUESTS_RETRIED] == attempt + 1
            request = await gw.tries_again()
        assert request.name == "a"
        request.answers(200, b"recovered")
        await sent.is_answered(200, b"recovered")
        assert gw.slot[c.REQUESTS_STARTED] == gw.slot[c.REQUESTS_SUCCEEDED] == 1


@in_loop
async def test_first_attempts_follow_soon_and_later_ones_less_so() -> None:
    async with gateway(api_timeout=1000) as gw:
        gw.posts()
        waited = []
        for _ in range(8):
            (await gw.api.next()).answers(503)
            await gw.comes_to_show(retries=1)
            before = gw.clock.now
            while gw.shows(retries=1):
                gw.advance(TICK_S)
            waited.append(gw.clock.now - before)
        assert waited[0] <= 2 * TICK_S
        assert max(waited[-3:]) <= LONGEST_BACKOFF_S + TICK_S
        assert min(waited[-3:]) >= LONGEST_BACKOFF_S / 2 - TICK_S


@in_loop
async def test_503_is_the_answer_when_the_time_is_up() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        started = gw.clock.now
        while gw.clock.now < started + 0.6 * API_TIMEOUT_S:
            request.answers(503)
            await gw.comes_to_show(retries=1)
            request = await gw.tries_again()
        gw.advance(started + API_TIMEOUT_S - 5 * TICK_S - gw.clock.now)
        request.answers(503, b"still overloaded")
        await sent.is_answered(503, b"still overloaded")
        assert gw.slot[c.REQUESTS_FAILED] == 1


@in_loop
async def test_next_attempt_uses_an_idle_connection() -> None:
    async with gateway() as gw:
        gw.posts()
        request = await gw.api.next()
        request.answers(503)
        await gw.comes_to_show(retries=1, idle=1)
        gw.advance(LONGEST_BACKOFF_S)
        assert (await gw.api.next()).number == request.number


@pytest.mark.parametrize("status", [408, 425, 429, 502, 504])
@in_loop
async def test_message_that_may_come_twice_is_sent_again_after(status: int) -> None:
    async with gateway() as gw:
        sent = gw.posts("a", retry_safe=True)
        (await gw.api.next()).answers(status)
        await gw.comes_to_show(retries=1)
        again = await gw.tries_again()
        assert again.name == "a"
        again.answers(200, b"recovered")
        await sent.is_answered(200, b"recovered")
        assert gw.slot[c.REQUESTS_SUCCEEDED] == gw.slot[c.REQUESTS_RETRIED] == 1


@pytest.mark.parametrize("status", [408, 425, 429, 502, 504])
@in_loop
async def test_message_that_must_not_come_twice_has_its_answer_with(status: int) -> None:
    async with gateway() as gw:
        sent = gw.posts("a")
        (await gw.api.next()).answers(status)
        await sent.is_answered(status)
        assert gw.slot[c.REQUESTS_RETRIED] == 0


@pytest.mark.parametrize("status", [429, 502, 503])
@in_loop
async def test_pause_that_the_api_asks_for_is_kept(status: int) -> None:
    async with gateway() as gw:
        gw.posts(retry_safe=True)
        (await gw.api.next()).answers(status, b"", "Retry-After: 3")
        await gw.comes_to_show(retries=1)
        await gw.passes(3 - 2 * TICK_S)
        assert gw.shows(retries=1)
        await gw.tries_again()


@pytest.mark.parametrize("event", [CONNECT, MESSAGE, DISCONNECT])
@in_loop
async def test_408_on_a_used_connection_came_before_the_request(event: int) -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        sent = gw.submits(event, "a")
        late = await gw.api.next()
        late.answers(408, b"", "Connection: close")
        again = await gw.api.next()
        assert (again.name, again.number) == ("a", 1)
        again.answers()
        await sent.is_answered()


# A disconnect, whose status is all of the answer.


@pytest.mark.parametrize(
    "wire",
    [
        b"Content-Length: 1001\r\n\r\n" + b"x" * 1001,
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Content-Encoding: br\r\nContent-Length: 1\r\n\r\nx",
    ],
)
@in_loop
async def test_disconnect_is_done_whatever_is_wrong_behind_the_status(wire: bytes) -> None:
    async with gateway() as gw:
        sent = gw.reports()
        (await gw.api.next()).sends(b"HTTP/1.1 200 OK\r\n" + wire)
        assert (await sent.reply()).status == 200
        await gw.passes(LONGEST_BACKOFF_S)
        await gw.api.nothing_more_arrives()
        assert gw.slot[c.REQUESTS_RETRIED] == 0


@in_loop
async def test_disconnect_is_done_though_its_answer_is_cut_off() -> None:
    async with gateway() as gw:
        sent = gw.reports()
        request = await gw.api.next()
        request.sends(b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n"[:-2])
        request.hangs_up()
        await gw.settles()
        assert not sent.is_done
        request = await gw.tries_again()
        request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        request.hangs_up()
        await sent.is_answered(200, b"half")


@in_loop
async def test_disconnect_is_done_though_its_answer_never_ends() -> None:
    async with gateway() as gw:
        sent = gw.reports()
        request = await gw.api.next()
        request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await gw.api.nothing_more_arrives()
        gw.advance(API_TIMEOUT_S + 3 * TICK_S)
        await sent.is_answered(200, b"half")
        await request.is_given_up()


# Bodies that were not asked for.


@pytest.mark.parametrize(
    ("line", "body"),
    [
        ("Content-Encoding: gzip", gzip.compress(b"caf\xc3\xa9", mtime=0)),
        ("Content-Encoding: deflate", zlib.compress(b"caf\xc3\xa9")),
        ("Content-Type: text/plain; charset=iso-8859-1", b"caf\xe9"),
    ],
)
@in_loop
async def test_body_is_decoded_each_time(line: str, body: bytes) -> None:
    async with gateway() as gw:
        for _ in range(2):  # the second time its head has been seen before
            sent = gw.posts()
            (await gw.api.next()).answers(200, body, line)
            await sent.is_answered(200, b"caf\xc3\xa9")


@pytest.mark.parametrize(
    "line", ["Content-Encoding: br", "Content-Encoding: gzip", "Content-Type: a/b; charset=xyz"]
)
@in_loop
async def test_body_that_cannot_be_decoded_is_no_answer(line: str) -> None:
    async with gateway() as gw:
        sent = gw.posts(retry_safe=True)
        (await gw.api.next()).answers(200, b"body", line)
        await sent.fails(ApiReplyInvalid)
        assert gw.slot[c.API_REPLIES_INVALID] == 1
        await gw.api.nothing_more_arrives()


@in_loop
async def test_body_that_ends_with_its_connection_is_decoded_too() -> None:
    async with gateway() as gw:
        for body in (gzip.compress(b"text"), b"text"):
            sent = gw.posts()
            request = await gw.api.next()
            request.sends(b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + body)
            request.hangs_up()
            if body == b"text":
                await sent.fails(ApiReplyInvalid)
            else:
                await sent.is_answered(200, b"text")


@pytest.mark.parametrize("line", ["Content-Encoding: gzip", "Content-Type: a/b; charset=xyz"])
@in_loop
async def test_body_that_ends_with_its_connection_and_cannot_be_decoded_is_no_answer(
    line: str,
) -> None:
    async with gateway() as gw:
        sent = gw.posts(retry_safe=True)
        request = await gw.api.next()
        request.sends(b"HTTP/1.0 200 OK\r\n%b\r\n\r\nbody" % line.encode())
        request.hangs_up()
        await sent.fails(ApiReplyInvalid)
        await gw.api.nothing_more_arrives()


# For how long the API keeps idle connections.


@pytest.mark.parametrize(("said", "idle_s"), [("timeout=5, max=9", 4), ("timeout=1", 0.5)])
@in_loop
async def test_idle_connection_is_closed_before_the_api_does(said: str, idle_s: float) -> None:
    async with gateway() as gw:
        request = await gw.exchanges("m", f"Keep-Alive: {said}")
        gw.advance(idle_s - TICK_S)
        assert gw.shows(idle=1)
        gw.advance(3 * TICK_S)
        await request.is_given_up()
        assert gw.shows(connections=0)


# Answers that cannot be used.


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000,
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
    ],
)
@in_loop
async def test_answer_that_cannot_be_used(wire: bytes) -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.sends(wire)
        await sent.fails(ApiReplyInvalid)
        await request.is_given_up()
        assert gw.slot[c.API_REPLIES_INVALID] == 1
        assert gw.shows(connections=0)


# An API that hangs.


@pytest.mark.parametrize("event", [CONNECT, MESSAGE])
@in_loop
async def test_answer_that_does_not_come_in_time(event: int) -> None:
    async with gateway() as gw:
        sent = gw.submits(event, "a")
        request = await gw.api.next()
        gw.advance(API_TIMEOUT_S - TICK_S)
        assert not sent.is_done
        gw.advance(3 * TICK_S)
        await sent.fails(ApiTimeout)
        await request.is_given_up()
        assert gw.shows(connections=0)


@in_loop
async def test_answer_that_comes_in_drops_is_timed_as_a_whole() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        for byte in b"HTTP/1.1 ":
            request.sends(bytes((byte,)))
            gw.advance(1)
        assert not sent.is_done
        gw.advance(2)
        await sent.fails(ApiTimeout)


@in_loop
async def test_time_in_the_queue_counts() -> None:
    async with gateway(api_max_connections=1) as gw:
        first, second = gw.posts("first"), gw.posts("second")
        request = await gw.api.next()
        gw.advance(API_TIMEOUT_S - 1)
        request.answers()
        await first.is_answered()
        assert (await gw.api.next()).name == "second"
        gw.advance(1 + 3 * TICK_S)
        await second.fails(ApiTimeout)


@in_loop
async def test_what_waits_behind_a_hanging_api_fails_in_time() -> None:
    async with gateway(api_max_connections=1) as gw:
        sent = [gw.posts("first"), gw.connects("second"), gw.posts("third")]
        await gw.api.next()
        gw.advance(API_TIMEOUT_S + 3 * TICK_S)
        for each in sent:
            await each.fails(ApiTimeout)
        assert gw.shows(connections=0, connecting=0, queued=0, retries=0)


@in_loop
async def test_message_that_was_put_off_fails_in_time_behind_younger_ones() -> None:
    async with gateway(api_max_connections=1) as gw:
        old = gw.posts("old")
        first = await gw.api.next()
        gw.advance(0.8 * API_TIMEOUT_S)
        young = [gw.posts("young"), gw.posts("younger")]
        first.answers(503)
        assert (await gw.api.next()).name == "young"
        gw.advance(0.2 * API_TIMEOUT_S + 3 * TICK_S)
        await old.fails(ApiTimeout)
        assert not any(each.is_done for each in young)


@in_loop
async def test_hanging_request_does_not_hold_up_others() -> None:
    async with gateway() as gw:
        gw.posts("hangs")
        await gw.api.next()
        assert (await gw.exchanges("other")).number == 1


@in_loop
async def test_connection_that_cannot_be_opened_in_time() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = listener.getsockname()[1]
        for _ in range(4):  # fill the queue of connections that nobody accepts
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        options = {"api": f"http://127.0.0.1:{port}/", "api_connect_timeout": 0.05}
        async with gateway(**options) as gw:
            await gw.connects().fails(ApiUnreachable)


@in_loop
async def test_host_whose_name_cannot_be_one() -> None:
    async with gateway(api=f"http://{'x' * 64}.example/") as gw:
        await gw.connects().fails(ApiUnreachable)


# The end.


@in_loop
async def test_close_drops_every_connection_and_opens_none() -> None:
    async with gateway(api_max_connections=2) as gw:
        await gw.warms_up(2)
        sent = [gw.posts("busy"), gw.connects("busy2"), gw.posts("waiting")]
        requests = [await gw.api.next() for _ in range(2)]
        await gw.upstream.close()
        for request in requests:
            await request.is_given_up()
        for each in sent:
            await each.fails(ApiAbandoned)
        await gw.api.nothing_more_arrives()
        assert gw.shows(connections=0, connecting=0, queued=0)


@in_loop
async def test_close_gives_up_connections_that_are_being_opened() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        assert gw.shows(connecting=1)
        await gw.upstream.close()
        await gw.comes_to_show(connecting=0, connections=0)
        await sent.fails(ApiAbandoned)
        await gw.api.nothing_more_arrives()


@in_loop
async def test_close_gives_up_what_waits_for_another_attempt() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        (await gw.api.next()).answers(503)
        await gw.comes_to_show(retries=1)
        await gw.upstream.close()
        await sent.fails(ApiAbandoned)
        assert gw.shows(retries=0)


@in_loop
async def test_what_is_submitted_after_the_end_fails() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        busy = gw.posts()
        await gw.api.next()
        busy.then = lambda: gw.posts("from-within-the-failure") and None
        await gw.upstream.close()
        late = [gw.posts(), gw.connects(), gw.reports()]
        for sent in (busy, gw.sent[-4], *late):
            await sent.fails(ApiAbandoned)
        assert gw.shows(connections=0, connecting=0)


@in_loop
async def test_fault_of_one_owner_does_not_keep_others_from_their_outcome() -> None:
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: complaints.append(fault))

    def fail() -> None:
        raise RuntimeError("not the upstream's")

    async with gateway(listens=False) as gw:
        first, second, third = gw.connects("first"), gw.connects("second"), gw.connects("third")
        first.then = second.then = fail
        for each in (first, second, third):
            await each.fails(ApiUnreachable)
    assert len(complaints) == 2


# How long it takes.

LATENCIES = {
    CONNECT: c.CONNECT_LATENCY,
    MESSAGE: c.MESSAGE_LATENCY,
    DISCONNECT: c.DISCONNECT_LATENCY,
}


def observed(gw: Gateway) -> list[int]:
    """Count the answers whose time was taken, of connects, messages and disconnects."""
    histograms = LATENCIES.values()
    return [sum(gw.slot[each.first : each.sum_index]) for each in histograms]


class Stopwatch:
    """Be the precise clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 10**15
        for module in ("upstream", "api_connection"):
            monkeypatch.setattr(f"ws2api.gateway.{module}.monotonic_ns", lambda: self.now_ns)

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


@pytest.mark.parametrize(
    ("event", "status"),
    [(CONNECT, 200), (CONNECT, 404), (MESSAGE, 200), (MESSAGE, 404), (DISCONNECT, 200)],
)
@in_loop
async def test_time_of_an_answer_is_taken_by_event(
    event: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Stopwatch(monkeypatch)
    async with gateway() as gw:
        watch.advance(5)
        sent = gw.submits(event, "a")
        request = await gw.api.next()
        watch.advance(0.004)
        request.answers(status)
        await sent.is_answered(status)
        assert observed(gw) == [each == event for each in LATENCIES]
        assert gw.slot[LATENCIES[event].sum_index] == 4_000


@in_loop
async def test_time_in_line_is_not_the_time_of_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch)
    async with gateway(api_max_connections=1) as gw:
        first, second = gw.posts("first"), gw.posts("second")
        for sent in (first, second):
            request = await gw.api.next()
            watch.advance(1)
            request.answers()
            await sent.is_answered()
        assert observed(gw) == [0, 2, 0]
        assert gw.slot[c.MESSAGE_LATENCY.sum_index] == 2_000_000


@in_loop
async def test_each_answer_counts_also_that_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch)
    async with gateway() as gw:
        sent = gw.posts()
        watch.advance(100)
        (await gw.api.next()).answers(503)
        await gw.settles()
        second = await gw.tries_again()
        watch.advance(0.002)
        second.answers()
        await sent.is_answered()
        assert observed(gw) == [0, 2, 0]
        # The second is timed from its own start.
        assert gw.slot[c.MESSAGE_LATENCY.sum_index] < 100_003_000


@pytest.mark.parametrize("event", [CONNECT, MESSAGE])
@in_loop
async def test_request_without_an_answer_counts_with_its_timeout(
    event: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Stopwatch(monkeypatch)
    async with gateway() as gw:
        sent = gw.submits(event, "a")
        await gw.api.next()
        watch.advance(API_TIMEOUT_S)
        gw.advance(API_TIMEOUT_S + 3 * TICK_S)
        await sent.fails(ApiTimeout)
        assert observed(gw) == [each == event for each in LATENCIES]
        assert gw.slot[LATENCIES[event].sum_index] == API_TIMEOUT_S * 1e6


@in_loop
async def test_request_that_was_never_sent_has_no_time() -> None:
    async with gateway(listens=False) as gw:
        sent = gw.posts()
        gw.advance(API_TIMEOUT_S + 1)
        assert await sent.failure() in (ApiUnreachable, ApiTimeout)
        assert observed(gw) == [0, 0, 0]


@in_loop
async def test_answer_that_cannot_be_used_has_no_time() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        (await gw.api.next()).sends(b"no HTTP\r\n\r\n")
        await sent.fails(ApiReplyInvalid)
        assert observed(gw) == [0, 0, 0]
