"""Read settings again: what changes, what is refused, and in which words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from ws2api.gateway.settings import Settings, SettingsError, load, option_rows
from ws2api.supervisor.configuration import FIXED, Configuration, ReloadRefused


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for row in option_rows():
        monkeypatch.delenv(row.variable, raising=False)
    former = structlog.get_config()
    yield
    structlog.configure(**former)


class File:
    """Be the configuration file of a Configuration."""

    def __init__(self, path: Path, text: str = "", *flags: str) -> None:
        self.path = path
        self.write(text)
        arguments = [f"--config={path}", *flags]
        self.configuration = Configuration(load(arguments), lambda: load(arguments))

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def refusal(self) -> str:
        """Reload, see that it is refused and that nothing changed, and return why."""
        before = self.configuration.settings
        with pytest.raises(ReloadRefused) as caught:
            self.configuration.reload()
        assert self.configuration.settings is before
        return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "ws2api.toml", "max_queue = 4\n", "--workers=2")


def test_new_values_are_in_force(file: File) -> None:
    file.write("max_queue = 5")
    assert file.configuration.settings.max_queue == 4
    file.configuration.reload()
    assert file.configuration.settings.max_queue == 5
    assert file.configuration.settings.workers == 2


def test_flags_and_environment_still_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WS2API_MAX_IN_FLIGHT", "7")
    file = File(tmp_path / "file", "", "--max-queue=3")
    file.write("max_queue = 5\nmax_in_flight = 8")
    file.configuration.reload()
    assert file.configuration.settings.max_queue == 3
    assert file.configuration.settings.max_in_flight == 7


def test_former_settings_can_be_had_back(file: File) -> None:
    file.write("max_queue = 5")
    file.configuration.reload()
    file.configuration.revert()
    assert file.configuration.settings.max_queue == 4
    file.configuration.reload()
    assert file.configuration.settings.max_queue == 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_queue = 0", "max-queue: must be at least 1, got 0"),
        ("max_que = 1", "config: no option 'max_que' may stand in "),
        ("max_queue =", "config: {} is no TOML: "),
        ("api-ca = '/no/such/file'", "api-ca: cannot read /no/such/file: No such file"),
        ("x = " + "[" * 100_000, "RecursionError: "),
    ],
)
def test_wrong_file_is_refused(file: File, text: str, reason: str) -> None:
    file.write(text)
    refusal = file.refusal()
    assert refusal.startswith(reason.format(file.path))
    assert "\n" not in refusal


def test_missing_file_is_refused(file: File) -> None:
    file.path.unlink()
    assert file.refusal() == f"config: cannot read {file.path}: No such file or directory"


def test_pipe_is_refused_instead_of_waited_for(file: File) -> None:
    file.path.unlink()
    os.mkfifo(file.path)
    assert file.refusal() == f"config: {file.path} is no regular file, to be read twice"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("workers", 3),
        ("listen", "127.0.0.1:7901"),
        ("push_listen", "127.0.0.1:7902"),
        ("push_advertise", "elsewhere.example"),
        ("admin_listen", "127.0.0.1:7903"),
        ("redis", "redis://127.0.0.1/0"),
        ("redis_prefix", "other:"),
        ("config", "/etc/hostname"),
    ],
)
def test_what_needs_a_restart_is_refused_by_name(option: str, value: Any) -> None:
    before, after = Settings(workers=2), Settings(**{"workers": 2, option: value})
    configuration = Configuration(before, lambda: after)
    with pytest.raises(ReloadRefused) as caught:
        configuration.reload()
    name = option.replace("_", "-")
    assert str(caught.value) == f"{name}: cannot change without a restart"
    assert option in FIXED
    assert configuration.settings is before


def test_every_reason_is_named(file: File) -> None:
    file.write("redis_prefix = 'x:'\nlisten = ':1'\nmax_queue = 9")
    assert file.refusal() == "listen, redis-prefix: cannot change without a restart"


def test_everything_else_may_change() -> None:
    other: dict[str, Any] = {
        "single_port": True,
        "push_token": "secret",
        "api": "http://127.0.0.1:1/x",
        "api_timeout": 1,
        "log_format": "json",
    }
    configuration = Configuration(Settings(), lambda: Settings(**other))
    configuration.reload()
    assert configuration.settings.single_port


def test_default_number_of_workers_is_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = File(tmp_path / "file")
    workers = file.configuration.settings.workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(workers + 1)))
    assert Settings().workers == workers + 1
    file.configuration.reload()
    assert file.configuration.settings.workers == workers


def test_refusal_is_one_line() -> None:
    def fail() -> Settings:
        raise SettingsError("two\nlines")

    with pytest.raises(ReloadRefused, match=r"^two lines$"):
        Configuration(Settings(), fail).reload()
