"""Say which client ids there may be: pure, and quick to import."""

from __future__ import annotations

import re
from typing import Final

from .errors import HandshakeError

# Unreserved or percent-encoded characters, RFC 3986, 2.1 and 2.3: they mean the same in every
# framework's router and in every proxy's access rule.
MAX_CLIENT_ID_BYTES: Final = 255
_CLIENT_ID: Final = re.compile(rb"(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+")
# A step to another folder, for a server behind us that decodes the path before it resolves it, as
# nginx does: there /ws/..%2Fadmin is /admin, which would lead out of the API's base URL.
_DOT_SEGMENT: Final = re.compile(rb"(?:\A|%2f|%5c)(?:\.|%2e){1,2}(?:%2f|%5c|\Z)", re.IGNORECASE)


def check_client_id(client_id: bytes) -> None:
    """Accept an id that may stand in a path.

    Raises:
        HandshakeError: if it is empty, too long, reserved, or holds what an id may not.
    """
    if not client_id:
        raise HandshakeError("the path names no client id")
    if len(client_id) > MAX_CLIENT_ID_BYTES:
        raise HandshakeError(f"the client id is longer than {MAX_CLIENT_ID_BYTES} bytes")
    if client_id.startswith(b"@"):
        raise HandshakeError("client ids that begin with @ are reserved")
    if not _CLIENT_ID.fullmatch(client_id):
        raise HandshakeError("the client id has characters that must be percent-encoded")
    if (b"%" in client_id or b"." in client_id) and _DOT_SEGMENT.search(client_id):
        raise HandshakeError("a client id may not be . or .., nor hold them between slashes")
