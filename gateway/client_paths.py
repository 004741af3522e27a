"""Find the client id in a path, by the patterns of --path: pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from .client_id import PCHAR, normalise_client_id, normalise_escapes
from .errors import HandshakeError, PathUnknown

ONE: Final = "/{id}"
"""The pattern of ids that are the whole path, of one segment; the default."""
SEVERAL: Final = "/{id...}"
"""The pattern of ids that are the whole path, of any number of segments."""

_PATTERN: Final = re.compile(r"(/(?:[^{}]*/)?)\{id(\.\.\.)?\}((?:/[^{}]*)?)")
_SEGMENT: Final = re.compile(rb"(?!\.{1,2}\Z)(?:[%b]|%%[0-9A-F]{2})+" % PCHAR)


class Pattern(NamedTuple):
    """Be a path in which one place is the id's."""

    before: bytes
    after: bytes
    is_several: bool
    """Whether the id may have several segments."""

    def match(self, path: bytes) -> bytes | None:
        """Return what stands in the place of the id, None if the path is another."""
        before, after, is_several = self
        end = len(path) - len(after)
        if end < len(before) or not (path.startswith(before) and path.endswith(after)):
            return None
        found = path[len(before) : end]
        return found if is_several or b"/" not in found else None


def parse_pattern(text: str) -> Pattern:
    """Read a pattern, as /ocpp/{id} or /{id...}.

    Raises:
        ValueError: if no path can be like that.
    """
    parts = _PATTERN.fullmatch(text)
    if parts is None:
        raise ValueError(
            "expected a path with {id} or {id...} for one whole segment, as /ocpp/{id}, "
            f"got {text!r}"
        )
    before, several, after = parts.groups()
    wires = [normalise_escapes(part.encode("utf-8")) for part in (before, after)]
    segments = [*wires[0].split(b"/")[1:-1], *wires[1].split(b"/")[1:]]
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise ValueError(
            f"{text!r} has a segment that is empty, . or .., or characters that must be "
            "percent-encoded"
        )
    return Pattern(wires[0], wires[1], several is not None)


class ClientPaths:
    """Know the paths that clients may use.

    Args:
        patterns: see `parse_pattern`; the first that matches counts.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        texts = tuple(patterns)
        self._patterns = tuple(map(parse_pattern, texts))
        self.is_plain = texts == (ONE,)
        """Whether an id is all of its path, so that the path says nothing more."""
        self.takes_several = any(pattern.is_several for pattern in self._patterns)
        """Whether ids may have several segments."""
        self._refusal = f"clients connect to {' or '.join(texts)} here"

    def find(self, path: bytes) -> bytes:
        """Return the id in a path, normalised.

        Raises:
            PathUnknown: if the path is none of a client.
            HandshakeError: if what stands in the place of the id is none.
        """
        if self.is_plain:
            client_id = path[1:]
            if b"/" in client_id:
                raise HandshakeError("the path must be one segment, the client id")
            return normalise_client_id(client_id)
        if b"%" in path:
            path = normalise_escapes(path)
        for pattern in self._patterns:
            found = pattern.match(path)
            if found is not None:
                return normalise_client_id(found, pattern.is_several)
        raise PathUnknown(self._refusal)


IDS: Final = (ClientPaths((ONE,)), ClientPaths((SEVERAL,)))
"""The paths of pushes and look-ups, which are the id: of one segment (False), of several (True)."""
