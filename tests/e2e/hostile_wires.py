"""Write what no sane client, API or proxy sends: hypothesis' strategies for bytes on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Final

from harness.ws import KEY, Frame, Op, close_payload, upgrade_request
from hypothesis import strategies as st

Bytes = st.SearchStrategy[bytes]

MAX_MESSAGE_BYTES: Final = 8192
"""The limit that some of the messages exceed."""


class Ending(Enum):
    """Say what an attacker does when everything is sent."""

    HALF_CLOSE = "half-close"
    RESET = "reset"
    WAIT = "wait"


@dataclass(frozen=True)
class Attack:
    """Hold what one connection sends.

    Attributes:
        wire: the bytes, with `/me` for the client's id.
        cuts: where it is cut into pieces, modulo its length.
    """

    wire: bytes
    cuts: list[int]
    ending: Ending

    def pieces(self, client_id: str) -> Iterator[bytes]:
        """Yield what is sent by this client."""
        wire = self.wire.replace(b"/me", b"/" + client_id.encode())
        places = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in self.cuts)})
        return (wire[start:end] for start, end in pairwise(places))


@dataclass(frozen=True)
class BadReply:
    """Hold what the API answers to one request of one client."""

    method: str
    wire: bytes
    then_close: bool


def attacks(wires: Bytes, *endings: Ending) -> st.SearchStrategy[list[Attack]]:
    """Make a few attacks that go on at the same time."""
    cuts = st.lists(st.integers(0, 5000), max_size=3)
    attack = st.builds(Attack, wires, cuts, st.sampled_from(endings or tuple(Ending)))
    return st.lists(attack, min_size=4, max_size=10)


@st.composite
def mutated(draw: st.DrawFn, originals: Bytes, tokens: tuple[bytes, ...]) -> bytes:
    """Damage something sound in a few places."""
    data = draw(originals)
    for _ in range(draw(st.integers(1, 2))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        how = draw(st.sampled_from(("cut", "insert", "insert", "flip", "drop", "repeat")))
        if how == "cut":
            data = data[:end]
        elif how == "insert":
            data = data[:start] + draw(st.sampled_from(tokens)) + data[start:]
        elif how == "flip":
            data = data[:start] + bytes(byte ^ 0x80 for byte in data[start:][:1]) + data[start:][1:]
        elif how == "drop":
            data = data[:start] + data[end:]
        else:
            data = data[:end] + data[start:end] + data[end:]
    return data


@st.composite
def requests(
    draw: st.DrawFn,
    methods: tuple[bytes, ...],
    targets: tuple[bytes, ...],
    lines: tuple[bytes, ...],
    bodies: tuple[bytes, ...],
) -> bytes:
    """Write a request with a few lines too many, wherever they fall.

    The first method and the first target are the sound ones, which most requests have.
    """
    head = list(lines)
    for line in draw(st.lists(st.sampled_from(HOSTILE_LINES), max_size=2)):
        head.insert(draw(st.integers(0, len(head))), line)
    if draw(st.integers(0, 4)) == 0:
        head.pop(draw(st.integers(0, len(head) - 1)))
    odd_part = draw(st.sampled_from((None, None, methods, targets, VERSIONS)))
    start_line = b" ".join(
        draw(st.sampled_from(choices)) if choices is odd_part else choices[0]
        for choices in (methods, targets, VERSIONS)
    )
    return b"\r\n".join([start_line, *head, b"", draw(st.sampled_from(bodies))])


# HTTP.

VERSIONS: Final = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 x", b"")

TARGETS: Final = (
    *(b"/me", b"/me?a=b", b"/me?\xff", b"http://x/me", b"//me", b"/", b"", b"*", b"x:1", b"/.."),
    *(b"/a b", b"/%zz", b"/@me", b"/me#x", b"/\0", b"/" + b"m" * 256, b"/" + b"m" * 9000),
    b"/me?" + b"q" * 5000,
)

HOSTILE_LINES: Final = (
    *(b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 0x5"),
    *(b"Content-Length: " + b"9" * 30, b"Content-Length: " + b"0" * 30 + b"2"),
    *(b"Content-Length: 2 ", b"Content-Length: 2, 2", b"Transfer-Encoding: chunked"),
    *(b"Transfer-Encoding: chunked, gzip", b"Transfer-Encoding:\tchunked ", b"Trailer: X"),
    *(b" folded", b"\tfolded", b"Name : value", b"no colon", b": no name", b"", b"X: a\0b"),
    *(b"X: a\rb", b"X: a\nY: b", b"X\0: a", b"\xc3\xbc: a", b"X: \xc3\xbc", b"X: \x01", b"X:"),
    *(b"Big: " + b"x" * 9000, b"\r\n".join([b"Many: x"] * 150), b"N" * 9000 + b": x"),
    *(b"Host: another", b"Host:", b"Upgrade: h2c", b"Connection: close", b"Connection: keep-alive"),
    *(b"Sec-WebSocket-Version: 8", b"Sec-WebSocket-Key: short", b"Sec-WebSocket-Protocol: a b"),
    *(b"Sec-WebSocket-Extensions: permessage-deflate", b"Origin: null", b"Expect: 100-continue"),
    *(b"Cookie: " + b"c" * 3000, b"Authorization: Basic \xff", b"Ws2api-Generation: -1"),
    *(b"Ws2api-Generation: 99999999999999999999", b"X-Forwarded-For: \t, ,"),
)

HTTP_TOKENS: Final = (
    *(b"\r", b"\n", b"\0", b"\r\n", b"\r\n\r\n", b"\r\n ", b"\r\n\t", b" ", b":", b"\x7f"),
    *(b"\xff", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length: 5 \r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"HTTP/1.1"),
    *(b"5\r\nhello\r\n0\r\n\r\n", b"Connection: close\r\n", b"Upgrade: h2c\r\n"),
    *(
        b"Expect: 100-continue\r\n",
        b"GET /me HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    b"\x16\x03\x01\x02\0\x01\0",  # TLS
)

NOISE: Final = st.binary(min_size=1, max_size=200)

# The client port.

_UPGRADES: Final = requests(
    (b"GET", b"POST", b"get", b"CONNECT", b"PRI", b"G" * 300),
    TARGETS,
    (
        *(b"Host: x", b"Upgrade: websocket", b"Connection: Upgrade"),
        *(b"Sec-WebSocket-Key: " + KEY.encode(), b"Sec-WebSocket-Version: 13"),
    ),
    (b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"\x81\x82\0\0\0\0hi", b"\xff" * 500),
)
HANDSHAKES: Final = st.one_of(
    mutated(st.just(upgrade_request("/me")), HTTP_TOKENS),
    _UPGRADES,
    mutated(_UPGRADES, HTTP_TOKENS),
    NOISE,
)

# An open WebSocket.

_PAYLOADS: Final = (
    *(b"", b"hi", b"gr\xc3\xbcn", b"\xff", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"x" * 125),
    *(b"x" * 126, b"x" * 5000, b"x" * (MAX_MESSAGE_BYTES + 1)),
    *(close_payload(code) for code in (0, 999, 1000, 1004, 1005, 1006, 1015, 2999, 4999, 65535)),
    *(b"\x03", close_payload(1000, b"\xff"), close_payload(4000, b"r" * 124)),
)
_FRAMES: Final = st.builds(
    lambda frame, is_masked: frame.encode(mask=is_masked),
    st.builds(
        Frame,
        st.sampled_from((0, 1, 1, 1, 2, 8, 9, 10, 3, 7, 11, 15)),
        st.sampled_from(_PAYLOADS),
        st.sampled_from((True, True, True, False)),
        st.sampled_from((0,) * 12 + (1, 2, 4, 7)),
    ),
    st.sampled_from((True,) * 12 + (False,)),
)
_SEVERAL_FRAMES: Final = st.lists(_FRAMES, min_size=1, max_size=5).map(b"".join)
_FRAGMENTS: Final = st.lists(
    st.builds(
        Frame, st.sampled_from((0, 0, 0, 9, 10)), st.sampled_from(_PAYLOADS[:6]), st.booleans()
    ),
    max_size=6,
)
_FRAME_TOKENS: Final = (
    *(b"\x81", b"\x88\x80\0\0\0\0", b"\x89\xfe\x01\0", b"\x81\xff" + b"\xff" * 8, b"\xff" * 16),
    *(b"\0\x80\0\0\0\0" * 50, b"\x8a\x80\0\0\0\0" * 50, b"\xc1\x80", b"\0", b"\x82\xfe\0\x02"),
)
FRAMES: Final = st.one_of(
    _SEVERAL_FRAMES,
    _FRAGMENTS.map(
        lambda others: b"".join(
            frame.encode() for frame in [Frame(Op.TEXT, b"gr\xc3", fin=False), *others]
        )
    ),
    mutated(_SEVERAL_FRAMES, _FRAME_TOKENS),
    NOISE,
)

# The push port.

_PUSHES: Final = requests(
    (b"POST", b"GET", b"DELETE", b"PUT", b"CONNECT"),
    (
        *(b"/victim", b"/nobody", b"/victim?code=4000&reason=%C3%BC", b"/victim?code=1&reason=%ff"),
        *TARGETS,
    ),
    (b"Host: x", b"Content-Length: 2"),
    (b"hi", b"", b"\xff\xff", b"hello and more", b"h" * (MAX_MESSAGE_BYTES + 1)),
)
_CHUNKED: Final = requests(
    (b"POST",),
    (b"/victim", b"/nobody"),
    (b"Host: x", b"Transfer-Encoding: chunked"),
    (
        *(b"2\r\nhi\r\n0\r\n\r\n", b"2;a=b\r\nhi\r\n0\r\nX: y\r\n\r\n", b"0\r\n\r\n", b"-1\r\n"),
        *(b"2\r\nhello", b"fffffffffffffffff\r\n", b"2\nhi\n0\n\n", b"2;" + b"x" * 40_000),
        *(b"2000\r\n" + b"h" * 0x2000 + b"\r\n1\r\nh\r\n", b"0\r\nX: " + b"x" * 40_000),
        b"0\r\n" + b"X: y\r\n" * 200,
    ),
)
_UPGRADING: Final = requests(
    (b"POST",),
    (b"/victim",),
    (b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: A", b"Content-Length: 2"),
    (b"hi", b"", b"hiPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
)
_SEVERAL_PUSHES: Final = st.lists(
    st.one_of(_PUSHES, _CHUNKED, _UPGRADING), min_size=1, max_size=4
).map(b"".join)
PUSHES: Final = st.one_of(_SEVERAL_PUSHES, mutated(_SEVERAL_PUSHES, HTTP_TOKENS), NOISE)

# The API's replies. None is both large and damaged: what follows the end of a reply may arrive when
# the connection is in use again, and then it is the API that has answered another client so.

_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
_SOUND_REPLIES: Final = (
    _OK,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\nok",
    b"HTTP/1.1 100 x\r\n\r\nHTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\nSec-WebSocket-Protocol: never-offered\r\n\r\n",
    b"HTTP/1.1 403 Forbidden\r\nWWW-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 503 Busy\r\nRetry-After: soon\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
)
_HOSTILE_REPLIES: Final = (
    *(b"", b"\r\n", b"\0", b"ok", b"HTTP/1.1", b"HTTP/9.9 200 OK\r\n\r\n", b"<html>200 OK</html>"),
    b"HTTP/1.1 000 x\r\n\r\nok",
    b"HTTP/1.1 099 x\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 999 x\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n\x81\x02hi",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 70_000,
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * 200_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
    b"HTTP/1.1 200 OK\r\nSet-Cookie: a\rInjected: b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 403 x\r\nContent-Type: a\nInjected: b\r\nContent-Length: 0\r\n\r\n",
    _OK + _OK,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
BAD_REPLIES: Final = st.builds(
    BadReply,
    st.sampled_from(("GET", "POST", "DELETE")),
    st.one_of(
        mutated(st.sampled_from(_SOUND_REPLIES), HTTP_TOKENS),
        st.sampled_from(_HOSTILE_REPLIES),
        NOISE,
    ),
    st.sampled_from((True, True, True, False)),
)
