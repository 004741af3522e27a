"""Be the command ws2api-ctl: look after a running gateway over its admin and push ports."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple

from .. import standard_streams
from . import views
from .access import find_access
from .arguments import MAX_PAGE, PROGRAM, parse
from .client import Port, Request, parse_object
from .errors import (
    EXIT_DONE,
    EXIT_REFUSED,
    CtlError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from .output import open_output
from .tables import Part, Screen, clean, encode_json

_EXIT_INTERRUPTED: Final = 130  # what a shell reports for SIGINT
_EXIT_BROKEN_PIPE: Final = 141  # and for SIGPIPE
_POLL_S: Final = 0.2
_SILENCE_S: Final = 10.0
_BINARY: Final = "application/octet-stream"
_TEXT: Final = "text/plain; charset=utf-8"

Object = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    Args:
        arguments: the command line without the program's name; None for sys.argv.
    """
    standard_streams.ensure()
    _never_fail_to_encode()
    wants_json = False
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        wants_json = options.json
        status = _COMMANDS[options.command](Session(options))
        sys.stdout.flush()
        return status
    except CtlError as error:
        if wants_json and not isinstance(error, UsageError):
            print(encode_json({"error": str(error), "status": error.http_status}))
        print(f"{PROGRAM}: {clean(' '.join(str(error).split()))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE


def _never_fail_to_encode() -> None:
    """Let a character that the terminal's encoding lacks look odd rather than raise."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test may have put something else there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class Session:
    """Hold what a command needs: its options, the ports, the screen."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        admin, push = find_access(options, os.environ)
        self.admin = Port(admin, options.timeout)
        self.push = Port(push, options.timeout)
        self.screen = Screen(sys.stdout)

    def report(self, document: object, *parts: Part) -> None:
        """Print the document with --json, else the parts."""
        if self.options.json:
            print(encode_json(document), flush=True)
        else:
            self.screen.show(*parts)

    def client_path(self) -> str:
        """Return the path of the client that the command is about.

        Raises:
            UsageError: if no client can have this id.
        """
        # Here, because this takes longer to load than all else, and not every command needs it.
        from ws2api.gateway.client_id import normalise_client_id
        from ws2api.gateway.errors import HandshakeError

        try:
            client_id = normalise_client_id(os.fsencode(self.options.id), is_several=True)
        except HandshakeError as error:
            raise UsageError(f"{self.options.id}: {error}") from None
        return f"/{client_id.decode('ascii')}"


def _status(session: Session) -> int:
    if session.options.watch is not None:
        return _watch(session)
    status = session.admin.ask_object("GET", "/status")
    session.report(status, *views.show_status(status, views.Rates(None, status, 0.0)))
    return EXIT_DONE


def _watch(session: Session) -> int:
    """Show the status again and again; Ctrl-C is the way to end it."""
    with contextlib.suppress(KeyboardInterrupt):
        if session.screen.is_terminal and not session.options.json:
            from rich.live import Live

            with Live(console=session.screen.console, screen=True, auto_refresh=False) as live:
                for status, rates in _statuses(session):
                    parts = views.show_status(status, rates)
                    live.update(session.screen.render(parts), refresh=True)
        for status, rates in _statuses(session):
            session.report(status, views.show_status_line(status, rates))
            sys.stdout.flush()
    return EXIT_DONE


def _statuses(session: Session) -> Iterator[tuple[Object, views.Rates]]:
    """Ask again and again; a gateway that has answered once may be away for a while."""
    before, asked_at = None, 0.0
    while True:
        began_at = time.monotonic()
        try:
            status = session.admin.ask_object("GET", "/status")
        except UnreachableError as error:
            if before is None:
                raise
            status = {"ready": False, "findings": [str(error)]}
        yield status, views.Rates(before, status, began_at - asked_at)
        before, asked_at = status, began_at
        time.sleep(max(0.0, began_at + session.options.watch - time.monotonic()))


def _clients(session: Session) -> int:
    if session.options.json:
        # As text, which takes a tenth of the memory: there may be a million clients.
        encoded, cursor = [], None
        for page in _pages(session):
            encoded += [encode_json(page.clients)[1:-1]] if page.clients else []
            cursor = page.cursor
        sys.stdout.write('{"clients": [')
        sys.stdout.writelines(f"{', ' if i else ''}{text}" for i, text in enumerate(encoded))
        sys.stdout.write(f'], "cursor": {encode_json(cursor)}}}\n')
    else:
        _print_clients(session)
    return EXIT_DONE


def _print_clients(session: Session) -> None:
    """Print each page as it comes, and what leads to the next one."""
    widths: list[int] = []
    cursor = None
    for page in _pages(session):
        if page.clients:
            table = views.show_clients(page.clients)
            table.has_head, table.widths = not widths, widths
            session.screen.show(table)
            widths = table.widths
        cursor = page.cursor
    if cursor is not None:
        print(clean(f"there may be more: --cursor {cursor}, or --all"), file=sys.stderr)
    elif not widths:
        session.screen.show("no clients")


class _Page(NamedTuple):
    clients: list[Object]
    cursor: str | None


def _pages(session: Session) -> Iterator[_Page]:
    """Yield clients with the cursor behind them, until there are enough."""
    options = session.options
    cursor, left = options.cursor, options.limit
    while True:
        query = {
            "limit": MAX_PAGE if options.all else left,
            "cursor": cursor,
            "worker": options.worker,
        }
        page = session.admin.ask_object("GET", "/clients", query)
        clients = [c for c in page.get("clients", []) if _is_of(c, options.worker)]
        cursor = page.get("cursor")
        left -= len(clients)
        yield _Page(clients, cursor)
        if cursor is None or (left <= 0 and not options.all):
            return


def _is_of(client: Object, worker: str | None) -> bool:
    """Tell whether a client is connected to a worker, named by its id or its number."""
    of = str(client.get("worker"))  # instance, number and incarnation with dashes between
    return worker is None or worker in (of, *of.split("-")[-2:-1])


def _client(session: Session) -> int:
    path = session.client_path()
    if session.admin.access.token is not None:
        client = session.admin.ask_object("GET", f"/clients{path}")
    else:
        client = _ask_push_port(session, path)
    session.report(client, *views.show_client(client))
    return EXIT_DONE if client.get("connected") else EXIT_REFUSED


def _tail(session: Session) -> int:
    """Show what happens, line by line; Ctrl-C is the way to end it."""
    path = session.client_path() if session.options.id is not None else ""
    # An empty line comes now and then: without any for so long, nobody is there any more.
    request = Request("GET", f"/tail{path}", work_s=_SILENCE_S)
    with contextlib.suppress(KeyboardInterrupt):
        with session.admin.download(request) as pieces:
            for line in _lines(pieces):
                if session.options.json:
                    print(encode_json(line))
                else:
                    print(clean(views.show_trace(line)))
                sys.stdout.flush()
        raise UnreachableError(f"{session.admin} has ended; was it reloaded?")
    return EXIT_DONE


def _lines(pieces: Iterator[bytes]) -> Iterator[Object]:
    """Yield the JSON object of each line as soon as it is whole."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line and (found := parse_object(line)) is not None:
                yield found


def _ask_push_port(session: Session, path: str) -> Object:
    """Return what the admin port would tell, without the last close."""
    connection = None
    try:
        connection = session.push.ask_object("GET", path)
    except RefusedError as error:
        if error.http_status != HTTPStatus.NOT_FOUND:
            raise
    connected = connection is not None
    return {"id": path[1:], "connected": connected, "connection": connection, "last_close": None}


def _push(session: Session) -> int:
    options, path = session.options, session.client_path()
    headers = {"Content-Type": _BINARY if options.binary else _TEXT}
    if options.generation is not None:
        headers["Ws2api-Generation"] = str(options.generation)
    session.push.ask(Request("POST", path, body=_read_message(options), headers=headers))
    session.report({"id": path[1:], "delivered": True}, "delivered")
    return EXIT_DONE


def _read_message(options: argparse.Namespace) -> bytes:
    if (options.message is None) == (options.file is None):
        raise UsageError("give a MESSAGE, or - for standard input, or --file FILE")
    if options.message == "-":
        return sys.stdin.buffer.read()
    if options.message is not None:
        return os.fsencode(options.message)
    try:
        return Path(options.file).read_bytes()
    except OSError as error:
        raise UsageError(f"--file: cannot read {options.file}: {error.strerror}") from None


def _close(session: Session) -> int:
    options, path = session.options, session.client_path()
    query = {"code": options.code, "reason": options.reason}
    if session.admin.access.token is not None:
        session.admin.ask(Request("DELETE", f"/clients{path}", query))
    else:
        session.push.ask(Request("DELETE", path, query))
    session.report({"id": path[1:], "closed": True}, "closed")
    return EXIT_DONE


def _drain(session: Session) -> int:
    options = session.options
    if options.worker is not None:
        return _replace(session, f"/workers/{options.worker}/drain", options.worker)
    if options.wait is not None:
        raise UsageError("--wait goes with --worker N only: the host's connections stay")
    answer = session.admin.ask_object("DELETE" if options.off else "POST", "/drain")
    text = "draining: /readyz is red, connections stay"
    session.report(answer, text if answer.get("draining") else "not draining")
    return EXIT_DONE


def _reload(session: Session) -> int:
    return _replace(session, "/reload", None)


def _replace(session: Session, path: str, worker: int | None) -> int:
    """Have one worker or all of them replaced; wait for the new ones if told to."""
    wait_s = session.options.wait
    before = {} if wait_s is None else session.admin.ask_object("GET", "/status")
    session.admin.ask(Request("POST", path))
    if wait_s is not None:
        _await_others(session, before, worker, wait_s)
    subject = "all workers" if worker is None else f"worker {worker}"
    text = f"replacing {subject}" if wait_s is None else f"replaced {subject}"
    document = {} if worker is None else {"worker": worker}
    session.report({**document, "replaced": wait_s is not None}, text)
    return EXIT_DONE


def _await_others(session: Session, before: Object, worker: int | None, wait_s: float) -> None:
    """Wait until other processes serve than before; the admin port is away meanwhile."""
    old = _list_pids(before, worker)
    refused = before.get("reloads", {}).get("refused")
    deadline, error, has_begun = time.monotonic() + wait_s, None, False
    while time.monotonic() < deadline:
        try:
            status, error = session.admin.ask_object("GET", "/status"), None
        except UnreachableError as away:
            error = away
        else:
            now, is_rolling = _list_pids(status, None, state="serving"), status.get("rolling")
            if all(now.get(worker) not in (None, pid) for worker, pid in old.items()):
                return
            if status.get("reloads", {}).get("refused") != refused:
                raise RefusedError("the gateway refuses its new settings; its log says why")
            if has_begun and not is_rolling:
                raise RefusedError("the gateway has given up; its log says why")
            has_begun = bool(is_rolling)
        time.sleep(_POLL_S)
    raise error or RefusedError(
        f"not all of it is replaced after {wait_s:g} s; the gateway's log says why"
    )


def _list_pids(status: Object, worker: int | None, state: str = "") -> dict[int, int | None]:
    """Return the processes of the workers, or of one; of those in a state, if one is given."""
    return {
        w["worker"]: w["pid"]
        for w in status.get("workers", [])
        if worker in (None, w["worker"]) and state in ("", w["state"])
    }


def _profile(session: Session) -> int:
    options = session.options
    if options.output == "-" and (options.json or sys.stdout.isatty()):
        raise UsageError("--output -: the profile is no text; give a FILE")
    request = Request(
        "POST",
        f"/workers/{options.worker}/profile",
        {"kind": options.kind, "seconds": options.seconds},
        work_s=options.seconds,
    )
    size = 0
    with open_output(options.output) as output, session.admin.download(request) as pieces:
        for piece in pieces:
            size += output.write(piece)
    if options.output != "-":
        _report_profile(session, size)
    return EXIT_DONE


def _report_profile(session: Session, size: int) -> None:
    options = session.options
    document = {
        "worker": options.worker,
        "kind": options.kind,
        "seconds": options.seconds,
        "file": options.output,
        "bytes": size,
    }
    reader = {"cpu": "python -m pstats", "memory": "tracemalloc.Snapshot.load"}[options.kind]
    session.report(document, f"wrote {options.output}, for {reader}")


def _errors(session: Session) -> int:
    answer = session.admin.ask_object("GET", "/errors")
    session.report(answer, *views.show_errors(answer.get("errors", [])))
    return EXIT_DONE


_COMMANDS: Final[dict[str, Callable[[Session], int]]] = {
    "status": _status,
    "clients": _clients,
    "client": _client,
    "tail": _tail,
    "push": _push,
    "close": _close,
    "drain": _drain,
    "reload": _reload,
    "profile": _profile,
    "errors": _errors,
}


if __name__ == "__main__":
    sys.exit(main())
