"""Follow a Redis whose clock goes as the test says."""

from __future__ import annotations

import time

import pytest
from ws2api.gateway.redis_time import RedisTime

BASE_MS = 1_700_000_000_000


class Time:
    """Be this host's clocks: the monotonic one, and that of the day, which is wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(time, "time_ns", lambda: 42_000_000)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_nobody_knows_before_redis_has_said_it(host: Time) -> None:
    assert RedisTime().deadline_ms(5.0) == 0


def test_goes_on_by_itself(host: Time) -> None:
    clock = RedisTime()
    clock.learn(BASE_MS, host.now_s)
    assert clock.deadline_ms(0.0) == BASE_MS
    host.now_s += 7
    assert clock.deadline_ms(0.0) == BASE_MS + 7_000
    assert clock.deadline_ms(1.5) == BASE_MS + 8_500


def test_answer_that_took_long_changes_nothing_that_it_agrees_with(host: Time) -> None:
    clock = RedisTime()
    clock.learn(BASE_MS, host.now_s)
    asked_at = host.now_s
    host.now_s += 4
    clock.learn(BASE_MS + 1_000, asked_at)
    assert clock.deadline_ms(0.0) == BASE_MS + 4_000


def test_answer_that_took_less_makes_it_more_exact(host: Time) -> None:
    clock = RedisTime()
    asked_at = host.now_s
    host.now_s += 4
    clock.learn(BASE_MS, asked_at)
    assert clock.deadline_ms(0.0) == BASE_MS
    clock.learn(BASE_MS + 3_000, host.now_s)
    assert clock.deadline_ms(0.0) == BASE_MS + 3_000


@pytest.mark.parametrize("jump_ms", [-30_000, 30_000])
def test_follows_a_clock_that_was_set(host: Time, jump_ms: int) -> None:
    clock = RedisTime()
    clock.learn(BASE_MS, host.now_s)
    clock.learn(BASE_MS + jump_ms, host.now_s)
    assert abs(clock.deadline_ms(0.0) - (BASE_MS + jump_ms)) <= 1


def test_generations_are_of_redis_time(host: Time) -> None:
    clock = RedisTime()
    assert clock.next_generation() == 42_000, "while nobody knows it, the host's"
    clock.learn(BASE_MS, host.now_s)
    assert clock.next_generation() == BASE_MS * 1000
    assert clock.next_generation() == BASE_MS * 1000 + 1
    host.now_s += 1
    assert clock.next_generation() == (BASE_MS + 1_000) * 1000


def test_generations_pass_by_what_there_is(host: Time) -> None:
    clock = RedisTime()
    clock.learn(BASE_MS, host.now_s)
    clock.pass_by(BASE_MS * 2_000)
    clock.pass_by(BASE_MS)
    assert clock.next_generation() == BASE_MS * 2_000 + 1
