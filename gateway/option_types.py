"""Parse and check the values that options take: addresses, URLs, durations, sizes, lists."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr
from pydantic_settings import NoDecode

from .client_paths import parse_pattern

DAY_S = 86_400.0

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", re.ASCII)
_DURATION_UNITS_S = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z*][a-z0-9+.*-]*)://(?P<host>[a-z0-9._*-]+|\[[0-9a-f:.]+\])"
    r"(?::(?P<port>\*|[0-9]{1,5}))?",
    re.ASCII,
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIS_OPTIONS = ("db", "ssl_ca_certs", "ssl_cert_reqs")
_OWN_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "sec-websocket-accept",
        "sec-websocket-extensions",
        "sec-websocket-key",
        "sec-websocket-version",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-forwarded-for",
    }
)


@dataclass(frozen=True, slots=True)
class Form:
    """Say how --help and the table of options write a value, beside its type.

    Attributes:
        metavar: the placeholder of the value.
        default: the words for the default; None when the value itself says it best.
    """

    metavar: str
    default: str | None = None


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
    def is_loopback(self) -> bool:
        """Tell whether nobody but programs of this host reaches it."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def is_wildcard(self) -> bool:
        """Tell whether the address means every interface."""
        return ipaddress.ip_address(self.host).is_unspecified

    def overlaps(self, other: Address) -> bool:
        """Tell whether two sockets could not listen on both addresses."""
        if self.port == 0 or self.port != other.port:
            return False
        return self.host == other.host or self.is_wildcard or other.is_wildcard

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


def format_duration(seconds: float) -> str:
    """Write a duration in the unit that suits it, as an option accepts it."""
    for unit in ("h", "m", "s"):
        count = seconds / _DURATION_UNITS_S[unit]
        # 60s reads better than 1m, 24h better than 86400s: a unit is used from two of it on.
        if count.is_integer() and (count >= 2 or unit == "s"):
            return f"{count:.0f}{unit}"
    return f"{_decimal(seconds)}s" if seconds > 1 else f"{_decimal(seconds * 1000)}ms"


def _decimal(number: float) -> str:
    """Write a number without an exponent, to three places, none of them idle."""
    return f"{number:.3f}".rstrip("0").rstrip(".")


def format_size(size_bytes: int) -> str:
    """Write a size in the largest binary unit that keeps it whole, as an option accepts it."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def format_value(value: object) -> str:
    """Write the value of an option for a person; empty for no value."""
    if value is None or value is False or value == ():
        return ""
    if isinstance(value, ByteSize):
        return format_size(value)
    if isinstance(value, float):
        return format_duration(value)
    return str(value)


def _parse_address(value: Any) -> Address:
    if isinstance(value, Address):
        return value
    host, colon, port = str(value).rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT, got {value!r}")
    host = host.removeprefix("[").removesuffix("]") or "0.0.0.0"  # noqa: S104
    if host == "localhost":
        host = "127.0.0.1"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"expected an IP address before the port, got {host!r}") from None
    return Address(host, int(port))


def _parse_api_url(value: Any) -> ApiUrl:
    if isinstance(value, ApiUrl):
        return value
    url = urlsplit(str(value))
    if url.scheme not in _DEFAULT_PORTS:
        raise ValueError(f"expected an http:// or https:// URL, got {value!r}")
    if not url.hostname:
        raise ValueError(f"no host in {value!r}")
    if url.username is not None or url.query or url.fragment:
        raise ValueError("no user, query or fragment may stand in the URL of the API")
    if not re.fullmatch(r"[!-~]*", url.netloc + url.path):
        raise ValueError("the URL of the API may hold printable ASCII only")
    if url.netloc.lower() == "unix:":
        raise ValueError("the API is asked over TCP, not over a Unix socket: give host and port")
    if url.netloc.endswith(":"):
        raise ValueError(f"no port behind the colon in {value!r}")
    if url.port == 0:
        raise ValueError(f"no server can listen on port 0, got {value!r}")
    port = url.port or _DEFAULT_PORTS[url.scheme]
    return ApiUrl(url.hostname, port, url.scheme == "https", url.path.rstrip("/"), url.netloc)


def _parse_duration(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    match = _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"expected a duration like 30, 500ms, 60s or 5m, got {value!r}")
    return float(match[1]) * _DURATION_UNITS_S[match[2]]


def _split_list(value: Any) -> Any:
    """Accept a TOML array, a repeated flag, and commas in either or in an environment variable."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [
        item.strip() if isinstance(item, str) else item
        for entry in values
        for item in (entry.split(",") if isinstance(entry, str) else [entry])
        if not isinstance(item, str) or item.strip()
    ]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _check_origin(value: str) -> str:
    """Bring an origin to the form that browsers send: lower case, no default port (RFC 6454, 6.2).

    A star stands for any characters but a slash.
    """
    origin = value.lower()
    if origin in ("*", "null", "file://"):  # the last is what Android's WebView sends for files
        return origin
    parts = _ORIGIN.fullmatch(origin)
    if parts is None:
        raise ValueError(f"{_what_is_no_origin(origin)}, got {value!r}")
    scheme, host, port = parts["scheme"], parts["host"], parts["port"]
    if scheme in ("ws", "wss"):
        raise ValueError(f"a page's origin begins with http:// or https://, got {value!r}")
    if port in (None, "*"):
        return origin
    if int(port) > 65535:
        raise ValueError(f"no port has so high a number, got {value!r}")
    if int(port) != _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}:{int(port)}"
    if host.endswith("*"):  # without the port it would stand for any port
        raise ValueError(f"browsers leave out :{int(port)}, got {value!r}")
    return f"{scheme}://{host}"


def _what_is_no_origin(origin: str) -> str:
    text = "expected scheme://host[:port]"
    if "://" not in origin:
        return f"{text}, as https://shop.example"
    if not origin.isascii():
        return f"{text}, the host as browsers send it (xn--…)"
    base = "/".join(origin.split("/")[:3])
    return f"{text}, without a path: {base}" if _ORIGIN.fullmatch(base) else text


def _check_redis(value: str) -> str:
    if value.lower() == "embedded":
        return "embedded"
    # The value is not repeated: it may hold a password.
    if not re.match(r"(redis|rediss|unix)://.", value):
        raise ValueError("expected embedded, or a URL with redis://, rediss:// or unix://")
    # The workers' own client knows these; another would be heeded at the start and then forgotten.
    for name in parse_qs(urlsplit(value).query, keep_blank_values=True):
        if name not in _REDIS_OPTIONS:
            known = ", ".join(_REDIS_OPTIONS)
            raise ValueError(f"the URL's option {name} is not known; known are {known}")
    return value


def _check_prefix(value: str) -> str:
    # Braces would choose the slot of a key in a Redis Cluster.
    if not re.fullmatch(r"[!-z|~]{1,64}", value):
        raise ValueError("expected 1 to 64 printable ASCII characters, no spaces or braces")
    return value


def _check_header_name(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise ValueError(f"{value!r} is no header name")
    # To CGI, and so to PHP and WSGI, X_Forwarded_For and X-Forwarded-For are the same header.
    lower = value.lower().replace("_", "-")
    if lower in _OWN_HEADERS or lower.startswith("ws2api-"):
        raise ValueError(f"{value} is set by the gateway and cannot be forwarded")
    return value


def _check_subprotocol(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise ValueError(f"{value!r} is no subprotocol name")
    return value


def _check_paths(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("expected a path with {id}")
    return values


def _check_path(value: str) -> str:
    parse_pattern(value)
    return value


def _check_cidr(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"expected a network like 10.0.0.0/8: {error}") from None
    return value


def _check_host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", value):
        raise ValueError("expected a host name or address, without port or scheme")
    return value


def _check_secret(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):
        raise ValueError("expected one or more printable ASCII characters without spaces")
    return value


ListenAddress = Annotated[Address, NoDecode, BeforeValidator(_parse_address), Form("HOST:PORT")]
BaseUrl = Annotated[ApiUrl, NoDecode, BeforeValidator(_parse_api_url), Form("URL")]
RedisUrl = Annotated[str, AfterValidator(_check_redis), Form("URL|embedded")]
Prefix = Annotated[str, AfterValidator(_check_prefix), Form("TEXT")]
HostName = Annotated[str, AfterValidator(_check_host)]
Secret = Annotated[SecretStr, AfterValidator(_check_secret)]
Seconds = Annotated[float, BeforeValidator(_parse_duration), Field(gt=0, le=DAY_S), Form("SECONDS")]
SecondsOrOff = Annotated[
    float, BeforeValidator(_parse_duration), Field(ge=0, le=DAY_S), Form("SECONDS")
]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_check_origin)], ...],
    NoDecode,
    BeforeValidator(_split_list),
]
AnyCase = BeforeValidator(_lower)
"""Of an enumeration, whose words are written in lower case here."""
HeaderNames = Annotated[
    tuple[Annotated[str, AfterValidator(_check_header_name)], ...],
    NoDecode,
    BeforeValidator(_split_list),
    Form("NAME"),
]
Subprotocols = Annotated[
    tuple[Annotated[str, AfterValidator(_check_subprotocol)], ...],
    NoDecode,
    BeforeValidator(_split_list),
    Form("NAME"),
]
Paths = Annotated[
    tuple[Annotated[str, AfterValidator(_check_path)], ...],
    NoDecode,
    BeforeValidator(_split_list),
    AfterValidator(_check_paths),
    Form("PATH", "/{id}"),
]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_check_cidr)], ...],
    NoDecode,
    BeforeValidator(_split_list),
    Form("CIDR"),
]
