"""Find ids in paths, by patterns; refuse patterns that no path can be like."""

from __future__ import annotations

import pytest
from ws2api.gateway.client_paths import IDS, ClientPaths, parse_pattern
from ws2api.gateway.errors import HandshakeError, PathUnknown
from ws2api.gateway.frames import TEXT
from ws2api.gateway.known_fields import KnownFields


@pytest.mark.parametrize(
    ("patterns", "path", "client_id"),
    [
        ("/{id}", "/CP1", "CP1"),
        ("/{id}", "/%43P1%2f", "CP1%2F"),
        ("/ocpp/{id}", "/ocpp/CP1", "CP1"),
        ("/ocpp/{id}", "/%6fcpp/DE*A:1", "DE*A:1"),
        ("/a/b%2fc/{id}", "/a/b%2Fc/x", "x"),
        ("/{id}/ws", "/ann/ws", "ann"),
        ("/v1/{id}/ws", "/v1/ws/ws", "ws"),
        ("/{id...}", "/CP1", "CP1"),
        ("/{id...}", "/acme/CP1", "acme/CP1"),
        ("/{id...}", "/acme/%43P1%2f/x", "acme/CP1%2F/x"),
        ("/{id...}", "/" + "a/" * 127 + "b", "a/" * 127 + "b"),
        ("/ocpp/{id...}/ws", "/ocpp/acme/ws/CP1/ws", "acme/ws/CP1"),
        ("/ocpp/{id} /{id}", "/CP1", "CP1"),
        ("/ocpp/{id} /{id}", "/ocpp/CP1", "CP1"),
        ("/ocpp/{id} /{id...}", "/ocpp/CP1", "CP1"),
        ("/ocpp/{id} /{id...}", "/ocpp/acme/CP1", "ocpp/acme/CP1"),
        ("/{id...} /ocpp/{id}", "/ocpp/CP1", "ocpp/CP1"),
    ],
)
def test_id_is_found(patterns: str, path: str, client_id: str) -> None:
    assert ClientPaths(patterns.split()).find(path.encode()) == client_id.encode()


@pytest.mark.parametrize(
    ("patterns", "path"),
    [
        ("/ocpp/{id}", "/CP1"),
        ("/ocpp/{id}", "/"),
        ("/ocpp/{id}", "/ocpp"),
        ("/ocpp/{id}", "/OCPP/CP1"),
        ("/ocpp/{id}", "/ocpp/acme/CP1"),
        ("/ocpp/{id}", "//ocpp/CP1"),
        ("/ocpp/{id}", "/ocpp%2FCP1"),
        ("/a/{id}/a", "/a/a"),
        ("/{id}/ws", "/ann"),
        ("/a/{id} /b/{id}", "/c/x"),
    ],
)
def test_path_of_another_form_is_unknown(patterns: str, path: str) -> None:
    with pytest.raises(PathUnknown) as caught:
        ClientPaths(patterns.split()).find(path.encode())
    assert caught.value.status == 404
    assert " or ".join(patterns.split()) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        *((form, f"/ocpp/{id_}") for form in ("/ocpp/{id}", "/ocpp/{id...}") for id_ in ("", "..")),
        *(("/ocpp/{id...}", f"/ocpp/{id_}") for id_ in ("a//b", "/a", "a/", "a/./b", "a/../b")),
        *(("/ocpp/{id...}", f"/ocpp/{id_}") for id_ in ("../a", "a/..", "a/%2e%2E/b", "a/..;x/b")),
        *(("/{id...}", f"/{id_}") for id_ in ("@all", "@groups/x", "a b", "a/%zz", "a\\b", "")),
        ("/{id...}", "/" + "a/" * 127 + "bc"),
        ("/ocpp/{id}", "/ocpp/@all"),
        ("/{id}", "/a/b"),
    ],
)
def test_what_is_no_id_is_refused(pattern: str, path: str) -> None:
    with pytest.raises(HandshakeError) as caught:
        ClientPaths([pattern]).find(path.encode())
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "/", "{id}", "ocpp/{id}", "/ocpp", "/x{id}", "/{id}x", "/{ID}", "/{id..}", "/{}"),
        *("/{id}/{id}", "/{id}{id}", "//{id}", "/a//{id}", "/{id}/", "/{id}//a", "/../{id}"),
        *("/a/./{id}", "/{id}/%2e%2e", "/a b/{id}", "/{id}?q", "/{id}#f", "/ü/{id}", "/%zz/{id}"),
        *("/{x}/{id}", "http://a/{id}", "/a\\b/{id}"),
    ],
)
def test_pattern_that_no_path_is_like(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"expected a path|has a segment"):
        parse_pattern(pattern)


def test_only_the_default_says_all() -> None:
    assert ClientPaths(["/{id}"]).is_plain
    assert not ClientPaths(["/{id...}"]).is_plain
    assert not ClientPaths(["/{id}", "/ocpp/{id}"]).is_plain
    assert [paths.takes_several for paths in IDS] == [False, True]


@pytest.mark.parametrize(
    "client_id", ["a", "a/b", "a//b", "/a", "a/", "a/.b", ".a/b", "a/..", "@a", "a/@b", "%61/b"]
)
def test_push_that_is_recognised_has_the_id_of_one_that_is_parsed(client_id: str) -> None:
    fields = b"Host: a\r\nContent-Length: 2\r\n\r\nhi"
    for is_several in (False, True):
        known = KnownFields(is_several)
        known.remember(b"POST /me HTTP/1.1\r\n" + fields, TEXT, b"hi")
        push = known.recognise(b"POST /%b HTTP/1.1\r\n%b" % (client_id.encode(), fields))
        try:
            found = IDS[is_several].find(b"/" + client_id.encode())
        except HandshakeError:
            assert push is None
        else:
            assert push is None or push[0] == found
            assert push is not None or "." in client_id or "%" in client_id
