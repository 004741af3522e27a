"""Tell binary messages from text, and texts that are UTF-8 from others."""

from __future__ import annotations

import pytest
from ws2api.gateway.media_type import charset_of, is_binary


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"application/octet-stream", True),
        (b"Application/Octet-Stream ; x=y", True),
        (b" application/octet-stream;charset=x ", True),
        (b"application/octet-streams", False),
        (b"application/octet-stream-x; a=b", False),
        (b"text/plain", False),
        (b"application/json", False),
        (b"", False),
        (b"x-application/octet-stream", False),
        (b"text/plain; x=application/octet-stream", False),
    ],
)
def test_binary_by_its_type(content_type: bytes, expected: bool) -> None:
    assert is_binary(content_type) == expected


@pytest.mark.parametrize(
    ("content_type", "charset"),
    [
        (b"text/plain", ""),
        (b"text/plain; charset=UTF-8", ""),
        (b'text/plain;charset="utf-8"', ""),
        (b"application/json; charset=us-ascii; x=y", ""),
        (b"text/plain; format=flowed; Charset = utf8", ""),
        (b"text/plain; charset=", ""),
        (b"text/plain; charset=ISO-8859-1", "iso-8859-1"),
        (b'text/plain; a=b; charset="utf-16"', "utf-16"),
        (b"text/plain; xcharset=utf-16", ""),
        (b"charset=utf-16", ""),
        (b"", ""),
    ],
)
def test_charset_that_is_not_utf8(content_type: bytes, charset: str) -> None:
    assert charset_of(content_type) == charset
