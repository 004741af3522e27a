"""Report ends of connections to an API that does not take them all, beside a Redis that may."""

from __future__ import annotations

import pytest
import structlog
from harness.looping import in_loop
from harness.upstream import (
    API_TIMEOUT_S,
    TICK_S,
    Gateway,
    Redis,
    gateway,
)
from ws2api.gateway import counters as c
from ws2api.gateway import departures
from ws2api.gateway.errors import ApiAbandoned, ApiUnreachable

# In which two more attempts follow the first.
ATTEMPTS_S = 1.5


async def fails_three_times(gw: Gateway, status: int = 500) -> None:
    """Have the API refuse one disconnect as often as it is asked before it is parked."""
    request = await gw.api.next()
    for _ in range(2):
        request.answers(status)
        await gw.comes_to_show(disconnects_retries=1)
        request = await gw.tries_again()
    request.answers(status)


# Attempts.


@pytest.mark.parametrize("fault", [301, 404, 500, 503, b"nonsense\r\n\r\n", "hang up", "silence"])
@in_loop
async def test_disconnect_is_sent_again_until_the_api_has_heard(fault: int | bytes | str) -> None:
    async with gateway() as gw:
        sent = gw.reports("gone")
        request = await gw.api.next()
        for _ in range(10):
            if isinstance(fault, int):
                request.answers(fault)
            elif isinstance(fault, bytes):
                request.sends(fault)
            elif fault == "hang up":
                request.hangs_up()
            else:
                gw.advance(API_TIMEOUT_S + 3 * TICK_S)
            await gw.comes_to_show(disconnects_sent=0)
            assert not sent.is_done
            request = await gw.tries_again()
        assert (request.method, request.name) == ("DELETE", "gone")
        request.answers(204)
        await sent.is_answered(204)
        assert gw.slot[c.REQUESTS_RETRIED] == 10
        gw.advance(TICK_S)
        assert gw.slot[c.DISCONNECTS_WAITING] == 0


@in_loop
async def test_disconnect_waits_however_long_the_api_is_away() -> None:
    async with gateway(listens=False) as gw:
        sent = gw.reports()
        await gw.passes(10 * API_TIMEOUT_S)
        assert gw.slot[c.DISCONNECTS_WAITING] == 1
        assert gw.slot[c.REQUESTS_RETRIED] == 0, "it was never sent"
        await gw.api.open()
        (await gw.tries_again()).answers()
        await sent.is_answered()


@in_loop
async def test_disconnect_uses_an_idle_connection_at_once() -> None:
    async with gateway() as gw:
        (number,) = await gw.warms_up(1)
        gw.reports()
        assert (await gw.api.next()).number == number


# Priority and pace.


@pytest.mark.parametrize(("connections", "most"), [(1, 1), (7, 1), (8, 2), (100, 25), (1000, 32)])
@in_loop
async def test_only_so_many_are_under_way_at_once(connections: int, most: int) -> None:
    async with gateway(api_max_connections=connections) as gw:
        sent = [gw.reports(f"{i}") for i in range(100)]
        under_way = [await gw.api.next() for _ in range(most)]
        await gw.api.nothing_more_arrives()
        assert gw.shows(disconnects_sent=most, disconnects_queued=100 - most)
        gw.advance(TICK_S)
        assert gw.slot[c.DISCONNECTS_WAITING] == 100
        for i in range(100):
            request = under_way.pop(0)
            request.answers()
            if i + most < 100:
                under_way.append(await gw.api.next())
        for each in sent:
            await each.is_answered()
        assert len(gw.api.connections) == most


@in_loop
async def test_limit_holds_beside_idle_connections() -> None:
    async with gateway(api_max_connections=8) as gw:
        await gw.warms_up(6)
        for i in range(10):
            gw.reports(f"{i}")
        for _ in range(2):
            await gw.api.next()
        await gw.api.nothing_more_arrives()
        assert gw.shows(idle=4, disconnects_sent=2)
        gw.posts("message")
        assert (await gw.api.next()).name == "message"


@in_loop
async def test_connects_and_messages_go_first() -> None:
    async with gateway(api_max_connections=1) as gw:
        gw.reports("d1")
        gw.reports("d2")
        gw.posts("m1")
        gw.connects("c")
        gw.posts("m2")
        order = []
        for _ in range(5):
            request = await gw.api.next()
            order.append(request.name)
            request.answers()
        assert order == ["m1", "c", "m2", "d1", "d2"]


@in_loop
async def test_messages_without_end_do_not_hold_disconnects_up_for_ever() -> None:
    async with gateway(api_max_connections=1, api_timeout=1000) as gw:
        gw.posts("0")
        sent = [gw.reports("d1"), gw.reports("d2")]
        order = []
        for i in range(1, 40):
            gw.posts(f"{i}")
            request = await gw.api.next()
            order.append(request.method)
            gw.advance(TICK_S)
            request.answers()
        assert all(each.is_done for each in sent)
        assert order[:10] == ["POST"] * 10, "but they do wait"


@in_loop
async def test_mass_disconnect_does_not_delay_messages() -> None:
    async with gateway(api_max_connections=40) as gw:
        gw.api.on_request = lambda request: request.answers() if request.method == "POST" else None
        for i in range(5_000):
            gw.reports(f"{i}")
        await gw.comes_to_show(disconnects_sent=10)
        for i in range(20):
            await gw.posts(f"m{i}").is_answered()
        assert gw.shows(disconnects_sent=10)


# Parking.


@pytest.mark.parametrize("status", [404, 500, 503])
@in_loop
async def test_disconnect_that_the_api_refuses_is_parked_after_two_more_attempts(
    status: int,
) -> None:
    redis = Redis()
    async with gateway(redis=redis) as gw:
        sent = gw.reports("gone")
        begin = gw.clock.now
        await fails_three_times(gw, status)
        await sent.is_parked()
        assert redis.parked == ["gone"]
        assert gw.clock.now - begin <= ATTEMPTS_S
        assert gw.slot[c.DISCONNECTS_PARKED] == gw.slot[c.REQUESTS_FAILED] == 1
        gw.advance(10 * API_TIMEOUT_S)
        assert redis.asked == 1
        await gw.api.nothing_more_arrives()


@in_loop
async def test_disconnect_that_redis_does_not_take_is_tried_on() -> None:
    redis = Redis()
    redis.is_up = False
    async with gateway(redis=redis) as gw:
        sent = gw.reports()
        await fails_three_times(gw)
        for attempt in range(1, 5):
            await gw.comes_to_show(disconnects_retries=1)
            assert redis.asked == attempt
            (await gw.tries_again()).answers(500)
        await gw.comes_to_show(disconnects_retries=1)
        redis.is_up = True
        (await gw.tries_again()).answers(500)
        await sent.is_parked()


@in_loop
async def test_pauses_between_attempts_grow_to_half_a_minute() -> None:
    async with gateway() as gw:
        gw.reports()
        request = await gw.api.next()
        waited = []
        for _ in range(12):
            request.answers(500)
            await gw.comes_to_show(disconnects_retries=1)
            before = gw.clock.now
            request = await gw.tries_again()
            waited.append(gw.clock.now - before)
        assert max(waited[0], waited[1]) <= 1
        assert all(15 - TICK_S <= pause <= 30 + 2 * TICK_S for pause in waited[-4:])


@in_loop
async def test_parks_at_once_while_the_api_is_away_some_at_each_tick() -> None:
    redis = Redis()
    async with gateway(listens=False, redis=redis) as gw:
        sent = [gw.reports(f"{i}") for i in range(2_500)]
        await gw.comes_to_show(connecting=0)
        while not gw.is_away:
            await gw.passes(TICK_S)
        assert not redis.parked
        for parked in (1_000, 2_000, 2_500, 2_500):
            gw.advance(TICK_S)
            assert len(redis.parked) == parked
            assert gw.slot[c.DISCONNECTS_WAITING] == 2_500 - parked
        assert redis.parked == [each.name for each in sent], "oldest first"
        late = gw.reports("late")
        assert not late.is_done
        gw.advance(TICK_S)
        await late.is_parked()


@in_loop
async def test_redis_that_is_away_is_asked_once_a_tick() -> None:
    redis = Redis()
    redis.is_up = False
    async with gateway(listens=False, redis=redis) as gw:
        sent = [gw.reports(f"{i}") for i in range(100)]
        await gw.comes_to_show(connecting=0)
        while not gw.is_away:
            await gw.passes(TICK_S)
        asked = redis.asked
        await gw.passes(1)
        assert redis.asked == asked + 10
        assert not any(each.is_done for each in sent)
        redis.is_up = True
        gw.advance(TICK_S)
        assert redis.parked == [each.name for each in sent]


@in_loop
async def test_what_waits_for_another_attempt_is_parked_too_when_the_api_goes_away() -> None:
    redis = Redis()
    async with gateway(redis=redis) as gw:
        sent = gw.reports()
        (await gw.api.next()).answers(500)
        await gw.comes_to_show(disconnects_retries=1)
        await gw.loses_the_api()
        gw.advance(TICK_S)
        await sent.is_parked()


@pytest.mark.parametrize("takes", [True, False])
@in_loop
async def test_close_parks_what_the_api_has_not_confirmed(takes: bool) -> None:
    redis = Redis()
    redis.is_up = takes
    async with gateway(api_max_connections=1, redis=redis) as gw:
        sent = [gw.reports("under-way"), gw.reports("in-line")]
        await gw.api.next()
        await gw.upstream.close()
        sent.append(gw.reports("late"))
        for each in sent:
            if takes:
                await each.is_parked()
            else:
                await each.fails(ApiAbandoned)


# Bounds.


@in_loop
async def test_crowd_is_parked_down_to_what_the_api_can_be_told_of_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(departures, "_CROWD", 100)
    redis = Redis()
    async with gateway(api_max_connections=4, redis=redis) as gw:
        sent = [gw.reports(f"{i}") for i in range(150)]
        await gw.api.next()
        gw.advance(TICK_S)
        assert redis.parked == [each.name for each in sent[1:51]]
        gw.advance(TICK_S)
        assert len(redis.parked) == 50


@in_loop
async def test_oldest_are_given_up_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "MOST_KEPT", 100)
    redis = Redis()
    redis.is_up = False
    with structlog.testing.capture_logs() as lines:
        async with gateway(listens=False, redis=redis) as gw:
            sent = [gw.reports(f"{i}") for i in range(150)]
            gw.advance(TICK_S)
            for each in sent[:50]:
                await each.fails(ApiUnreachable)
            assert not any(each.is_done for each in sent[50:])
            assert gw.slot[c.DISCONNECTS_LOST] == 50
            for i in range(10):
                gw.reports(f"more{i}")
                gw.advance(TICK_S)
            assert gw.slot[c.DISCONNECTS_LOST] == 60
            gw.advance(10)
            assert gw.slot[c.DISCONNECTS_WAITING] == 100
    lost = [line["lost"] for line in lines if "lost" in line]
    assert lost == [50, 10], "a line now and then"
