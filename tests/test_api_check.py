"""Look for an API that is there, away, silent, or not to be trusted."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import uvloop
from harness.api import FakeApi
from harness.certificates import Certificate, make_certificate
from ws2api.gateway.settings import load
from ws2api.supervisor.api_check import find_fault


def fault(api: str, *options: str) -> str:
    return uvloop.run(find_fault(load(["--api", api, *options])))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "api")


@pytest.fixture(scope="module")
def tls_port(certificate: Certificate) -> Iterator[int]:
    with FakeApi(tls=certificate.server_context()) as api:
        yield api.port


def test_api_that_is_there_is_not_asked_anything() -> None:
    with FakeApi() as api:
        assert fault(api.url) == ""
        assert not api.violations


def test_api_that_is_away() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    assert fault(url) == f"api: cannot reach {url}: Connection refused"


def test_api_whose_name_nobody_knows() -> None:
    assert fault("http://no-such-host.invalid/").startswith(
        "api: cannot reach http://no-such-host.invalid/: "
    )


def test_api_whose_name_no_host_can_have() -> None:
    url = "http://api..example/"
    assert fault(url) == f"api: cannot reach {url}: no host can have this name"


def test_api_that_speaks_no_tls() -> None:
    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.recv(1)

    with closing(socket.create_server(("127.0.0.1", 0))) as server, ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer)
        text = fault(f"https://127.0.0.1:{server.getsockname()[1]}/")
        answering.result()
    assert "it speaks no TLS there" in text


def test_api_that_is_silent() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        text = fault(f"https://127.0.0.1:{port}", "--api-connect-timeout=200ms")
    assert text.endswith("no connection within 0.2 s")


def test_certificate_that_is_not_trusted(tls_port: int, certificate: Certificate) -> None:
    url = f"https://127.0.0.1:{tls_port}/"
    assert "its certificate is not trusted; name its authority with --api-ca FILE" in fault(url)
    assert fault(url, f"--api-ca={certificate.certificate}") == ""
    other = f"https://localhost:{tls_port}/"
    assert "its certificate is for another name than localhost" in fault(
        other, f"--api-ca={certificate.certificate}"
    )


def test_authority_that_vouches_for_others(tls_port: int, tmp_path: Path) -> None:
    other = make_certificate(tmp_path, "other")
    text = fault(f"https://127.0.0.1:{tls_port}/", f"--api-ca={other.certificate}")
    assert f"no authority in --api-ca {other.certificate} vouches" in text
