"""State what the push port can ask of a client, wherever the client is: pure."""

from __future__ import annotations

from .envelope import PUSH
from .frames import TEXT


class Ask:
    """Carry one request about one client until its outcome is known.

    Subclasses say who learns the outcome: a connection of the push port, or another worker.
    """

    __slots__ = (
        "client_id",
        "code",
        "forwarded",
        "generation",
        "hops",
        "kind",
        "payload",
        "waited",
    )

    def __init__(
        self,
        kind: int = PUSH,
        client_id: bytes = b"",
        generation: int = 0,
        code: int = TEXT,
        payload: bytes = b"",
        hops: int = 0,
        waited: bool = False,
    ) -> None:
        self.kind = kind
        """PUSH, DESCRIBE or CLOSE of the envelope module."""
        self.client_id = client_id
        self.generation = generation
        """Generation that the client must have, 0 for any."""
        self.code = code
        """First byte of the frame for a push, close code for a close."""
        self.payload = payload
        """The message, or the close reason in UTF-8."""
        self.hops = hops
        """How often it was passed on because the client had moved."""
        self.waited = waited
        """True when it was held for a connect long enough, and is for the open connection now."""

        self.forwarded = False
        """True when this worker has handed it to another one."""

    def finish(self, outcome: int, body: bytes) -> None:
        """Tell the outcome; called exactly once.

        Args:
            outcome: one of the outcomes module.
            body: what to answer instead of the outcome's own text; empty for that text.
        """
        raise NotImplementedError
