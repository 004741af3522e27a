"""List what can become of a push, with the HTTP answer and the counter of each: pure."""

from __future__ import annotations

from typing import Final

from . import counters as c

OK: Final = 0
NOT_FOUND: Final = 1
STALE: Final = 2
TOO_SLOW: Final = 3
UNAVAILABLE: Final = 4
TIMEOUT: Final = 5
BAD_REQUEST: Final = 6
UNAUTHORIZED: Final = 7
TOO_LARGE: Final = 8
METHOD_NOT_ALLOWED: Final = 9
HEAD_TOO_LARGE: Final = 10
UNKNOWN_CHARSET: Final = 11
UNKNOWN_CODING: Final = 12
UNKNOWN_TRANSFER: Final = 13

# outcome → status line, body when there is none of its own, index of the counter
ANSWERS: Final[tuple[tuple[bytes, bytes, int], ...]] = (
    (b"200 OK", b"ok", c.PUSHES_OK),
    (b"404 Not Found", b"no such client\n", c.PUSHES_NOT_FOUND),
    (b"412 Precondition Failed", b"the client has reconnected since\n", c.PUSHES_STALE),
    (b"429 Too Many Requests", b"the client reads too slowly\n", c.PUSHES_TOO_SLOW),
    (b"503 Service Unavailable", b"the client's worker is out of reach\n", c.PUSHES_UNAVAILABLE),
    (b"504 Gateway Timeout", b"the client's worker did not confirm\n", c.PUSHES_TIMEOUT),
    (b"400 Bad Request", b"bad request\n", c.PUSHES_BAD_REQUEST),
    (b"401 Unauthorized", b"a bearer token is required\n", c.PUSHES_UNAUTHORIZED),
    (b"413 Content Too Large", b"the message exceeds the limit\n", c.PUSHES_TOO_LARGE),
    (b"405 Method Not Allowed", b"POST, GET or DELETE /<ClientId>\n", c.PUSHES_BAD_REQUEST),
    (
        b"431 Request Header Fields Too Large",
        b"the request line and headers exceed 16 KiB\n",
        c.PUSHES_BAD_REQUEST,
    ),
    (
        b"415 Unsupported Media Type",
        b"a text message must be UTF-8, and its Content-Type must not name another charset\n",
        c.PUSHES_BAD_REQUEST,
    ),
    (
        b"415 Unsupported Media Type",
        b"a message must come without a Content-Encoding\n",
        c.PUSHES_BAD_REQUEST,
    ),
    (
        b"501 Not Implemented",
        b"the only Transfer-Encoding that is known is chunked\n",
        c.PUSHES_BAD_REQUEST,
    ),
)

HEADER_LINES: Final[dict[int, bytes]] = {
    TOO_SLOW: b"Retry-After: 1\r\n",
    UNAVAILABLE: b"Retry-After: 1\r\n",
    UNAUTHORIZED: b"WWW-Authenticate: Bearer\r\n",
    UNKNOWN_CODING: b"Accept-Encoding: identity\r\n",
    METHOD_NOT_ALLOWED: b"Allow: POST, GET, DELETE\r\n",
}
