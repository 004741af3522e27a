"""Ask the kernel how much of what was written to a TCP connection has arrived: Linux' TCP_INFO."""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any, Final, NamedTuple

# struct tcp_info of linux/tcp.h: the fields that are read, by offset.
_LAST_DATA_RECEIVED_MS: Final = struct.Struct("@52xI")
_BYTES_ACKED: Final = struct.Struct("@120xQ")
_NOTSENT_BYTES: Final = struct.Struct("@144xI")
_BYTES_SENT_AND_RETRANS: Final = struct.Struct("@200xQQ")
# Since Linux 4.19; an older one fills less.
_SIZE: Final = 216


class TcpProgress(NamedTuple):
    """Say how far the bytes of a connection have come."""

    taken: int
    """Bytes that the kernel has taken, sent or not."""
    unacknowledged: int
    """Those of them of which the peer's kernel has never said that it has them; one less, because
    the opening of the connection is counted (RFC 4898, tcpEStatsAppHCThruOctetsAcked)."""
    last_received_s: float
    """How long ago the last bytes of the peer came; the kernel's clock is coarse."""


def progress(transport: Any) -> TcpProgress | None:
    """Return what the kernel knows; None if that is nothing, as where it is no Linux."""
    if sys.platform != "linux":
        return None
    sock = transport.get_extra_info("socket")
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except (AttributeError, OSError):
        return None
    if len(info) < _SIZE:
        return None
    (last_received_ms,) = _LAST_DATA_RECEIVED_MS.unpack_from(info)
    (acked,) = _BYTES_ACKED.unpack_from(info)
    (unsent,) = _NOTSENT_BYTES.unpack_from(info)
    sent, sent_again = _BYTES_SENT_AND_RETRANS.unpack_from(info)
    taken = sent - sent_again + unsent
    return TcpProgress(taken, taken - acked, last_received_ms / 1000)
