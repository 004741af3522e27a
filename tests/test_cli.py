"""Start the command with wrong options and in wrong places: one line, and the right status."""

from __future__ import annotations

import logging
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog
from harness.valkey import ValkeyProcess
from harness.waiting import DEADLINE_S
from ws2api.gateway.settings import option_rows
from ws2api.supervisor import cli
from ws2api.supervisor.errors import GaveUpError

FREE_PORTS = (
    "--listen=127.0.0.1:0",
    "--push-listen=127.0.0.1:0",
    "--admin-listen=127.0.0.1:0",
)


@pytest.fixture(autouse=True)
def _process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what main() does to the process that it usually has to itself."""
    for row in option_rows():
        monkeypatch.delenv(row.variable, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    former = structlog.get_config()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    structlog.configure(**former)
    root.handlers[:] = handlers
    root.setLevel(level)


def assert_refused(capsys: pytest.CaptureFixture[str], *arguments: str, text: str) -> None:
    """Expect exit status 2 and a single line that contains the text, with --check and without."""
    for mode in ((), ("--check",)):
        assert cli.main([*FREE_PORTS, *arguments, *mode]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("ws2api-supervisor: ")
        assert text in err
        assert err.count("\n") == 1
        assert err.endswith("\n")


def test_refuses_a_bad_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "--workers=0", text="workers: must be at least 1, got 0")


def test_refuses_in_one_line_whatever_the_value_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "--workers=1\n2", text="workers: must be a whole number, got 1 2")


@pytest.mark.parametrize("option", ["listen", "push-listen", "admin-listen"])
def test_refuses_a_port_in_use(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = f"{option}: cannot listen on {address}: port in use"
        assert_refused(capsys, f"--{option}={address}", text=text)


def test_refuses_an_unreachable_redis_without_its_password(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    assert_refused(
        capsys,
        f"--redis=redis://user:hunter2@127.0.0.1:{port}/3",
        text=f"redis: cannot use redis://127.0.0.1:{port}/3: ",
    )
    cli.main([*FREE_PORTS, f"--redis=redis://user:hunter2@127.0.0.1:{port}/3"])
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://h:port", "redis: "),
        ("redis://127.0.0.1?nonsense=1", "redis: "),
        ("unix:///no", "redis: cannot use "),
    ],
)
def test_refuses_a_redis_url_that_means_nothing(
    capsys: pytest.CaptureFixture[str], url: str, text: str
) -> None:
    assert_refused(capsys, f"--redis={url}", text=text)


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "cannot read {}: No such file or directory"), ("x", "no PEM certificates in {}")],
)
def test_refuses_unusable_authorities(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, text: str
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    assert_refused(capsys, f"--api-ca={path}", text="api-ca: " + text.format(path))


def test_refuses_to_run_without_temporary_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    assert cli.main([*FREE_PORTS, "--workers=1"]) == 2
    reason = capsys.readouterr().err
    assert reason == (
        "ws2api-supervisor: no folder for temporary files: No such file or directory\n"
    )


def test_check_says_what_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with ValkeyProcess(tmp_path) as valkey:
        assert cli.main([*FREE_PORTS, "--check", "--workers=1", f"--redis={valkey.url}"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("ok: 1 worker, clients 127.0.0.1:")
    assert out.endswith(f", api http://127.0.0.1:8000/, redis {valkey.url}\n")


def test_warns_once_of_what_is_hardly_meant(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WS2API_WORKRES", "2")
    ports = ["--listen=127.0.0.1:0", "--push-listen=:0", "--admin-listen=:0"]
    with closing(socket.create_server(("127.0.0.1", 0))) as api:
        url = f"http://127.0.0.1:{api.getsockname()[1]}"
        assert cli.main([*ports, "--check", f"--api={url}"]) == 0
    push, admin, variable = capfd.readouterr().err.splitlines()
    assert "warning" in push
    assert "push-listen: whoever reaches 0.0.0.0:0 may push to any client" in push
    assert "admin-listen: whoever reaches 0.0.0.0:0 sees the figures" in admin
    assert "did you mean WS2API_WORKERS?" in variable


def test_check_warns_of_an_api_that_is_away(capfd: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    assert cli.main([*FREE_PORTS, "--check", f"--api={url}"]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert "warning" in line
    assert f"api: cannot reach {url}: Connection refused" in line


def test_check_finds_the_server_to_embed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*FREE_PORTS, "--check", "--workers=3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok: 3 workers, ")
    assert "redis embedded (/" in out


def test_says_why_it_gave_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(_configuration: object) -> int:
        raise GaveUpError("the workers cannot start")

    monkeypatch.setattr(cli, "_serve", give_up)
    assert cli.main([*FREE_PORTS]) == 3
    assert capsys.readouterr().err == "ws2api-supervisor: the workers cannot start\n"


def test_interrupted_start_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_configuration: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_serve", interrupt)
    assert cli.main([*FREE_PORTS]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argument", "status"), [("--version", 0), ("--help", 0), ("--nonsense", 2)]
)
def test_is_installed_as_a_command(argument: str, status: int) -> None:
    command = Path(sys.executable).with_name("ws2api-supervisor")
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", command, argument],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == status
    assert (done.stdout == "") == (status == 2)
    assert (done.stderr == "") == (status == 0)
    assert "Traceback" not in done.stderr
