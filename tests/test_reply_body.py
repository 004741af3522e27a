"""Decode bodies of replies, within bounds."""

from __future__ import annotations

import gzip
import zlib

import pytest
from ws2api.gateway.reply_body import BodyUnusable, decode, keep_alive_s

LIMIT = 1_000
TEXT = "größer".encode()


def raw_deflate(body: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(body) + deflater.flush()


@pytest.mark.parametrize(
    ("codings", "body"),
    [
        (b"", TEXT),
        (b",identity", TEXT),
        (b",gzip", gzip.compress(TEXT, mtime=0)),
        (b",X-GZip , chunked", gzip.compress(TEXT, mtime=0)),
        (b",deflate", zlib.compress(TEXT)),
        (b",deflate", raw_deflate(TEXT)),
    ],
)
def test_codings_are_undone(codings: bytes, body: bytes) -> None:
    assert decode(body, codings, "", LIMIT) == TEXT


@pytest.mark.parametrize(
    ("codings", "body"),
    [
        (b",br", TEXT),
        (b",gzip,deflate", gzip.compress(TEXT, mtime=0)),
        (b",gzip", TEXT),
        (b",gzip", gzip.compress(TEXT, mtime=0)[:-1]),
        (b",gzip", gzip.compress(TEXT, mtime=0) + b"x"),
        (b",deflate", gzip.compress(TEXT, mtime=0)),
    ],
)
def test_what_is_not_so_coded_is_unusable(codings: bytes, body: bytes) -> None:
    with pytest.raises(BodyUnusable):
        decode(body, codings, "", LIMIT)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_no_more_is_inflated_than_the_limit(coding: str) -> None:
    compress = gzip.compress if coding == "gzip" else zlib.compress
    whole = compress(bytes(LIMIT))
    assert decode(whole, f",{coding}".encode(), "", LIMIT) == bytes(LIMIT)
    for size in (LIMIT + 1, 100_000_000):
        with pytest.raises(BodyUnusable, match="limit"):
            decode(compress(bytes(size)), f",{coding}".encode(), "", LIMIT)


@pytest.mark.parametrize("charset", ["iso-8859-1", "windows-1252", "utf-16", "cp850"])
def test_text_is_put_into_utf8(charset: str) -> None:
    assert decode(TEXT.decode().encode(charset), b"", charset, LIMIT) == TEXT


@pytest.mark.parametrize("charset", ["xyz", "base64", "zlib", "idna", "unicode_escape", "../x"])
def test_unknown_charset_is_named(charset: str) -> None:
    with pytest.raises(BodyUnusable, match="unknown charset"):
        decode(b"text", b"", charset, LIMIT)


def test_text_that_is_none_in_its_charset_is_unusable() -> None:
    with pytest.raises(BodyUnusable, match="utf-16"):
        decode(b"odd", b"", "utf-16", LIMIT)


def test_text_must_keep_to_the_limit_in_utf8_too() -> None:
    with pytest.raises(BodyUnusable, match="limit"):
        decode(b"\xe9" * LIMIT, b"", "latin-1", LIMIT)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"timeout=5", 5),
        (b"max=100, Timeout=15", 15),
        (b"timeout=0;x", 0),
        (b"max=7", None),
        (b"timeout=1.5", None),
        (b"timeout=", None),
    ],
)
def test_keep_alive(value: bytes, seconds: int | None) -> None:
    assert keep_alive_s(value) == seconds
