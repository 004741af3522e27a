"""Name what can go wrong; a class carries the HTTP status that it leads to,
and its label in the metrics."""

from __future__ import annotations

from . import causes


class GatewayError(Exception):
    """Root of the gateway's own errors; the message is fit for the peer that caused it."""


class HandshakeError(GatewayError):
    """Refuse a connection on the client port before it became a WebSocket.

    Attributes:
        status: the HTTP status of the answer.
        header_lines: lines that the answer carries besides the usual ones, each with its CRLF.
    """

    status = 400
    header_lines = b""


class HeadTooLarge(HandshakeError):
    """The request line and headers exceed the limit (RFC 6585, 5)."""

    status = 431


class UpgradeRequired(HandshakeError):
    """The request is HTTP but no WebSocket upgrade, or one of another version (RFC 6455, 4.4)."""

    status = 426
    header_lines = b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"


class PathUnknown(HandshakeError):
    """The path is none that --path lets clients use."""

    status = 404


class OriginRefused(HandshakeError):
    """The page's origin is not in the allow list (RFC 6455, 10.2)."""

    status = 403


class ApiError(GatewayError):
    """A request to the API ended without an answer that can be used.

    Attributes:
        status: what a client is told whose connect depended on it.
        header_lines: lines that this answer carries besides the usual ones, each with its CRLF.
        cause: what the metrics call it.
        detail: what the operator is told; no peer's business.
    """

    status = 502
    cause = causes.UNREACHABLE
    header_lines = b""

    def __init__(self, text: str, detail: str = "") -> None:
        super().__init__(text)
        self.detail = detail or text


class ApiUnreachable(ApiError):
    """The API is away, or answers that it cannot keep up, and is not asked at the moment."""

    header_lines = b"Retry-After: 1\r\n"


class ApiDisconnected(ApiError):
    """The API closed the connection before its answer was whole."""

    cause = causes.DISCONNECTED


class ApiReplyInvalid(ApiError):
    """The API's answer is no HTTP, or exceeds a limit."""

    cause = causes.INVALID_REPLY


class ApiTimeout(ApiError):
    """The API did not answer in time."""

    status = 504
    cause = causes.TIMEOUT


class ApiAbandoned(ApiError):
    """The worker ends, so that nobody waits for the API's answer any longer."""

    status = 503
    cause = causes.ABANDONED
    header_lines = b"Retry-After: 1\r\n"


class RedisUnavailable(GatewayError):
    """Redis is away, or did not answer in time."""


class RedisNotAsked(RedisUnavailable):
    """Redis is away, and the command was never written: it has no effect."""
