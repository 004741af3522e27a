"""Declare every option once: flag, environment variable, TOML key, default, unit and validation."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as PydanticSettingsError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_DURATION_UNITS_S = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_HEADER_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")  # a token, RFC 9110, 5.6.2


@dataclass(frozen=True, slots=True)
class Address:
    """Name a TCP address to listen on; port 0 asks the kernel for a free one."""

    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        """Tell IPv6 from IPv4 by the literal."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def is_wildcard(self) -> bool:
        """Tell whether the address means every interface."""
        return ipaddress.ip_address(self.host).is_unspecified

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ApiUrl:
    """Hold the base URL of the API in the parts that a request needs."""

    host: str
    port: int
    tls: bool
    path: str
    """Path in front of `/<ClientId>`, without a trailing slash; empty for the root."""
    host_header: str

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.path}/"


def _parse_address(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT, got {value!r}")
    host = host.removeprefix("[").removesuffix("]") or "0.0.0.0"  # noqa: S104
    if host == "localhost":
        host = "127.0.0.1"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"expected an IP address before the port, got {host!r}") from None
    return Address(host, int(port))


def _parse_api_url(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    url = urlsplit(value)
    if url.scheme not in ("http", "https"):
        raise ValueError(f"expected an http:// or https:// URL, got {value!r}")
    if not url.hostname:
        raise ValueError(f"no host in {value!r}")
    if url.username is not None or url.query or url.fragment:
        raise ValueError("no user, query or fragment may stand in the URL of the API")
    if not re.fullmatch(r"[!-~]*", url.netloc + url.path):
        raise ValueError("the URL of the API may hold printable ASCII only")
    tls = url.scheme == "https"
    port = url.port or (443 if tls else 80)
    return ApiUrl(url.hostname, port, tls, url.path.rstrip("/"), url.netloc)


def _parse_duration(value: Any) -> Any:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"expected a duration like 30, 500ms, 60s or 5m, got {value!r}")
        return float(match[1]) * _DURATION_UNITS_S[match[2]]
    return value


def _split_list(value: Any) -> Any:
    """Accept a TOML array, a repeated flag, and commas in either or in an environment variable."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [
        item.strip() if isinstance(item, str) else item
        for entry in values
        for item in (entry.split(",") if isinstance(entry, str) else [entry])
        if not isinstance(item, str) or item.strip()
    ]


def _check_redis(value: str) -> str:
    if value != "embedded" and not re.match(r"(redis|rediss|unix)://.", value):
        raise ValueError(f"expected embedded or a redis, rediss or unix URL, got {value!r}")
    return value


def _check_header_name(value: str) -> str:
    if not _HEADER_NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no header name")
    lower = value.lower()
    if lower in _OWN_HEADERS or lower.startswith("ws2api-"):
        raise ValueError(f"{value} is set by the gateway and cannot be forwarded")
    return value


def _check_subprotocol(value: str) -> str:
    if not _HEADER_NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no subprotocol name")
    return value


def _check_cidr(value: str) -> str:
    ipaddress.ip_network(value)
    return value


def _check_token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):
        raise ValueError("a token is one or more printable ASCII characters without spaces")
    return value


_OWN_HEADERS = frozenset(
    "connection content-length content-type expect host keep-alive te trailer transfer-encoding "
    "upgrade x-forwarded-for sec-websocket-key sec-websocket-version sec-websocket-extensions "
    "sec-websocket-accept".split()
)

ListenAddress = Annotated[Address, NoDecode, BeforeValidator(_parse_address)]
Seconds = Annotated[float, BeforeValidator(_parse_duration), Field(gt=0, le=86_400)]
SecondsOrOff = Annotated[float, BeforeValidator(_parse_duration), Field(ge=0, le=86_400)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]
HeaderNames = Annotated[
    tuple[Annotated[str, AfterValidator(_check_header_name)], ...],
    NoDecode,
    BeforeValidator(_split_list),
]
Subprotocols = Annotated[
    tuple[Annotated[str, AfterValidator(_check_subprotocol)], ...],
    NoDecode,
    BeforeValidator(_split_list),
]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_check_cidr)], ...],
    NoDecode,
    BeforeValidator(_split_list),
]


class Settings(BaseSettings):
    """Hold the options of one supervisor and its workers, validated and frozen.

    A flag wins over its environment variable, that over the TOML file, that over the default.
    """

    model_config = SettingsConfigDict(
        env_prefix="WS2API_",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
    )

    workers: Annotated[int, Field(ge=1, le=1024)] = Field(
        default_factory=lambda: len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else (os.cpu_count() or 1),
        description="Worker processes (default: one per CPU).",
    )
    listen: ListenAddress = Field(
        Address("0.0.0.0", 7001),  # noqa: S104
        description="Where clients connect with their WebSockets.",
    )
    push_listen: ListenAddress = Field(
        Address("127.0.0.1", 7002), description="Where the API pushes to clients."
    )
    push_advertise: str | None = Field(
        None,
        description="Host name or address in Ws2api-Push-Url, under which the API reaches this "
        "host (default: the push address, or the host's name when that is a wildcard).",
    )
    push_token: Annotated[SecretStr, AfterValidator(_check_token)] | None = Field(
        None, description="Bearer token that every push must carry."
    )
    admin_listen: ListenAddress = Field(
        Address("127.0.0.1", 7003), description="Where /healthz, /readyz and /metrics are served."
    )
    single_port: bool = Field(
        False, description="Also serve pushes, and the plain counters at GET /, on the client port."
    )
    api: Annotated[ApiUrl, NoDecode, BeforeValidator(_parse_api_url)] = Field(
        ApiUrl("127.0.0.1", 8000, False, "", "127.0.0.1:8000"),
        description="Base URL of the API, http or https.",
    )
    api_timeout: Seconds = Field(
        60.0, description="Time for one request to the API, retries included."
    )
    api_connect_timeout: Seconds = Field(5.0, description="Time to open a connection to the API.")
    api_max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        10_000, description="Connections to the API, over all workers."
    )
    api_max_idle: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        1_000, description="Idle connections to the API that are kept, over all workers."
    )
    api_ca: Path | None = Field(
        None, description="PEM file with the authorities to trust for an https API."
    )
    redis: Annotated[str, AfterValidator(_check_redis)] = Field(
        "embedded",
        description="Redis or Valkey: a redis, rediss or unix URL; or embedded, a private Valkey.",
    )
    redis_prefix: Annotated[str, Field(pattern=r"^[!-z|~]{1,64}$")] = Field(
        "ws2api:", description="Prefix of every Redis key and channel."
    )
    max_message_size: Annotated[ByteSize, Field(ge=1, le=1 << 30)] = Field(
        ByteSize(1 << 20), description="Largest message either way, and largest API reply."
    )
    max_in_flight: Annotated[int, Field(ge=1, le=1_000)] = Field(
        1, description="Messages of one client under way to the API at once; above 1, order is "
        "not kept.",
    )
    max_queue: Annotated[int, Field(ge=1, le=10_000)] = Field(
        16, description="Messages of one client that wait here before its socket is not read."
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
    push_timeout: Seconds = Field(
        5.0, description="Time for another worker to confirm a push."
    )
    shutdown_timeout: Seconds = Field(
        30.0, description="Time for a worker to finish after SIGTERM, before it is killed."
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
    allow_origin: Names = Field(
        (), description="Origin that browsers may connect from, * matching any run of characters; "
        "all when none is given.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged; debug adds each connection."
    )
    log_format: Literal["text", "json"] = Field("text", description="How log lines look.")
    config: Path | None = Field(None, description="TOML file with any of these options.")
    check: bool = Field(False, description="Validate the options, try Redis and the ports, exit.")

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.push_advertise is not None and not re.fullmatch(
            r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", self.push_advertise
        ):
            raise ValueError("push_advertise is a host name or address, without port or scheme")
        return self


class SettingsError(Exception):
    """Say in one line which option is wrong and why."""


def load(arguments: Sequence[str], *, program: str = "ws2api-supervisor") -> Settings:
    """Read the options from flags, the environment and the TOML file, and validate them.

    Args:
        arguments: the command line without the program's name.
        program: the name that --help shows.

    Raises:
        SettingsError: if a value, a name or the file is wrong.
        SystemExit: after --help (0).
    """
    file_values = _read_toml(_find_config(arguments))

    class _Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return env_settings, InitSettingsSource(settings_cls, init_kwargs=file_values)

    _Loaded.__doc__ = "Stand between WebSocket clients and an ordinary HTTP API."
    try:
        cli: CliSettingsSource[Any] = CliSettingsSource(
            _Loaded,
            cli_prog_name=program,
            cli_parse_args=list(arguments),
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
            cli_avoid_json=True,
        )
        return _Loaded(_cli_settings_source=cli)
    except ValidationError as error:
        raise SettingsError(_first_error(error)) from None
    except (PydanticSettingsError, ValueError) as error:
        raise SettingsError(str(error).removeprefix("error parsing CLI: ")) from None


def _find_config(arguments: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except SystemExit:  # --config without a value: the full parser says so
        return None
    name = known.config or os.environ.get("WS2API_CONFIG")
    return Path(name) if name else None


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config: cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config: {path} is no TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in values.items()}


def _first_error(error: ValidationError) -> str:
    """Put the first of pydantic's findings into one line that names the option."""
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]).replace("_", "-") if first["loc"] else ""
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        text = "no such option"
    return f"{name}: {text}" if name else text
