"""Name what ended a connection, and what went wrong with a request: pure.

Few and fixed, because each is the label of a counter.
"""

from __future__ import annotations

from typing import Final

CLIENT: Final = "client"
"""The client sent a close frame."""
LOST: Final = "lost"
"""The socket ended without a close frame."""
PROTOCOL: Final = "protocol"
"""The client broke RFC 6455 or a limit."""
API: Final = "api"
"""The API closed it through the push port, or an operator did."""
PING_TIMEOUT: Final = "ping_timeout"
TOO_SLOW: Final = "too_slow"
REPLACED: Final = "replaced"
"""The client connected again under the same id."""
RESTART: Final = "restart"
"""Its worker was replaced, or had been given up for lost."""
SHUTDOWN: Final = "shutdown"
"""The gateway ended."""
WORKER_LOST: Final = "worker_lost"
"""Its worker died, and cannot say so itself."""

OTHER_CODE: Final = "other"

_PROTOCOL_CODES: Final = ("1002", "1003", "1007", "1009", "1011")
_CHOSEN_CODES: Final = (
    *("1000", "1001", "1002", "1003", "1005", "1007", "1008", "1009"),
    *("1010", "1011", "1012", "1013", "1014", "3xxx", "4xxx"),
)

CODES: Final[dict[str, tuple[str, ...]]] = {
    CLIENT: _CHOSEN_CODES,
    LOST: ("1006",),
    PROTOCOL: _PROTOCOL_CODES,
    API: _CHOSEN_CODES,
    PING_TIMEOUT: ("1011",),
    TOO_SLOW: ("1008",),
    REPLACED: ("4008",),
    RESTART: ("1012",),
    SHUTDOWN: ("1001",),
    WORKER_LOST: ("1006",),
}
"""Close codes that are told apart, of each cause; all others are `OTHER_CODE`."""

OF_OUR_CODES: Final = {
    1001: SHUTDOWN,
    1008: TOO_SLOW,
    1011: PING_TIMEOUT,
    1012: RESTART,
    4008: REPLACED,
}
"""What a close code of this gateway's own choice says."""


def label_of(code: int, cause: str) -> str:
    """Return the label of a close code under a cause."""
    label = str(code)
    if label in CODES[cause]:
        return label
    group = f"{code // 1000}xxx"
    return group if group in CODES[cause] else OTHER_CODE


# What may be wrong with the API's part.
TIMEOUT: Final = "timeout"
DISCONNECTED: Final = "disconnected"
INVALID_REPLY: Final = "invalid_reply"
UNREACHABLE: Final = "unreachable"
STATUS: Final = "status"
"""It answered a message with a status that means neither success nor to try again."""
ABANDONED: Final = "abandoned"
"""The worker ended before the answer."""

OF_REQUESTS: Final = (TIMEOUT, DISCONNECTED, INVALID_REPLY, UNREACHABLE, STATUS, ABANDONED)
