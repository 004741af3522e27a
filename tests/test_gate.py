"""Send clients through the gate, with a clock that goes only when it is told to."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from ws2api.gateway import counters as c
from ws2api.gateway.counters import Counters
from ws2api.gateway.gate import Gate, retry_after

PATIENCE_S = 10.0


class Clock:
    """Tell the time, which goes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0


class Gateway:
    """Hold a gate, and note whom it lets through."""

    def __init__(self, limit: int, patience_s: float = PATIENCE_S) -> None:
        self.clock = Clock()
        self.slot = Counters(1).bank(0, 0)
        self.gate = Gate(limit, patience_s, self.slot, self.clock)
        self.admitted: list[Entrant] = []

    @property
    def names(self) -> str:
        """Who was let through so far, one letter each."""
        return "".join(entrant.name for entrant in self.admitted)

    @property
    def waiting(self) -> int:
        return self.slot[c.CONNECTS_WAITING]

    @property
    def overflowed(self) -> int:
        return self.slot[c.CONNECTS_OVERFLOWED]

    def enters(self, name: str) -> Entrant:
        """Let one in who need not go."""
        entrant = Entrant(self, name)
        assert self.gate.enter(entrant) == 0.0
        return entrant

    def let_in(self, names: str) -> list[Entrant]:
        return [self.enters(name) for name in names]

    def is_turned_away(self, name: str) -> float:
        """Return after how many seconds one may come again who has to go."""
        wait_s = self.gate.enter(Entrant(self, name))
        assert wait_s > 0
        return wait_s


class Entrant:
    """Be a client whose request is read."""

    def __init__(self, gateway: Gateway, name: str = "") -> None:
        self._gateway = gateway
        self.name = name

    def on_admitted(self) -> None:
        self._gateway.admitted.append(self)

    def leaves(self) -> None:
        self._gateway.gate.leave(self)


def test_lets_through_at_once_while_there_is_room() -> None:
    gateway = Gateway(limit=2)
    gateway.let_in("ab")
    assert gateway.names == "ab"
    assert gateway.waiting == 0


def test_next_is_let_through_when_one_leaves() -> None:
    gateway = Gateway(limit=2)
    a, b, _, _ = gateway.let_in("abcd")
    assert gateway.names == "ab"
    assert gateway.waiting == 2
    b.leaves()
    assert gateway.names == "abc"
    a.leaves()
    assert gateway.names == "abcd"
    assert gateway.waiting == 0


def test_who_comes_later_is_let_through_later() -> None:
    gateway = Gateway(limit=1)
    a, b, c_, *_ = gateway.let_in("abcd")
    a.leaves()
    b.leaves()
    gateway.enters("e")
    c_.leaves()
    assert gateway.names == "abcd"


def test_who_leaves_the_line_is_not_let_through() -> None:
    gateway = Gateway(limit=1)
    a, b, _ = gateway.let_in("abc")
    b.leaves()
    assert gateway.waiting == 1
    a.leaves()
    assert gateway.names == "ac"


def test_leaving_twice_makes_room_once() -> None:
    gateway = Gateway(limit=1)
    a, *_ = gateway.let_in("abc")
    a.leaves()
    a.leaves()
    assert gateway.names == "ab"


def test_stranger_makes_no_room() -> None:
    gateway = Gateway(limit=1)
    gateway.let_in("ab")
    Entrant(gateway, "x").leaves()
    assert gateway.names == "a"
    assert gateway.waiting == 1


def test_who_was_turned_away_is_a_stranger() -> None:
    gateway = Gateway(limit=1)
    gateway.let_in("a")
    gateway.clock.now += PATIENCE_S + 1
    turned_away = Entrant(gateway, "b")
    assert gateway.gate.enter(turned_away) > 0
    turned_away.leaves()
    assert gateway.names == "a"
    assert gateway.overflowed == 1


def test_may_come_again_after_it_has_left() -> None:
    gateway = Gateway(limit=1)
    (a,) = gateway.let_in("a")
    a.leaves()
    assert gateway.gate.enter(a) == 0.0
    assert gateway.names == "aa"


@pytest.mark.parametrize("leaves", ["a", "ab", "ba"])
def test_who_leaves_the_moment_it_is_let_through_makes_room_for_the_next(leaves: str) -> None:
    class Hasty(Entrant):
        def on_admitted(self) -> None:
            super().on_admitted()
            self.leaves()

    gateway = Gateway(limit=2)
    first = dict(zip("ab", gateway.let_in("ab"), strict=True))
    for name in "cde":
        assert gateway.gate.enter(Hasty(gateway, name)) == 0.0
    for name in leaves:
        first[name].leaves()
    assert gateway.names == "abcde"
    assert gateway.waiting == 0


# The expected wait.


def measured(took_s: float, limit: int = 1) -> Gateway:
    """Return a gate that has seen many connects of this length."""
    gateway = Gateway(limit)
    for _ in range(200):
        (entrant,) = gateway.let_in("x")
        gateway.clock.now += took_s
        entrant.leaves()
    gateway.admitted.clear()
    return gateway


def test_nobody_is_turned_away_by_an_api_that_is_quick() -> None:
    gateway = measured(0.001)
    gateway.let_in("a" * 5000)
    assert gateway.waiting == 4999
    assert gateway.overflowed == 0


@pytest.mark.parametrize("limit", [1, 4])
def test_who_would_wait_for_too_long_is_turned_away(limit: int) -> None:
    gateway = measured(1.0, limit)
    gateway.let_in("a" * limit)
    room = int(PATIENCE_S) * limit  # a second each, `limit` of them at once
    gateway.let_in("b" * room)
    assert gateway.is_turned_away("c") > PATIENCE_S
    assert gateway.overflowed == 1
    assert gateway.waiting == room


def test_longer_line_is_to_be_avoided_for_longer() -> None:
    gateway = measured(1.0)
    gateway.let_in("a" * 10)
    gateway.clock.now += 5
    first = gateway.is_turned_away("b")
    gateway.clock.now += 5
    assert gateway.is_turned_away("c") > first > PATIENCE_S


def test_api_that_hangs_has_no_time_for_more() -> None:
    gateway = measured(0.001)
    gateway.let_in("ab")
    gateway.clock.now += PATIENCE_S
    assert gateway.is_turned_away("c") > PATIENCE_S


def test_all_that_hang_are_noticed_when_others_have_come_and_gone() -> None:
    gateway = measured(0.005, limit=256)
    gateway.let_in("a" * 256)
    gateway.clock.now += PATIENCE_S / 2
    gateway.let_in("b" * 100)
    assert gateway.overflowed == 0, "they have their time, and are told when it is over"
    gateway.clock.now += PATIENCE_S
    turned_away = sum(gateway.gate.enter(Entrant(gateway)) > 0 for _ in range(100))
    assert (turned_away, gateway.waiting) == (100, 100)


def test_one_that_hangs_turns_nobody_away_while_others_come_and_go() -> None:
    gateway = measured(0.005, limit=256)
    hangs = gateway.enters("h")
    gateway.clock.now += 30
    quick = gateway.let_in("q" * 255)
    gateway.clock.now += 0.005
    quick.pop().leaves()
    gateway.let_in("s" * 2000)
    assert gateway.overflowed == 0
    gateway.clock.now += 0.005
    while quick:
        quick.pop().leaves()
    assert gateway.waiting == 2000 - 255
    gateway.let_in("t" * 1000)
    assert gateway.overflowed == 0
    hangs.leaves()


def test_one_that_hangs_turns_nobody_away_when_all_come_back_at_once() -> None:
    gateway = measured(0.005, limit=256)
    gateway.enters("h")
    gateway.clock.now += 30
    gateway.let_in("o" * 255)
    for _ in range(2000):
        gateway.gate.enter(Entrant(gateway))
    assert gateway.overflowed == 0


def test_api_that_answers_again_has_time_again() -> None:
    gateway = Gateway(limit=1)
    a, b = gateway.let_in("ab")
    gateway.clock.now += 60
    gateway.is_turned_away("c")
    for entrant in (a, b):
        entrant.leaves()
    for name in "defghijk" * 10:
        gateway.enters(name).leaves()
    gateway.enters("x")
    assert gateway.enters("y"), "it waits"
    assert gateway.waiting == 1


def test_who_waits_is_not_turned_away_by_the_gate() -> None:
    gateway = measured(0.1)
    a, *_ = gateway.let_in("abc")
    gateway.clock.now += 3600
    a.leaves()
    assert gateway.names == "ab"


# Retry-After.


@pytest.mark.parametrize(
    ("wait_s", "seconds"),
    [(0.0, 1), (0.2, 1), (1.0, 1), (1.1, 2), (59.5, 60), (60.0, 60), (61.0, 60), (1e9, 60)],
)
def test_retry_after_is_whole_seconds_between_one_and_sixty(wait_s: float, seconds: int) -> None:
    assert retry_after(wait_s) == b"Retry-After: %d\r\n" % seconds


# Any order of events.


class Crowd(RuleBasedStateMachine):
    """Let clients come, leave and wait in any order."""

    present = Bundle("present")

    @initialize(limit=st.integers(1, 4), patience_s=st.sampled_from((0.5, 10.0)))
    def opens(self, limit: int, patience_s: float) -> None:
        self.limit = limit
        self.patience_s = patience_s
        self.gateway = Gateway(limit, patience_s)
        self.line: list[Entrant] = []
        self.inside: set[Entrant] = set()
        self.seen = 0
        self.turned_away = 0

    def _follow(self) -> None:
        """Compare those who were let through since with those whose turn it was."""
        new = self.gateway.admitted[self.seen :]
        self.seen += len(new)
        assert new == self.line[: len(new)], "in the order in which they came, each once"
        del self.line[: len(new)]
        self.inside.update(new)

    @rule(target=present)
    def enters(self) -> Entrant:
        entrant = Entrant(self.gateway)
        had_room = len(self.inside) < self.limit and not self.line
        self.line.append(entrant)
        wait_s = self.gateway.gate.enter(entrant)
        if wait_s:
            assert not had_room
            assert wait_s > self.patience_s
            self.line.remove(entrant)
            self.turned_away += 1
        self._follow()
        assert (entrant in self.inside) == had_room
        return entrant

    @rule(entrant=present)
    def leaves(self, entrant: Entrant) -> None:
        self.inside.discard(entrant)
        if entrant in self.line:
            self.line.remove(entrant)
        entrant.leaves()
        self._follow()

    @rule(entrant=consumes(present))
    def leaves_for_good(self, entrant: Entrant) -> None:
        self.leaves(entrant)

    @precondition(lambda self: self.gateway.clock.now < 5000)
    @rule(seconds=st.sampled_from((0.0, 0.1, 1.0, 60.0)))
    def time_goes_by(self, seconds: float) -> None:
        self.gateway.clock.now += seconds

    @invariant()
    def no_more_are_inside_than_allowed(self) -> None:
        assert len(self.inside) <= self.limit

    @invariant()
    def nobody_waits_beside_an_open_gate(self) -> None:
        assert not self.line or len(self.inside) == self.limit

    @invariant()
    def books_are_kept(self) -> None:
        assert self.gateway.waiting == len(self.line)
        assert self.gateway.overflowed == self.turned_away

    def teardown(self) -> None:
        """Let those inside leave until nobody is left."""
        if not hasattr(self, "gateway"):
            return
        while self.inside:
            entrant = self.inside.pop()
            entrant.leaves()
            self._follow()
        assert not self.line, "somebody was forgotten"


Crowd.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=30)
TestCrowd = Crowd.TestCase
