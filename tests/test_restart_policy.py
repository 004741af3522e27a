"""Hold the restart policy to its bounds, whatever the lives of the children."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ws2api.supervisor.restart_policy import (
    EARLY_ENDS_LIMIT,
    EARLY_S,
    EXIT_BOOT_FAILED,
    FIRST_DELAY_S,
    LONGEST_DELAY_S,
    STABLE_S,
    Backoff,
    CrashLoop,
    Verdict,
)

lifetimes = st.floats(0, 1e6)
young = st.floats(0, STABLE_S, exclude_max=True)
early = st.floats(0, EARLY_S, exclude_max=True)


def judge(loop: CrashLoop, lifetime_s: float, exit_code: int = 1, others: bool = False) -> Verdict:
    return loop.judge(lifetime_s=lifetime_s, exit_code=exit_code, others_serve=others)


@given(st.lists(lifetimes))
def test_delay_stays_within_bounds(lives: list[float]) -> None:
    backoff = Backoff()
    for life in lives:
        assert FIRST_DELAY_S <= backoff.after_end(life) <= LONGEST_DELAY_S


@given(st.lists(young, min_size=1))
def test_delay_doubles_for_the_young(lives: list[float]) -> None:
    backoff = Backoff()
    delays = [backoff.after_end(life) for life in lives]
    assert delays[0] == FIRST_DELAY_S
    for one, next_one in pairwise(delays):
        assert next_one == min(2 * one, LONGEST_DELAY_S)


@given(st.lists(lifetimes), st.floats(STABLE_S, 1e6))
def test_delay_starts_over_after_a_stable_life(lives: list[float], stable: float) -> None:
    backoff = Backoff()
    for life in lives:
        backoff.after_end(life)
    assert backoff.after_end(stable) == FIRST_DELAY_S


@given(st.lists(early, min_size=EARLY_ENDS_LIMIT, max_size=EARLY_ENDS_LIMIT))
def test_gives_up_after_early_ends_in_a_row(lives: list[float]) -> None:
    loop = CrashLoop()
    verdicts = [judge(loop, life) for life in lives]
    assert verdicts == [Verdict.RESTART] * (EARLY_ENDS_LIMIT - 1) + [Verdict.GIVE_UP]


@given(st.lists(lifetimes, min_size=EARLY_ENDS_LIMIT, max_size=EARLY_ENDS_LIMIT))
def test_gives_up_after_failed_boots_however_long_they_took(lives: list[float]) -> None:
    loop = CrashLoop()
    assert [judge(loop, life, EXIT_BOOT_FAILED) for life in lives][-1] is Verdict.GIVE_UP


@given(st.lists(lifetimes, max_size=50))
def test_never_gives_up_while_others_serve(lives: list[float]) -> None:
    loop = CrashLoop()
    for life in lives:
        assert judge(loop, life, EXIT_BOOT_FAILED, others=True) is Verdict.RESTART


@given(st.integers(0, EARLY_ENDS_LIMIT - 1), st.floats(EARLY_S, 1e6))
def test_a_life_of_some_length_starts_the_count_over(ends: int, life: float) -> None:
    loop = CrashLoop()
    for _ in range(ends):
        judge(loop, 0.0)
    assert judge(loop, life) is Verdict.RESTART
    for _ in range(EARLY_ENDS_LIMIT - 1):
        assert judge(loop, 0.0) is Verdict.RESTART
    assert judge(loop, 0.0) is Verdict.GIVE_UP


@pytest.mark.parametrize("exit_code", [0, 1, -9, -11])
def test_how_it_ended_makes_no_difference_else(exit_code: int) -> None:
    loop = CrashLoop()
    judge(loop, EARLY_S, exit_code)
    assert loop.early_ends == 0
    judge(loop, 0.0, exit_code)
    assert loop.early_ends == 1
