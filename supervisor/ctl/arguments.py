"""Declare the command line of ws2api-ctl."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import Final, NoReturn

from .errors import UsageError

PROGRAM: Final = "ws2api-ctl"
MAX_PAGE: Final = 1000
MAX_PROFILE_S: Final = 300
_WAIT_S: Final = 300.0

_DEFAULTS: Final[dict[str, object]] = {
    "admin": None,
    "push": None,
    "admin_token": None,
    "push_token": None,
    "config": None,
    "timeout": 15.0,
    "json": False,
}
"""Of what may stand before the command as well as behind it."""


class Parser(argparse.ArgumentParser):
    """Raise what is wrong with the command line instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        # A wrong word is not repeated: behind a misspelt option it may be a token.
        text = re.sub(r"invalid choice: .* \((choose .*)\)", r"\1", message, flags=re.DOTALL)
        raise UsageError(f"{text.removeprefix('argument ')}; see {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `command` is the name of the command.

    Raises:
        UsageError: if it is wrong.
        SystemExit: after --help and --version (0).
    """
    options, surplus = create_parser().parse_known_args(list(arguments))
    if surplus and not _take_message(options, surplus):
        raise UsageError(_describe_surplus(surplus, options.command))
    return argparse.Namespace(**{**_DEFAULTS, **vars(options)})


def _take_message(options: argparse.Namespace, surplus: Sequence[str]) -> bool:
    """Take what is left as the MESSAGE, which argparse misses behind an option behind the ID."""
    if options.command != "push" or options.message is not None:
        return False
    follows_dashes = surplus[0] == "--"
    words = surplus[1:] if follows_dashes else surplus
    if len(words) != 1 or (words[0].startswith("-") and words[0] != "-" and not follows_dashes):
        return False
    options.message = words[0]
    return True


def _describe_surplus(surplus: Sequence[str], command: str) -> str:
    """Name options that there are not; a value is not repeated, for it may be a token."""
    names = [word.partition("=")[0] for word in surplus if word.startswith("-")]
    if names:
        from ws2api.gateway.spelling import guess  # no other run needs it

        near = guess(names[0], _list_flags(command)) or f"; see {PROGRAM} --help"
        return f"no such option: {' '.join(names)}{near}"
    return "too many arguments; one with spaces needs quotes"


def create_parser() -> Parser:
    """Build the parser, also for the completion scripts."""
    common = _common()
    parser = Parser(
        prog=PROGRAM,
        description="Look after a running ws2api gateway, over its admin port and its push port.",
        epilog="Exit status: 0 done; 1 the gateway said no; 2 wrong arguments; 3 no gateway there.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version"
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True
    )
    for name, text, declare in _COMMANDS:
        command = commands.add_parser(
            name, help=text, description=f"{text}.", parents=[common], allow_abbrev=False
        )
        declare(command)
    return parser


def _common() -> Parser:
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("the gateway")
    group.add_argument("--admin", metavar="URL", help="its admin port (http://127.0.0.1:7003)")
    group.add_argument("--push", metavar="URL", help="its push port (http://127.0.0.1:7002)")
    group.add_argument(
        "--admin-token",
        metavar="TOKEN",
        help="better in WS2API_ADMIN_TOKEN, which other users do not see",
    )
    group.add_argument("--push-token", metavar="TOKEN", help="better in WS2API_PUSH_TOKEN")
    group.add_argument(
        "--config", metavar="FILE", help="the gateway's own TOML file, for ports and tokens"
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="for one answer (default: 15)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _list_flags(command: str) -> list[str]:
    """List the flags of a command."""
    parser = Parser(parents=[_common()], add_help=False)
    next(declare for name, _, declare in _COMMANDS if name == command)(parser)
    return [flag for action in parser._actions for flag in action.option_strings]


def _declare_status(parser: Parser) -> None:
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=_seconds,
        const=1.0,
        help="again and again, each second unless given, with rates",
    )


def _declare_clients(parser: Parser) -> None:
    parser.add_argument(
        "--limit",
        metavar="N",
        type=_Whole(1, MAX_PAGE),
        default=100,
        help=f"at most so many, 1 to {MAX_PAGE} (default: 100)",
    )
    parser.add_argument("--cursor", metavar="CURSOR", help="go on where the last page ended")
    parser.add_argument("--all", action="store_true", help="every client, page by page")
    parser.add_argument(
        "--worker", metavar="WORKER", help="of one worker: its number, or its id as it is shown"
    )


def _declare_tail(parser: Parser) -> None:
    parser.add_argument(
        "id", metavar="ID", nargs="?", help="only of this client, percent-encoded; else of all"
    )


def _declare_client(parser: Parser) -> None:
    _add_id(parser)


def _declare_push(parser: Parser) -> None:
    _add_id(parser)
    parser.add_argument(
        "message", metavar="MESSAGE", nargs="?", help="what to send; - reads standard input"
    )
    parser.add_argument("--file", metavar="FILE", help="send what is in a file")
    parser.add_argument("--binary", action="store_true", help="as a binary message, not as text")
    parser.add_argument(
        "--generation",
        metavar="N",
        type=_Whole(0, 10**18 - 1),
        help="only to this connection of the client, not to a later one",
    )


def _declare_close(parser: Parser) -> None:
    _add_id(parser)
    parser.add_argument(
        "--code",
        metavar="N",
        type=_Whole(1000, 4999),
        default=1000,
        help="close code (default: 1000)",
    )
    parser.add_argument("--reason", metavar="TEXT", help="up to 123 bytes, for the client")


def _declare_drain(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--off", action="store_true", help="take clients again")
    what.add_argument(
        "--worker",
        metavar="N",
        type=_Whole(0, 1023),
        help="not the host: replace this worker, and move its clients with 1012",
    )
    _add_wait(parser, "with --worker: until the new worker serves")


def _declare_reload(parser: Parser) -> None:
    _add_wait(parser, "until all workers are new")


def _declare_profile(parser: Parser) -> None:
    parser.add_argument(
        "--worker",
        metavar="N",
        type=_Whole(0, 1023),
        required=True,
        help="its number, as status shows it",
    )
    parser.add_argument(
        "--kind",
        type=str.lower,
        choices=("cpu", "memory"),
        default="cpu",
        help="where time goes, or what has taken memory meanwhile (default: cpu)",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=_Whole(1, MAX_PROFILE_S),
        default=10,
        help=f"1 to {MAX_PROFILE_S} (default: 10)",
    )
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="where to put it; - is standard output"
    )


def _declare_errors(_parser: Parser) -> None:
    """Errors have no options of their own."""


_COMMANDS: Final = (
    ("status", "Show the gateway, its workers and what they have done", _declare_status),
    ("clients", "List clients, of all hosts that share the Redis", _declare_clients),
    ("client", "Show one client: where it is, since when, its traffic", _declare_client),
    ("tail", "Show requests to the API and pushes as they happen", _declare_tail),
    ("push", "Send a message to a client", _declare_push),
    ("close", "Close a client's connection", _declare_close),
    ("drain", "Turn /readyz red, so that load balancers send nobody new", _declare_drain),
    ("reload", "Replace all workers with the configuration read again", _declare_reload),
    ("profile", "Record where a worker spends time or memory", _declare_profile),
    ("errors", "Show the latest errors, newest first", _declare_errors),
)


def _add_id(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="as the client wrote it, percent-encoded")


def _add_wait(parser: Parser, text: str) -> None:
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        nargs="?",
        type=_seconds,
        const=_WAIT_S,
        help=f"{text}, for {_WAIT_S:g} s unless given",
    )


class _Version(argparse.Action):
    """Print the version, which takes a while to find out, only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print it, and exit."""
        from importlib import metadata

        print(f"{PROGRAM} {metadata.version('ws2api')}")
        parser.exit()


class _Whole:
    """Read a whole number between two limits."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most

    def __call__(self, text: str) -> int:
        """Return the number."""
        is_number = text.isascii() and text.isdigit() and len(text) <= 18
        number = int(text) if is_number else -1
        if not self._least <= number <= self._most:
            raise argparse.ArgumentTypeError(f"expected a number, {self._least} to {self._most}")
        return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86_400:
        raise argparse.ArgumentTypeError("expected a number of seconds, more than 0")
    return seconds
