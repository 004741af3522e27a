"""Note what becomes of clients, and read the lines and the records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import structlog
from harness.looping import Clock
from structlog.testing import capture_logs
from ws2api.gateway import causes
from ws2api.gateway import counters as c
from ws2api.gateway.counters import Counters
from ws2api.gateway.journal import Journal
from ws2api.gateway.recent import CloseRecord, ErrorRecord, Recent
from ws2api.gateway.session import OPEN, Session
from ws2api.gateway.sweeper import Sweeper

AT_ONCE = 5


class Noted:
    """Hold a journal, and read what it has written."""

    def __init__(self, *, logs_connections: bool = True) -> None:
        self.clock = Clock()
        self.sweeper = sweeper = Sweeper(cast(Any, self.clock))
        sweeper.start()
        self.slot = Counters(1).bank(0, 0)
        self._recent = Recent(1, 1)
        self.journal = Journal(
            self.slot,
            sweeper,
            self._recent.closes(0, 0),
            self._recent.errors(0, 0),
            logs_connections,
        )

    @property
    def closes(self) -> list[CloseRecord]:
        return [CloseRecord.decode(each) for each in self._recent.closes(0, 0).read()]

    @property
    def errors(self) -> list[ErrorRecord]:
        return [ErrorRecord.decode(each) for each in self._recent.errors(0, 0).read()]

    def complains(self, times: int = 1, cause: str = causes.TIMEOUT) -> None:
        for _ in range(times):
            self.journal.complain("not taken", b"tom", cause, "too late")


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """Catch what is logged, whatever the level."""
    former = structlog.get_config()
    structlog.reset_defaults()
    with capture_logs() as lines:
        yield lines
    structlog.configure(**former)


def client(name: bytes = b"tom", **fields: Any) -> Any:
    session = Session(cast(Any, None))
    session.client_id = name
    session.generation = time.time_ns() // 1000 - 2_500_000
    session.state = OPEN
    session.close_code, session.close_reason = 1000, "bye"
    session.sequence, session.sent = 3, 4
    for field, value in fields.items():
        setattr(session, field, value)
    return session


# Beginnings and ends.


def test_each_connection_has_a_line_at_its_start_and_one_at_its_end(lines: list[Any]) -> None:
    noted, tom = Noted(), client()
    noted.journal.opened(tom, "192.0.2.7")
    noted.journal.closed(tom, causes.CLIENT)
    start, end = lines
    assert start == {
        "event": "client connected",
        "log_level": "debug",
        "client": "tom",
        "generation": tom.generation,
        "remote": "192.0.2.7",
    }
    assert 2.5 <= end.pop("duration_s") < 60
    assert end == {
        "event": "client disconnected",
        "log_level": "debug",
        "client": "tom",
        "generation": tom.generation,
        "remote": "192.0.2.7",
        "code": 1000,
        "cause": "client",
        "messages_received": 3,
        "messages_sent": 4,
    }


def test_messages_that_wait_count_as_received(lines: list[Any]) -> None:
    noted = Noted()
    tom = client(_queue=[(1, b"a"), (1, b"b")])
    noted.journal.closed(tom, causes.CLIENT)
    assert lines[0]["messages_received"] == noted.closes[0].messages_received == 5


def test_ends_are_kept_also_when_nothing_is_logged(lines: list[Any]) -> None:
    noted, tom = Noted(logs_connections=False), client()
    noted.journal.opened(tom, "192.0.2.7")
    noted.journal.closed(tom, causes.API)
    assert not lines
    (record,) = noted.closes
    assert (record.client_id, record.generation, record.cause) == ("tom", tom.generation, "api")
    assert (record.code, record.reason) == (1000, "bye")
    assert (record.messages_received, record.messages_sent) == (3, 4)
    assert 2.5 <= record.duration_s < 60
    assert time.time() - 60 < record.time_s <= time.time()


def test_connection_that_began_before_the_level_was_raised_has_no_remote(
    lines: list[Any],
) -> None:
    noted, before, between = Noted(logs_connections=False), client(b"before"), client(b"between")
    noted.journal.opened(before, "192.0.2.1")
    noted.journal.logs_connections = True
    noted.journal.opened(between, "192.0.2.2")
    noted.journal.closed(before, causes.LOST)
    noted.journal.logs_connections = False
    noted.journal.closed(between, causes.LOST)
    noted.journal.logs_connections = True
    noted.journal.closed(client(b"later"), causes.LOST)
    ends = [line for line in lines if line["event"] == "client disconnected"]
    assert [(line["client"], line["remote"]) for line in ends] == [
        ("before", None),
        ("later", None),
    ]


def test_remembers_nobody_who_has_left(lines: list[Any]) -> None:
    noted = Noted()
    clients = [client(b"c%d" % number) for number in range(10)]
    for each in clients:
        noted.journal.opened(each, "192.0.2.7")
    noted.journal.logs_connections = False
    for each in clients:
        noted.journal.closed(each, causes.LOST)
    assert not noted.journal._remotes


def test_clock_that_is_ahead_elsewhere_makes_no_negative_duration(lines: list[Any]) -> None:
    noted = Noted()
    noted.journal.closed(client(generation=time.time_ns() // 1000 + 10**9), causes.LOST)
    assert noted.closes[0].duration_s == lines[0]["duration_s"] == 0


@pytest.mark.parametrize("reason", [None, "", "é" * 61, "\U0001f600" * 30, 'a "quoted"\nline'])
def test_any_reason_and_the_longest_id_find_room(lines: list[Any], reason: str | None) -> None:
    noted = Noted()
    longest = b"x" * 255
    noted.journal.closed(client(longest, close_reason=reason), causes.PING_TIMEOUT)
    (record,) = noted.closes
    assert (record.client_id, record.reason) == (longest.decode(), reason or "")


# Troubles.


@pytest.mark.parametrize("cause", causes.OF_REQUESTS)
def test_complaint_is_counted_logged_and_kept(lines: list[Any], cause: str) -> None:
    noted = Noted()
    noted.complains(cause=cause)
    assert {name: noted.slot[index] for name, index in c.ERRORS.items() if noted.slot[index]} == {
        cause: 1
    }
    assert lines == [
        {
            "event": "not taken",
            "log_level": "warning",
            "client": "tom",
            "cause": cause,
            "error": "too late",
        }
    ]
    (record,) = noted.errors
    assert (record.cause, record.client_id, record.text) == (cause, "tom", "not taken: too late")


def events(lines: list[Any]) -> list[Any]:
    return [line.get("count") or line["client"] for line in lines]


def test_no_more_than_a_few_lines_a_second_and_the_count_of_the_others(lines: list[Any]) -> None:
    noted = Noted()
    noted.complains(1000)
    assert events(lines) == ["tom"] * AT_ONCE
    assert len(noted.errors) == AT_ONCE
    assert noted.slot[c.ERRORS[causes.TIMEOUT]] == 1000
    noted.clock.advance(1.0)
    noted.complains()
    assert events(lines) == [*["tom"] * AT_ONCE, 1000 - AT_ONCE, "tom"]


def test_count_of_the_others_needs_no_further_complaint(lines: list[Any]) -> None:
    noted = Noted()
    noted.complains(AT_ONCE + 2)
    noted.clock.advance(3.0)
    assert events(lines) == [*["tom"] * AT_ONCE, 2]
    noted.clock.advance(3.0)
    noted.complains(AT_ONCE)
    noted.clock.advance(3.0)
    assert events(lines)[AT_ONCE + 1 :] == ["tom"] * AT_ONCE


def test_count_is_told_also_when_ticks_come_late_and_then_in_time(lines: list[Any]) -> None:
    noted = Noted()
    noted.clock.stall(0.15)
    noted.complains(AT_ONCE + 2)
    noted.clock.stall(0.05)
    noted.clock.advance(3.0)
    assert events(lines) == [*["tom"] * AT_ONCE, 2]


def test_wheel_holds_one_place_however_long_an_outage_lasts(lines: list[Any]) -> None:
    noted = Noted()

    def places() -> int:
        return sum(map(len, noted.sweeper._ring))

    for _ in range(200):
        noted.complains(10)
        assert places() <= 1
        noted.clock.advance(0.1)
    noted.clock.advance(3.0)
    assert places() == 0


def test_long_outage_is_told_in_a_few_lines_a_second(lines: list[Any]) -> None:
    noted = Noted()
    for _ in range(100):
        noted.complains(10)
        noted.clock.advance(0.1)
    noted.clock.advance(3.0)
    told = [line["count"] for line in lines if "count" in line]
    assert len(lines) - len(told) <= 11 * AT_ONCE
    assert len(told) <= 11
    assert sum(told) + len(lines) - len(told) == 1000 == noted.slot[c.ERRORS[causes.TIMEOUT]]


def test_no_cause_hides_another(lines: list[Any]) -> None:
    noted = Noted()
    noted.complains(1000, causes.TIMEOUT)
    noted.complains(1, causes.INVALID_REPLY)
    noted.complains(AT_ONCE + 3, causes.STATUS)
    noted.clock.advance(3.0)
    logged = [line["cause"] for line in lines if "count" not in line]
    assert logged == [
        *[causes.TIMEOUT] * AT_ONCE,
        causes.INVALID_REPLY,
        *[causes.STATUS] * AT_ONCE,
    ]
    assert [record.cause for record in noted.errors].count(causes.INVALID_REPLY) == 1
    left_out = {line["cause"]: line["count"] for line in lines if "count" in line}
    assert left_out == {causes.TIMEOUT: 1000 - AT_ONCE, causes.STATUS: 3}


def test_error_that_is_too_long_is_kept_as_far_as_it_fits(lines: list[Any]) -> None:
    noted = Noted()
    noted.journal.complain("not taken", b"x" * 255, causes.TIMEOUT, "é" * 500)
    (record,) = noted.errors
    assert record.client_id == "x" * 255
    assert record.text.startswith("not taken: éé")
    assert set(record.text.removeprefix("not taken: ")) == {"é"}


# Refusals.


def test_refusal_is_logged_with_its_reason(lines: list[Any]) -> None:
    Noted().journal.connect_refused(b"tom", 401, "the API said no", "192.0.2.7")
    assert lines == [
        {
            "event": "connect refused",
            "log_level": "info",
            "client": "tom",
            "status": 401,
            "reason": "the API said no",
            "remote": "192.0.2.7",
        }
    ]


def test_refusals_are_logged_seldom_and_the_others_counted(lines: list[Any]) -> None:
    noted = Noted()
    for _ in range(AT_ONCE + 3):
        noted.journal.push_refused(b"tom", 404, "no such client", "")
    noted.journal.push_refused(b"", 401, "a bearer token is required", "")
    assert [line["status"] for line in lines] == [404] * AT_ONCE + [401]
    noted.clock.advance(11)
    assert lines[AT_ONCE + 1 :] == [
        {
            "event": "similar lines were left out",
            "log_level": "info",
            "of": "push refused",
            "status": 404,
            "count": 3,
        }
    ]
    noted.journal.push_refused(b"tom", 404, "no such client", "")
    assert lines[-1]["event"] == "push refused"
