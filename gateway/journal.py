"""Note what becomes of clients: for the log, for the metrics, and for whoever looks one up."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from . import causes
from . import counters as c
from .recent import CloseRecord, ErrorRecord, Ring
from .sweeper import Sweeper

if TYPE_CHECKING:
    from .session import Session

_COMPLAINTS_AT_ONCE: Final = 5
_COMPLAINT_S: Final = 1.0
"""Within this time no more than so many complaints of one cause are logged."""
_REFUSAL_S: Final = 10.0
"""The same for refusals of one kind, which anybody can cause."""
_HINT: Final = "hint"

_log = structlog.get_logger()


class Journal:
    """Be told of the beginnings, the ends and the troubles of a worker's clients.

    Args:
        slot: the worker's counters.
        closes: keeps the latest ends.
        errors: keeps the latest errors.
        logs_connections: whether a line is logged at the start and at the end of each connection.
    """

    def __init__(
        self, slot: memoryview, sweeper: Sweeper, closes: Ring, errors: Ring, logs_connections: bool
    ) -> None:
        self._slot = slot
        self._closes = closes
        self._errors = errors
        self.logs_connections = logs_connections
        # Where clients come from, of those whose start was logged: a socket that has ended does
        # not tell any more.
        self._remotes: dict[Session, str] = {}
        # Each cause has its own, so that none hides behind another.
        self._limiters = {
            cause: _Limiter(partial(_tell_complaints, cause), _COMPLAINT_S, sweeper)
            for cause in (*causes.OF_REQUESTS, _HINT)
        }
        self._sweeper = sweeper
        # By text and status, of which there are few.
        self._refusals: dict[tuple[str, int], _Limiter] = {}

    def opened(self, client: Session, remote: str) -> None:
        """Note that a client is connected.

        Args:
            remote: its IP address, as far as proxies are trusted to tell it.
        """
        if not self.logs_connections:
            return
        self._remotes[client] = remote
        _log.debug(
            "client connected",
            client=client.client_id.decode("ascii"),
            generation=client.generation,
            remote=remote,
        )

    def closed(self, client: Session, cause: str) -> None:
        """Note that a client's connection has ended.

        Its line says where it came from only if the line of its start was logged, too: it did not
        begin before the level was raised, nor had it left before it was open.
        """
        now_s = time.time()
        record = CloseRecord(
            now_s,
            client.generation,
            client.close_code,
            max(0.0, now_s - client.generation / 1e6),
            client.sequence + client.queued,
            client.sent,
            cause,
            client.client_id.decode("ascii"),
            client.close_reason or "",
        )
        self._closes.append(record.encode())
        remote = self._remotes.pop(client, None) if self._remotes else None
        if self.logs_connections:
            _log.debug(
                "client disconnected",
                client=record.client_id,
                generation=record.generation,
                remote=remote,
                code=record.code,
                cause=cause,
                duration_s=round(record.duration_s, 3),
                messages_received=record.messages_received,
                messages_sent=record.messages_sent,
            )

    def complain(self, text: str, client_id: bytes, cause: str, error: str) -> None:
        """Count what went wrong for one client, and log it, a few times a second at most.

        An API that fails fails for thousands of clients at once; the counters tell how many.

        Args:
            cause: one of the causes module.
        """
        self._slot[c.ERRORS[cause]] += 1
        if self._limiters[cause].lets_through():
            client = client_id.decode("ascii")
            record = ErrorRecord(time.time(), cause, client, f"{text}: {error}")
            self._errors.append(record.encode())
            _log.warning(text, client=client, cause=cause, error=error)

    def hint(self, text: str, client_id: bytes) -> None:
        """Log what is in order for the gateway, but hardly what was meant; as seldom."""
        if self._limiters[_HINT].lets_through():
            _log.warning(text, client=client_id.decode("ascii"))

    def connect_refused(self, client_id: bytes, status: int, reason: str, remote: str) -> None:
        """Log that a connect was refused, a few times in ten seconds at most.

        Args:
            client_id: empty when the request did not get so far.
            status: that of the answer.
            reason: one line.
            remote: IP address that it came from; empty when it is not known.
        """
        self._refused("connect refused", client_id, status, reason, remote)

    def push_refused(self, client_id: bytes, status: int, reason: str, remote: str) -> None:
        """Do the same for a push."""
        self._refused("push refused", client_id, status, reason, remote)

    def _refused(self, text: str, client_id: bytes, status: int, reason: str, remote: str) -> None:
        limiter = self._refusals.get((text, status))
        if limiter is None:
            tell = partial(_tell_refusals, text, status)
            limiter = self._refusals[text, status] = _Limiter(tell, _REFUSAL_S, self._sweeper)
        if limiter.lets_through():
            client = client_id.decode("ascii")
            _log.info(text, client=client, status=status, reason=reason, remote=remote)


def _tell_complaints(cause: str, count: int) -> None:
    _log.warning("similar lines were left out", cause=cause, count=count)


def _tell_refusals(text: str, status: int, count: int) -> None:
    _log.info("similar lines were left out", of=text, status=status, count=count)


class _Limiter:
    """Let a few lines through within a time, and tell how many others there were.

    Args:
        tell: logs how many were left out.
        within_s: that time.
    """

    def __init__(self, tell: Callable[[int], None], within_s: float, sweeper: Sweeper) -> None:
        self._log_left_out = tell
        self._within_s = within_s
        self._sweeper = sweeper
        # Lines since the given time.
        self._count = 0
        self._since = 0.0
        # Whether the wheel will ask how many were left out.
        self._will_tell = False

    def lets_through(self) -> bool:
        """Count a line; tell whether it may be logged."""
        now = self._sweeper.now
        if now - self._since >= self._within_s:
            self._tell()
            self._since = now
        self._count += 1
        if self._count <= _COMPLAINTS_AT_ONCE:
            return True
        if not self._will_tell:
            self._will_tell = True
            self._sweeper.schedule(self, self._within_s)
        return False

    def on_tick(self, now: float) -> float:
        """Tell how many were left out, although no other follows."""
        left_s = self._since + self._within_s - now
        if left_s > 0:
            return left_s
        self._will_tell = False
        self._tell()
        return 0.0

    def _tell(self) -> None:
        left_out, self._count = self._count - _COMPLAINTS_AT_ONCE, 0
        if left_out > 0:
            self._log_left_out(left_out)
