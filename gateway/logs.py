"""Write log lines, as text or as JSON, from every process of the gateway to one stderr.

A process says once who it is (`structlog.contextvars.bind_contextvars(worker=3)`), and every line
of it carries that, those of libraries too. Nothing here holds a lock, a thread or a buffer, so it
is configured before the fork and works after it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import time
from collections.abc import Sequence
from typing import Any, Final, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]

STDERR: Final = 2

_log = structlog.get_logger()

_PLAIN = re.compile(r"[!#-<>-~]+")
"""Values that text needs no quotes around: printable ASCII but for space, quote and equals."""

_COLOURS: Final = {
    "debug": "\x1b[2m",
    "warning": "\x1b[33m",
    "error": "\x1b[31m",
    "critical": "\x1b[31;1m",
}
_RESET: Final = "\x1b[0m"


RAISED_S: Final = 300.0
"""How long `raise_level` should hold, in every process alike."""


class _Levels:
    """Remember the level in force, and the one of the options."""

    configured: Level = "info"
    current: Level = "info"
    # Monotonic time at which everything was raised last, None while the options are in force.
    raised_at: float | None = None


def configure(level: Level, format: Format, *, descriptor: int = STDERR) -> None:
    """Set up structlog, and route stdlib logging from warnings on into it.

    Args:
        level: the least severe level that is written.
        format: "text" for people, "json" for one object a line.
        descriptor: the file that lines are written to.
    """
    _Levels.configured = level
    _Levels.raised_at = None
    colours = os.isatty(descriptor) and "NO_COLOR" not in os.environ
    structlog.configure(
        processors=_processors(format, colours=colours),
        logger_factory=_LineWriterFactory(descriptor),
        # A logger kept at module level must follow a later configure().
        cache_logger_on_first_use=False,
    )
    _set_level(level)
    logging.basicConfig(
        level=max(logging.WARNING, _number(level)),
        handlers=[_ToStructlog()],
        force=True,
    )


def raise_level() -> None:
    """Write everything from now on, until `restore_level`; see RAISED_S."""
    _Levels.raised_at = time.monotonic()
    _set_level("debug")
    _log.warning("logging more for a while", least="debug", seconds=RAISED_S)


def restore_level() -> None:
    """Write what the options say."""
    # Said first: it is of no level that a gateway which logs errors only would write.
    _log.warning("logging as before", least=_Levels.configured)
    _Levels.raised_at = None
    _set_level(_Levels.configured)


def raised_left_s() -> float | None:
    """Return how long more is to be logged yet; None while the options are in force.

    A process that is forked meanwhile inherits the level, but not the timer that restores it.
    """
    if _Levels.raised_at is None:
        return None
    return max(0.0, _Levels.raised_at + RAISED_S - time.monotonic())


def is_written(level: Level) -> bool:
    """Tell whether lines of a level are written."""
    return _number(level) >= _number(_Levels.current)


def _set_level(level: Level) -> None:
    _Levels.current = level
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        **{key: value for key, value in structlog.get_config().items() if key != "wrapper_class"},
    )


def _number(level: Level) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _processors(format: Format, *, colours: bool) -> list[Processor]:
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    if format == "json":
        return [*shared, structlog.processors.JSONRenderer(default=_as_text)]
    return [*shared, _TextRenderer(colours)]


class _TextRenderer:
    """Write time, level, event and the other keys as name=value on one line.

    Values may come from the network: what is no plain word is quoted and escaped, so that nobody
    can forge a line. A traceback follows on lines of its own.
    """

    def __init__(self, colours: bool) -> None:
        self._colours = _COLOURS if colours else {}

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> str:
        traces = [event.pop(key) for key in ("stack", "exception") if key in event]
        time, level, text = event.pop("timestamp"), event.pop("level"), str(event.pop("event"))
        colour = self._colours.get(level, "")
        line = f"{time} {colour}{level:<8}{_RESET if colour else ''} {_one_line(text)}"
        pairs = [f"{key}={_quote(value)}" for key, value in event.items()]
        return "\n".join([" ".join([line, *pairs]), *traces])


def _as_text(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


def _quote(value: Any) -> str:
    text = _as_text(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class _LineWriter:
    """Write each line with one call, so that lines of several processes do not mix."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def msg(self, message: str) -> None:
        """Write a line, or drop it: a log that nobody can read must not stop the traffic."""
        rest = (message + "\n").encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            # A pipe that polls writable takes PIPE_BUF bytes without blocking. O_NONBLOCK would
            # not do: it belongs to the file, which other processes write to as well.
            while rest and self._poll.poll(0):
                rest = rest[os.write(self._descriptor, rest[: select.PIPE_BUF]) :]

    debug = info = warning = warn = error = critical = fatal = exception = log = msg


class _LineWriterFactory:
    def __init__(self, descriptor: int) -> None:
        self._writer = _LineWriter(descriptor)

    def __call__(self, *_arguments: Sequence[Any]) -> _LineWriter:
        return self._writer


class _ToStructlog(logging.Handler):
    """Hand what asyncio, aiohttp, websockets and redis log to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno,
                record.getMessage(),
                logger=record.name,
                exc_info=record.exc_info,
            )
        except Exception:
            self.handleError(record)
