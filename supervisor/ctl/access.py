"""Find out where the gateway's ports are, and which tokens open them.

A flag wins over the environment, that over the gateway's own TOML file, that over the default.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from .errors import UsageError

if TYPE_CHECKING:  # it takes longer to load than all else; most runs do without
    from ws2api.gateway.settings import Address, Settings


@dataclass(frozen=True, slots=True)
class Access:
    """Hold what it takes to ask one port.

    Attributes:
        port: its name for people: `admin port`, `push port`.
        option: the flag that says where it is, `--admin` or `--push`.
        url: its base, without a trailing slash.
        token: for the Authorization header; None for none.
        source: the flag, variable or file that the token is from.
    """

    port: str
    option: str
    url: str
    token: str | None = field(default=None, repr=False)
    source: str = ""

    @property
    def token_hint(self) -> str:
        """Say how a token is given."""
        return f"{self.option}-token, {_variable(self.option, 'TOKEN')} or --config FILE"


ADMIN: Final = Access("admin port", "--admin", "http://127.0.0.1:7003")
PUSH: Final = Access("push port", "--push", "http://127.0.0.1:7002")


def find_access(
    options: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[Access, Access]:
    """Return what it takes to ask the admin port and the push port.

    Raises:
        UsageError: if a URL, a token or the configuration is no good.
    """
    settings = _load_settings(options, environment)
    return _find(ADMIN, options, environment, settings), _find(PUSH, options, environment, settings)


def _load_settings(options: argparse.Namespace, environment: Mapping[str, str]) -> Settings | None:
    """Read the gateway's settings where they could tell something, as inside its container."""
    path = options.config or environment.get("WS2API_CONFIG")
    listens = {"WS2API_ADMIN_LISTEN": options.admin, "WS2API_PUSH_LISTEN": options.push}
    if not path and not any(environment.get(name) and not url for name, url in listens.items()):
        return None
    from ws2api.gateway.settings import SettingsError, load

    try:
        return load(["--config", path] if path else [])
    except SettingsError as error:
        raise UsageError(f"the gateway's settings: {error}") from None


def _find(
    default: Access,
    options: argparse.Namespace,
    environment: Mapping[str, str],
    settings: Settings | None,
) -> Access:
    name = default.option.removeprefix("--")
    url = getattr(options, name)
    if url is not None:
        url = parse_url(url, default.option)
    elif settings is not None:
        url = _as_url(getattr(settings, f"{name}_listen"), default.option)
    token, source = getattr(options, f"{name}_token"), f"{default.option}-token"
    if token is None:
        source = _variable(default.option, "TOKEN")
        token = environment.get(source) or None
    if token is None and settings is not None:
        source = str(settings.config)
        secret = getattr(settings, f"{name}_token")
        token = None if secret is None else secret.get_secret_value()
    if token is None:
        source = ""
    elif not re.fullmatch(r"[!-~]+", token):
        raise UsageError(f"the token of {source} is not printable ASCII without spaces")
    return Access(default.port, default.option, url or default.url, token, source)


def _variable(option: str, what: str) -> str:
    return f"WS2API_{option.removeprefix('--').upper()}_{what}"


def parse_url(text: str, option: str) -> str:
    """Bring a URL, or just HOST:PORT, into the form that `Access` holds.

    Raises:
        UsageError: if it is none. It is not repeated: there may be a password in it.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not re.fullmatch(r"[!-~]+", text):
        raise UsageError(f"{option}: expected a URL like http://127.0.0.1:7003")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"{option}: no user, query or fragment may stand in the URL")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _as_url(address: Address, option: str) -> str:
    """Return how to reach what listens at an address, from the same host."""
    if address.port == 0:
        raise UsageError(f"the gateway's settings leave its port open: give {option} URL")
    host = address.host
    if address.is_wildcard:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{address.port}" if ":" in host else f"http://{host}:{address.port}"
