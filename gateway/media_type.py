"""Read a Content-Type: whether a message is binary, and what a text is written in; pure."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

BINARY_TYPE: Final = b"application/octet-stream"

_CHARSET: Final = re.compile(rb';[ \t]*charset[ \t]*=[ \t]*"?([^\s";]{1,40})', re.IGNORECASE)
# All that is ASCII is UTF-8.
_UTF8: Final = ("utf-8", "utf8", "us-ascii", "ascii")
# An API sends few different ones, again and again.
_MOST_TYPES: Final = 32


def is_binary(content_type: bytes) -> bool:
    """Tell whether a Content-Type is that of a binary message, whatever its parameters."""
    return content_type.partition(b";")[0].strip().lower() == BINARY_TYPE


def charset_of(content_type: bytes) -> str:
    """Return the charset that a Content-Type names; empty if none, or what is UTF-8 anyway."""
    found = _CHARSET.search(content_type) if b";" in content_type else None
    charset = found[1].decode("latin-1").lower() if found else ""
    return "" if charset in _UTF8 else charset


@lru_cache(_MOST_TYPES)
def form_of(content_type: bytes) -> tuple[bool, str]:
    """Return whether a Content-Type is that of a text message, and `charset_of` the text."""
    is_text = not is_binary(content_type)
    return is_text, charset_of(content_type) if is_text else ""
