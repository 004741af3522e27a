"""Look at heartbeats that a test makes up, at times that it makes up."""

from __future__ import annotations

import pytest
from ws2api.gateway import counters as c
from ws2api.supervisor.watch import BOOT_S, LOOK_S, STUCK_S, Watch, sign_of_life

LOOKS = int(STUCK_S / LOOK_S)


def looks(watch: Watch, *beats: int, start: float = 100.0) -> list[float | None]:
    """Look once a second at a process with each heartbeat; return its silences, None if it is well.

    The first look is one at a process that was not seen before.
    """
    return [watch.look(start + n * LOOK_S, {7: beat}).get(7) for n, beat in enumerate(beats)]


def test_is_stuck_after_looks_that_find_nothing_new() -> None:
    found = looks(Watch(), *[5] * (LOOKS + 2))
    assert found[:LOOKS] == [None] * LOOKS
    assert found[LOOKS:] == [STUCK_S, STUCK_S + LOOK_S]


def test_one_beat_starts_the_count_over() -> None:
    assert looks(Watch(), *[5] * LOOKS, *[6] * LOOKS) == [None] * 2 * LOOKS


def test_beats_are_told_apart_by_change_alone() -> None:
    assert looks(Watch(), *range(50, 0, -1)) == [None] * 50


def test_one_that_boots_has_more_time() -> None:
    found = looks(Watch(), *[0] * int(BOOT_S / LOOK_S + 1))
    assert found[:-1] == [None] * int(BOOT_S / LOOK_S)
    assert found[-1] == BOOT_S


def test_one_that_begins_to_serve_starts_over() -> None:
    assert looks(Watch(), *[0] * 25, *[9] * LOOKS) == [None] * (25 + LOOKS)


def test_old_heartbeats_after_a_sleep_are_no_proof() -> None:
    watch = Watch()
    assert looks(watch, 5, 5) == [None, None]
    # The machine slept for an hour; nobody has had the time for a beat.
    assert watch.look(4000.0, {7: 5}) == {}
    assert watch.look(4000.0 + LOOK_S, {7: 6}) == {}
    # One that was stuck before and after is found all the same.
    assert looks(watch, *[6] * (LOOKS + 1), start=4002.0)[-1] is not None


def test_each_process_is_judged_for_itself() -> None:
    watch = Watch(stuck_s=2.0)
    watch.look(0.0, {1: 5, 2: 5})
    watch.look(1.0, {1: 5, 2: 6})
    assert watch.look(2.0, {1: 5, 2: 7}) == {1: 2.0}


def test_what_is_gone_is_forgotten() -> None:
    watch = Watch(stuck_s=2.0)
    watch.look(0.0, {1: 5})
    watch.look(1.0, {})
    # The same pid and, by chance, the same heartbeat.
    watch.look(2.0, {1: 5})
    assert watch.look(3.0, {1: 5}) == {}
    assert watch.look(4.0, {1: 5}) == {1: 2.0}


def test_next_look_is_due_in_time() -> None:
    watch = Watch()
    assert watch.due_at <= 0.0
    watch.look(5.0, {})
    assert watch.due_at == 5.0 + LOOK_S


@pytest.mark.parametrize(
    ("state", "sign"),
    [
        (c.STATE_DOWN, 0),
        (c.STATE_STARTING, 0),
        (c.STATE_SERVING, 1234),
        (c.STATE_DRAINING, 1234),
    ],
)
def test_heart_counts_from_the_first_service_on(state: int, sign: int) -> None:
    bank = c.Counters(1).bank(0, 1)
    bank[c.HEARTBEAT_US] = 1234
    bank[c.STATE] = state
    assert sign_of_life(bank) == sign
