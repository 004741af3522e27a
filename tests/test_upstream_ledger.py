"""Let faults of every kind meet requests of every kind: each has one outcome, and goes in order."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from harness.looping import in_loop
from harness.upstream import TICK_S, Arrived, Gateway, Redis, Sent, gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway import counters as c
from ws2api.gateway.exchange import CONNECT, DISCONNECT, MESSAGE

API_TIMEOUT_S = 3.0
# In which an API that is well again gets everything: the longest pause of a disconnect that Redis
# did not take, and some.
RECOVERY_S = 35.0
PER_CLIENT = 5

ANSWERED = {
    "200": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "503": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    "503 later": b"HTTP/1.1 503 No\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
    "last one": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    "more": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nand more",
    "until the end": b"HTTP/1.0 200 OK\r\n\r\nok",
}
BROKEN = {
    "half": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
    "no HTTP": b"220 smtp.example ESMTP\r\n",
    "nothing": b"",
}
HANGS_UP_AFTER = {"until the end", "half", "nothing"}
# After these the API has done what it was asked, or says that it will not.
FINAL = {"200", "204", "404", "last one", "more", "until the end"}
TAKES_DISCONNECT = FINAL - {"404"}
# After these even a message may come again that is not safe to repeat.
NOT_SEEN = {"503", "503 later"}
FATES = (*ANSWERED, *BROKEN, "reset", "hang")


class Seen(NamedTuple):
    """Note a request that has arrived, and what was made of it."""

    name: str
    fate: str


class Ledger:
    """Be an API that deals out fates, and the clients that send to it.

    A client sends a message when the last one has had its outcome, as a session does.
    """

    def __init__(self, gw: Gateway, fates: list[str]) -> None:
        self._gw = gw
        self.fates = list(fates)
        """What the next requests are in for; then all goes well."""
        self.seen: list[Seen] = []
        # Requests that get no answer, and where they are noted.
        self._hanging: dict[Arrived, int] = {}
        self._clients = 0
        gw.api.on_request = self._take

    def _take(self, request: Arrived) -> None:
        fate = self.fates.pop(0) if self.fates else "200"
        self.seen.append(Seen(request.name, fate))
        if fate == "hang":
            self._hanging[request] = len(self.seen) - 1
        elif fate == "reset":
            request.resets()
        else:
            request.sends((ANSWERED | BROKEN)[fate])
            if fate in HANGS_UP_AFTER:
                request.hangs_up()

    def client_begins(self, retry_safe: bool) -> None:
        self._clients += 1
        self._post(f"client{self._clients}", 1, retry_safe)

    def _post(self, client: str, number: int, retry_safe: bool) -> None:
        sent = self._gw.submits(MESSAGE, f"{client}.{number}", retry_safe=retry_safe)
        if number < PER_CLIENT:
            sent.then = lambda: self._post(client, number + 1, retry_safe)

    async def settles(self) -> None:
        """Wait until nothing is under way but what hangs."""
        gw = self._gw
        await gw.turns()
        while gw.busy > len(self._hanging) or not gw.shows(connecting=0):
            await gw.turns()
        for request in [request for request in self._hanging if request.is_lost]:
            del self._hanging[request]

    def api_has_ended(self) -> None:
        """Note that what was hanging was cut off."""
        for index in self._hanging.values():
            self.seen[index] = self.seen[index]._replace(fate="reset")

    async def passes(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self._gw.advance(TICK_S)
            await self.settles()


async def do(step: tuple[str, object], gw: Gateway, ledger: Ledger, redis: Redis) -> None:
    """Take one step of a random story."""
    what, detail = step
    number = len(gw.sent)
    if what == "client":
        ledger.client_begins(bool(detail))
    elif what == "connect":
        gw.connects(f"connect{number}", left=bool(detail))
    elif what == "disconnects":
        assert isinstance(detail, int)
        for i in range(detail):
            gw.reports(f"disconnect{number + i}")
    elif what == "passes":
        assert isinstance(detail, float)
        await ledger.passes(detail)
    elif what == "stands still":
        gw.clock.stall(API_TIMEOUT_S + 2)
    elif what == "redis":
        redis.is_up = bool(detail)
    elif what == "api":
        if detail and not gw.api.is_open:
            await gw.api.open()
        elif not detail and gw.api.is_open:
            await gw.api.close()
            ledger.api_has_ended()
    await ledger.settles()


steps = st.one_of(
    st.tuples(st.just("client"), st.booleans()),
    st.tuples(st.just("client"), st.booleans()),
    st.tuples(st.just("connect"), st.booleans()),
    st.tuples(st.just("disconnects"), st.integers(1, 6)),
    st.tuples(st.just("passes"), st.sampled_from([0.1, 0.5, 2.0])),
    st.tuples(st.just("stands still"), st.none()),
    st.tuples(st.just("redis"), st.booleans()),
    st.tuples(st.just("api"), st.booleans()),
)
stories = st.lists(steps, min_size=8, max_size=25)
fates = st.lists(st.sampled_from(FATES), min_size=10, max_size=60)


def check_arrivals(seen: list[Seen], sent: list[Sent]) -> None:
    """Check that nothing came again that must not, and that each client's order was kept."""
    owners = {each.name: each for each in sent}
    fates: dict[str, list[str]] = defaultdict(list)
    last: dict[str, int] = defaultdict(int)
    for name, fate in seen:
        event = owners[name].exchange.event
        final = TAKES_DISCONNECT if event == DISCONNECT else FINAL
        assert not final.intersection(fates[name]), f"{name} came again after {fates[name]}"
        if event == MESSAGE:
            if not owners[name].retry_safe:
                assert NOT_SEEN.issuperset(fates[name]), f"{name} came again after {fates[name]}"
            client, _, number = name.partition(".")
            assert int(number) >= last[client], f"{name} came after {client}.{last[client]}"
            last[client] = int(number)
        fates[name].append(fate)


def check_outcomes(sent: list[Sent], redis: Redis) -> None:
    """Check that each request ended as one of its kind may."""
    for each in sent:
        assert each.is_done, each.name
        if each.exchange.event == DISCONNECT:
            assert each.outcome in {"200", "204", "Parked"}, each.name
        else:
            assert each.outcome != "Parked", each.name
    parked = [each.name for each in sent if each.outcome == "Parked"]
    assert sorted(redis.parked) == sorted(parked), "told exactly once"


def check_books(gw: Gateway) -> None:
    """Check that the counters say what has happened."""
    outcomes = Counter(each.outcome for each in gw.sent)
    ok = sum(
        each.outcome == "200" or (each.outcome == "204" and each.exchange.event != CONNECT)
        for each in gw.sent
    )
    assert gw.slot[c.REQUESTS_SUCCEEDED] == ok
    assert gw.slot[c.REQUESTS_FAILED] == len(gw.sent) - ok
    assert gw.slot[c.DISCONNECTS_PARKED] == outcomes["Parked"]
    assert gw.slot[c.DISCONNECTS_WAITING] == gw.slot[c.DISCONNECTS_LOST] == 0


@settings(max_examples=100, deadline=None)
@given(stories, fates, st.sampled_from([1, 2, 9]), st.sampled_from([0, 1, 5]))
@in_loop
async def test_every_request_has_one_outcome_whatever_happens(
    story: list[tuple[str, object]], fates: list[str], connections: int, idle: int
) -> None:
    redis = Redis()
    async with gateway(
        redis=redis,
        api_max_connections=connections,
        api_max_idle=idle,
        api_timeout=API_TIMEOUT_S,
        api_max_age=2,
    ) as gw:
        ledger = Ledger(gw, fates)
        for step in story:
            await do(step, gw, ledger, redis)
        # All is well again.
        ledger.fates.clear()
        await do(("api", True), gw, ledger, redis)
        await ledger.passes(RECOVERY_S)
        check_arrivals(ledger.seen, gw.sent)
        check_outcomes(gw.sent, redis)
        check_books(gw)
        assert gw.busy == 0
        await gw.posts("after-all").is_answered(200, b"ok")
        assert not gw.is_away


@settings(max_examples=50, deadline=None)
@given(stories, fates)
@in_loop
async def test_every_request_has_one_outcome_when_the_end_comes_at_any_time(
    story: list[tuple[str, object]], fates: list[str]
) -> None:
    redis = Redis()
    async with gateway(redis=redis, api_max_connections=4, api_timeout=API_TIMEOUT_S) as gw:
        ledger = Ledger(gw, fates)
        for step in story:
            await do(step, gw, ledger, redis)
        await gw.upstream.close()
        while not all(each.is_done for each in gw.sent):  # clients that are not done yet
            await gw.turns()
        parked = [each.name for each in gw.sent if each.outcome == "Parked"]
        assert sorted(redis.parked) == sorted(parked)
        if redis.is_up:
            for each in gw.sent:
                assert each.exchange.event != DISCONNECT or each.outcome != "ApiAbandoned"
