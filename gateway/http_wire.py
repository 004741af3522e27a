"""Encode requests to the API and decode its replies: pure, on httptools (RFC 9112)."""

from __future__ import annotations

from typing import Final

import httptools

from .known_heads import KnownHeads
from .media_type import BINARY_TYPE, form_of
from .reply_body import BodyUnusable, decode, keep_alive_s
from .settings import ApiUrl

MAX_REPLY_HEAD_BYTES: Final = 65_536
# What the chunked coding may add to each byte of a body: five bytes if every chunk holds but one.
MAX_FRAMING: Final = 16

_TEXT_TYPE: Final = b"text/plain; charset=utf-8"


class ReplyTooLarge(Exception):
    """A reply's head or body exceeds its limit."""


class RequestEncoder:
    """Write the three requests of a client's life to one API.

    All that is the same for every request stands in templates, so a request is one formatting
    operation; a part kept per connection would save 40 ns and cost each idle client 180 bytes.

    Args:
        api: base URL of the API.
    """

    __slots__ = ("_binary", "_connect", "_disconnect", "_text")

    def __init__(self, api: ApiUrl) -> None:
        path = api.path.encode("ascii").replace(b"%", b"%%") + b"/%b"
        host = b" HTTP/1.1\r\nHost: " + api.host_header.encode("ascii").replace(b"%", b"%%")
        generation = b"\r\nWs2api-Generation: %d\r\nAccept-Encoding: identity\r\n"
        self._text = b"".join(
            (
                b"POST ",
                path,
                host,
                generation,
                b"Ws2api-Sequence: %d\r\nContent-Type: ",
                _TEXT_TYPE,
                b"\r\nContent-Length: %d\r\n\r\n%b",
            )
        )
        self._binary = self._text.replace(_TEXT_TYPE, BINARY_TYPE)
        self._connect = (
            b"GET " + path + b"%b" + host + generation + b"Ws2api-Push-Url: %b\r\n%b\r\n"
        )
        self._disconnect = b"".join(
            (
                b"DELETE ",
                path,
                host,
                generation,
                b"Ws2api-Close-Code: %d\r\nContent-Type: ",
                _TEXT_TYPE,
                b"\r\nContent-Length: %d\r\n\r\n%b",
            )
        )

    def connect(
        self, client_id: bytes, query: bytes, generation: int, push_url: bytes, header_lines: bytes
    ) -> bytes:
        """Return the GET that asks whether a client may connect.

        Args:
            query: the client's query with its question mark, or nothing.
            header_lines: what is passed on from the client, each line with its CRLF.
        """
        return self._connect % (client_id, query, generation, push_url, header_lines)

    def message(
        self, client_id: bytes, generation: int, sequence: int, is_text: bool, payload: bytes
    ) -> bytes:
        """Return the POST of one message."""
        template = self._text if is_text else self._binary
        return template % (client_id, generation, sequence, len(payload), payload)

    def disconnect(self, client_id: bytes, generation: int, code: int, reason: bytes) -> bytes:
        """Return the DELETE that reports the end of a connection."""
        return self._disconnect % (client_id, generation, code, len(reason), reason)


KnownReplies = KnownHeads[tuple[int, bool, int]]
"""Head of a reply, without the empty line -> status, whether the body is text, Content-Length."""


class ReplyReader:
    """Collect one reply after the other from the bytes of one connection to the API.

    The attributes describe the last reply and stay until the next one begins. Interim replies
    (1xx) are passed over.

    An API that is busy writes the same head again and again, because its clock changes only once
    a second. What the parser made of the very same bytes before holds for them now: `recognise`
    looks a head up instead of parsing it, which costs a sixth.

    Args:
        max_body_size: largest body in bytes.
        known: heads that were parsed before, to be shared by readers of the same limit.
    """

    __slots__ = (
        "_begun",
        "_body_size",
        "_charset",
        "_codings",
        "_fed_size",
        "_framed",
        "_head_size",
        "_is_last",
        "_known",
        "_max_body_size",
        "_more",
        "_parser",
        "body",
        "complete",
        "content_type",
        "headers",
        "is_fresh",
        "is_text",
        "keep_alive",
        "keep_alive_s",
        "retry_after",
        "status",
        "want_headers",
    )

    def __init__(self, max_body_size: int, known: KnownReplies | None = None) -> None:
        self._max_body_size = max_body_size
        self._known: KnownReplies = KnownHeads() if known is None else known
        self.is_fresh = True
        """Whether no byte was fed since `expect`."""
        self.want_headers = False
        """Set before the reply to have all its headers in `headers`."""
        self.status = 0
        self.body = b""
        self.content_type = b""
        self.is_text = True
        """Whether the body goes to the client as text."""
        self.retry_after = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.keep_alive = False
        self.keep_alive_s: int | None = None
        """For how long the API keeps idle connections, as it has said last; None before."""
        self.complete = False
        # What the body has to be decoded from; nothing in most replies.
        self._codings = b""
        self._charset = ""
        # Whether no other reply is to follow, whatever the API says.
        self._is_last = False
        # Whether the head of the reply has come.
        self._begun = False
        # Whether the head tells where the body ends, other than by the end of the stream.
        self._framed = False
        # Bytes that were fed since the request and did not complete the reply.
        self._fed_size = 0
        self._head_size = 0
        self._body_size = 0
        # The body so far, None while it came in one piece; a bytearray, because a body of a million
        # tiny chunks must not cost more than its size.
        self._more: bytearray | None = None
        self._parser = httptools.HttpResponseParser(self)

    def expect(self, want_headers: bool) -> None:
        """Make ready for the reply to the next request."""
        self.want_headers = want_headers
        self.is_fresh = True
        self.complete = self._begun = False
        self._fed_size = 0

    def make_last(self) -> None:
        """Let `keep_alive` be False from the next reply on, or from the present one."""
        self._is_last = True
        self._known = KnownHeads()  # so that each is parsed, and looked at

    def recognise(self, data: bytes) -> bool:
        """Read a whole reply whose head is known; only for one that is expected and fresh.

        Sets `status`, `body`, `is_text` and `keep_alive`. False means that nothing was read and
        that `feed` is to have the bytes.
        """
        head, empty_line, body = data.partition(b"\r\n\r\n")
        known = self._known.get(head)
        # Without the empty line more fields may follow.
        if known is None or known[2] != len(body) or not empty_line:
            return False
        self.status, self.is_text, _ = known
        self.body = body
        self.keep_alive = True
        return True

    def remember(self, data: bytes) -> None:
        """Make the head known of a reply that was read whole from `data`, if it is a plain one."""
        if (self.status != 200 and self.status != 204) or not self.keep_alive or self._fed_size:
            return
        if self._codings or self._charset:
            return
        head, _, body = data.partition(b"\r\n\r\n")
        # Another body means that it was chunked, or that an interim reply came first.
        if body == self.body:
            self._known.remember(head, (self.status, self.is_text, len(body)))

    def feed(self, data: bytes) -> None:
        """Read bytes of the API; `complete` tells when a reply is whole.

        Raises:
            httptools.HttpParserError: if they are no HTTP, exceed a limit, or come unasked.
            ReplyTooLarge: if a line has no end, or there is no end to lines other than the body.
        """
        self.is_fresh = False
        self._parser.feed_data(data)
        if not self.complete:
            # The parser keeps a header or trailer to itself until it is whole.
            self._fed_size += len(data)
            if self._fed_size > MAX_REPLY_HEAD_BYTES + MAX_FRAMING * self._body_size:
                raise ReplyTooLarge("reply head or trailer exceeds the limit")

    def feed_eof(self) -> bool:
        """Take the end of the stream; tell whether that completed the reply (RFC 9112, 6.3).

        Raises:
            BodyUnusable: if it did, and its body cannot be decoded.
        """
        if self.complete or self._framed or not self._begun or 100 <= self.status < 200:
            return False
        self._finish()
        return True

    def end_early(self) -> bool:
        """Do without the rest of a reply if its status has come; tell whether it has."""
        if self.complete or not self._begun or self.status < 200:
            return False
        self.keep_alive = False
        self.complete = True
        return True

    def drop_body(self) -> None:
        """Let go of a reply that was passed on: an idle connection must not keep it."""
        self.body = b""
        if self.headers:
            self.headers = []

    def close(self) -> None:
        """Break the cycle with the parser; nothing can be fed from now on."""
        del self._parser

    @property
    def retry_after_s(self) -> float:
        """Return the pause that the reply asks for, 0 if none or as a date (RFC 9110, 10.2.3)."""
        value = self.retry_after.rstrip(b" \t")
        return float(value) if value.isdigit() and len(value) < 10 else 0.0

    # Called by httptools.

    def on_message_begin(self) -> None:
        if self.complete:
            raise ReplyTooLarge("bytes after the end of the reply")
        self.status = 0
        self._begun = False
        self.body = self.content_type = self.retry_after = b""
        self.is_text = True
        self._more = None
        self._framed = False
        self._codings = b""
        self._charset = ""
        self._head_size = self._body_size = 0
        if self.headers:
            self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._begun:
            return  # a trailer field, which must not pass for a header (RFC 9110, 6.5.1)
        length = len(name)
        self._head_size += length + len(value)  # checked at the end, `feed` bounds it until then
        if length >= 10:  # that is, in most replies, three headers of five
            if length == 12:
                if name.lower() == b"content-type":
                    self.content_type = value
                    self.is_text, self._charset = form_of(value)
            elif length == 14:
                if name.lower() == b"content-length":
                    self._framed = True
            elif length == 10:
                if b"timeout=" in value.lower() and name.lower() == b"keep-alive":
                    self.keep_alive_s = keep_alive_s(value)
            elif length == 17:
                if name.lower() == b"transfer-encoding":
                    # The last coding counts, also over several lines: another one than chunked
                    # leaves it to the end of the stream to end the body (RFC 9112, 6.3).
                    self._framed = value.rpartition(b",")[2].strip().lower() == b"chunked"
                    if value.lower() != b"chunked":
                        self._codings += b"," + value
            elif length == 16:
                if name.lower() == b"content-encoding":
                    self._codings += b"," + value
            elif length == 11 and name.lower() == b"retry-after":
                self.retry_after = value
        if self.want_headers:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._head_size > MAX_REPLY_HEAD_BYTES:
            raise ReplyTooLarge("reply head exceeds the limit")
        self.status = self._parser.get_status_code()
        self._begun = True

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._max_body_size:
            raise ReplyTooLarge("reply body exceeds the limit")
        if not self.body:
            self.body = body
        else:
            if self._more is None:
                self._more = bytearray(self.body)
            self._more += body

    def on_message_complete(self) -> None:
        if 100 <= self.status < 200:
            self._begun = False
            return
        self._finish()
        self.keep_alive = self._parser.should_keep_alive() and not self._is_last

    def _finish(self) -> None:
        if self._more is not None:
            self.body = bytes(self._more)
            self._more = None
        if (self._codings or self._charset) and self.body:
            self._decode()
        self.keep_alive = False
        self.complete = True

    def _decode(self) -> None:
        charset = "" if self.want_headers else self._charset  # a refusal goes with its type
        try:
            self.body = decode(self.body, self._codings, charset, self._max_body_size)
        except BodyUnusable:
            if self.status == 200:
                raise
            self.body = b""  # the status says enough
