"""Say which client ids there may be, and bring them to one spelling: pure, and quick to import."""

from __future__ import annotations

import re
from typing import Final

from .errors import HandshakeError

MAX_CLIENT_ID_BYTES: Final = 255
UNRESERVED: Final = rb"A-Za-z0-9._~-"
"""RFC 3986, 2.3: escaped or not, these mean the same. To stand in brackets of a pattern."""
PCHAR: Final = rb"!$&'()*+,;=:@" + UNRESERVED
"""What may stand in a segment of a path without being escaped (RFC 3986, 3.3), likewise."""
_SEGMENT: Final = rb"(?:[%b]|%%[0-9A-Fa-f]{2})+" % PCHAR
_CLIENT_ID: Final = re.compile(_SEGMENT)
_SEGMENTS: Final = re.compile(rb"%b(?:/%b)*" % (_SEGMENT, _SEGMENT))
PLAIN_TARGET: Final = re.compile(rb"/((?![.@])[%b]{1,%d})" % (PCHAR, MAX_CLIENT_ID_BYTES))
"""Of an id that needs no closer look, as nearly all: nothing encoded, no `.` or `@` in front."""
_ESCAPE: Final = re.compile(rb"%..")
_UNESCAPED: Final = {
    b"%%%02X" % code: bytes((code,))
    for code in range(256)
    if re.fullmatch(rb"[%b]" % UNRESERVED, bytes((code,)))
}
# A step to another folder, for a server behind us that decodes the path before it resolves it, as
# nginx does: there /ws/..%2Fadmin is /admin, which would lead out of the API's base URL. Servers in
# Java take off what follows a semicolon first.
_DOT_SEGMENT: Final = re.compile(rb"(?:\A|/|%2F|%5C)\.{1,2}(?:/|%2F|%5C|;|%3B|\Z)")


def normalise_client_id(client_id: bytes, is_several: bool = False) -> bytes:
    """Return the one spelling of an id that may stand in a path (RFC 3986, 6.2.2).

    Escapes are written in capitals, and unreserved characters are not escaped. Others stay as they
    are: `+` and `%2B` are two ids.

    Args:
        is_several: whether it may have several segments, with slashes between them.

    Raises:
        HandshakeError: if it is empty, too long, reserved, or holds what an id may not.
    """
    if not client_id:
        raise HandshakeError("the path names no client id")
    if client_id.startswith(b"@"):
        raise HandshakeError("client ids that begin with @ are reserved")
    if not (_SEGMENTS if is_several else _CLIENT_ID).fullmatch(client_id):
        if is_several and b"//" in b"/%b/" % client_id:
            raise HandshakeError("the client id has an empty segment")
        raise HandshakeError("the client id has characters that must be percent-encoded")
    if b"%" in client_id:
        client_id = normalise_escapes(client_id)
    if len(client_id) > MAX_CLIENT_ID_BYTES:
        raise HandshakeError(f"the client id is longer than {MAX_CLIENT_ID_BYTES} bytes")
    if b"." in client_id and _DOT_SEGMENT.search(client_id):
        raise HandshakeError("a client id may not be . or .., nor hold them between slashes")
    return client_id


def normalise_escapes(path: bytes) -> bytes:
    """Return a path, or a part of one, in which equal escapes are written alike."""
    return _ESCAPE.sub(_normalise_escape, path)


def _normalise_escape(match: re.Match[bytes]) -> bytes:
    escape = match[0].upper()
    return _UNESCAPED.get(escape, escape)
