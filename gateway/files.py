"""Divide a worker's limit of open files, so that nobody takes what another cannot do without: pure.

A client, a connection to the API and one to the push port are a file each, and a process that has
none left fails at whatever it does next. So each kind has its share, and stops at it.
"""

from __future__ import annotations

from typing import Final

# What a worker has open by itself: sockets that listen, Redis, pipes, logs. Idle, it has 20.
_OWN: Final = 32
# Of the others, when there are plenty.
_MOST_REFUSED: Final = 64
_MOST_PUSHES: Final = 160


class Files:
    """Say how many files each kind of connection may take.

    Args:
        limit: files that the process may have open.
        to_api: connections to the API that are wanted.
    """

    def __init__(self, limit: int, to_api: int) -> None:
        rest = max(16, limit - _OWN)
        self.api = min(to_api, rest // 4)
        """Connections to the API."""
        self.refused = min(_MOST_REFUSED, rest // 16)
        """Clients that are being told at the same time that there is no room for them."""
        self.pushes = min(_MOST_PUSHES, rest // 8)
        """Connections of the push port, beside those that take the place of clients."""
        self.clients = rest - self.api - self.refused - self.pushes
        """Connections of clients."""
