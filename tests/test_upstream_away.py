"""Take the API away and bring it back: what waits, what fails, how often it is tried."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import structlog
from harness.looping import in_loop
from harness.names import ALIVE, NAME, REFUSING, SILENT, silence
from harness.upstream import (
    API_TIMEOUT_S,
    TICK_S,
    Arrived,
    Gateway,
    Sent,
    gateway,
)
from ws2api.gateway import counters as c
from ws2api.gateway.breaker import CLOSED, FAILURES_TO_OPEN, HALF_OPEN, MAX_PAUSE_S, OPEN
from ws2api.gateway.errors import ApiDisconnected, ApiError, ApiTimeout, ApiUnreachable
from ws2api.gateway.exchange import DISCONNECT, MESSAGE

LONGEST_PAUSE_S = MAX_PAUSE_S


@in_loop
async def test_connect_fails_at_once_while_the_api_is_away() -> None:
    async with gateway(listens=False) as gw:
        await gw.connects().fails(ApiUnreachable)
        await gw.comes_to_show(connecting=0)
        await gw.connects().fails(ApiUnreachable)


@pytest.mark.parametrize("event", [MESSAGE, DISCONNECT])
@in_loop
async def test_messages_and_disconnects_wait_for_the_api_to_come_back(event: int) -> None:
    async with gateway(listens=False) as gw:
        sent = [gw.submits(event, f"{i}") for i in range(3)]
        await gw.passes(LONGEST_PAUSE_S)
        assert not any(each.is_done for each in sent)
        gw.api.on_request = Arrived.answers
        await gw.api.open()
        await gw.passes(LONGEST_PAUSE_S + TICK_S)
        for each in sent:
            await each.is_answered()


@in_loop
async def test_owner_may_try_again_from_within_the_failure() -> None:
    async with gateway(listens=False) as gw:
        first = gw.connects("first")
        first.then = lambda: gw.connects("second") and None
        await first.fails(ApiUnreachable)
        await gw.sent[1].fails(ApiUnreachable)


@in_loop
async def test_connect_that_fails_takes_nobody_with_it() -> None:
    async with gateway(listens=False) as gw:
        message, connect = gw.posts(), gw.connects()
        await connect.fails(ApiUnreachable)
        assert not message.is_done
        await gw.comes_to_show(queued=1)


@in_loop
async def test_message_fails_when_the_api_is_away_for_long() -> None:
    async with gateway(listens=False) as gw:
        sent = gw.posts()
        await gw.passes(API_TIMEOUT_S - TICK_S)
        assert not sent.is_done
        await gw.passes(4 * TICK_S)
        await sent.fails(ApiUnreachable)
        assert gw.slot[c.REQUESTS_RETRIED] == 0, "it was never sent"


@in_loop
async def test_busy_connection_serves_what_waits_when_no_more_can_be_opened() -> None:
    async with gateway() as gw:
        await gw.warms_up(1)
        busy = gw.posts("busy")
        request = await gw.api.next()
        gw.api.refuses()
        waiting = gw.connects("waiting")
        await gw.comes_to_show(connecting=0)
        assert not waiting.is_done
        request.answers()
        await busy.is_answered()
        (await gw.api.next()).answers()
        await waiting.is_answered()


# The breaker.


async def opens(gw: Gateway, *lines: str) -> list[Sent]:
    """Have five connects answered with 503; return what was refused."""
    sent = [gw.connects(f"open{i}") for i in range(FAILURES_TO_OPEN)]
    for _ in sent:
        (await gw.api.next()).answers(503, b"", *lines)
    for each in sent:
        await each.is_answered(503)
    assert gw.is_away
    return sent


def hangs_up(request: Arrived) -> None:
    request.hangs_up()


def refuses(request: Arrived) -> None:
    request.answers(503)


@pytest.mark.parametrize("fault", [None, hangs_up, refuses])
@in_loop
async def test_a_thousand_that_wait_cause_one_attempt_per_pause(
    fault: Callable[[Arrived], None] | None,
) -> None:
    async with gateway(listens=fault is not None, api_timeout=1_000) as gw:
        attempts = 0

        def answer(request: Arrived) -> None:
            nonlocal attempts
            attempts += 1
            assert fault is not None
            fault(request)

        gw.api.on_request = answer
        sent = [gw.posts(f"{i}", retry_safe=True) for i in range(1_000)]
        await gw.settles()
        await gw.passes(TICK_S)
        assert gw.is_away
        before = gw.loop.dialled if fault is None else attempts
        assert before <= 256, "the first wave, before anything was known"
        await gw.passes(60)
        after = gw.loop.dialled if fault is None else attempts
        # Five short pauses, then one or two seconds each.
        assert 25 <= after - before <= 70
        assert not any(each.is_done for each in sent)
        gw.api.on_request = Arrived.answers
        if fault is None:
            await gw.api.open()
        await gw.passes(3 * LONGEST_PAUSE_S)
        for each in sent:
            await each.is_answered()
        assert gw.slot[c.BREAKER_OPENED] == 1


@in_loop
async def test_api_that_is_back_gets_one_then_two_then_four() -> None:
    async with gateway() as gw:
        await opens(gw)
        sent = [gw.posts(f"{i}") for i in range(20)]
        await gw.api.nothing_more_arrives()
        gw.advance(2 * TICK_S)
        names = []
        for window in (1, 2, 4, 8):
            requests = [await gw.api.next() for _ in range(window)]
            await gw.api.nothing_more_arrives()
            assert gw.slot[c.BREAKER_STATE] == HALF_OPEN
            names += [request.name for request in requests]
            for request in requests:
                request.answers()
        for _ in range(5):
            request = await gw.api.next()
            names.append(request.name)
            request.answers()
        for each in sent:
            await each.is_answered()
        assert names == [each.name for each in sent], "first come, first served"
        assert gw.slot[c.BREAKER_STATE] == CLOSED
        assert not gw.is_away


@in_loop
async def test_connects_fail_without_an_attempt_while_open() -> None:
    async with gateway(listens=False) as gw:
        await gw.loses_the_api()
        dialled = gw.loop.dialled
        for _ in range(100):
            await gw.connects().fails(ApiUnreachable)
        assert gw.loop.dialled == dialled


@in_loop
async def test_connects_in_line_fail_when_it_opens() -> None:
    async with gateway(api_max_connections=5) as gw:
        busy = [gw.posts(f"busy{i}") for i in range(5)]
        requests = [await gw.api.next() for _ in busy]
        message, connects = gw.posts(), [gw.connects() for _ in range(3)]
        for request in requests:
            request.hangs_up()
        for each in busy:
            await each.fails(ApiDisconnected)
        for each in connects:
            await each.fails(ApiUnreachable)
        assert not message.is_done


@in_loop
async def test_one_connect_may_find_out_whether_the_api_is_back() -> None:
    async with gateway() as gw:
        await opens(gw)
        gw.advance(2 * TICK_S)
        assert gw.slot[c.BREAKER_STATE] == HALF_OPEN
        probe, other = gw.connects("probe"), gw.connects("other")
        await other.fails(ApiUnreachable)
        request = await gw.api.next()
        assert request.name == "probe"
        request.answers(200, b"ok")
        await probe.is_answered(200, b"ok")
        assert gw.slot[c.BREAKER_STATE] == CLOSED


@in_loop
async def test_one_connect_may_find_out_by_a_new_connection() -> None:
    async with gateway(listens=False) as gw:
        for _ in range(FAILURES_TO_OPEN):
            await gw.connects().fails(ApiUnreachable)
        gw.advance(2 * TICK_S)
        probe, other = gw.connects("probe"), gw.connects("other")
        await other.fails(ApiUnreachable)
        assert not probe.is_done
        await probe.fails(ApiUnreachable)
        gw.advance(TICK_S)
        assert gw.slot[c.BREAKER_STATE] == OPEN


@in_loop
async def test_connects_get_in_line_once_the_api_has_answered() -> None:
    async with gateway() as gw:
        await opens(gw)
        sent = [gw.posts(f"{i}") for i in range(3)]
        gw.advance(2 * TICK_S)
        (await gw.api.next()).answers()
        under_way = [await gw.api.next() for _ in range(2)]
        connect = gw.connects()
        await gw.api.nothing_more_arrives()
        assert not connect.is_done
        for request in under_way:
            request.answers()
        (await gw.api.next()).answers(200, b"ok")
        for each in (*sent, connect):
            assert (await each.reply()).status == 200


@in_loop
async def test_disconnect_may_find_out_whether_the_api_is_back() -> None:
    async with gateway() as gw:
        await opens(gw)
        sent = gw.reports()
        gw.advance(2 * TICK_S)
        (await gw.api.next()).answers()
        await sent.is_answered()
        assert not gw.is_away


@pytest.mark.parametrize(("asked", "pause"), [("3", 3), ("100", 5)])
@in_loop
async def test_retry_after_is_respected(asked: str, pause: float) -> None:
    async with gateway() as gw:
        await opens(gw, f"Retry-After: {asked}")
        sent = gw.posts()
        gw.advance(pause - TICK_S)
        await gw.api.nothing_more_arrives()
        gw.advance(2 * TICK_S)
        (await gw.api.next()).answers()
        await sent.is_answered()


@in_loop
async def test_retry_after_that_is_a_date_is_not() -> None:
    async with gateway() as gw:
        await opens(gw, "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT")
        gw.posts()
        gw.advance(2 * TICK_S)
        (await gw.api.next()).answers()


@in_loop
async def test_says_when_it_opens_and_when_it_closes() -> None:
    with structlog.testing.capture_logs() as lines:
        async with gateway(listens=False, api_timeout=1_000) as gw:
            gw.posts()
            await gw.passes(30)
            assert len(lines) == 1
            assert lines[0]["event"] == "API unavailable"
            assert "Connection refused" in lines[0]["error"]
            assert gw.slot[c.BREAKER_OPENED] == 1
            gw.api.on_request = Arrived.answers
            await gw.api.open()
            await gw.passes(2 * LONGEST_PAUSE_S)
            assert [line["event"] for line in lines[1:]] == ["API available again"]
            assert 25 < lines[1]["away_s"] < 35


@in_loop
async def test_says_why_it_cannot_connect_though_only_now_and_then() -> None:
    with structlog.testing.capture_logs() as lines:
        async with gateway(listens=False) as gw:
            for _ in range(30):
                await gw.connects().fails(ApiUnreachable)
                await gw.api.open()
                await gw.exchanges("m", "Connection: close")
                await gw.comes_to_show(connections=0)
                await gw.api.close()
                gw.advance(1)
    assert [line["event"] for line in lines] == ["API unavailable", "API available again"] * 3


@in_loop
async def test_idle_connections_are_kept_for_later() -> None:
    async with gateway() as gw:
        numbers = await gw.warms_up(FAILURES_TO_OPEN)
        await opens(gw)
        assert gw.shows(idle=FAILURES_TO_OPEN)
        gw.posts()
        await gw.api.nothing_more_arrives()
        gw.advance(2 * TICK_S)
        request = await gw.api.next()
        assert request.number in numbers
        request.answers()
        while gw.is_away:
            await gw.settles()
        for _ in range(FAILURES_TO_OPEN):
            gw.posts()
            assert (await gw.api.next()).number in numbers
        assert gw.loop.dialled == FAILURES_TO_OPEN


@in_loop
async def test_no_more_than_allowed_are_kept_for_later() -> None:
    async with gateway(api_max_idle=2) as gw:
        await opens(gw)
        gw.advance(1)
        assert gw.shows(idle=2)


@in_loop
async def test_good_answers_in_between_keep_it_closed() -> None:
    async with gateway(api_timeout=1_000) as gw:
        for _ in range(5):
            for _ in range(FAILURES_TO_OPEN - 1):
                sent = gw.connects()
                (await gw.api.next()).answers(503)
                await sent.is_answered(503)
            await gw.exchanges()
        assert not gw.is_away


@pytest.mark.parametrize("status", [204, 404, 500, 502])
@in_loop
async def test_other_answers_are_no_failures(status: int) -> None:
    async with gateway() as gw:
        for _ in range(2 * FAILURES_TO_OPEN):
            sent = gw.posts()
            (await gw.api.next()).answers(status)
            await sent.is_answered(status)
        assert not gw.is_away


@in_loop
async def test_api_that_hangs_is_not_away() -> None:
    async with gateway() as gw:
        sent = [gw.posts(f"{i}") for i in range(2 * FAILURES_TO_OPEN)]
        for _ in sent:
            await gw.api.next()
        gw.advance(API_TIMEOUT_S + 3 * TICK_S)
        for each in sent:
            await each.fails(ApiTimeout)
        assert not gw.is_away


@in_loop
async def test_probe_that_hangs_does_not_hold_up_all_others() -> None:
    async with gateway() as gw:
        await opens(gw)
        hanging, sent = gw.posts("hanging"), gw.posts("other")
        gw.advance(2 * TICK_S)
        assert (await gw.api.next()).name == "hanging"
        await gw.api.nothing_more_arrives()
        gw.advance(LONGEST_PAUSE_S + TICK_S)
        (await gw.api.next()).answers()
        await sent.is_answered()
        assert not hanging.is_done


@in_loop
async def test_failures_of_times_gone_by_are_forgotten() -> None:
    async with gateway() as gw:
        old = [gw.posts(f"old{i}") for i in range(2 * FAILURES_TO_OPEN)]
        requests = [await gw.api.next() for _ in old]
        await opens(gw)
        gw.advance(2 * TICK_S)
        await gw.exchanges()
        assert not gw.is_away
        for request in requests:
            request.hangs_up()
        for each in old:
            await each.fails(ApiDisconnected)
        assert not gw.is_away


@in_loop
async def test_connections_that_were_closed_unnoticed_do_not_count_against_the_api() -> None:
    async with gateway() as gw:
        await gw.warms_up(3)
        await opens(gw)
        gw.posts()
        for connection in gw.api.connections:
            connection.ends_unnoticed()
        gw.clock.stall(2 * TICK_S)
        request = await gw.api.next()
        assert request.number >= FAILURES_TO_OPEN, "the others that were idle are not trusted"
        request.answers()
        while gw.is_away:
            await gw.settles()
        assert gw.slot[c.BREAKER_OPENED] == 1


@in_loop
async def test_api_that_hangs_up_on_every_connection_is_away() -> None:
    async with gateway(api_timeout=1_000) as gw:
        gw.api.hangs_up_at_once = True
        sent = [gw.posts(f"{i}", retry_safe=True) for i in range(2 * FAILURES_TO_OPEN)]
        await gw.passes(10)
        assert gw.is_away
        accepted = gw.api.accepted
        await gw.passes(20)
        assert gw.api.accepted - accepted <= 22
        gw.api.hangs_up_at_once = False
        gw.api.on_request = Arrived.answers
        await gw.passes(2 * LONGEST_PAUSE_S)
        for each in sent:
            await each.is_answered()


@in_loop
async def test_api_that_wants_no_more_connections_is_asked_for_one_per_tick() -> None:
    async with gateway() as gw:
        await gw.warms_up(2)
        for i in range(2):
            gw.posts(f"busy{i}")
        requests = [await gw.api.next() for _ in range(2)]
        gw.api.refuses()
        gw.posts("first")
        await gw.comes_to_show(connecting=0)
        dialled = gw.loop.dialled
        for i in range(100):
            gw.posts(f"{i}")
        await gw.comes_to_show(connecting=0)
        assert gw.loop.dialled == dialled
        for _ in range(FAILURES_TO_OPEN):
            gw.advance(TICK_S)
            await gw.comes_to_show(connecting=0)
            requests.pop(0).answers()
            requests.append(await gw.api.next())
        assert gw.loop.dialled == dialled + FAILURES_TO_OPEN
        assert not gw.is_away


# An API with several addresses, or one that moves.


@in_loop
async def test_address_that_is_silent_costs_no_request() -> None:
    async with gateway(host=NAME) as gw:
        gw.loop.addresses = (SILENT, ALIVE)
        with silence(gw.api.port):
            gw.api.on_request = Arrived.answers
            await gw.connects().is_answered()
        assert gw.loop.tried == [SILENT, ALIVE]


@in_loop
async def test_api_that_has_moved_is_followed_under_traffic() -> None:
    async with gateway(host=NAME, api_max_age=60) as gw, gw.api.elsewhere(REFUSING) as other:
        gw.api.on_request = other.on_request = Arrived.answers
        gw.loop.addresses = (ALIVE,)
        for _ in range(10):
            await gw.posts().is_answered()
            await gw.passes(1)
        gw.loop.addresses = (REFUSING,)
        for _ in range(60):
            await gw.posts().is_answered()
            await gw.passes(1)
        assert gw.api.accepted == other.accepted == 1


@in_loop
async def test_connection_that_is_never_idle_retires_as_well() -> None:
    async with gateway(api_max_connections=1, api_max_age=60) as gw:
        gw.posts("first")
        request = await gw.api.next()
        numbers = []
        for i in range(70):
            gw.posts(f"{i}")
            gw.advance(1)
            numbers.append(request.number)
            request.answers()
            request = await gw.api.next()
        request.answers()
        assert set(numbers) == {0, 1}


@in_loop
async def test_connection_is_kept_while_no_other_can_be_opened() -> None:
    async with gateway(api_max_age=60) as gw:
        gw.api.on_request = Arrived.answers
        await gw.posts().is_answered()
        gw.api.refuses()
        busy = [gw.posts(f"busy{i}") for i in range(2)]
        for each in busy:
            await each.is_answered()
        await gw.comes_to_show(connecting=0)
        for _ in range(70):
            await gw.passes(1)
            await gw.posts().is_answered()
        assert gw.api.accepted == 1
        await gw.api.open()
        for _ in range(3):
            await gw.passes(1)
            await gw.posts().is_answered()
        assert gw.api.accepted == 2


@in_loop
async def test_connections_may_be_of_any_age() -> None:
    async with gateway(api_max_age=0) as gw:
        gw.api.on_request = Arrived.answers
        for _ in range(70):
            await gw.posts().is_answered()
            await gw.passes(2)
        assert gw.api.accepted == 1


# What the admin process sees.


@in_loop
async def test_shows_from_the_first_failure_why_nothing_can_be_sent() -> None:
    async with gateway(listens=False) as gw:
        assert not gw.outage
        error = await gw.connects().error()
        assert gw.outage == "Connection refused"
        assert error.detail == "Connection refused"
        assert str(error) == "the API is unreachable", "no peer's business"
        gw.api.on_request = Arrived.answers
        await gw.api.open()
        await gw.connects().is_answered()
        assert not gw.outage


@in_loop
async def test_what_waited_for_the_api_fails_with_the_cause() -> None:
    async with gateway(listens=False) as gw:
        sent = gw.posts()
        await gw.passes(API_TIMEOUT_S + 4 * TICK_S)
        assert (await sent.error()).detail == "Connection refused"
        connect = gw.connects()
        assert (await connect.error()).detail == "Connection refused"


@in_loop
async def test_what_waited_while_the_api_answered_503_fails_with_that() -> None:
    async with gateway() as gw:
        await opens(gw, "Retry-After: 5")
        assert gw.outage == "status 503"
        assert (await gw.connects().error()).detail == "status 503"


@in_loop
async def test_sees_by_itself_that_the_api_is_back_when_nothing_asks_for_it() -> None:
    async with gateway(listens=False) as gw:
        await gw.connects().fails(ApiUnreachable)
        await gw.passes(60)
        assert gw.outage == "Connection refused"
        assert 20 <= gw.loop.dialled <= 35
        assert not gw.is_away, "nobody is refused for that"
        await gw.api.open()
        await gw.passes(3)
        assert not gw.outage


@in_loop
async def test_failures_of_long_ago_are_not_shown_when_nothing_is_asked_any_more() -> None:
    async with gateway() as gw:
        await opens(gw)
        await gw.passes(59)
        assert gw.outage == "status 503"
        await gw.passes(2)
        assert not gw.outage


# One client's failures.


def fails_for_ann(fault: Callable[[Arrived], None], request: Arrived) -> None:
    """Do to all of ann's what the test says, and answer everybody else."""
    if request.name == "ann":
        fault(request)
    else:
        request.answers()


@pytest.mark.parametrize("fault", [hangs_up, refuses])
@in_loop
async def test_one_client_s_failures_keep_nobody_else_waiting(
    fault: Callable[[Arrived], None],
) -> None:
    async with gateway(api_timeout=1_000) as gw:
        gw.api.on_request = partial(fails_for_ann, fault)
        anns = gw.posts("ann", retry_safe=True)
        await gw.passes(10)
        assert anns.exchange.attempts > FAILURES_TO_OPEN
        assert not gw.is_away
        for _ in range(2 * FAILURES_TO_OPEN):
            with contextlib.suppress(AssertionError):
                await gw.connects("ann").reply()
        for _ in range(2):
            await gw.connects("bob").is_answered()
            await gw.posts("bob").is_answered()
        assert gw.slot[c.BREAKER_OPENED] == 0
        assert not anns.is_done


@in_loop
async def test_message_waits_for_as_long_as_the_api_asks_for() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        (await gw.api.next()).answers(503, b"", "Retry-After: 3")
        await gw.comes_to_show(retries=1)
        gw.advance(3 - TICK_S)
        await gw.api.nothing_more_arrives()
        gw.advance(2 * TICK_S)
        (await gw.api.next()).answers()
        await sent.is_answered()


@in_loop
async def test_another_client_s_request_finds_out_whether_the_api_is_back() -> None:
    async with gateway() as gw:
        await opens(gw)
        suspects = [gw.posts(f"open{i}") for i in range(FAILURES_TO_OPEN)]
        other = gw.posts("other")
        gw.advance(2 * TICK_S)
        request = await gw.api.next()
        assert request.name == "other"
        request.answers()
        await other.is_answered()
        for _ in suspects:
            (await gw.api.next()).answers()
        for each in suspects:
            await each.is_answered()


@in_loop
async def test_suspect_s_request_goes_where_there_is_no_other_and_keeps_no_connect_out() -> None:
    async with gateway() as gw:
        await opens(gw)
        suspect = gw.posts("open0")
        gw.advance(2 * TICK_S)
        (await gw.api.next()).answers(503)
        await gw.comes_to_show(retries=1)
        connect = gw.connects("other")
        (await gw.api.next()).answers()
        await connect.is_answered()
        request = await gw.tries_again()
        assert request.name == "open0"
        request.answers()
        await suspect.is_answered()
        assert gw.slot[c.BREAKER_OPENED] == 1


@pytest.mark.parametrize("fault", [hangs_up, refuses])
@in_loop
async def test_disconnects_that_fail_keep_nobody_out(fault: Callable[[Arrived], None]) -> None:
    async with gateway() as gw:
        sent = [gw.reports(f"{i}") for i in range(2 * FAILURES_TO_OPEN)]
        for _ in sent:
            fault(await gw.api.next())
        await gw.comes_to_show(disconnects_retries=len(sent))
        assert not gw.is_away
        connect = gw.connects()
        (await gw.api.next()).answers()
        await connect.is_answered()


@in_loop
async def test_disconnects_that_are_taken_do_not_hide_that_messages_are_not() -> None:
    async with gateway() as gw:
        for i in range(FAILURES_TO_OPEN):
            gw.posts(f"{i}")
            (await gw.api.next()).answers(503)
            report = gw.reports(f"gone{i}")
            (await gw.api.next()).answers()
            await report.is_answered()
        assert gw.is_away


@in_loop
async def test_disconnect_finds_out_whether_the_api_is_back_where_nothing_else_waits() -> None:
    async with gateway() as gw:
        await opens(gw)
        sent = [gw.reports(f"{i}") for i in range(3)]
        gw.advance(2 * TICK_S)
        (await gw.api.next()).answers(503)
        await gw.settles()
        await gw.api.nothing_more_arrives()
        connect = gw.connects()
        (await gw.api.next()).answers(503)
        await connect.is_answered(503)
        gw.api.on_request = Arrived.answers
        await gw.passes(2 * LONGEST_PAUSE_S)
        for each in sent:
            await each.is_answered()
        assert not gw.is_away


# What may have been acted on.


@pytest.mark.parametrize(
    "fault", ["hang up", "reset", "half an answer", "no HTTP", "too large", "hang up on reuse"]
)
@pytest.mark.parametrize("retry_safe", [False, True])
@in_loop
async def test_message_that_may_have_been_seen_goes_again_only_if_that_is_safe(
    fault: str, retry_safe: bool
) -> None:
    async with gateway() as gw:
        if fault == "hang up on reuse":
            await gw.warms_up(1)
        sent = gw.posts("a", retry_safe=retry_safe)
        request = await gw.api.next()
        if fault == "reset":
            request.resets()
        elif fault == "no HTTP":
            request.sends(b"SSH-2.0-OpenSSH\r\n")
        elif fault == "too large":
            request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"x" * 9_999)
        else:
            if fault != "hang up":
                request.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
            request.hangs_up()
        if retry_safe:
            await gw.comes_to_show(retries=1)
            assert gw.slot[c.REQUESTS_RETRIED] == 1
            request = await gw.tries_again()
            assert request.name == "a"
            request.answers()
            await sent.is_answered()
        else:
            assert issubclass(await sent.failure(), ApiError)
            gw.advance(API_TIMEOUT_S)
            await gw.api.nothing_more_arrives()


@in_loop
async def test_safe_message_is_sent_again_until_its_time_is_up() -> None:
    async with gateway() as gw:
        gw.api.on_request = hangs_up
        sent = gw.posts(retry_safe=True)
        await gw.passes(0.5 * API_TIMEOUT_S)
        assert not sent.is_done
        await gw.passes(0.5 * API_TIMEOUT_S + 4 * TICK_S)
        assert sent.is_done
        assert sent.exchange.attempts >= 4


@in_loop
async def test_safe_message_is_not_sent_again_after_a_timeout() -> None:
    async with gateway() as gw:
        sent = gw.posts(retry_safe=True)
        await gw.api.next()
        gw.advance(API_TIMEOUT_S + 3 * TICK_S)
        await sent.fails(ApiTimeout)
        await gw.passes(API_TIMEOUT_S)
        await gw.api.nothing_more_arrives()


@in_loop
async def test_connect_is_not_sent_again_though_messages_might_be() -> None:
    async with gateway() as gw:
        sent = gw.connects(retry_safe=True)
        (await gw.api.next()).hangs_up()
        await sent.fails(ApiDisconnected)


@in_loop
async def test_message_whose_connections_were_all_closed_goes_again_later() -> None:
    async with gateway() as gw:
        await gw.warms_up(6)
        for connection in gw.api.connections:
            connection.ends_unnoticed()
        sent = gw.posts("a")
        assert not sent.is_done
        request = await gw.tries_again()
        assert request.name == "a"
        request.answers()
        await sent.is_answered()


# Clients that have left.


@in_loop
async def test_connect_of_a_client_that_has_left_is_skipped() -> None:
    async with gateway(api_max_connections=1) as gw:
        gw.posts("busy")
        request = await gw.api.next()
        left, other = gw.connects("left"), gw.connects("other")
        left.left = True
        request.answers()
        assert (await gw.api.next()).name == "other"
        await left.fails(ApiUnreachable)
        assert not other.is_done


@in_loop
async def test_connect_that_was_sent_is_not_skipped() -> None:
    async with gateway(api_max_connections=1) as gw:
        await gw.warms_up(1)
        gw.api.connections[0].ends_unnoticed()
        sent = gw.connects("a")
        sent.left = True
        (await gw.api.next()).answers(200, b"ok")
        await sent.is_answered(200, b"ok")


# A process that stood still.


@in_loop
async def test_answers_that_lay_unread_while_the_process_stood_still_count() -> None:
    async with gateway() as gw:
        sent = gw.posts()
        request = await gw.api.next()
        request.answers(200, b"in time")
        gw.clock.stall(API_TIMEOUT_S + 5)
        await sent.is_answered(200, b"in time")


@in_loop
async def test_what_is_late_all_the_same_fails_at_the_next_tick() -> None:
    async with gateway(api_max_connections=1) as gw:
        sent = [gw.posts("under-way"), gw.posts("in-line")]
        await gw.api.next()
        gw.clock.stall(API_TIMEOUT_S + 5)
        assert not any(each.is_done for each in sent)
        gw.advance(TICK_S)
        for each in sent:
            await each.fails(ApiTimeout)
