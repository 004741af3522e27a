"""Declare every option once: flag, environment variable, TOML key, default, unit and validation."""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

from pydantic import ByteSize, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from .option_types import (
    Address,
    AnyCase,
    ApiUrl,
    BaseUrl,
    Form,
    HeaderNames,
    HostName,
    ListenAddress,
    Networks,
    Origins,
    Paths,
    Prefix,
    RedisUrl,
    Seconds,
    SecondsOrOff,
    Secret,
    Subprotocols,
    format_size,
    format_value,
)
from .spelling import guess

__all__ = [
    "Address",
    "ApiUrl",
    "OptionRow",
    "Settings",
    "SettingsError",
    "doubts",
    "load",
    "option_rows",
]

PROGRAM = "ws2api-supervisor"
_ENVIRONMENT_PREFIX = "WS2API_"
_ONLY_BY_HAND = ("config", "check")
"""Options of one run, which have no place in the file."""
_SECRET = ("push_token", "admin_token", "redis")
"""Options whose values are not to be shown."""
_OF_OTHERS = re.compile(
    # What Kubernetes and Docker set for a service of that name, and the examples' own variable.
    r"WS2API_(?:.+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT(?:_\d+_(?:TCP|UDP)(?:_.+)?)?)"
    r"|WS2API_PUSH"
)
"""Variables that look like options and are none, without anybody being mistaken."""


def _count_cpus() -> int:
    """Count the CPUs that this process may use; a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Settings(BaseSettings):
    """Hold the options of one supervisor and its workers, validated and frozen.

    A flag wins over its environment variable, that over the TOML file, that over the default.
    """

    model_config = SettingsConfigDict(
        env_prefix=_ENVIRONMENT_PREFIX,
        env_ignore_empty=True,  # as a unit or a compose file has it that leaves a value open
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
    )

    workers: Annotated[int, Field(ge=1, le=1024), Form("N", "one per CPU")] = Field(
        default_factory=_count_cpus, description="Worker processes."
    )
    listen: ListenAddress = Field(
        Address("0.0.0.0", 7001),  # noqa: S104
        description="Where clients connect with their WebSockets.",
    )
    path: Paths = Field(
        ("/{id}",),
        description="Path that clients may use; {id} is their id, {id...} one with slashes in it.",
    )
    push_listen: ListenAddress = Field(
        Address("127.0.0.1", 7002), description="Where the API pushes to clients."
    )
    push_advertise: Annotated[
        HostName | None, Form("NAME", "the push address, or this host's name for a wildcard")
    ] = Field(
        None,
        description="Host name or address in Ws2api-Push-Url, under which the API reaches this "
        "host.",
    )
    push_token: Annotated[Secret | None, Form("TOKEN")] = Field(
        None, description="Bearer token that every push must carry."
    )
    admin_listen: ListenAddress = Field(
        Address("127.0.0.1", 7003),
        description="Where the dashboard, /healthz, /readyz, /status and /metrics are served.",
    )
    admin_token: Annotated[Secret | None, Form("TOKEN")] = Field(
        None,
        description="Bearer token for what the admin port shows of single clients and for all that "
        "it changes; without one it does neither.",
    )
    single_port: bool = Field(
        False, description="Also serve pushes, and the plain counters at GET /, on the client port."
    )
    api: BaseUrl = Field(
        ApiUrl("127.0.0.1", 8000, False, "", "127.0.0.1:8000"),
        description="Base URL of the API, http or https.",
    )
    api_timeout: Seconds = Field(
        60.0, description="Time for one request to the API, retries included."
    )
    api_connect_timeout: Seconds = Field(5.0, description="Time to open a connection to the API.")
    api_max_connections: Annotated[int, Field(ge=1, le=1_000_000), Form("N")] = Field(
        1_000, description="Connections to the API, over all workers."
    )
    api_max_idle: Annotated[int, Field(ge=0, le=1_000_000), Form("N")] = Field(
        1_000, description="Idle connections to the API that are kept, over all workers."
    )
    api_max_age: SecondsOrOff = Field(
        60.0,
        description="Greatest age of a connection to the API, after which its name is resolved "
        "again; 0 for any.",
    )
    max_connecting: Annotated[int, Field(ge=1, le=100_000), Form("N")] = Field(
        256,
        description="Connects that one worker asks the API about at once; more wait, up to the "
        "handshake timeout.",
    )
    api_ca: Annotated[Path | None, Form("FILE", "the system's")] = Field(
        None, description="PEM file with the authorities to trust for an https API."
    )
    redis: RedisUrl = Field(
        "embedded",
        description="Redis or Valkey: a redis, rediss or unix URL; or embedded, a private Valkey.",
    )
    redis_prefix: Prefix = Field("ws2api:", description="Prefix of every Redis key and channel.")
    max_pending_disconnects: Annotated[int, Field(ge=1, le=100_000_000), Form("N")] = Field(
        1_000_000,
        description="Disconnects that the API did not take and that Redis keeps for it; beyond it "
        "the oldest go.",
    )
    reap_rate: Annotated[int, Field(ge=1, le=100_000), Form("N")] = Field(
        500,
        description="DELETEs per second for clients of lost workers, and for those that the API "
        "did not take at once.",
    )
    max_message_size: Annotated[ByteSize, Field(ge=1, le=1 << 30), Form("BYTES")] = Field(
        ByteSize(1 << 20), description="Largest message either way, and largest API reply."
    )
    max_in_flight: Annotated[int, Field(ge=1, le=1_000), Form("N")] = Field(
        1,
        description="Messages of one client under way to the API at once; above 1, order is not "
        "kept.",
    )
    max_queue: Annotated[int, Field(ge=1, le=10_000), Form("N")] = Field(
        16, description="Messages of one client that wait here before no more are taken from it."
    )
    max_write_buffer: Annotated[ByteSize, Field(ge=1, le=1 << 30), Form("BYTES")] = Field(
        ByteSize(1 << 18),
        description="Bytes that may wait for a client that reads slowly; beyond it pushes get 429.",
    )
    write_timeout: Seconds = Field(
        30.0, description="A client that reads nothing for this time is closed with 1008."
    )
    ping_interval: SecondsOrOff = Field(
        30.0, description="A silent client is pinged after this time; 0 turns pings off."
    )
    ping_timeout: Seconds = Field(
        20.0, description="A client that does not answer a ping is closed after this time."
    )
    handshake_timeout: Seconds = Field(
        10.0, description="Time for a client to send its request, and to finish a close."
    )
    push_timeout: Seconds = Field(5.0, description="Time for another worker to confirm a push.")
    shutdown_timeout: Seconds = Field(
        30.0, description="Time for a worker to finish after SIGTERM, before it is killed."
    )
    drain_seconds: Seconds = Field(
        60.0,
        description="Time over which SIGHUP moves the clients of the old workers, with 1012.",
    )
    max_connections_per_ip: Annotated[int, Field(ge=0, le=10_000_000), Form("N", "any number")] = (
        Field(
            0,
            description="Connections from one IP address (or one /64 of IPv6), over all workers; "
            "more get 429.",
        )
    )
    forward_header: HeaderNames = Field(
        (), description="Another header of the client to pass on with the connect."
    )
    subprotocol: Subprotocols = Field(
        (), description="Subprotocol to choose, when offered and the API's answer names none."
    )
    trusted_proxy: Networks = Field(
        (), description="Network of proxies whose X-Forwarded-For is believed and appended to."
    )
    allow_origin: Annotated[Origins, Form("ORIGIN", "all")] = Field(
        (),
        description="Origin that browsers may connect from, scheme://host[:port]; * stands for any "
        "characters but /.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = Field(
        "info", description="Least severe level that is logged; debug adds each connection."
    )
    log_format: Annotated[Literal["text", "json"], AnyCase] = Field(
        "text", description="How log lines look."
    )
    log_requests: bool = Field(
        False,
        description="Log a line for each request to the API and each push, at level info: method, "
        "id, status, time, sizes, and why not.",
    )
    cpuprofile: Annotated[Path | None, Form("FILE")] = Field(
        None,
        description="Profile every worker from start to end, into FILE.0, FILE.1, … (pstats).",
    )
    memprofile: Annotated[Path | None, Form("FILE")] = Field(
        None,
        description="Write what memory is held at the end of every worker, and where it came from, "
        "into FILE.0, FILE.1, … (tracemalloc).",
    )
    config: Annotated[Path | None, Form("FILE")] = Field(
        None, description="TOML file with any of these options."
    )
    check: bool = Field(
        False, description="Validate the options, try Redis, the API and the ports, exit."
    )

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        # Sockets that share a port among workers would also share it with each other, unnoticed.
        ports = {
            "listen": self.listen,
            "push-listen": self.push_listen,
            "admin-listen": self.admin_listen,
        }
        for (one, its), (other, others) in combinations(ports.items(), 2):
            if its.overlaps(others):
                raise ValueError(f"{one} and {other} name the same port, {its.port}")
        return self


class SettingsError(Exception):
    """Say in one line which option is wrong and why."""


@dataclass(frozen=True, slots=True)
class OptionRow:
    """Describe one option in every way it can be given, for --help and for the documentation.

    Attributes:
        flag: with its two dashes.
        metavar: placeholder of the flag's value; empty for a switch.
        variable: name of the environment variable.
        key: key in the TOML file; empty for an option that the file cannot hold.
        default: as a person writes it; empty for none.
        description: a sentence.
        repeatable: whether the flag may be given several times.
    """

    flag: str
    metavar: str
    variable: str
    key: str
    default: str
    description: str
    repeatable: bool


def option_rows() -> list[OptionRow]:
    """List every option in the order of its declaration."""
    return [_row(name, field) for name, field in Settings.model_fields.items()]


def load(arguments: Sequence[str], *, program: str = PROGRAM) -> Settings:
    """Read the options from flags, the environment and the TOML file, and validate them.

    Args:
        arguments: the command line without the program's name.
        program: the name that --help shows.

    Raises:
        SettingsError: if a value, a name or the file is wrong.
        SystemExit: after --help and --version (0).
    """
    namespace, surplus = _parser(program).parse_known_args(list(arguments))
    if surplus:
        raise SettingsError(_describe_surplus(surplus))
    flags = vars(namespace)
    environment = EnvSettingsSource(Settings)()
    path = flags.get("config") or environment.get("config")
    try:
        return Settings(**{**_read_toml(path), **environment, **flags})
    except ValidationError as error:
        raise SettingsError(_first_finding(error)) from None


def doubts(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """List what can be meant, but hardly is: to be warned of once, at the start."""
    return [*_list_open_ports(settings), *_list_unknown_variables(environment)]


def _list_open_ports(settings: Settings) -> Iterator[str]:
    """Name the ports that others than this host's programs reach, and that ask for no token."""
    if settings.push_token is None:
        if not settings.push_listen.is_loopback:
            yield (
                f"push-listen: whoever reaches {settings.push_listen} may push to any client and "
                "close it, for there is no --push-token"
            )
        if settings.single_port and not settings.listen.is_loopback:
            yield (
                f"single-port: whoever reaches {settings.listen} may push to any client and close "
                "it, for there is no --push-token"
            )
    if settings.admin_token is None and not settings.admin_listen.is_loopback:
        yield (
            f"admin-listen: whoever reaches {settings.admin_listen} sees the figures, and there is "
            "no --admin-token: keep strangers away from it"
        )


def _list_unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    known = [row.variable.removeprefix(_ENVIRONMENT_PREFIX) for row in option_rows()]
    for name in environment:
        upper = name.upper()  # an option's variable is found in either case
        word = upper.removeprefix(_ENVIRONMENT_PREFIX)
        if word != upper and word not in known and not _OF_OTHERS.fullmatch(upper):
            near = guess(word, known, _ENVIRONMENT_PREFIX)
            yield f"{name}: there is no such option{near}"


def _row(name: str, field: FieldInfo) -> OptionRow:
    form = next((item for item in field.metadata if isinstance(item, Form)), None)
    default = form.default if form else None
    return OptionRow(
        flag="--" + name.replace("_", "-"),
        metavar=form.metavar if form else "|".join(get_args(field.annotation)),
        variable=_ENVIRONMENT_PREFIX + name.upper(),
        key="" if name in _ONLY_BY_HAND else name,
        default=default if default is not None else format_value(field.default),
        description=field.description or "",
        repeatable=isinstance(field.default, tuple),
    )


class _Parser(argparse.ArgumentParser):
    """Raise what is wrong with the command line instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(re.sub(r"^argument (--[a-z-]+): ", r"\1: ", message))


def _describe_surplus(surplus: Sequence[str]) -> str:
    """Name options that there are not; a value is not repeated, for it may be a token."""
    flags = [row.flag for row in option_rows()]
    for word in surplus:
        if word.startswith("-"):
            name = word.partition("=")[0]
            return f"no such option: {name}{guess(name, flags)}"
    return "there is a value too many, which belongs to no option"


def _parser(program: str) -> _Parser:
    """Build the parser, which only collects text: Settings validates it, whatever its source."""
    parser = _Parser(
        prog=program,
        description="Stand between WebSocket clients and an ordinary HTTP API.",
        epilog="Every option is also an environment variable, WS2API_ and its name, and a key in "
        "the TOML file. Durations are seconds or have a unit (500ms, 60s, 5m), sizes too (64KiB).",
        usage="%(prog)s [options]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    for row in option_rows():
        text = row.description
        if row.repeatable:
            text += " May be repeated."
        if row.default:
            text += f" (default: {row.default})"
        text = text.replace("%", "%%")
        if not row.metavar:
            parser.add_argument(row.flag, action="store_true", help=text)
        elif row.repeatable:
            parser.add_argument(row.flag, action="append", metavar=row.metavar, help=text)
        else:
            parser.add_argument(row.flag, metavar=row.metavar, help=text)
    return parser


def _version() -> str:
    return f"ws2api {metadata.version('ws2api')}"


def _read_toml(name: str | None) -> dict[str, Any]:
    """Read the file and bring its keys, with dashes or underscores, to the names of the fields."""
    if name is None:
        return {}
    try:
        document = tomllib.loads(
            Path(name).read_text(encoding="utf-8-sig")
        )  # Windows begins with a BOM
    except OSError as error:
        raise SettingsError(f"config: cannot read {name}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config: {name} is no TOML: {error}") from None
    values = {key.replace("-", "_"): value for key, value in document.items()}
    keys = [key for key in Settings.model_fields if key not in _ONLY_BY_HAND]
    for key in values:
        if key not in keys:
            text = f"config: no option {key!r} may stand in {name}"
            raise SettingsError(text + guess(key.lower(), keys))
    return values


_WORDING = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "literal_error": "must be {expected}",
    "byte_size": "must be a size like 65536, 64KiB or 1MiB",
    "byte_size_unit": "must be a size like 65536, 64KiB or 1MiB",
    "extra_forbidden": "no such option",
}
"""Pydantic's kinds of error in words that fit behind an option's name."""


def _first_finding(error: ValidationError) -> str:
    """Put the first of pydantic's findings into one line that names the option."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    text = first["msg"].removeprefix("Value error, ")
    wording = _WORDING.get(first["type"])
    if wording is not None:
        limits = {key: _limit(name, value) for key, value in first.get("ctx", {}).items()}
        text = wording.format(**limits)
        # Lists, tables and secrets are better not repeated.
        if isinstance(first["input"], (str, int, float)) and name not in _SECRET:
            text += f", got {first['input']}"
    return f"{name.replace('_', '-')}: {text}" if name else text


def _limit(name: str, value: object) -> str:
    """Write a limit in the unit of the option that it limits."""
    if isinstance(value, int) and name == "max_message_size":
        return format_size(value)
    if value == 0:
        return "0"
    return format_value(value)
