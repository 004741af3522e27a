"""Read the lines that the processes would write."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from harness.work import Rig
from ws2api.gateway import logs
from ws2api.supervisor import process

# Another test's server may run in a thread: no child here touches what a thread could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

Configure = Callable[..., Callable[[], str]]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """Configure logs into a file; the result reads it. All is as before after the test."""
    for name in ("configured", "current", "raised_at"):
        monkeypatch.setattr(logs._Levels, name, getattr(logs._Levels, name))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    former = structlog.get_config()
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def configure(level: logs.Level = "info", format: logs.Format = "text") -> Callable[[], str]:
        logs.configure(level, format, descriptor=descriptor)
        return path.read_text

    yield configure
    os.close(descriptor)
    structlog.contextvars.clear_contextvars()
    structlog.configure(**former)
    root.handlers[:] = handlers
    root.setLevel(level)


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_text_line(configure: Configure) -> None:
    read = configure()
    structlog.get_logger().bind(worker=3).info("connection opened", client="tom", ms=1.5)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z info     connection opened "
        r"worker=3 client=tom ms=1\.5\n",
        read(),
    )


def test_json_line(configure: Configure) -> None:
    read = configure(format="json")
    structlog.get_logger().bind(worker=3).info(
        "connection opened", client=b"\xfftom", path=Path("/")
    )
    (line,) = json_lines(read())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "event": "connection opened",
        "worker": 3,
        "client": "\\xfftom",
        "path": "/",
    }


def test_context_of_the_process_is_in_every_line(configure: Configure) -> None:
    read = configure(format="json")
    structlog.contextvars.bind_contextvars(worker=7)
    structlog.get_logger().warning("one")
    logging.getLogger("asyncio").warning("two")
    assert [line["worker"] for line in json_lines(read())] == [7, 7]


@pytest.mark.parametrize(
    ("level", "kept"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_level_is_the_least_that_is_written(
    configure: Configure, level: logs.Level, kept: int
) -> None:
    read = configure(level, "json")
    log = structlog.get_logger()
    for method in (log.debug, log.info, log.warning, log.error):
        method("line")
    assert len(json_lines(read())) == kept


def test_level_is_raised_for_a_while_and_both_are_said(configure: Configure) -> None:
    read = configure("error", "json")
    structlog.get_logger().debug("before")
    logs.raise_level()
    structlog.get_logger().debug("meanwhile")
    logs.restore_level()
    structlog.get_logger().warning("after")
    assert [(line["event"], line.get("least")) for line in json_lines(read())] == [
        ("logging more for a while", "debug"),
        ("meanwhile", None),
        ("logging as before", "error"),
    ]


def test_libraries_are_heard_from_warnings_on(configure: Configure) -> None:
    read = configure("debug", "json")
    log = logging.getLogger("aiohttp.access")
    log.info("a request")
    log.warning("odd: %s", "x")
    (line,) = json_lines(read())
    assert line["event"] == "odd: x"
    assert line["logger"] == "aiohttp.access"


def test_libraries_are_quiet_with_the_rest(configure: Configure) -> None:
    read = configure("error")
    logging.getLogger("asyncio").warning("slow")
    assert read() == ""


@pytest.mark.parametrize("format", ["text", "json"])
def test_traceback_is_kept(configure: Configure, format: logs.Format) -> None:
    read = configure(format=format)
    try:
        raise ValueError("inner")
    except ValueError:
        structlog.get_logger().exception("ours")
        logging.getLogger("asyncio").exception("theirs")
    assert read().count("Traceback") == 2
    assert read().count("ValueError: inner") == 2
    if format == "json":
        assert [line["event"] for line in json_lines(read())] == ["ours", "theirs"]


def test_nobody_forges_a_line(configure: Configure) -> None:
    read = configure()
    structlog.get_logger().info("closed", reason='x\n2026 info "forged"', by=b"a\nb")
    logging.getLogger("lib").warning("bad %s", "x\ny\x1b[31m")
    first, second = read().splitlines()
    assert first.endswith(r'closed reason="x\n2026 info \"forged\"" by="a\nb"')
    assert r'"bad x\ny\u001b[31m"' in second


def test_colours_on_a_terminal_only(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    read = configure()
    structlog.get_logger().error("plain")
    assert "\x1b" not in read()
    main, terminal = pty.openpty()
    logs.configure("info", "text", descriptor=terminal)
    structlog.get_logger().error("red")
    assert b"\x1b[31merror" in os.read(main, 1000)
    os.close(main)
    os.close(terminal)


def test_closed_stderr_stops_nobody(configure: Configure) -> None:
    configure()
    reader, writer = os.pipe()
    os.close(reader)
    logs.configure("info", "text", descriptor=writer)
    structlog.get_logger().info("unheard")
    os.close(writer)


def test_works_after_a_fork(configure: Configure) -> None:
    read = configure(format="json")

    def child() -> int:
        structlog.contextvars.bind_contextvars(worker=1)
        structlog.get_logger().info("in the child")
        logging.getLogger("asyncio").warning("there too")
        return 0

    os.waitpid(process.fork(child), 0)
    structlog.get_logger().info("in the parent")
    lines = json_lines(read())
    assert [line["event"] for line in lines] == ["in the child", "there too", "in the parent"]
    assert [line.get("worker") for line in lines] == [1, 1, None]


# More for a while.


def say_something_at_every_level() -> None:
    log = structlog.get_logger()
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)(level)


def events(text: str) -> list[str]:
    return [line["event"] for line in json_lines(text)]


@pytest.mark.parametrize(
    ("level", "kept"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_raised_level_writes_everything_until_it_is_restored(
    configure: Configure, level: logs.Level, kept: list[str]
) -> None:
    read = configure(level, "json")
    logs.raise_level()
    say_something_at_every_level()
    logs.restore_level()
    raised = ["logging more for a while", "debug", "info", "warning", "error", "logging as before"]
    assert events(read()) == raised
    say_something_at_every_level()
    assert events(read())[len(raised) :] == kept


def test_level_that_is_raised_twice_is_restored_once(configure: Configure) -> None:
    read = configure("error", "json")
    logs.raise_level()
    logs.raise_level()
    logs.restore_level()
    before = read()
    say_something_at_every_level()
    assert events(read()[len(before) :]) == ["error"]


def test_loggers_that_were_bound_before_follow(configure: Configure) -> None:
    read = configure("info", "json")
    log = structlog.get_logger()
    log.debug("not yet")
    logs.raise_level()
    log.debug("now")
    logs.restore_level()
    log.debug("no more")
    assert [event for event in events(read()) if "logging" not in event] == ["now"]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_tells_which_levels_are_written(configure: Configure, level: logs.Level) -> None:
    names: list[logs.Level] = ["debug", "info", "warning", "error"]
    configure(level)
    assert [logs.is_written(name) for name in names] == [i >= names.index(level) for i in range(4)]
    logs.raise_level()
    assert all(map(logs.is_written, names))
    logs.restore_level()
    assert logs.is_written("debug") == (level == "debug")


def test_raised_level_stays_in_the_format_that_was_configured(configure: Configure) -> None:
    read = configure("info", "text")
    logs.raise_level()
    structlog.get_logger().debug("line", client="tom")
    assert re.search(r"Z debug    line client=tom\n", read())


def test_libraries_are_no_louder_while_the_level_is_raised(configure: Configure) -> None:
    read = configure("info", "json")
    logs.raise_level()
    logging.getLogger("aiohttp.client").debug("Authorization: Bearer secret")
    assert "secret" not in read()


def test_time_that_is_left_passes(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    configure()
    assert logs.raised_left_s() is None
    logs.raise_level()
    assert logs.raised_left_s() == logs.RAISED_S
    now[0] += 100.0
    assert logs.raised_left_s() == logs.RAISED_S - 100.0
    now[0] += logs.RAISED_S
    assert logs.raised_left_s() == 0.0
    logs.restore_level()
    assert logs.raised_left_s() is None


def test_new_configuration_ends_the_raise(configure: Configure) -> None:
    configure("info")
    logs.raise_level()
    configure("warning")
    assert logs.raised_left_s() is None
    assert not logs.is_written("info")


def test_worker_raises_its_level_for_a_while(configure: Configure) -> None:
    read = configure("info", "json")
    with Rig() as rig:
        rig.leaves(rig.connects()[0])
        assert "client connected" not in events(read())
        rig._worker._verbosity.rise()
        rig.loop.passes(logs.RAISED_S - 1.0)
        rig._worker._verbosity.rise()  # once more, for as long again
        rig.loop.passes(logs.RAISED_S - 1.0)
        assert logs.is_written("debug")
        rig.leaves(rig.connects()[0])
        assert events(read()).count("client connected") == 1
        rig.loop.passes(2.0)
        assert not logs.is_written("debug")
        assert events(read()).count("logging as before") == 1
        rig.leaves(rig.connects()[0])
        assert events(read()).count("client connected") == 1
        assert events(read()).count("client disconnected") == 1


def test_worker_that_was_forked_while_the_level_was_raised_restores_it(
    configure: Configure,
) -> None:
    read = configure("info", "json")
    logs.raise_level()  # the supervisor does, before the fork
    with Rig() as rig:
        rig.leaves(rig.connects()[0])
        assert events(read()).count("client disconnected") == 1
        rig.loop.passes(logs.RAISED_S)
        assert not logs.is_written("debug")
        rig.leaves(rig.connects()[0])
        assert events(read()).count("client disconnected") == 1
