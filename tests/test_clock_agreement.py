"""Let clocks jump, drift and be asked slowly: pure."""

from __future__ import annotations

import pytest
from ws2api.supervisor.clock_agreement import TOLERANCE_S, ClockAgreement

WINDOW_S = 15.0
EPOCH_S = 1_700_000_000.0


def sampled(clock: ClockAgreement, count: int, *, ahead_s: float = 0.0, start: float = 0.0) -> None:
    """Sample once a second; Redis is ahead of what it was by so much."""
    for second in range(count):
        now = start + second
        assert clock.sample(EPOCH_S + now + ahead_s, now - 0.001, now) == 0


def test_clocks_that_agree_are_believed_since_the_start() -> None:
    clock = ClockAgreement(WINDOW_S, 0.0)
    sampled(clock, 100)
    assert clock.agreed_since == 0.0


@pytest.mark.parametrize("jump_s", [30.0, 60.0, 1.5, -1.5, -3600.0])
def test_jump_begins_the_time_of_agreement_anew(jump_s: float) -> None:
    clock = ClockAgreement(WINDOW_S, 0.0)
    sampled(clock, 100)
    assert clock.sample(EPOCH_S + 100 + jump_s, 99.999, 100) == pytest.approx(jump_s, abs=0.01)
    assert clock.agreed_since == 100
    sampled(clock, 100, ahead_s=jump_s, start=101)
    assert clock.agreed_since == 100


def test_process_that_did_not_run_for_a_while_disagrees() -> None:
    """A machine that was suspended: its monotonic clock stood still."""
    clock = ClockAgreement(WINDOW_S, 0.0)
    sampled(clock, 3)
    assert clock.sample(EPOCH_S + 600, 2.999, 3) > 500
    assert clock.agreed_since == 3


def test_steps_that_add_up_within_the_window_are_a_jump() -> None:
    clock = ClockAgreement(WINDOW_S, 0.0)
    clock.sample(EPOCH_S, 0.0, 0.0)
    jumps = [clock.sample(EPOCH_S + 1.5 * now, now, now) for now in range(1, 10)]
    assert any(jumps)


def test_clocks_that_drift_slowly_agree() -> None:
    clock = ClockAgreement(WINDOW_S, 0.0)
    drift = 0.9 * TOLERANCE_S / WINDOW_S
    assert not any(clock.sample(EPOCH_S + s * (1 + drift), s, s) for s in range(1000))


def test_answer_that_took_long_proves_no_jump() -> None:
    """The time may have been read at any moment between question and answer."""
    clock = ClockAgreement(WINDOW_S, 0.0)
    sampled(clock, 3)
    assert clock.sample(EPOCH_S + 3, 3.0, 8.0) == 0
    assert clock.sample(EPOCH_S + 13, 8.0, 13.0) == 0
