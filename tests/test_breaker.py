"""Lead a breaker through its states; the clock is a number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ws2api.gateway.breaker import (
    CLOSED,
    FAILURES_TO_OPEN,
    HALF_OPEN,
    MAX_PAUSE_S,
    MAX_RETRY_AFTER_S,
    MIN_PAUSE_S,
    MOST_SUSPECTS,
    OPEN,
    Breaker,
)

LIMIT = 100
TICK_S = 0.1


class Api:
    """Hold a breaker and its clock."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.breaker = Breaker(limit)
        self.now = 1000.0
        self._clients = 0

    def passes(self, seconds: float) -> None:
        self.now += seconds

    @property
    def room(self) -> int:
        return self.breaker.room(self.now)

    def sends(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.room > 0
            self.breaker.admit()

    def answers(self, count: int = 1, *, sent_at: float | None = None, waits: bool = True) -> None:
        for _ in range(count):
            sent = self.now if sent_at is None else sent_at
            self.breaker.on_success(self.now, sent, something_waits=waits)

    def fails(
        self,
        count: int = 1,
        *,
        sent_at: float | None = None,
        retry_after_s: float = 0.0,
        client: bytes = b"",
    ) -> None:
        """Fail for one client, or for another one each time."""
        for _ in range(count):
            self._clients += 1
            who = client or b"client-%d" % self._clients
            sent = self.now if sent_at is None else sent_at
            self.breaker.on_failure(self.now, sent, who, retry_after_s)

    def refuses_connections(self, count: int = 1) -> None:
        for _ in range(count):
            self.breaker.on_failure(self.now, self.now, None)

    def pause(self) -> float:
        """Let the pause pass; return its length."""
        assert self.breaker.state == OPEN
        begin = self.now
        while not self.room:
            self.passes(0.01)
        return self.now - begin

    def is_half_open(self) -> Api:
        self.fails(FAILURES_TO_OPEN)
        self.pause()
        assert self.breaker.state == HALF_OPEN
        return self


def test_begins_closed() -> None:
    api = Api()
    assert (api.breaker.state, api.room) == (CLOSED, LIMIT)
    assert api.breaker.is_calm and api.breaker.is_proven
    assert repr(api.breaker) == "<Breaker closed failures=0 window=0>"


def test_opens_at_the_fifth_failure_in_a_row() -> None:
    api = Api()
    for _ in range(4):
        api.fails()
        assert api.breaker.state == CLOSED
        assert not api.breaker.is_calm
    api.fails()
    assert (api.breaker.state, api.room) == (OPEN, 0)
    assert not api.breaker.is_calm and not api.breaker.is_proven


def test_success_in_between_begins_the_count_anew() -> None:
    api = Api()
    for _ in range(10):
        api.fails(FAILURES_TO_OPEN - 1)
        api.answers()
        assert api.breaker.is_calm
    assert api.breaker.state == CLOSED


def test_timeouts_are_no_failures() -> None:
    api = Api()
    for _ in range(100):
        api.breaker.on_nothing(api.now)
    assert api.breaker.is_calm


def test_closed_one_lets_all_go_however_many_are_under_way() -> None:
    api = Api()
    api.sends(3 * LIMIT)


def test_pauses_double_up_to_a_limit_with_jitter() -> None:
    api = Api()
    api.fails(FAILURES_TO_OPEN)
    for exponent in range(10):
        longest = min(MAX_PAUSE_S, MIN_PAUSE_S * 2**exponent)
        assert longest / 2 - 0.02 <= api.pause() <= longest + 0.02
        api.fails()
    pauses = []
    for _ in range(5):
        pauses.append(api.pause())
        api.fails()
    assert len(set(pauses)) > 1


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [(1, 1, 1), (4.5, 4.5, 4.5), (3600, MAX_RETRY_AFTER_S, MAX_RETRY_AFTER_S), (0.01, 0.05, 0.1)],
)
def test_pause_is_as_long_as_the_api_asks_for(asked: float, least: float, most: float) -> None:
    api = Api()
    api.fails(FAILURES_TO_OPEN, retry_after_s=asked)
    assert least - 0.02 <= api.pause() <= most + 0.02


def test_one_may_go_when_the_pause_is_over() -> None:
    api = Api().is_half_open()
    assert api.room == 1
    api.sends()
    assert api.room == 0
    assert not api.breaker.is_proven


def test_failure_of_the_probe_opens_it_again_at_once() -> None:
    api = Api().is_half_open()
    api.sends()
    api.fails()
    assert (api.breaker.state, api.room) == (OPEN, 0)


def test_failure_that_belongs_to_no_request_opens_it_as_well() -> None:
    api = Api().is_half_open()
    api.refuses_connections()  # for the probe
    assert api.breaker.state == OPEN
    api.pause()
    api.sends()
    api.answers()
    api.refuses_connections()
    assert api.breaker.state == OPEN


def test_opens_at_the_fifth_refused_connection() -> None:
    api = Api()
    api.refuses_connections(FAILURES_TO_OPEN - 1)
    assert api.breaker.state == CLOSED
    api.refuses_connections()
    assert api.breaker.state == OPEN


def test_failures_of_one_client_count_once() -> None:
    api = Api()
    api.fails(100, client=b"ann")
    assert (api.breaker.state, api.room) == (CLOSED, LIMIT)
    assert list(api.breaker.suspects) == [b"ann"]
    api.fails(FAILURES_TO_OPEN - 2)
    assert api.breaker.state == CLOSED
    api.fails()
    assert api.breaker.state == OPEN


def test_nobody_is_suspected_any_more_when_somebody_has_been_answered() -> None:
    api = Api()
    api.fails(client=b"ann")
    api.answers()
    assert api.breaker.is_calm and not api.breaker.suspects
    api.is_half_open()
    api.sends()
    api.answers(waits=False)
    assert api.breaker.is_calm and not api.breaker.suspects


def test_suspect_that_is_the_probe_tells_nothing_new() -> None:
    api = Api()
    api.fails(client=b"ann")
    api.is_half_open()
    api.sends()
    api.fails(client=b"ann")
    assert (api.breaker.state, api.room) == (HALF_OPEN, 1), "for others"
    assert not api.breaker.is_proven


@pytest.mark.parametrize("is_suspect", [True, False])
def test_what_would_be_no_news_is_asked_less_and_less_often(is_suspect: bool) -> None:
    api = Api()
    api.fails(client=b"ann")
    api.is_half_open()
    pauses = []
    for _ in range(10):
        assert api.breaker.asks_suspects(api.now)
        api.sends()
        begin = api.now
        if is_suspect:
            api.fails(client=b"ann")
        else:
            api.breaker.on_old_news(api.now, api.now)
        while not api.breaker.asks_suspects(api.now):
            assert (api.breaker.state, api.room) == (HALF_OPEN, 1)
            api.passes(0.01)
        pauses.append(api.now - begin)
    assert pauses[0] <= 2 * MIN_PAUSE_S + 0.02
    assert all(MAX_PAUSE_S / 2 <= pause <= MAX_PAUSE_S + 0.02 for pause in pauses[6:])


def test_one_client_s_failures_do_not_end_what_has_begun_well() -> None:
    api = Api().is_half_open()
    api.sends()
    api.answers()
    api.sends(2)
    api.fails(2, client=b"ann")
    assert (api.breaker.state, api.room) == (HALF_OPEN, 2)
    api.fails(FAILURES_TO_OPEN - 1)
    assert api.breaker.state == OPEN


def test_remembers_a_bounded_number_of_suspects() -> None:
    api = Api()
    for _ in range(3 * MOST_SUSPECTS):
        api.fails()
        if api.breaker.state == OPEN:
            api.pause()
        api.sends()
    assert len(api.breaker.suspects) == MOST_SUSPECTS


def test_window_doubles_with_each_round_trip() -> None:
    api = Api().is_half_open()
    for window in (1, 2, 4, 8, 16, 32, 64):
        assert api.room == window
        api.sends(window)
        assert api.room == 0
        api.answers(window)
        assert api.breaker.is_proven
    assert (api.breaker.state, api.room) == (CLOSED, LIMIT)


def test_closes_when_nothing_waits() -> None:
    api = Api().is_half_open()
    api.sends()
    api.answers(waits=False)
    assert api.breaker.state == CLOSED
    assert api.breaker.is_calm


def test_limit_of_one_closes_with_the_first_success() -> None:
    api = Api(limit=1).is_half_open()
    api.sends()
    api.answers()
    assert api.breaker.state == CLOSED


def test_what_was_sent_before_counts_for_nothing() -> None:
    api = Api()
    before = api.now
    api.is_half_open()
    api.sends()
    for fate in (api.answers, api.fails):
        fate(3, sent_at=before)
        assert (api.breaker.state, api.room) == (HALF_OPEN, 0)
    api.breaker.on_nothing(before)
    assert api.room == 0
    api.answers(waits=False)
    api.fails(FAILURES_TO_OPEN, sent_at=before)
    assert api.breaker.is_calm


def test_nothing_that_comes_while_open_matters() -> None:
    api = Api()
    api.fails(FAILURES_TO_OPEN, retry_after_s=1)
    ends = api.now + 1
    api.passes(0.5)
    api.fails(retry_after_s=5)
    api.answers()
    assert api.breaker.state == OPEN
    assert api.now + api.pause() == pytest.approx(ends, abs=0.02)


def test_probe_that_ends_without_a_word_makes_room_for_another() -> None:
    api = Api().is_half_open()
    api.sends()
    api.breaker.on_nothing(api.now)
    assert api.room == 1


def test_probe_that_is_not_answered_gets_company_now_and_then() -> None:
    api = Api().is_half_open()
    api.sends()
    sent = 1
    for _ in range(300):
        api.passes(TICK_S)
        while api.room:
            api.sends()
            sent += 1
    assert 10 <= sent <= 16  # 30 s
    assert not api.breaker.is_proven


def test_relapse_is_not_taken_for_a_first_failure() -> None:
    api = Api().is_half_open()
    for _ in range(6):
        api.fails()
        api.pause()
    api.sends()
    api.answers(waits=False)
    api.fails(FAILURES_TO_OPEN)
    assert api.pause() >= MAX_PAUSE_S / 2
    api.sends()
    api.answers(waits=False)
    api.passes(10)
    api.fails(FAILURES_TO_OPEN)
    assert api.pause() <= MIN_PAUSE_S + 0.02


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=60))
def test_one_client_s_failures_never_keep_others_out(steps: list[tuple[bool, float]]) -> None:
    api = Api()
    for is_answered, later_s in steps:
        assert api.breaker.state == CLOSED
        sent_at = api.now
        api.passes(later_s)
        if is_answered:
            api.answers(sent_at=sent_at)
        else:
            api.fails(sent_at=sent_at, client=b"ann", retry_after_s=5)
    assert api.room == LIMIT


Step = Callable[[Api, list[float]], None]


def _send(api: Api, under_way: list[float]) -> None:
    if api.room:
        api.breaker.admit()
        under_way.append(api.now)


def _answer(api: Api, under_way: list[float]) -> None:
    if under_way:
        api.answers(sent_at=under_way.pop(0))


def _fail(api: Api, under_way: list[float]) -> None:
    if under_way:
        api.fails(sent_at=under_way.pop(0))


def _fail_again(api: Api, under_way: list[float]) -> None:
    if under_way:
        api.fails(sent_at=under_way.pop(0), client=b"ann")


def _refuse(api: Api, under_way: list[float]) -> None:
    api.refuses_connections()


def _forget(api: Api, under_way: list[float]) -> None:
    if under_way:
        api.breaker.on_nothing(under_way.pop())


def _tick(api: Api, under_way: list[float]) -> None:
    api.passes(TICK_S)


def _wait(api: Api, under_way: list[float]) -> None:
    api.passes(5)


STEPS = [_send, _send, _answer, _fail, _fail, _fail_again, _refuse, _forget, _tick, _wait]


@given(st.lists(st.sampled_from(STEPS)))
def test_lets_somebody_go_in_the_end_whatever_has_happened(steps: list[Step]) -> None:
    api = Api(limit=4)
    under_way: list[float] = []
    for step in steps:
        step(api, under_way)
        assert 0 <= api.room <= 4 or api.breaker.state == HALF_OPEN
        assert len(api.breaker.suspects) <= MOST_SUSPECTS
        if api.breaker.state == OPEN:
            assert api.room == 0
        if api.breaker.state == HALF_OPEN and not api.breaker.is_proven:
            assert api.room <= 1
    api.passes(MAX_RETRY_AFTER_S + MAX_PAUSE_S)
    assert api.room >= 1
    while under_way:
        _forget(api, under_way)
    api.passes(TICK_S)
    for _ in range(8):
        if api.breaker.state != CLOSED:
            _send(api, under_way)
            _answer(api, under_way)
    assert api.breaker.state == CLOSED
