"""Hold the settings in force, and read them again when the supervisor is asked to."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final

from ws2api.gateway import logs
from ws2api.gateway.settings import Settings, SettingsError

from .errors import StartError

FIXED: Final = (
    "workers",
    "listen",
    "push_listen",
    "push_advertise",
    "admin_listen",
    "redis",
    "redis_prefix",
    "config",
)
"""Options that sockets, the counters or the embedded server were made from at the start."""


class ReloadRefused(Exception):
    """Say in one line why the settings stay as they are."""


class Configuration:
    """Hold the settings in force.

    Args:
        settings: those of the start.
        read: reads them from all sources again; raises SettingsError.

    Attributes:
        settings: those in force; a process that is forked gets these.
    """

    def __init__(self, settings: Settings, read: Callable[[], Settings]) -> None:
        self._read = read
        self._former = settings
        self.settings = settings

    def reload(self) -> None:
        """Read the settings again and put them in force.

        Raises:
            ReloadRefused: if they are wrong or need a restart; nothing has changed then.
        """
        try:
            self._put_in_force(self._read_valid())
        except (ReloadRefused, SettingsError, StartError) as error:
            raise ReloadRefused(" ".join(str(error).split())) from None
        except Exception as error:  # whatever a file can hold, workers that serve are worth more
            raise ReloadRefused(f"{type(error).__name__}: {error}") from error

    def revert(self) -> None:
        """Put those before the last reload in force."""
        self._put_in_force(self._former)

    def _read_valid(self) -> Settings:
        path = self.settings.config
        if path is not None and path.exists() and not path.is_file():
            raise ReloadRefused(f"config: {path} is no regular file, to be read twice")
        settings = self._read()
        if "workers" not in settings.model_fields_set | self.settings.model_fields_set:
            # One per CPU, of which there may be more or fewer by now.
            settings = settings.model_copy(update={"workers": self.settings.workers})
        changed = [n for n in FIXED if getattr(settings, n) != getattr(self.settings, n)]
        if changed:
            names = ", ".join(name.replace("_", "-") for name in changed)
            raise ReloadRefused(f"{names}: cannot change without a restart")
        check_authorities(settings)
        return settings

    def _put_in_force(self, settings: Settings) -> None:
        self._former, self.settings = self.settings, settings
        logs.configure(settings.log_level, settings.log_format)


def check_authorities(settings: Settings) -> None:
    """Make sure that the authorities for an https API can be loaded.

    Raises:
        StartError: if not.
    """
    if settings.api_ca is None:
        return
    try:
        ssl.create_default_context(cafile=str(settings.api_ca))
    except ssl.SSLError:  # an OSError too, but its number is none of the system's
        raise StartError(f"api-ca: no PEM certificates in {settings.api_ca}") from None
    except OSError as error:
        raise StartError(f"api-ca: cannot read {settings.api_ca}: {error.strerror}") from None
