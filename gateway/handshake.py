"""Read and answer a client's opening handshake: pure (RFC 6455, 4.2; RFC 9112)."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from http import HTTPStatus
from typing import Final

import httptools
from websockets.utils import accept_key

from .client_id import PLAIN_TARGET
from .client_paths import IDS, ClientPaths
from .errors import HandshakeError, HeadTooLarge, OriginRefused, UpgradeRequired
from .http_wire import ReplyReader
from .settings import Settings

MAX_HEAD_BYTES: Final = 16_384
MAX_LINE_BYTES: Final = 8_192
MAX_HEADERS: Final = 100

_QUERY: Final = re.compile(rb"[!-~]*")
# RFC 3986, 3.2.2 and 3.2.3. Who names a user there is up to no good (RFC 9110, 4.2.4).
_NAME: Final = rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})"
_AUTHORITY: Final = rb"(?:\[[0-9A-Za-z:.%%_~-]+\]|%b+)(?::[0-9]*)?" % _NAME
_HOST: Final = re.compile(rb"(?:%b)?" % _AUTHORITY)
_ABSOLUTE: Final = re.compile(rb"(?:http|ws)s?://%b(?=[/?]|\Z)" % _AUTHORITY, re.IGNORECASE)
_FIELD_VALUE: Final = re.compile(rb"[\t -~\x80-\xff]*")
_TOKEN: Final = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")

# What a client may send once at most; a second one is an attack or a broken client.
_SINGLE: Final = frozenset(
    (
        b"authorization",
        b"content-length",
        b"host",
        b"origin",
        b"sec-websocket-key",
        b"sec-websocket-version",
        b"transfer-encoding",
        b"user-agent",
    )
)
_PASSED_ON: Final = (
    b"Authorization",
    b"Cookie",
    b"Origin",
    b"User-Agent",
    b"Sec-WebSocket-Protocol",
)
# The rest of an API's refusal that reaches the client beside status and body.
_REFUSAL_HEADERS: Final = {b"www-authenticate": b"WWW-Authenticate", b"retry-after": b"Retry-After"}
_PASSED_STATUSES: Final = frozenset((401, 403, 404, 409, 429))


def to_origin_form(target: bytes) -> bytes:
    """Return path and query of a target, whose scheme and host say nothing here.

    A server must take the absolute form, which is meant for proxies, from everybody (RFC 9112,
    3.2.2); some chargers send it. A target of another form is returned as it is.
    """
    absolute = None if target.startswith(b"/") else _ABSOLUTE.match(target)
    if absolute is None:
        return target
    rest = target[absolute.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def check_host(host: bytes | None, target: bytes) -> None:
    """Accept the Host header of an HTTP/1.1 request (RFC 9112, 3.2).

    Args:
        host: None when there is none.
        target: the host in an absolute one counts, and what Host says does not (3.2.2).

    Raises:
        HandshakeError: if it is missing or malformed.
    """
    if host is None:
        raise HandshakeError("the Host header is missing")
    if target.startswith(b"/") and not _HOST.fullmatch(host):
        raise HandshakeError("the Host header is malformed")


def split_target(target: bytes, paths: ClientPaths = IDS[False]) -> tuple[bytes, bytes]:
    """Split a target into client id and query, the latter with its question mark.

    The id is normalised, the query stays as it is.

    Args:
        paths: says where in the path the id is.

    Raises:
        HandshakeError: if it is neither of origin nor of absolute form, or its path holds no client
            id.
    """
    if paths.is_plain and (plain := PLAIN_TARGET.fullmatch(target)) is not None:
        return plain[1], b""
    if not target.startswith(b"/"):
        target = to_origin_form(target)
        if not target.startswith(b"/"):
            raise HandshakeError("the request target must begin with /, or be an http or ws URL")
    path, mark, query = target.partition(b"?")
    if not _QUERY.fullmatch(query) or b"#" in target:
        raise HandshakeError("the query has characters that must be percent-encoded")
    return paths.find(path), mark + query


class RequestHead:
    """Collect the head of one request while its bytes arrive; httptools calls it.

    After `feed` returned True the attributes hold: method, target, version, headers (lower-case
    names, repeated ones joined as a list), is_upgrade and rest, the bytes after the head.
    """

    __slots__ = (
        "_complete",
        "_count",
        "_fed_size",
        "_parser",
        "_size",
        "has_body",
        "headers",
        "is_upgrade",
        "method",
        "rest",
        "target",
        "version",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.version = ""
        self.headers: dict[bytes, bytes] = {}
        self.is_upgrade = False
        self.has_body = False
        self.rest = b""
        self._fed_size = 0
        self._size = 0
        self._count = 0
        self._complete = False
        # None when the head is complete: the parser refers back to this object.
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> bool:
        """Read bytes of the client; tell whether the head is complete.

        Raises:
            HandshakeError: if they are no HTTP/1, or exceed a limit.
        """
        assert self._parser is not None
        self._fed_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.is_upgrade = True
            self.rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            if not self._complete:
                self._parser = None
                if isinstance(error.__context__, HandshakeError):
                    raise error.__context__ from None
                raise HandshakeError("malformed HTTP request") from None
        if self._complete:
            self._parser = None
            return True
        if self._fed_size > MAX_HEAD_BYTES:  # the parser keeps a header until it is whole
            self._parser = None
            raise HeadTooLarge("the request line and headers exceed 16 KiB")
        return False

    @property
    def wants_websocket(self) -> bool:
        """Tell whether the request asks for what this port is for (and not, say, for HTTP/2)."""
        return self.is_upgrade and b"websocket" in _list(self.headers.get(b"upgrade", b"").lower())

    # Called by httptools.

    def on_message_begin(self) -> None:
        if self._complete:
            raise HandshakeError("a request may not follow in the same packet")

    def on_url(self, url: bytes) -> None:
        self.target += url
        self._size += len(url)
        if len(self.target) > MAX_LINE_BYTES:
            raise HeadTooLarge("the request line exceeds 8 KiB")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._complete:
            return  # a trailer field, which must not pass for a header (RFC 9110, 6.5.1)
        self._count += 1
        if self._count > MAX_HEADERS or len(name) + len(value) > MAX_LINE_BYTES:
            raise HeadTooLarge("a header exceeds 8 KiB, or there are more than 100")
        self._size += len(name) + len(value) + 4  # colon, space, CR and LF
        if self._size > MAX_HEAD_BYTES:
            raise HeadTooLarge("the request line and headers exceed 16 KiB")
        if not _FIELD_VALUE.fullmatch(value):
            raise HandshakeError("a header has control characters")
        value = value.rstrip(b" \t")  # RFC 9112, 5.1: no part of the value; the parser leaves it
        name = name.lower()
        before = self.headers.get(name)
        if before is None:
            self.headers[name] = value
        elif name in _SINGLE:
            raise HandshakeError(f"{name.decode('latin-1')} is sent twice")
        else:
            self.headers[name] = before + (b"; " if name == b"cookie" else b", ") + value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.method = self._parser.get_method()
        self.version = self._parser.get_http_version()
        if self.version not in ("1.1", "1.0"):
            raise HandshakeError("HTTP/1.1 is required")
        headers = self.headers
        self.has_body = b"transfer-encoding" in headers or (
            headers.get(b"content-length", b"0") != b"0"
        )
        self._complete = True


class Handshake:
    """Hold what is known of an upgrade request between its arrival and the answer to it."""

    __slots__ = ("accept", "client_id", "header_lines", "protocols", "query", "remote")

    def __init__(
        self,
        client_id: bytes,
        query: bytes,
        accept: bytes,
        protocols: tuple[bytes, ...],
        header_lines: bytes,
        remote: str,
    ) -> None:
        self.client_id = client_id
        self.query = query
        self.accept = accept
        self.protocols = protocols
        """Subprotocols that the client offers, in its order."""
        self.header_lines = header_lines
        """What the API is told of the client's headers."""
        self.remote = remote
        """IP address of the client, as far as trusted proxies tell it."""


class HandshakePolicy:
    """Apply the options that concern handshakes; one for all connections of a worker.

    Args:
        settings: the options.
    """

    def __init__(self, settings: Settings) -> None:
        names = [name.encode("ascii") for name in settings.forward_header]
        known = {name.lower() for name in _PASSED_ON}
        self._passed_on = [(name.lower(), name) for name in _PASSED_ON]
        self._passed_on += [(n.lower(), n) for n in names if n.lower() not in known]
        self._trusted = [_network(cidr) for cidr in settings.trusted_proxy]
        self._origins = [_origin_pattern(origin) for origin in settings.allow_origin]
        self._paths = ClientPaths(settings.path)
        self._subprotocols = [name.encode("ascii") for name in settings.subprotocol]

    def check(self, head: RequestHead, peer: str) -> Handshake:
        """Validate an upgrade request (RFC 6455, 4.2.1).

        Args:
            head: the complete head.
            peer: IP address of the other end of the connection.

        Raises:
            HandshakeError: if it is not fit to be one.
        """
        headers = head.headers
        if head.version != "1.1":
            raise HandshakeError("HTTP/1.1 is required")
        upgrade = headers.get(b"upgrade", b"").lower()
        if head.method != b"GET" or b"websocket" not in _list(upgrade):
            raise UpgradeRequired("this port speaks WebSocket: an upgrade is required")
        if b"upgrade" not in _list(headers.get(b"connection", b"").lower()):
            raise UpgradeRequired("this port speaks WebSocket: Connection: Upgrade is missing")
        if head.has_body:
            raise HandshakeError("an upgrade request has no body")
        check_host(headers.get(b"host"), head.target)
        client_id, query = split_target(head.target, self._paths)
        if headers.get(b"sec-websocket-version") != b"13":
            raise UpgradeRequired("Sec-WebSocket-Version must be 13")
        key = headers.get(b"sec-websocket-key", b"")
        try:
            if len(base64.b64decode(key, validate=True)) != 16:
                raise ValueError
        except (binascii.Error, ValueError):
            raise HandshakeError("Sec-WebSocket-Key must be 16 bytes in base64") from None
        self._check_origin(headers.get(b"origin"))
        protocols = tuple(_list(headers.get(b"sec-websocket-protocol", b"")))
        if not all(_TOKEN.fullmatch(name) for name in protocols):
            raise HandshakeError("Sec-WebSocket-Protocol is malformed")
        accept = accept_key(key.decode("ascii")).encode("ascii")
        lines = self._header_lines(headers, peer)
        if not self._paths.is_plain:
            path = to_origin_form(head.target).partition(b"?")[0]
            lines += b"Ws2api-Path: %b\r\n" % path
        return Handshake(client_id, query, accept, protocols, lines, self._remote(headers, peer))

    def trusts(self, peer: str) -> bool:
        """Tell whether an address is that of a proxy whose X-Forwarded-For is believed."""
        if not self._trusted:
            return False
        address = _address(peer)
        return address is not None and any(address in network for network in self._trusted)

    def _remote(self, headers: dict[bytes, bytes], peer: str) -> str:
        """Follow X-Forwarded-For from its end, for as long as trusted proxies have written it."""
        remote = peer
        before = [item.decode("latin-1") for item in _list(headers.get(b"x-forwarded-for", b""))]
        while before and self.trusts(remote):
            address = _address(before.pop())
            if address is None:
                break
            remote = str(address)
        return remote

    def _check_origin(self, origin: bytes | None) -> None:
        # Only browsers send an Origin, and they always do (RFC 6455, 10.2), so a request without
        # one cannot come from somebody else's page.
        if self._origins and origin is not None:
            lower = origin.lower()
            if not any(pattern.fullmatch(lower) for pattern in self._origins):
                raise OriginRefused("connections from this origin are not allowed")

    def _header_lines(self, headers: dict[bytes, bytes], peer: str) -> bytes:
        lines = [
            b"%b: %b\r\n" % (name, headers[lower])
            for lower, name in self._passed_on
            if lower in headers
        ]
        forwarded = peer.encode("ascii")
        before = headers.get(b"x-forwarded-for")
        if before is not None and self.trusts(peer):
            forwarded = before + b", " + forwarded
        lines.append(b"X-Forwarded-For: %b\r\n" % forwarded)
        return b"".join(lines)

    def accept(self, handshake: Handshake, reply: ReplyReader) -> tuple[bytes, bytes]:
        """Return the 101 that accepts a client, and the subprotocol in it (empty for none).

        Raises:
            HandshakeError: with status 502, if the API chose a subprotocol that was not offered.
        """
        cookies = b""
        chosen = None
        for name, value in reply.headers:
            if name == b"set-cookie":
                cookies += b"Set-Cookie: %b\r\n" % value
            elif name == b"sec-websocket-protocol":
                chosen = value.strip()
        if chosen is None:
            # None of the API's own choice: the first of the options that the client offers.
            chosen = next((p for p in self._subprotocols if p in handshake.protocols), b"")
        elif chosen and chosen not in handshake.protocols:
            error = HandshakeError("the API chose a subprotocol that the client did not offer")
            error.status = HTTPStatus.BAD_GATEWAY
            raise error
        protocol = b"Sec-WebSocket-Protocol: %b\r\n" % chosen if chosen else b""
        response = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n%b%b\r\n" % (handshake.accept, protocol, cookies)
        )
        return response, chosen


def plain_address(host: str) -> str:
    """Return the IPv4 address of a peer that an IPv6 wildcard socket names its own way.

    Others are returned as they are (RFC 4291, 2.5.5.2).
    """
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def _network(cidr: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Read a network; one of mapped addresses stands for that of IPv4."""
    network = ipaddress.ip_network(cidr)
    if isinstance(network, ipaddress.IPv6Network):
        mapped = network.network_address.ipv4_mapped
        if mapped is not None and network.prefixlen >= 96:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address as proxies write it, also with a port; None if it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # What an IPv6 wildcard socket calls a peer that speaks IPv4 (RFC 4291, 2.5.5.2).
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_for_client(reply: ReplyReader) -> bool:
    """Tell whether a reply to a connect speaks of the client, rather than of the API's troubles."""
    return reply.status == 200 or reply.status in _PASSED_STATUSES


def is_nearly_ok(body: bytes) -> bool:
    """Tell whether an API means ok, but says it with a newline, quotes, capitals or a BOM."""
    return body.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n\"'.!").lower() == b"ok"


def refusal(reply: ReplyReader) -> bytes:
    """Return the answer to a client whose connect the API did not answer with `ok`.

    What the API says of the client is passed on; what it says of itself becomes 502.
    """
    if reply.status == 200:
        return error_response(403, reply.body, reply.content_type)
    if reply.status not in _PASSED_STATUSES:
        return error_response(502, b"the API answered with status %d\n" % reply.status)
    lines = b"".join(
        b"%b: %b\r\n" % (_REFUSAL_HEADERS[name], value)
        for name, value in reply.headers
        if name in _REFUSAL_HEADERS
    )
    return error_response(reply.status, reply.body, reply.content_type, lines)


def allows_retry(reply: ReplyReader) -> bool:
    """Tell whether the API can bear to get one of the client's messages twice."""
    return any(
        name == b"ws2api-retry" and value.strip().lower() == b"safe"
        for name, value in reply.headers
    )


def error_response(
    status: int, body: bytes, content_type: bytes = b"", header_lines: bytes = b""
) -> bytes:
    """Return an HTTP answer after which the connection is closed."""
    return (
        b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n%b\r\n%b"
        % (
            status,
            HTTPStatus(status).phrase.encode("ascii"),
            content_type or b"text/plain; charset=utf-8",
            len(body),
            header_lines,
            body,
        )
    )


def _origin_pattern(origin: str) -> re.Pattern[bytes]:
    """Return what matches an origin in which * stands for any run of characters in a host."""
    anything = r".*" if origin == "*" else r"[^/]*"
    return re.compile(re.escape(origin.lower()).replace(r"\*", anything).encode("utf-8"))


def _list(value: bytes) -> list[bytes]:
    """Split a comma-separated header (RFC 9110, 5.6.1)."""
    return [item.strip() for item in value.split(b",") if item.strip()]
