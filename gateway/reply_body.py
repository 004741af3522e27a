"""Make of the body of a reply what the client gets: inflated, and in UTF-8; pure."""

from __future__ import annotations

import codecs
import re
import zlib
from typing import Final

_TIMEOUT: Final = re.compile(rb"\btimeout=(\d{1,9})(?:[,;\s]|$)", re.IGNORECASE)
_GZIP: Final = (b"gzip", b"x-gzip")
_NO_CODING: Final = (b"", b"identity", b"chunked")
# Names of Python's own that are no charset, or take a time that grows with the square of the size.
_NO_CHARSETS: Final = (
    *("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "mbcs", "oem"),
)


class BodyUnusable(Exception):
    """A reply's body cannot be decoded; the message is for the operator."""


def keep_alive_s(value: bytes) -> int | None:
    """Return the seconds in a Keep-Alive header (RFC 2068, 19.7.1.1); None without any."""
    found = _TIMEOUT.search(value)
    return int(found[1]) if found else None


def decode(body: bytes, codings: bytes, charset: str, limit: int) -> bytes:
    """Return a body without its codings, and in UTF-8.

    Args:
        codings: what Content-Encoding and Transfer-Encoding list, with commas; one may count.
        charset: what the text is written in; empty if it is UTF-8, or no text.
        limit: size in bytes that the result may have; nothing larger is ever inflated.

    Raises:
        BodyUnusable: if that cannot be done.
    """
    names = [name.strip().lower() for name in codings.split(b",")]
    applied = [name for name in names if name not in _NO_CODING]
    if len(applied) > 1:
        raise BodyUnusable(f"several codings: {_show(b', '.join(applied))}")
    if applied:
        body = _inflate(body, applied[0], limit)
    return _to_utf8(body, charset, limit) if charset else body


def _inflate(body: bytes, coding: bytes, limit: int) -> bytes:
    if coding in _GZIP:
        windows = [16 + zlib.MAX_WBITS]
    elif coding == b"deflate":
        # By RFC 9110, 8.4.1.2, in the format of zlib; some servers leave that away.
        windows = [zlib.MAX_WBITS, -zlib.MAX_WBITS]
    else:
        raise BodyUnusable(f"a coding that was not asked for: {_show(coding)}")
    for window in windows:
        inflater = zlib.decompressobj(window)
        try:
            inflated = inflater.decompress(body, limit + 1)
        except zlib.error:
            continue
        if len(inflated) > limit:
            raise BodyUnusable("the inflated body exceeds the limit")
        if inflater.eof and not inflater.unused_data:
            return inflated
    raise BodyUnusable(f"the body is no {_show(coding)}")


def _to_utf8(body: bytes, charset: str, limit: int) -> bytes:
    try:
        if codecs.lookup(charset).name.replace("-", "_") in _NO_CHARSETS:
            raise LookupError
        text = body.decode(charset).encode()
    except LookupError:  # also for codecs that do not make text
        raise BodyUnusable(f"an unknown charset: {charset!r}") from None
    except ValueError:
        raise BodyUnusable(f"the body is no {charset!r}") from None
    if len(text) > limit:
        raise BodyUnusable("the body in UTF-8 exceeds the limit")
    return text


def _show(name: bytes) -> str:
    return repr(name[:40].decode("latin-1"))
