"""Tell ids that may be from those that may not; bring each to one spelling."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ws2api.gateway.client_id import normalise_client_id
from ws2api.gateway.errors import HandshakeError
from ws2api.gateway.frames import TEXT
from ws2api.gateway.known_fields import KnownFields


@pytest.mark.parametrize(
    "client_id",
    [
        *("a", "0", "-", "~", "Az09-._~", "...", ".a", "a.", "CP_001", "x" * 255, "%F0" * 85),
        *("DE*ABC*E1", "a:b", "a+b", "o'neil!", "a;b", "a,b", "a=b", "a&b", "$", "(a)", "a@b"),
        *("%2F", "%C3%BC", "%00", "a%2Fb", "..a%2F.b%2F...", "%252e%252e%252f", "%40all", "*"),
        *("a;..", "a;..b", "a;%2e", "%2B", "%3A"),
    ],
)
def test_id_that_may_stand_in_a_path_is_taken(client_id: str) -> None:
    assert normalise_client_id(client_id.replace("%2e", ".").encode())


@pytest.mark.parametrize(
    "client_id",
    [
        *("", ".", "..", "%2e", "%2E", "%2e%2E", ".%2e", "%2e.", "@", "@all", "x" * 256),
        *("..%2Fadmin", "%2e%2e%2fadmin", "a%2F..%2F..%2Fb", "a%2f.", "..%5Cadmin", "a%5c%2E%2e"),
        *("..;", "..;a=b", ".;", "%2e%2e;x", "..%3bx", "a%2f..;b%2Fc", "a%5C..%3B", "%2e%2F"),
        *("%", "%4", "%zz", "a%", "a b", "a\\b", "a\0", "a/b", "a\n", "a\r\nX: y", "ü", "\xff"),
        *('a"b', "<a>", "a|b", "{a}", "a^b", "a`b", "a#b", "a?b", "[a]", "%%41", "%2%41"),
        "%F0" * 86,
    ],
)
def test_id_that_may_not_is_refused(client_id: str) -> None:
    with pytest.raises(HandshakeError):
        normalise_client_id(client_id.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a%2fb", "a%2Fb"),
        ("%c3%bc", "%C3%BC"),
        ("%61%6C%6c", "all"),
        ("%2e%2e%2e", "..."),
        ("%7Ea%2D%5f", "~a-_"),
        # Others that are not escaped are not the same as those that are (RFC 3986, 2.2).
        ("a+b:c", "a+b:c"),
        ("a%2bb%3ac", "a%2Bb%3Ac"),
        ("%40all", "%40all"),
        # What comes out of it is not read again.
        ("%25%36%31", "%2561"),
        ("%2541", "%2541"),
        # The length counts when all is normalised.
        ("%61" * 255, "a" * 255),
    ],
)
def test_one_client_has_one_spelling(written: str, meant: str) -> None:
    assert normalise_client_id(written.encode()) == meant.encode()


_pieces = st.sampled_from("abZ09.-_~!$&'()*+,;=:@%/\\") | st.integers(0, 255).map("%{:02x}".format)


@settings(deadline=None, max_examples=300)
@given(st.lists(_pieces, max_size=12).map("".join) | st.text(max_size=6))
def test_spelling_says_the_same_and_stays(text: str) -> None:
    try:
        spelling = normalise_client_id(text.encode())
    except HandshakeError:
        return
    assert unquote_to_bytes(spelling) == unquote_to_bytes(text.encode())
    assert normalise_client_id(spelling) == spelling
    assert not re.search(rb"[^!-~]|%[0-9A-F]?[a-f]", spelling)
    # As nginx and as a server in Java would read it.
    segments = re.split(rb"[/\\]", re.sub(rb";[^/\\]*", b"", unquote_to_bytes(spelling)))
    assert not {b".", b".."} & set(segments)


@settings(deadline=None, max_examples=200)
@given(st.lists(_pieces, min_size=1, max_size=6).map("".join))
def test_push_that_is_recognised_has_the_id_of_one_that_is_parsed(text: str) -> None:
    known = KnownFields()
    fields = b"Host: a\r\nContent-Length: 2\r\n\r\nhi"
    known.remember(b"POST /me HTTP/1.1\r\n" + fields, TEXT, b"hi")
    push = known.recognise(b"POST /%b HTTP/1.1\r\n%b" % (text.encode(), fields))
    try:
        spelling = normalise_client_id(text.encode())
    except HandshakeError:
        assert push is None
        return
    is_plain = "%" not in text and not text.startswith(".")
    assert (push is not None) == is_plain
    assert push is None or push[0] == spelling
