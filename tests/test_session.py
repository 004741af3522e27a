"""Lead sessions through every state, and note what they want done."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from ws2api.gateway import causes, outcomes
from ws2api.gateway import counters as c
from ws2api.gateway.counters import Counters
from ws2api.gateway.errors import ApiDisconnected, ApiError, ApiTimeout, ApiUnreachable
from ws2api.gateway.exchange import CONNECT, DISCONNECT, MESSAGE, Exchange
from ws2api.gateway.frames import BINARY, TEXT, encode
from ws2api.gateway.http_wire import ReplyReader
from ws2api.gateway.session import (
    ABNORMAL,
    ASKING,
    CLAIMING,
    CLOSED,
    CLOSING,
    HANDSHAKE,
    NO_CLOSE_FRAME,
    OPEN,
    REPLACED_CODE,
    REPORTING,
    SERVICE_RESTART,
    WAITING,
    Session,
)

Action = tuple[object, ...]
ENDED_ABNORMALLY = (ABNORMAL, NO_CLOSE_FRAME)
REPLACED: Action = ("send_close", REPLACED_CODE, "replaced")
GIVEN_UP: Action = ("send_close", SERVICE_RESTART, "service restart")


class Recorder(Session):
    """Be a session whose actions are noted; Redis answers when the test says so.

    Args:
        releases_at_once: whether the registry answers a release before it returns, as it does
            while Redis is away.
    """

    def __init__(
        self, max_in_flight: int = 1, max_queue: int = 4, *, releases_at_once: bool = False
    ) -> None:
        self.slot = Counters(1).bank(0, 0)
        super().__init__(
            SimpleNamespace(slot=self.slot, max_in_flight=max_in_flight, max_queue=max_queue)
        )
        self.actions: list[Action] = []
        self.posts: list[tuple[int, int, bytes]] = []
        self.reading = True
        self._releases_at_once = releases_at_once
        self.settled = 0
        self.complaints: list[str] = []
        self.causes: list[str] = []

    @property
    def written(self) -> int:
        """Count the frames that were written."""
        return sum(action[0] == "write" for action in self.actions)

    def taken(self) -> list[Action]:
        """Return the actions since this was called last."""
        actions, self.actions = self.actions, []
        return actions

    def _post(self, first_byte: int, payload: bytes) -> None:
        self.posts.append((self.sequence, first_byte, payload))
        self.actions.append(("post", payload))

    def _ask(self) -> None:
        self.actions.append(("ask",))

    def _abandon(self) -> None:
        self.actions.append(("abandon",))
        self._forget()

    def _claim(self) -> None:
        self.actions.append(("claim",))

    def _leave(self, cause: str) -> None:
        self.causes.append(cause)

    def _take_over(self) -> None:
        self.actions.append(("take_over",))

    def _welcome(self) -> None:
        self.actions.append(("welcome",))

    def _judge(self, reply: ReplyReader) -> bool:
        accepted = reply.status == 200 and reply.body == b"ok"
        if not accepted:
            self.actions.append(("refuse", reply.status))
            self._forget()
        return accepted

    def _refuse(self, status: int, text: str, header_lines: bytes = b"") -> None:
        self.actions.append(("refuse", status))
        self._forget()

    def _write(self, wire: bytes) -> None:
        self.actions.append(("write", wire))

    def _send_close(self, code: int, reason: str) -> None:
        self.actions.append(("send_close", code, reason))

    def _read_on(self, on: bool) -> None:
        assert on != self.reading
        self.reading = on
        self.actions.append(("read_on", on))

    def _release(self) -> None:
        self.actions.append(("release",))
        if self._releases_at_once:
            self.on_released(True)

    def _report(self) -> None:
        self.actions.append(("report", self.close_code, self.close_reason))

    def _settle(self) -> None:
        self.settled += 1

    def _complain(self, exchange: Exchange, cause: str, error: str) -> None:
        assert cause in (causes.STATUS, causes.INVALID_REPLY)
        self.complaints.append(error)

    # What happens to it.

    def announces(self) -> None:
        """Bring the handshake to its end, as the subclass does."""
        self.state = ASKING

    def is_answered(
        self, event: int, status: int = 200, body: bytes = b"", type_: str = ""
    ) -> None:
        self.on_reply(Exchange(self, event, b""), reply(status, body, type_))

    def is_accepted(self) -> None:
        self.is_answered(CONNECT, 200, b"ok")

    def is_parked(self) -> None:
        self.on_parked(Exchange(self, DISCONNECT, b""))

    def fails(self, event: int, error: ApiError | None = None) -> None:
        self.on_failure(Exchange(self, event, b""), error or ApiDisconnected("gone"))

    def receives(self, *messages: bytes) -> None:
        for message in messages:
            self.on_message(TEXT, message)


def reply(status: int, body: bytes = b"", type_: str = "") -> ReplyReader:
    reader = ReplyReader(1 << 20)
    reader.expect(want_headers=False)
    content_type = f"Content-Type: {type_}\r\n" if type_ else ""
    head = f"HTTP/1.1 {status} Whatever\r\n{content_type}Content-Length: {len(body)}\r\n\r\n"
    reader.feed(head.encode() + body)
    assert reader.complete
    return reader


def closes_of(session: Recorder) -> dict[str, int]:
    """Return how often each cause has ended a connection, without those that have not."""
    found: dict[str, int] = {}
    for (cause, _), index in c.CLOSES.items():
        if session.slot[index]:
            found[cause] = found.get(cause, 0) + session.slot[index]
    return found


def in_handshake(**limits: int | bool) -> Recorder:
    return Recorder(**limits)  # type: ignore[arg-type]


def waiting(**limits: int | bool) -> Recorder:
    session = in_handshake(**limits)
    session.state = WAITING
    return session


def announcing(**limits: int | bool) -> Recorder:
    session = waiting(**limits)
    session.announces()
    return session


def asking(**limits: int | bool) -> Recorder:
    session = announcing(**limits)
    session.on_announced()
    assert session.taken() == [("ask",)]
    return session


def claiming(**limits: int | bool) -> Recorder:
    session = asking(**limits)
    session.is_accepted()
    assert session.taken() == [("claim",)]
    return session


def opened(**limits: int | bool) -> Recorder:
    session = claiming(**limits)
    session.on_claimed()
    assert session.taken() == [("take_over",), ("welcome",)]
    return session


def closing(**limits: int | bool) -> Recorder:
    session = opened(**limits)
    session.end(1000, "bye")
    assert session.taken() == [("release",)]
    return session


def reporting(**limits: int | bool) -> Recorder:
    session = closing(**limits)
    session.on_released(True)
    assert session.taken() == [("report", 1000, "bye")]
    return session


def closed(**limits: int | bool) -> Recorder:
    session = reporting(**limits)
    session.is_answered(DISCONNECT)
    return session


STATES: list[tuple[Callable[..., Recorder], int]] = [
    (in_handshake, HANDSHAKE),
    (waiting, WAITING),
    (announcing, ASKING),
    (asking, ASKING),
    (claiming, CLAIMING),
    (opened, OPEN),
    (closing, CLOSING),
    (reporting, REPORTING),
    (closed, CLOSED),
]
NOT_OPEN = [make for make, state in STATES if state != OPEN]


@pytest.mark.parametrize(("make", "state"), STATES)
def test_states_follow_each_other(make: Callable[..., Recorder], state: int) -> None:
    assert make().state == state


# The connect.


def test_accepted_client_is_claimed_before_it_is_welcomed() -> None:
    session = asking()
    session.is_accepted()
    assert session.taken() == [("claim",)]
    assert session.slot[c.CONNECTIONS_OPENED] == 0
    session.on_claimed()
    assert session.taken() == [("take_over",), ("welcome",)]
    assert session.slot[c.CONNECTIONS_OPENED] == 1


@pytest.mark.parametrize(("status", "body"), [(200, b"no"), (200, b""), (401, b"ok"), (500, b"")])
def test_refused_client_is_forgotten(status: int, body: bytes) -> None:
    session = asking()
    session.is_answered(CONNECT, status, body)
    session.end(*ENDED_ABNORMALLY)
    assert session.taken() == [("refuse", status)]
    assert session.state == CLOSED


@pytest.mark.parametrize(
    ("error", "status"),
    [(ApiUnreachable("x"), 502), (ApiDisconnected("x"), 502), (ApiTimeout("x"), 504)],
)
def test_client_is_refused_when_the_api_does_not_answer(error: ApiError, status: int) -> None:
    session = asking()
    session.fails(CONNECT, error)
    assert session.taken() == [("refuse", status)]
    assert session.state == CLOSED


@pytest.mark.parametrize("make", [in_handshake, waiting])
def test_leaving_before_the_connect_concerns_nobody(make: Callable[..., Recorder]) -> None:
    session = make()
    session.end(*ENDED_ABNORMALLY)
    assert session.state == CLOSED
    assert session.taken() == []


def test_api_is_asked_when_the_connect_is_marked() -> None:
    session = announcing()
    assert session.taken() == []
    session.on_announced()
    assert session.taken() == [("ask",)]


@pytest.mark.parametrize(("given", "kept"), [(17, 17), (None, 5)])
def test_mark_gives_the_connection_its_birth(given: int | None, kept: int) -> None:
    session = announcing()
    session.generation = 5
    session.on_announced(given)
    assert session.generation == kept


def test_api_is_not_asked_about_a_client_that_has_left() -> None:
    session = announcing()
    session.end(*ENDED_ABNORMALLY)
    session.on_announced()
    assert session.taken() == [("abandon",)]
    assert session.state == CLOSED


def test_client_that_left_while_the_api_was_asked_is_reported_if_accepted() -> None:
    session = asking()
    session.end(*ENDED_ABNORMALLY)
    assert session.taken() == []
    session.is_accepted()
    assert session.taken() == [("claim",)], "the generation that the API knows last has the id"
    session.on_claimed()
    assert session.taken() == [("take_over",), ("release",)]
    session.on_released(True)
    assert session.taken() == [("report", *ENDED_ABNORMALLY)]


def test_client_that_left_while_the_api_was_asked_is_not_reported_if_refused() -> None:
    for answer in (lambda s: s.is_answered(CONNECT, 403), lambda s: s.fails(CONNECT)):
        session = asking()
        session.end(*ENDED_ABNORMALLY)
        answer(session)
        assert session.state == CLOSED
        assert ("release",) not in session.actions


def test_newer_connection_outlives_one_that_left_while_the_api_was_asked() -> None:
    session = asking()
    session.end(*ENDED_ABNORMALLY)
    session.is_accepted()
    session.on_claimed(False)
    assert ("report", *ENDED_ABNORMALLY) not in session.taken()
    assert session.state == CLOSED


def test_connection_that_lost_its_claim_gives_way_at_once() -> None:
    session = claiming()
    session.on_claimed(False)
    assert ("send_close", 4008, "replaced") in session.taken()
    assert session.state == CLOSED


def test_client_that_left_while_it_was_claimed_is_reported() -> None:
    session = claiming()
    session.end(*ENDED_ABNORMALLY)
    session.on_claimed()
    # The connection before it has lost the id, too.
    assert session.taken() == [("take_over",), ("release",)]
    session.on_released(True)
    assert session.taken() == [("report", *ENDED_ABNORMALLY)]
    assert session.slot[c.CONNECTIONS_OPENED] == session.slot[c.CONNECTIONS_CLOSED] == 1


@pytest.mark.parametrize("make", [make for make, state in STATES if state != CLAIMING])
def test_claim_counts_once(make: Callable[..., Recorder]) -> None:
    session = make()
    state = session.state
    session.on_claimed()
    assert session.state == state
    assert session.taken() == []


# Messages to the API.


def test_message_is_posted_at_once() -> None:
    session = opened()
    session.on_message(BINARY, b"\xff")
    assert session.posts == [(1, BINARY, b"\xff")]
    assert (session.in_flight, session.queued) == (1, 0)


def test_messages_are_posted_one_after_the_other() -> None:
    session = opened()
    session.receives(b"a", b"b", b"c")
    assert session.posts == [(1, TEXT, b"a")]
    session.is_answered(MESSAGE)
    assert session.posts == [(1, TEXT, b"a"), (2, TEXT, b"b")]
    session.fails(MESSAGE)
    assert session.posts == [(1, TEXT, b"a"), (2, TEXT, b"b"), (3, TEXT, b"c")]
    session.is_answered(MESSAGE, 500)
    assert (session.in_flight, session.queued) == (0, 0)


def test_several_messages_may_be_under_way() -> None:
    session = opened(max_in_flight=3)
    session.receives(b"a", b"b", b"c", b"d")
    assert [payload for _, _, payload in session.posts] == [b"a", b"b", b"c"]
    session.is_answered(MESSAGE)
    assert session.posts[3:] == [(4, TEXT, b"d")]


def test_failed_message_takes_its_number_with_it() -> None:
    session = opened()
    session.receives(b"lost")
    session.fails(MESSAGE, ApiTimeout("late"))
    session.receives(b"next")
    assert session.posts == [(1, TEXT, b"lost"), (2, TEXT, b"next")]


def test_counts_what_the_client_sends() -> None:
    session = opened()
    session.receives(b"four", b"seven")
    assert session.slot[c.MESSAGES_RECEIVED] == 2
    assert session.slot[c.BYTES_RECEIVED] == 9


@pytest.mark.parametrize("limit", [1, 2, 3, 16])
def test_reading_stops_at_a_full_queue_and_goes_on_at_half(limit: int) -> None:
    session = opened(max_queue=limit)
    session.receives(*[b"x"] * limit)
    assert session.wants_messages
    session.receives(b"x")
    assert not session.wants_messages
    assert session.queued == limit
    while session.queued > limit // 2:
        assert not session.reading
        session.is_answered(MESSAGE)
    assert session.wants_messages
    assert session.reading


def test_client_that_does_not_read_is_not_read() -> None:
    session = opened()
    session.on_writable(False)
    session.on_writable(True)
    assert session.taken() == [("read_on", False), ("read_on", True)]


def test_reading_goes_on_when_both_reasons_are_gone() -> None:
    session = opened(max_queue=2)
    session.receives(b"a", b"b", b"c")
    session.on_writable(False)
    session.is_answered(MESSAGE)
    session.is_answered(MESSAGE)
    assert not session.reading
    session.on_writable(True)
    assert session.reading


def test_reader_that_catches_up_does_not_empty_the_queue() -> None:
    session = opened(max_queue=2)
    session.receives(b"a", b"b", b"c")
    session.on_writable(False)
    session.on_writable(True)
    assert not session.reading


def test_message_of_a_client_that_does_not_read_waits() -> None:
    session = opened(max_in_flight=2)
    session.receives(b"a")
    session.on_writable(False)
    session.receives(b"b", b"c")
    session.is_answered(MESSAGE)
    assert [payload for _, _, payload in session.posts] == [b"a"]
    session.on_writable(True)
    assert [payload for _, _, payload in session.posts] == [b"a", b"b", b"c"]
    assert session.reading


def test_messages_that_come_when_reading_goes_on_find_their_place() -> None:
    class Eager(Recorder):
        def _read_on(self, on: bool) -> None:
            super()._read_on(on)
            while self.wants_messages:
                self.receives(b"%d" % self.slot[c.MESSAGES_RECEIVED])

    session = Eager(max_queue=2)
    session.announces()
    session.on_announced()
    session.is_accepted()
    session.on_claimed()
    session.receives(b"0", b"1", b"2")
    for _ in range(5):
        session.is_answered(MESSAGE)
    assert session.posts == [(i + 1, TEXT, b"%d" % i) for i in range(6)]
    assert session.queued <= 2


# Messages to the client.


@pytest.mark.parametrize(
    ("type_", "first_byte"),
    [
        ("", TEXT),
        ("text/plain", TEXT),
        ("application/json", TEXT),
        ("application/octet-stream", BINARY),
        ("Application/Octet-Stream; x=y", BINARY),
    ],
)
def test_reply_goes_back_as_a_message(type_: str, first_byte: int) -> None:
    session = opened()
    session.receives(b"hi")
    session.taken()
    session.is_answered(MESSAGE, 200, "grüß dich".encode(), type_)
    assert session.taken() == [("write", encode(first_byte, "grüß dich".encode()))]
    assert session.slot[c.MESSAGES_SENT] == 1
    assert session.slot[c.BYTES_SENT] == len("grüß dich".encode())


@pytest.mark.parametrize(("status", "body"), [(200, b""), (204, b""), (500, b"no"), (201, b"no")])
def test_other_answers_are_no_message(status: int, body: bytes) -> None:
    session = opened()
    session.receives(b"hi")
    session.taken()
    session.is_answered(MESSAGE, status, body)
    assert session.taken() == []
    assert session.state == OPEN


def test_reply_is_written_before_the_next_message_is_posted() -> None:
    session = opened()
    session.receives(b"a", b"b")
    session.taken()
    session.is_answered(MESSAGE, 200, b"re: a")
    assert session.taken() == [("write", encode(TEXT, b"re: a")), ("post", b"b")]


def test_text_reply_that_is_no_utf8_is_not_passed_on() -> None:
    session = opened()
    session.receives(b"hi")
    session.taken()
    session.is_answered(MESSAGE, 200, b"\xff")
    assert session.taken() == []
    assert session.slot[c.API_REPLIES_INVALID] == 1
    assert session.slot[c.MESSAGES_SENT] == 0
    assert session.in_flight == 0


def test_binary_reply_need_not_be_utf8() -> None:
    session = opened()
    session.receives(b"hi")
    session.taken()
    session.is_answered(MESSAGE, 200, b"\xff", "application/octet-stream")
    assert session.taken() == [("write", encode(BINARY, b"\xff"))]


def test_reply_to_a_client_that_has_left_is_dropped() -> None:
    session = opened()
    session.receives(b"hi")
    session.end(1000, "")
    session.taken()
    session.is_answered(MESSAGE, 200, b"too late")
    assert session.taken() == []
    assert session.slot[c.MESSAGES_SENT] == 0


def test_delivers_a_push() -> None:
    session = opened()
    assert session.deliver(BINARY, b"\xff") == outcomes.OK
    assert session.taken() == [("write", encode(BINARY, b"\xff"))]
    assert (session.slot[c.MESSAGES_SENT], session.slot[c.BYTES_SENT]) == (1, 1)


@pytest.mark.parametrize("make", NOT_OPEN)
def test_delivers_only_while_open(make: Callable[..., Recorder]) -> None:
    session = make()
    assert session.deliver(TEXT, b"x") == outcomes.NOT_FOUND
    assert session.taken() == []


def test_delivers_nothing_to_a_client_that_does_not_read() -> None:
    session = opened()
    session.on_writable(False)
    session.taken()
    assert session.deliver(TEXT, b"x") == outcomes.TOO_SLOW
    assert session.taken() == []
    assert session.slot[c.MESSAGES_SENT] == 0


# The end.


def test_end_is_reported_after_the_release() -> None:
    session = opened()
    session.end(4001, "grün")
    assert session.taken() == [("release",)]
    session.on_released(True)
    assert session.taken() == [("report", 4001, "grün")]
    assert session.slot[c.CONNECTIONS_CLOSED] == 1


def test_end_is_taken_once() -> None:
    session = opened()
    session.end(1000, "first")
    session.end(*ENDED_ABNORMALLY)
    session.close(1001, "third")
    session.on_released(True)
    session.end(*ENDED_ABNORMALLY)
    assert session.taken() == [("release",), ("report", 1000, "first")]
    assert session.slot[c.CONNECTIONS_CLOSED] == 1


@pytest.mark.parametrize(
    "order",
    ["released answered answered", "answered released answered", "answered answered released"],
)
def test_api_hears_of_the_end_last(order: str) -> None:
    session = opened()
    session.receives(b"a", b"b")
    session.end(1000, "")
    session.taken()
    for step in order.split():
        assert not any(action[0] == "report" for action in session.taken())
        if step == "released":
            session.on_released(True)
        else:
            session.is_answered(MESSAGE)
    assert session.taken()[-1] == ("report", 1000, "")
    assert len(session.posts) == 2


def test_end_is_reported_when_the_last_message_failed() -> None:
    session = opened()
    session.receives(b"a")
    session.end(1000, "")
    session.on_released(True)
    session.taken()
    session.fails(MESSAGE)
    assert session.taken() == [("report", 1000, "")]


def test_end_is_reported_when_redis_is_away() -> None:
    session = opened(releases_at_once=True)
    session.end(1000, "")
    assert session.taken() == [("release",), ("report", 1000, "")]


@pytest.mark.parametrize("way", ["reply", "failure"])
def test_is_closed_when_the_api_has_heard_or_never_will(way: str) -> None:
    session = reporting()
    if way == "reply":
        session.is_answered(DISCONNECT)
    else:
        session.fails(DISCONNECT)
    assert session.state == CLOSED


def test_end_is_settled_when_the_api_has_heard_of_it() -> None:
    session = reporting()
    assert session.settled == 0
    session.is_answered(DISCONNECT)
    assert session.settled == 1


@pytest.mark.parametrize("way", ["fails", "is_parked"])
def test_end_that_the_api_has_not_heard_of_is_not_settled(way: str) -> None:
    session = reporting()
    session.fails(DISCONNECT) if way == "fails" else session.is_parked()
    assert session.settled == 0


def test_answers_to_messages_settle_nothing() -> None:
    session = opened()
    session.receives(b"a")
    session.is_answered(MESSAGE)
    assert session.settled == 0


def test_parked_end_is_over() -> None:
    session = reporting()
    session.is_parked()
    assert session.state == CLOSED
    assert session.taken() == []
    assert not session.is_owed


# Owed to the API.


@pytest.mark.parametrize(("make", "state"), STATES)
def test_end_is_owed_from_its_release_to_the_answer(
    make: Callable[..., Recorder], state: int
) -> None:
    assert make().is_owed == (state == REPORTING)


def test_end_is_owed_while_messages_are_under_way() -> None:
    session = opened()
    session.receives(b"a", b"b")
    session.end(1000, "")
    assert not session.is_owed, "Redis does not know of it yet"
    session.on_released(True)
    assert session.is_owed
    session.is_answered(MESSAGE)
    assert session.is_owed
    session.is_answered(MESSAGE)
    assert session.is_owed
    session.is_answered(DISCONNECT)
    assert not session.is_owed


def test_end_is_owed_when_redis_is_away() -> None:
    session = opened(releases_at_once=True)
    session.receives(b"a")
    session.end(1000, "")
    assert session.is_owed


def test_end_of_a_connection_that_gave_way_is_not_owed() -> None:
    for gives_way in (lambda s: s.replace(), lambda s: (s.end(1000, ""), s.on_released(False))):
        session = opened()
        session.receives(b"a")
        gives_way(session)
        assert session.state == CLOSING
        assert not session.is_owed


@pytest.mark.parametrize("how", ["end", "close", "drain"])
def test_messages_of_a_client_that_does_not_read_are_posted_at_the_end(how: str) -> None:
    session = opened()
    session.receives(b"a")
    session.on_writable(False)
    session.receives(b"b", b"c")
    if how == "drain":
        session.drain(1001, "")
    session.is_answered(MESSAGE)
    if how != "drain":
        getattr(session, how)(1001, "")
        session.on_released(True)
    session.is_answered(MESSAGE)
    assert ("report", 1001, "") not in session.actions
    session.is_answered(MESSAGE)
    if how == "drain":  # which closes when all is answered
        session.on_released(True)
    assert session.posts == [(1, TEXT, b"a"), (2, TEXT, b"b"), (3, TEXT, b"c")]
    assert session.actions[-1] == ("report", 1001, "")


def test_closes_from_this_side() -> None:
    session = opened()
    session.close(1011, "ping timeout")
    assert session.taken() == [("send_close", 1011, "ping timeout"), ("release",)]
    session.on_released(True)
    assert session.taken() == [("report", 1011, "ping timeout")]


@pytest.mark.parametrize("make", NOT_OPEN)
@pytest.mark.parametrize("how", ["close", "drain"])
def test_closes_only_while_open(make: Callable[..., Recorder], how: str) -> None:
    session = make()
    state = session.state
    getattr(session, how)(1001, "going away")
    assert session.taken() == []
    assert session.state == state


# Replaced by a newer connection.


def test_replaced_client_is_closed_and_not_reported() -> None:
    session = opened()
    session.replace()
    assert session.taken() == [REPLACED]
    assert session.state == CLOSED
    assert session.slot[c.CONNECTIONS_CLOSED] == 1


def test_replaced_client_has_its_messages_posted() -> None:
    session = opened()
    session.receives(b"a", b"b")
    session.taken()
    session.replace()
    session.is_answered(MESSAGE, 200, b"too late")
    assert session.taken() == [REPLACED, ("post", b"b")]
    assert session.state == CLOSING
    session.is_answered(MESSAGE)
    assert session.taken() == []
    assert session.state == CLOSED


def test_id_that_belongs_to_a_newer_connection_is_not_reported() -> None:
    session = opened()
    session.end(1000, "")
    session.on_released(False)
    assert session.taken() == [("release",)]
    assert session.state == CLOSED


def test_replaced_while_the_id_is_released() -> None:
    session = closing()
    session.replace()
    session.on_released(True)
    assert session.taken() == []
    assert session.state == CLOSED


def test_replaced_while_the_last_message_is_under_way() -> None:
    session = opened()
    session.receives(b"a")
    session.end(1000, "")
    session.on_released(True)
    session.replace()
    session.taken()
    session.is_answered(MESSAGE)
    assert session.taken() == []
    assert session.state == CLOSED


def test_report_under_way_is_not_called_back() -> None:
    session = reporting()
    session.replace()
    assert session.state == REPORTING
    session.is_answered(DISCONNECT)
    assert session.state == CLOSED
    assert session.taken() == []


@pytest.mark.parametrize("make", [announcing, asking, claiming])
def test_replaced_before_it_was_open_closes_when_it_is(make: Callable[..., Recorder]) -> None:
    session = make()
    session.replace()
    if make is announcing:
        session.on_announced()
    if session.state == ASKING:
        session.is_accepted()
    session.taken()
    session.on_claimed()
    assert session.taken() == [("take_over",), ("welcome",), REPLACED]
    assert session.state == CLOSED
    assert session.slot[c.CONNECTIONS_OPENED] == session.slot[c.CONNECTIONS_CLOSED] == 1


@pytest.mark.parametrize("make", [asking, claiming])
def test_replaced_before_it_was_open_and_left(make: Callable[..., Recorder]) -> None:
    session = make()
    session.end(*ENDED_ABNORMALLY)
    session.replace()
    if session.state == ASKING:
        session.is_accepted()
    session.on_claimed()
    assert session.state == CLOSED
    assert not any(action[0] in ("report", "welcome") for action in session.taken())


# Given up for lost.


def test_client_that_was_given_up_is_closed_and_not_reported_again() -> None:
    session = opened()
    session.give_up()
    assert session.taken() == [GIVEN_UP]
    assert session.state == CLOSED
    assert not session.is_owed
    assert session.slot[c.CONNECTIONS_CLOSED] == 1


def test_client_that_was_given_up_has_its_messages_posted() -> None:
    session = opened()
    session.receives(b"a", b"b")
    session.taken()
    session.give_up()
    assert session.state == CLOSING
    session.is_answered(MESSAGE)
    assert ("post", b"b") in session.taken()
    session.is_answered(MESSAGE)
    assert len(session.posts) == 2
    assert session.state == CLOSED
    assert session.taken() == []


def test_client_that_was_given_up_while_it_was_drained_is_closed_at_once() -> None:
    session = opened()
    session.receives(b"a")
    session.drain(1001, "going away")
    session.taken()
    session.give_up()
    assert session.taken() == [GIVEN_UP]
    session.is_answered(MESSAGE)
    assert session.state == CLOSED
    assert session.taken() == []


@pytest.mark.parametrize("make", [announcing, asking, claiming])
def test_client_that_was_given_up_before_it_was_open_is_closed_and_reported_when_it_is(
    make: Callable[..., Recorder],
) -> None:
    """The API may have said yes after it was told of the end, so it must hear of it again."""
    session = make()
    session.give_up()
    if make is announcing:
        session.on_announced()
    if session.state == ASKING:
        session.is_accepted()
    session.taken()
    session.on_claimed()
    assert session.taken() == [("take_over",), ("welcome",), GIVEN_UP, ("release",)]
    assert session.state == CLOSING
    assert session.slot[c.CONNECTIONS_OPENED] == session.slot[c.CONNECTIONS_CLOSED] == 1
    session.on_released(True)
    assert session.is_owed
    assert session.taken() == [("report", *GIVEN_UP[1:])]


@pytest.mark.parametrize("make", [asking, claiming])
def test_client_that_was_given_up_before_it_was_open_may_have_been_replaced(
    make: Callable[..., Recorder],
) -> None:
    session = make()
    session.give_up()
    if session.state == ASKING:
        session.is_accepted()
    session.taken()
    session.on_claimed(owned=False)
    assert session.taken() == [("take_over",), ("welcome",), REPLACED]
    assert session.state == CLOSED


@pytest.mark.parametrize("make", [asking, claiming])
def test_client_that_was_given_up_before_it_was_open_may_have_left(
    make: Callable[..., Recorder],
) -> None:
    session = make()
    session.end(*ENDED_ABNORMALLY)
    session.give_up()
    if session.state == ASKING:
        session.is_accepted()
    session.taken()
    session.on_claimed()
    assert session.taken() == [("take_over",), ("release",)]
    session.on_released(True)
    assert session.taken() == [("report", *ENDED_ABNORMALLY)]


@pytest.mark.parametrize("make", [in_handshake, waiting])
def test_client_that_the_api_was_not_asked_about_is_not_given_up(
    make: Callable[..., Recorder],
) -> None:
    session = make()
    session.give_up()
    assert session.taken() == []
    assert not session.is_leaving


def test_client_that_was_given_up_may_be_refused() -> None:
    session = asking()
    session.give_up()
    session.is_answered(CONNECT, 403)
    assert session.taken() == [("refuse", 403)]
    assert session.state == CLOSED


@pytest.mark.parametrize("make", [closing, reporting, closed])
def test_connection_that_has_ended_is_not_given_up(make: Callable[..., Recorder]) -> None:
    session = make()
    state, is_owed = session.state, session.is_owed
    session.give_up()
    assert session.taken() == []
    assert (session.state, session.is_owed) == (state, is_owed)
    if make is closing:
        session.on_released(True)
        assert session.taken() == [("report", 1000, "bye")]


# Drained before a shutdown.


def test_idle_client_is_drained_at_once() -> None:
    session = opened()
    session.drain(1001, "going away")
    assert session.taken() == [("send_close", 1001, "going away"), ("release",)]


def test_drained_client_is_not_read_and_closed_after_its_last_answer() -> None:
    session = opened()
    session.receives(b"a", b"b")
    session.taken()
    session.drain(1001, "going away")
    assert session.taken() == [("read_on", False)]
    session.is_answered(MESSAGE, 200, b"re: a")
    assert session.taken() == [("write", encode(TEXT, b"re: a")), ("post", b"b")]
    session.is_answered(MESSAGE, 200, b"re: b")
    assert session.taken() == [
        ("write", encode(TEXT, b"re: b")),
        ("send_close", 1001, "going away"),
        ("release",),
    ]


def test_drain_waits_for_all_that_is_under_way() -> None:
    session = opened(max_in_flight=2)
    session.receives(b"a", b"b")
    session.drain(1001, "")
    session.is_answered(MESSAGE)
    assert session.state == OPEN
    session.fails(MESSAGE)
    assert session.state == CLOSING


def test_drained_client_is_not_read_again() -> None:
    session = opened(max_queue=2)
    session.receives(b"a", b"b", b"c")
    session.drain(1001, "")
    session.on_writable(False)
    session.on_writable(True)
    session.is_answered(MESSAGE)
    assert session.queued == 1
    assert not session.reading


def test_drained_client_may_leave_first() -> None:
    session = opened()
    session.receives(b"a")
    session.drain(1001, "")
    session.end(1000, "bye")
    session.on_released(True)
    session.taken()
    session.is_answered(MESSAGE)
    assert session.taken() == [("report", 1000, "bye")]


def test_client_is_leaving_from_the_farewell_on() -> None:
    session = opened()
    session.receives(b"a")
    assert not session.is_leaving
    session.drain(SERVICE_RESTART, "service restart")
    assert session.is_leaving
    assert session.state == OPEN


@pytest.mark.parametrize("make", NOT_OPEN)
def test_nobody_leaves_who_is_not_there(make: Callable[..., Recorder]) -> None:
    session = make()
    session.drain(SERVICE_RESTART, "service restart")
    assert not session.is_leaving


def test_last_farewell_is_the_one_that_is_said() -> None:
    session = opened()
    session.receives(b"a")
    session.drain(SERVICE_RESTART, "service restart")
    session.drain(1001, "going away")
    session.taken()
    session.is_answered(MESSAGE)
    assert session.taken() == [("send_close", 1001, "going away"), ("release",)]


def test_drained_client_still_gets_pushes() -> None:
    session = opened()
    session.receives(b"a")
    session.drain(1001, "")
    assert session.deliver(TEXT, b"x") == outcomes.OK


# What the metrics say.


def gauges(session: Recorder) -> tuple[int, int]:
    """Return how many clients are paused, and how many messages wait."""
    return session.slot[c.CLIENTS_PAUSED], session.slot[c.MESSAGES_QUEUED]


def test_gauges_follow_the_queue() -> None:
    session = opened(max_queue=2)
    assert gauges(session) == (0, 0)
    session.receives(b"a", b"b")
    assert gauges(session) == (0, 1)
    session.receives(b"c")
    assert gauges(session) == (1, 2)
    session.is_answered(MESSAGE)
    assert gauges(session) == (0, 1)
    session.is_answered(MESSAGE)
    assert gauges(session) == (0, 0)


def test_client_that_does_not_read_is_paused() -> None:
    session = opened()
    session.on_writable(False)
    assert gauges(session) == (1, 0)
    session.on_writable(False)
    assert gauges(session) == (1, 0)
    session.on_writable(True)
    assert gauges(session) == (0, 0)


def test_client_that_did_not_read_before_it_was_open_is_paused_from_then_on() -> None:
    session = claiming()
    session.on_writable(False)
    assert gauges(session) == (0, 0)
    session.on_claimed()
    assert gauges(session) == (1, 0)
    session.end(*ENDED_ABNORMALLY)
    assert gauges(session) == (0, 0)


ENDS: list[Callable[[Recorder], None]] = [
    lambda session: session.end(1000, "bye", causes.CLIENT),
    lambda session: session.end(*ENDED_ABNORMALLY),
    lambda session: session.close(1008, "too slow"),
    lambda session: session.replace(),
    lambda session: session.give_up(),
    lambda session: session.drain(1001, "going away"),
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("writable", [True, False])
def test_gauges_are_as_before_when_the_session_is_over(
    end: Callable[[Recorder], None], writable: bool
) -> None:
    session = opened(max_queue=2)
    session.receives(b"a", b"b", b"c")
    session.on_writable(writable)
    assert gauges(session) == (1, 2)
    end(session)
    while session.in_flight:
        session.fails(MESSAGE)
    session.end(*ENDED_ABNORMALLY)
    assert gauges(session) == (0, 0)
    assert sum(closes_of(session).values()) == session.slot[c.CONNECTIONS_CLOSED] == 1


def test_client_that_is_drained_while_it_is_paused_is_paused_once() -> None:
    session = opened(max_queue=1)
    session.receives(b"a", b"b")
    session.drain(1001, "going away")
    assert gauges(session) == (1, 1)
    session.is_answered(MESSAGE)
    assert gauges(session) == (1, 0)
    session.is_answered(MESSAGE)
    assert session.state == CLOSING
    assert gauges(session) == (0, 0)


@pytest.mark.parametrize(
    ("end", "cause", "code"),
    [
        (lambda s: s.end(1000, "bye", causes.CLIENT), causes.CLIENT, "1000"),
        (lambda s: s.end(4321, "bye", causes.CLIENT), causes.CLIENT, "4xxx"),
        (lambda s: s.end(1002, "masked", causes.PROTOCOL), causes.PROTOCOL, "1002"),
        (lambda s: s.end(*ENDED_ABNORMALLY), causes.LOST, "1006"),
        (lambda s: s.close(3999, "x", causes.API), causes.API, "3xxx"),
        (lambda s: s.close(1001, "x", causes.API), causes.API, "1001"),
        (lambda s: s.close(1001, "going away"), causes.SHUTDOWN, "1001"),
        (lambda s: s.drain(1012, "service restart"), causes.RESTART, "1012"),
        (lambda s: s.close(1008, "too slow"), causes.TOO_SLOW, "1008"),
        (lambda s: s.close(1011, "ping timeout"), causes.PING_TIMEOUT, "1011"),
        (lambda s: s.replace(), causes.REPLACED, "4008"),
        (lambda s: s.give_up(), causes.RESTART, "1012"),
    ],
)
def test_end_is_counted_once_under_its_cause_and_code(
    end: Callable[[Recorder], None], cause: str, code: str
) -> None:
    session = opened()
    for _ in range(2):
        end(session)
        session.end(*ENDED_ABNORMALLY)
        assert closes_of(session) == {cause: 1}
        assert session.slot[c.CLOSES[cause, code]] == 1
        assert session.causes == [cause]


@pytest.mark.parametrize("make", NOT_OPEN)
def test_what_was_never_open_does_not_end_in_the_metrics(make: Callable[..., Recorder]) -> None:
    session = make()
    before = closes_of(session)
    session.end(*ENDED_ABNORMALLY)
    session.close(1001, "going away")
    assert closes_of(session) == before


def test_client_that_left_while_it_was_claimed_counts_as_lost() -> None:
    session = claiming()
    session.end(*ENDED_ABNORMALLY)
    session.on_claimed()
    assert closes_of(session) == {causes.LOST: 1}


def test_counts_the_messages_to_the_client() -> None:
    session = opened()
    session.receives(b"a", b"b", b"c", b"d")
    session.is_answered(MESSAGE, 200, b"answer")
    session.is_answered(MESSAGE, 200, b"\xff", "text/plain")
    session.is_answered(MESSAGE, 204)
    session.deliver(TEXT, b"push")
    assert session.sent == session.slot[c.MESSAGES_SENT] == 2
    session.on_writable(False)
    assert session.deliver(TEXT, b"push") == outcomes.TOO_SLOW
    session.end(*ENDED_ABNORMALLY)
    session.is_answered(MESSAGE, 200, b"too late")
    assert session.sent == 2


# All of it in any order.


class Life(RuleBasedStateMachine):
    """Let anything happen to a session that its socket, the API and Redis may do to it."""

    @initialize(
        max_in_flight=st.integers(1, 3), max_queue=st.integers(1, 4), releases_at_once=st.booleans()
    )
    def connects(self, max_in_flight: int, max_queue: int, releases_at_once: bool) -> None:
        self.session = Recorder(max_in_flight, max_queue, releases_at_once=releases_at_once)
        self.session.announces()
        self.max_in_flight, self.max_queue = max_in_flight, max_queue
        self.received: list[bytes] = []
        self.answered = 0
        self.socket_ended = self.announced = self.accepted = self.released = False
        self.replaced_before_report = False
        # Whether it was given up when it was open, and before.
        self.given_up = self.given_up_early = False
        self.heard = 0
        self.last_state = ASKING

    def is_in(self, *states: int) -> bool:
        return self.session.state in states

    @property
    def asked_to_release(self) -> bool:
        return ("release",) in self.session.actions

    @property
    def reports(self) -> int:
        return sum(action[0] == "report" for action in self.session.actions)

    @precondition(lambda self: not self.announced)
    @rule()
    def registry_has_announced(self) -> None:
        self.announced = True
        self.session.on_announced()

    @precondition(lambda self: self.announced and self.is_in(ASKING))
    @rule()
    def api_accepts(self) -> None:
        self.accepted = True
        self.session.is_accepted()

    @precondition(lambda self: self.announced and self.is_in(ASKING))
    @rule(fails=st.booleans())
    def api_refuses(self, fails: bool) -> None:
        if fails:
            self.session.fails(CONNECT)
        else:
            self.session.is_answered(CONNECT, 403)

    @precondition(lambda self: self.is_in(CLAIMING))
    @rule(owned=st.sampled_from((True, True, True, False)))
    def registry_has_claimed(self, owned: bool) -> None:
        self.replaced_before_report |= not owned
        self.session.on_claimed(owned)

    @precondition(lambda self: self.is_in(OPEN) and self.session.wants_messages)
    @rule(count=st.integers(1, 6))
    def client_sends(self, count: int) -> None:
        for _ in range(count):
            if self.is_in(OPEN) and self.session.wants_messages:
                message = b"%d" % len(self.received)
                self.received.append(message)
                self.session.receives(message)

    @precondition(lambda self: self.session.in_flight)
    @rule(status=st.sampled_from((200, 204, 500)), body=st.sampled_from((b"", b"re", b"\xff")))
    def api_answers(self, status: int, body: bytes) -> None:
        self.answered += 1
        self.session.is_answered(MESSAGE, status, b"" if status == 204 else body)

    @precondition(lambda self: self.session.in_flight)
    @rule()
    def api_fails(self) -> None:
        self.answered += 1
        self.session.fails(MESSAGE)

    @precondition(lambda self: not self.socket_ended)
    @rule(writable=st.booleans())
    def client_reads_or_not(self, writable: bool) -> None:
        if writable != self.session.writable:
            self.session.on_writable(writable)

    @precondition(lambda self: not self.socket_ended)
    @rule(code=st.sampled_from((1000, ABNORMAL)))
    def socket_ends(self, code: int) -> None:
        self.socket_ended = True
        self.session.end(code, "")

    @rule(how=st.sampled_from(("close", "drain")))
    def gateway_closes(self, how: str) -> None:
        getattr(self.session, how)(1001, "going away")

    @rule()
    def newer_connection_comes(self) -> None:
        self.replaced_before_report |= not self.reports
        self.session.replace()

    @rule()
    def others_give_it_up(self) -> None:
        self.given_up |= self.is_in(OPEN)
        self.given_up_early |= self.is_in(ASKING, CLAIMING)
        self.session.give_up()

    @precondition(
        lambda self: self.asked_to_release and not self.released and not self.session._released
    )
    @rule(owned=st.booleans())
    def registry_has_released(self, owned: bool) -> None:
        self.released = True
        self.replaced_before_report |= not owned
        self.session.on_released(owned)

    @precondition(lambda self: self.is_in(REPORTING))
    @rule(way=st.sampled_from(("hears", "fails", "others tell it")))
    def api_has_heard(self, way: str) -> None:
        if way == "hears":
            self.heard += 1
            self.session.is_answered(DISCONNECT)
        elif way == "fails":
            self.session.fails(DISCONNECT)
        else:
            self.session.is_parked()

    @rule()
    def api_pushes(self) -> None:
        outcome = self.session.deliver(TEXT, b"push")
        if not self.is_in(OPEN):
            assert outcome == outcomes.NOT_FOUND

    @invariant()
    def messages_are_posted_in_order_and_numbered_without_gap(self) -> None:
        posts = self.session.posts
        assert (
            posts
            == [(i + 1, TEXT, message) for i, message in enumerate(self.received)][: len(posts)]
        )
        assert len(posts) + self.session.queued == len(self.received)

    @invariant()
    def no_more_is_under_way_than_allowed(self) -> None:
        in_flight = len(self.session.posts) - self.answered
        assert in_flight == self.session.in_flight
        assert in_flight <= self.max_in_flight

    @invariant()
    def reading_is_off_while_the_queue_is_full(self) -> None:
        assert self.session.queued <= self.max_queue
        assert self.session.reading == self.session.wants_messages
        if self.is_in(OPEN) and (
            self.session.queued == self.max_queue or not self.session.writable
        ):
            assert not self.session.reading

    @invariant()
    def nobody_is_kept_waiting(self) -> None:
        if self.session.queued and (self.session.writable or not self.is_in(OPEN)):
            assert self.session.in_flight == self.max_in_flight
        if self.is_in(OPEN) and not self.session.queued and self.session.writable:
            assert self.session.reading or self.session.in_flight, "nothing would read on"

    @invariant()
    def states_only_go_forward(self) -> None:
        assert self.session.state >= self.last_state
        self.last_state = self.session.state

    @invariant()
    def end_is_reported_once_and_last(self) -> None:
        assert self.reports <= 1
        if self.reports:
            assert self.session.actions[-1][0] in ("report", "read_on")
            assert self.answered == len(self.received)
            assert not self.replaced_before_report

    @invariant()
    def who_was_given_up_does_not_stay(self) -> None:
        assert not (self.is_in(OPEN) and (self.given_up or self.given_up_early))
        if self.given_up:
            assert not self.reports, "the API was told already"

    @invariant()
    def what_the_api_accepted_is_reported_unless_it_knows(self) -> None:
        if self.is_in(CLOSED) and self.accepted:
            assert self.reports or self.replaced_before_report or self.given_up

    @invariant()
    def what_is_owed_is_reported_or_will_be(self) -> None:
        session = self.session
        if session.is_owed:
            assert self.is_in(CLOSING, REPORTING)
            assert session._released
            assert self.is_in(REPORTING) or not session.replaced
        elif self.is_in(REPORTING):
            raise AssertionError("what is under way is owed")
        assert session.settled == self.heard

    @invariant()
    def books_are_kept(self) -> None:
        slot = self.session.slot
        assert slot[c.CONNECTIONS_OPENED] - slot[c.CONNECTIONS_CLOSED] == self.is_in(OPEN)
        assert slot[c.MESSAGES_RECEIVED] == len(self.received)
        assert closes_of(self.session) == dict.fromkeys(
            self.session.causes, slot[c.CONNECTIONS_CLOSED]
        )
        assert len(self.session.causes) == slot[c.CONNECTIONS_CLOSED] <= 1
        assert self.session.sent == slot[c.MESSAGES_SENT] == self.session.written

    @invariant()
    def gauges_say_what_is_so(self) -> None:
        session, slot = self.session, self.session.slot
        assert slot[c.MESSAGES_QUEUED] == session.queued
        assert slot[c.CLIENTS_PAUSED] == (self.is_in(OPEN) and not session.wants_messages)

    def teardown(self) -> None:
        """Let it end, and look back."""
        if not hasattr(self, "session"):
            return
        session = self.session
        if not self.announced:
            self.registry_has_announced()
        if self.is_in(ASKING):
            self.api_accepts()
        session.on_claimed()
        session.end(ABNORMAL, "")
        if self.asked_to_release and not session._released:
            session.on_released(True)
        while session.in_flight:
            self.api_answers(200, b"")
        if self.is_in(REPORTING):
            session.is_answered(DISCONNECT)
        assert session.state == CLOSED
        if self.given_up:  # the API has been told by others
            assert self.reports <= self.accepted
        else:
            assert self.reports == (self.accepted and not self.replaced_before_report)
        assert len(session.posts) == len(self.received)
        assert session.slot[c.MESSAGES_QUEUED] == session.slot[c.CLIENTS_PAUSED] == 0


Life.TestCase.settings = settings(deadline=None, max_examples=120, stateful_step_count=30)
TestLife = Life.TestCase


@pytest.mark.parametrize(
    ("status", "complaints"), [(200, []), (204, []), (201, ["status 201"]), (500, ["status 500"])]
)
def test_answer_that_the_contract_does_not_know_is_told_to_the_operator(
    status: int, complaints: list[str]
) -> None:
    session = opened()
    session.receives(b"a")
    session.is_answered(MESSAGE, status)
    assert session.complaints == complaints
    assert session.state == OPEN
