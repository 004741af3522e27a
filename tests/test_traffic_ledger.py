"""The ledger of numbered traffic: whatever is lost, doubled or out of order, it says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness.ledger import WORKER_LOST, Ledger
from harness.traffic_api import Life
from harness.traffic_clients import Stay, message
from harness.traffic_pushes import PushRecord


def make_life(*sequences: int) -> Life:
    """Make a connection whose messages of these numbers were processed."""
    posts = [(sequence, message("ann", sequence)) for sequence in sequences]
    return Life("ann", 7, is_accepted=True, posts=posts)


def make_stay(sent: int) -> Stay:
    """Make a connection on which so many messages were sent, and no answer has come."""
    return Stay("ann", status=101, generation=7, first=1 if sent else 0, last=sent)


class TestMessages:
    def test_balance(self) -> None:
        stay = make_stay(3)
        stay.answered = [1, 2, 3]
        Ledger([make_life(1, 2, 3)], [stay]).assert_balanced()

    @pytest.mark.parametrize(
        ("processed", "complaint"),
        [
            ([1, 3], "given up: 1"),
            ([1, 2], "given up: 1"),
            ([1, 2, 2, 3], "processed twice: 1"),
            ([1, 3, 2], "out of order"),
        ],
    )
    def test_do_not_balance(self, processed: list[int], complaint: str) -> None:
        [problem] = Ledger([make_life(*processed)], [make_stay(3)]).problems
        assert complaint in problem

    def test_numbers_that_do_not_fit_their_sequence(self) -> None:
        life = make_life(1)
        life.posts.append((2, message("ann", 3)))
        assert "swapped or skipped" in Ledger([life], [make_stay(3)]).problems[0]

    @pytest.mark.parametrize("answered", [[2, 1], [1, 1], [4]])
    def test_answers_that_nobody_can_have_given(self, answered: list[int]) -> None:
        stay = make_stay(2)
        stay.answered = answered
        assert Ledger([make_life(1, 2)], [stay]).problems

    @pytest.mark.parametrize("left", ["reset", "hang up"])
    def test_last_ones_may_be_lost_with_a_broken_connection(self, left: str) -> None:
        life, stay = make_life(1), make_stay(3)
        life.deletes = [(1006, "EOF")]
        stay.left, stay.has_ended = left, True
        ledger = Ledger([life], [stay])
        ledger.assert_balanced()
        assert ledger.messages.counts["lost with the connection"] == 2

    def test_none_may_be_lost_before_a_close_frame_unless_the_worker_was(self) -> None:
        life, stay = make_life(1), make_stay(2)
        stay.left, stay.has_ended = "close", True
        life.deletes = [(1000, "bye")]
        assert "given up: 1" in Ledger([life], [stay]).problems[0]
        life.deletes = [(1006, WORKER_LOST)]
        Ledger([life], [stay]).assert_balanced()

    def test_without_consent(self) -> None:
        [problem] = Ledger([], [make_stay(0)]).problems
        assert "without the API's consent" in problem


class TestConnections:
    @pytest.mark.parametrize(
        ("deletes", "has_ended", "complaint"),
        [([], True, "no DELETE"), ([(1000, "bye")], False, "DELETE of an open one")],
    )
    def test_do_not_balance(
        self, deletes: list[tuple[int, str]], has_ended: bool, complaint: str
    ) -> None:
        life, stay = make_life(), make_stay(0)
        life.deletes, stay.has_ended = deletes, has_ended
        [problem] = Ledger([life], [stay]).problems
        assert complaint in problem

    def test_that_was_replaced_needs_none(self) -> None:
        stay = make_stay(0)
        stay.close_code, stay.has_ended = 4008, True
        Ledger([make_life()], [stay]).assert_balanced()

    def test_that_nobody_has_seen(self) -> None:
        assert Ledger([make_life()], []).problems


def received(count: int) -> Stay:
    stay = make_stay(0)
    stay.pushes = [1] * count
    return stay


def broken() -> Stay:
    stay = make_stay(0)
    stay.close_code, stay.has_ended = 4008, True
    return stay


class TestPushes:
    @pytest.mark.parametrize(
        ("status", "stay"),
        [
            (200, received(1)),
            (404, received(0)),
            (429, received(0)),
            (503, received(0)),
            (504, received(1)),
            (0, received(1)),
        ],
    )
    def test_balance(self, status: int, stay: Stay) -> None:
        Ledger([make_life()], [stay], [PushRecord(1, "ann", status)]).assert_balanced()

    @pytest.mark.parametrize(
        ("status", "make"),
        [
            (200, lambda: received(0)),
            (200, lambda: received(2)),
            (404, lambda: received(1)),
            (504, lambda: received(2)),
            (200, broken),
            (502, lambda: received(0)),
        ],
    )
    def test_do_not_balance(self, status: int, make: Callable[[], Stay]) -> None:
        assert Ledger([make_life()], [make()], [PushRecord(1, "ann", status)]).problems

    def test_that_nobody_has_made(self) -> None:
        assert Ledger([make_life()], [received(1)]).problems
