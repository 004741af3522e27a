"""Say which client ids there may be: pure, and quick to import."""

from __future__ import annotations

import re
from typing import Final

from .errors import HandshakeError

# Unreserved or percent-encoded characters, RFC 3986, 2.1 and 2.3: they mean the same in every
# framework's router and in every proxy's access rule.
MAX_CLIENT_ID_BYTES: Final = 255
CLIENT_ID_PATTERN: Final = rb"(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+"
_CLIENT_ID: Final = re.compile(CLIENT_ID_PATTERN)


def check_client_id(client_id: bytes) -> None:
    """Accept an id that may stand in a path.

    Raises:
        HandshakeError: if it is empty, too long, reserved, or holds what an id may not.
    """
    if not client_id:
        raise HandshakeError("the path names no client id")
    if len(client_id) > MAX_CLIENT_ID_BYTES:
        raise HandshakeError(f"the client id is longer than {MAX_CLIENT_ID_BYTES} bytes")
    if client_id in (b".", b".."):
        raise HandshakeError("a client id may not be . or ..")
    if client_id.startswith(b"@"):
        raise HandshakeError("client ids that begin with @ are reserved")
    if not _CLIENT_ID.fullmatch(client_id):
        raise HandshakeError("the client id has characters that must be percent-encoded")
    decoded = client_id.lower()
    if decoded in (b"%2e", b"%2e%2e", b".%2e", b"%2e."):
        raise HandshakeError("a client id may not be . or ..")
