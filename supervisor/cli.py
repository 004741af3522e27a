"""Be the command ws2api-supervisor: settings in, a running gateway or one clear line out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from ws2api.gateway import logs
from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.counters import BANKS, Counters
from ws2api.gateway.recent import Recent
from ws2api.gateway.settings import PROGRAM, Settings, SettingsError, doubts, load
from ws2api.gateway.traces import Traces

from . import admin, embedded, listeners, process, profiles_folder, redis_check, standard_streams
from .api_check import find_fault
from .configuration import Configuration, check_authorities
from .embedded import EmbeddedServer, find_server
from .errors import EXIT_GAVE_UP, EXIT_OK, EXIT_USAGE, GaveUpError, StartError
from .listeners import Listeners
from .loop import Loop
from .notify import Notifier
from .parts import Parts
from .shared_state import SharedState
from .tree import ORDERS_WAIT, VERBOSE, Tree

_EXIT_INTERRUPTED: Final = 130  # what a shell reports for SIGINT

_log = structlog.get_logger()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the supervisor until it is told to stop; return the exit status.

    Args:
        arguments: the command line without the program's name; None for sys.argv.
    """
    standard_streams.ensure()
    for number in (VERBOSE, ORDERS_WAIT):  # until there is somebody to heed them
        signal.signal(number, signal.SIG_IGN)
    read = partial(load, list(sys.argv[1:] if arguments is None else arguments))
    try:
        settings = read()
        logs.configure(settings.log_level, settings.log_format)
        for doubt in doubts(settings, os.environ):
            _log.warning(doubt)
        process.raise_file_limit()
        return _check(settings) if settings.check else _serve(Configuration(settings, read))
    except (SettingsError, StartError) as error:
        _complain(error)
        return EXIT_USAGE
    except GaveUpError as error:
        _complain(error)
        return EXIT_GAVE_UP
    except KeyboardInterrupt:  # before the tree handles signals
        return _EXIT_INTERRUPTED


def _complain(error: Exception) -> None:
    print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)


def _check(settings: Settings) -> int:
    """Try everything that a start needs, and start nothing."""
    check_authorities(settings)
    redis = _try_redis(settings)
    bound = listeners.bind(settings)
    bound.close()
    with asyncio.Runner(loop_factory=Loop) as runner:  # at a start the admin process looks
        if fault := runner.run(find_fault(settings)):
            _log.warning(fault)
    workers = "1 worker" if settings.workers == 1 else f"{settings.workers} workers"
    print(
        f"ok: {workers}, clients {bound.client_address}, pushes {bound.push_address}, "
        f"admin {bound.admin_address}, api {settings.api}, redis {redis}"
    )
    return EXIT_OK


def _serve(configuration: Configuration) -> int:
    settings = configuration.settings
    check_authorities(settings)
    redis = _try_redis(settings)
    embedded.remove_all_leftovers()  # this one may do without a server, and so not see to it
    with (
        contextlib.closing(listeners.bind(settings)) as bound,
        profiles_folder.held() as profiles,
    ):
        server = EmbeddedServer(find_server()) if settings.redis == "embedded" else None
        if server is not None:
            redis = f"embedded ({server.url})"
        return Tree(_compose(configuration, bound, server, redis, profiles)).run()


def _compose(
    configuration: Configuration,
    bound: Listeners,
    server: EmbeddedServer | None,
    redis: str,
    profiles: Path,
) -> Parts:
    """Say what each child does. Everything that they import is imported here, before the fork."""
    from ws2api.gateway.worker import Assignment, run

    settings = configuration.settings  # of the start; a child takes those in force when it begins
    counters = Counters(settings.workers)
    shared = SharedState(
        counters,
        Recent(settings.workers, BANKS),
        AddressTable(settings.workers),
        Traces(settings.workers, BANKS),
        profiles,
    )
    redis_url = server.url if server is not None else settings.redis
    started_s = time.time()

    def run_worker(index: int, bank: int, incarnation: str) -> int:
        own = bound.keep_slot(index)
        return run(
            configuration.settings,
            Assignment(
                index=index,
                bank=bank,
                incarnation=incarnation,
                client_socket=own.client,
                push_socket=own.push,
                private_push_socket=own.private_push,
                push_url=own.push_url,
                redis_url=redis_url,
                counters=counters,
                recent=shared.recent,
                addresses=shared.addresses,
                traces=shared.traces,
                profiles=shared.profiles,
            ),
        )

    def run_admin(instance: str) -> int:
        return admin.run(
            bound.keep_admin(),
            bound.push_address,
            shared,
            redis_url,
            started_s,
            configuration.settings,
            instance,
        )

    announce = partial(_announce, settings, bound, redis)
    return Parts(
        counters,
        shared.addresses,
        configuration,
        run_worker,
        run_admin,
        server,
        announce,
        stop_listening=bound.close_clients,
        notifier=Notifier(os.environ),
    )


def _announce(settings: Settings, bound: Listeners, redis: str) -> None:
    """Print where the gateway listens, for people and for programs that wait for it."""
    lines = (
        f"clients ws://{bound.client_address}/<ClientId>",
        f"pushes http://{bound.push_address}/<ClientId>",
        f"admin http://{bound.admin_address}/",
        f"api {settings.api}",
        f"redis {redis}",
        "ready",
    )
    # Whoever does not want to read them has closed the other end.
    with contextlib.suppress(OSError):
        # One write, so that no line of a worker's log can land between.
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()


def _try_redis(settings: Settings) -> str:
    """Make sure that there is a Redis that will do, or a server to embed; name it for people."""
    if settings.redis == "embedded":
        return f"embedded ({find_server()})"
    from ws2api.gateway import bus, disconnects, registry

    scripts = (*registry.SCRIPTS, *disconnects.SCRIPTS, *bus.SCRIPTS)
    sources = [script.source for script in scripts]
    for doubt in redis_check.check(settings.redis, settings.redis_prefix, sources):
        _log.warning(doubt)
    return redis_check.name_without_secrets(settings.redis)


if __name__ == "__main__":
    sys.exit(main())
