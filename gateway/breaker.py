"""Decide how much the API may be asked, from how it has answered: a circuit breaker, pure.

    CLOSED     all may go; failures in a row are counted  → OPEN at the fifth
    OPEN       nothing may go                             → HALF_OPEN when the pause is over
    HALF_OPEN  one may go, one more after each success    → CLOSED when nothing waits any more, or
                                                            as many may be under way as ever
                                                          → OPEN at a failure of the first that
                                                            went, for longer; once it has answered,
                                                            at the fifth as when closed

A failure is a sign that the API is away or does not keep up: it cannot be connected to, answers
503, or hangs up without an answer. Any other answer is a success; a timeout is neither. What was
sent before the last time that it was half open tells of times gone by, and counts for nothing.

A message may be what its own handler at the API dies of. So what befalls the requests of one client
counts once, however often it happens: the client is a suspect until the API has answered somebody.
While the API is in doubt the requests of suspects are asked less and less often as well, but nobody
else has to wait for that.
"""

from __future__ import annotations

from typing import Final

from .backoff import backoff

CLOSED: Final = 0
HALF_OPEN: Final = 1
OPEN: Final = 2

FAILURES_TO_OPEN: Final = 5
MIN_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 2.0
MAX_RETRY_AFTER_S: Final = 5.0
"""The longest pause that the API may ask for."""
MOST_SUSPECTS: Final = 32
"""Clients that are remembered for their failures; beyond it the oldest is forgotten."""

# An API that fails again so soon after it seemed to be back has not been back.
_RELAPSE_S: Final = 2.0


class Breaker:
    """Be the state of one API address; whoever asks it says what time it is.

    Args:
        limit: how many may be under way at once when all is well.
    """

    __slots__ = (
        "_failures",
        "_has_answered",
        "_heard_at",
        "_limit",
        "_pause_ends_at",
        "_pauses",
        "_since",
        "_under_way",
        "_window",
        "closed_at",
        "state",
        "suspects",
    )

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.state: int = CLOSED
        self.closed_at = float("-inf")
        """Time of the last change to CLOSED."""
        self.suspects: dict[bytes, None] = {}
        """Clients whose requests have failed, the latest at the end."""
        # In a row, while closed; while half open, since the first answer.
        self._failures = 0
        # In a row, up to now.
        self._pauses = 0
        self._pause_ends_at = 0.0
        # Begin of the last look that was half open; what was sent before it is not listened to.
        self._since = float("-inf")
        # While half open: how many may be under way, how many are, and the time of the last answer
        # or, without one, of the last probe.
        self._window = 0
        self._under_way = 0
        self._heard_at = 0.0
        self._has_answered = False

    def __repr__(self) -> str:
        name = ("closed", "half-open", "open")[self.state]
        return f"<Breaker {name} failures={self._failures} window={self._window}>"

    @property
    def is_calm(self) -> bool:
        """Tell whether a success would change nothing."""
        return self.state == CLOSED and not self._failures

    @property
    def is_proven(self) -> bool:
        """Tell whether the API has answered since it was last in doubt."""
        return self.state == CLOSED or (self.state == HALF_OPEN and self._has_answered)

    def room(self, now: float) -> int:
        """Return how many more requests may go now; a pause that is over ends by this."""
        if self.state == CLOSED:
            return self._limit
        if self.state == OPEN:
            if now < self._pause_ends_at:
                return 0
            self.state = HALF_OPEN
            self._since = self._heard_at = now
            self._window = 1
            self._under_way = 0
            self._has_answered = False
        elif self._under_way >= self._window and now - self._heard_at >= MAX_PAUSE_S:
            # A request may take its time, so silence is no failure, but others need not wait for
            # this one: another probe.
            self._heard_at = now
            self._window = self._under_way + 1
        return max(0, self._window - self._under_way)

    def admit(self) -> None:
        """Count a request that goes; there must be room for it."""
        if self.state == HALF_OPEN:
            self._under_way += 1

    def on_success(self, now: float, sent_at: float, *, something_waits: bool) -> None:
        """Learn that the API has answered.

        Args:
            sent_at: time at which the request was sent.
            something_waits: whether there are requests that could not go yet.
        """
        if sent_at < self._since:
            return
        if self.state == CLOSED:
            self._forget_failures()
        elif self.state == HALF_OPEN:
            self._under_way -= 1
            self._window += 1
            self._heard_at = now
            if not self._has_answered:
                self._has_answered = True
                self._failures = 0
            if self._window >= self._limit or not something_waits:
                self.state = CLOSED
                self.closed_at = now
                self._forget_failures()

    def _forget_failures(self) -> None:
        self._failures = 0
        self.suspects.clear()

    def on_failure(
        self, now: float, sent_at: float, client: bytes | None, retry_after_s: float = 0.0
    ) -> None:
        """Learn that the API is away or does not keep up.

        Args:
            sent_at: time at which the attempt began.
            client: whose request failed; None when no connection could be opened, which is no
                client's doing, or when it does not matter who it was.
            retry_after_s: pause that the API has asked for, 0 if none.
        """
        if sent_at < self._since or self.state == OPEN:
            return
        if client is not None:
            if self.state == HALF_OPEN:
                self._under_way -= 1
            if client in self.suspects:
                self._put_off_suspects(now)
                return
            self._suspect(client)
        self._failures += 1
        if self._failures < FAILURES_TO_OPEN and self._bears_failures(client):
            return
        if self.state == CLOSED and now - self.closed_at > _RELAPSE_S:
            self._pauses = 0
        self.state = OPEN
        self._pause(now, retry_after_s)

    def on_old_news(self, now: float, sent_at: float) -> None:
        """Learn of a failure that is no reason to ask less, nor one to ask the same again soon."""
        self.on_nothing(sent_at)
        self._put_off_suspects(now)

    def asks_suspects(self, now: float) -> bool:
        """Tell whether a request may go now whose failure would be no news."""
        return now >= self._pause_ends_at

    def _put_off_suspects(self, now: float) -> None:
        if self.state == HALF_OPEN and not self._has_answered:
            self._pause(now, 0.0)

    def _pause(self, now: float, retry_after_s: float) -> None:
        self._pauses += 1
        pause_s = backoff(self._pauses, MIN_PAUSE_S, MAX_PAUSE_S)
        self._pause_ends_at = now + max(pause_s, min(retry_after_s, MAX_RETRY_AFTER_S))

    def _suspect(self, client: bytes) -> None:
        if len(self.suspects) >= MOST_SUSPECTS:
            del self.suspects[next(iter(self.suspects))]
        self.suspects[client] = None

    def _bears_failures(self, client: bytes | None) -> bool:
        """Tell whether one failure more or less is no reason to stop asking."""
        return self.state == CLOSED or (self._has_answered and client is not None)

    def on_nothing(self, sent_at: float) -> None:
        """Learn that a request has ended in a way that tells nothing of the API."""
        if self.state == HALF_OPEN and sent_at >= self._since:
            self._under_way -= 1
