"""Recognise pushes whose header fields were parsed before: pure.

An API that pushes says the same about each message, but for the client and the message itself:
its library writes one block of fields, which differs by the Content-Length at most. What the parser
made of the very same bytes before holds for them now, so they are looked up instead of parsed.
"""

from __future__ import annotations

import re
from typing import Final

from .client_id import MAX_CLIENT_ID_BYTES, PCHAR
from .frames import TEXT, is_utf8
from .known_heads import KnownHeads

# Ids that need no closer look, as nearly all: nothing encoded, and no `.`, `..` or `@` in front.
_REQUEST_LINE: Final = re.compile(rb"POST /((?![.@])[%b]+) HTTP/1\.1" % PCHAR)
_OF_SEVERAL: Final = re.compile(
    rb"POST /((?![.@])[%b]+(?:/(?!\.)[%b]+)*) HTTP/1\.1" % (PCHAR, PCHAR)
)
_MAX_LINE_BYTES: Final = len(b"POST / HTTP/1.1") + MAX_CLIENT_ID_BYTES


class KnownFields:
    """Hold blocks of fields, and what each says about the message that follows it.

    Args:
        is_several: whether ids may have several segments.
    """

    __slots__ = ("_known", "_request_line")

    def __init__(self, is_several: bool = False) -> None:
        self._request_line = _OF_SEVERAL if is_several else _REQUEST_LINE
        # Block of fields, without the line before and the empty line after it -> Content-Length,
        # and TEXT or BINARY.
        self._known: KnownHeads[tuple[int, int]] = KnownHeads()

    def __len__(self) -> int:
        return len(self._known)

    def recognise(self, data: bytes) -> tuple[bytes, int, bytes] | None:
        """Return client id, first byte of the frame and message, if `data` is one whole push.

        None means that the parser must look at it.
        """
        line, _, rest = data.partition(b"\r\n")
        fields, empty_line, body = rest.partition(b"\r\n\r\n")
        known = self._known.get(fields)
        # Without the empty line more fields may follow.
        if known is None or known[0] != len(body) or not empty_line:
            return None
        match = self._request_line.fullmatch(line)
        if match is None or len(line) > _MAX_LINE_BYTES:
            return None
        code = known[1]
        # A method of bytes finds out whether all is ASCII, without the call of a function.
        if not body.isascii() and code == TEXT and not is_utf8(body):
            return None
        return match[1], code, body

    def remember(self, data: bytes, code: int, payload: bytes) -> None:
        """Make the fields known of a push that the parser has read whole from `data`.

        Args:
            code: what its frame begins with.
            payload: the message that the parser has found.
        """
        fields, _, body = data.partition(b"\r\n")[2].partition(b"\r\n\r\n")
        if body == payload:  # else it was chunked, for one
            self._known.remember(fields, (len(body), code))
