"""Print the completion of ws2api-ctl for a shell, made from its parser; --write renews the files.

scripts/completion/ws2api-ctl.bash is for bash, scripts/completion/_ws2api-ctl for zsh.
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ws2api.supervisor.ctl.arguments import PROGRAM, create_parser

FOLDER = Path(__file__).parent / "completion"
FILES = {"bash": FOLDER / f"{PROGRAM}.bash", "zsh": FOLDER / f"_{PROGRAM}"}
_MADE = "Made by scripts/completion.py --write."


@dataclass(frozen=True)
class Option:
    """Describe an option; the value is empty for a switch."""

    names: list[str]
    text: str
    value: str
    is_value_optional: bool
    choices: list[str]


@dataclass(frozen=True)
class Command:
    """Describe a command, or what stands in front of all of them."""

    name: str
    text: str
    options: list[Option]
    arguments: list[tuple[str, str]]


def read_commands() -> list[Command]:
    """Return what the parser declares; the first one has no name and holds the common options."""
    parser = create_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    texts = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return [
        _read("", "", parser),
        *(_read(name, texts[name], one) for name, one in commands.choices.items()),
    ]


def _read(name: str, text: str, parser: argparse.ArgumentParser) -> Command:
    actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    options = [_read_option(action) for action in actions if action.option_strings]
    arguments = [(str(a.metavar), a.help or "") for a in actions if not a.option_strings]
    return Command(name, text, options, arguments)


def _read_option(action: argparse.Action) -> Option:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    return Option(
        list(action.option_strings),
        action.help or "",
        value,
        action.nargs == "?",
        [str(choice) for choice in action.choices or ()],
    )


def make_bash(commands: list[Command]) -> str:
    """Return the function that bash calls at each Tab."""
    options = {name: o for command in commands for o in command.options for name in o.names}
    valued = {n: o for n, o in options.items() if o.value and not o.is_value_optional}
    files = [name for name, option in valued.items() if option.value == "FILE"]
    chosen = {name: option.choices for name, option in valued.items() if option.choices}
    others = [name for name in valued if name not in files and name not in chosen]
    names = [command.name for command in commands[1:]]
    lines = [
        f"# Completion of {PROGRAM} for bash. {_MADE}",
        "",
        "_ws2api_ctl() {",
        "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}",
        "    local words command='' i",
        "    # bash makes words of their own of = and :, as in --admin=http://127.0.0.1:7003",
        "    [[ $word == '=' ]] && word=''",
        "    [[ $before == '=' ]] && before=${COMP_WORDS[COMP_CWORD - 2]}",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        f"            {' | '.join(valued)})",
        "                i=$((i + 1)) ;;",
        f"            {' | '.join(names)})",
        "                command=${COMP_WORDS[i]}",
        "                break ;;",
        "        esac",
        "    done",
        "    case $before in",
        f"        {' | '.join(files)})",
        "            compopt -o filenames 2>/dev/null",
        '            mapfile -t COMPREPLY < <(compgen -f -- "$word")',
        "            return ;;",
        *(f"        {n}) words='{' '.join(c)}' ;;" for n, c in chosen.items()),
        f"        {' | '.join(others)})",
        "            COMPREPLY=()",
        "            return ;;",
        "        *)",
        "            case $command in",
        *(f"                {c.name}) words='{_names(c)}' ;;" for c in commands[1:]),
        f"                *) words='{' '.join(names)} {_names(commands[0])}' ;;",
        "            esac ;;",
        "    esac",
        '    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")',
        "}",
        "",
        f"complete -F _ws2api_ctl {PROGRAM}",
    ]
    return "\n".join(lines) + "\n"


def _names(command: Command) -> str:
    return " ".join(name for option in command.options for name in option.names)


def make_zsh(commands: list[Command]) -> str:
    """Return the function that zsh loads from a folder in its fpath."""
    common, *named = commands
    shared = [o for o in common.options if all(o in command.options for command in named)]
    own = [o for o in common.options if o not in shared]
    lines = [
        f"#compdef {PROGRAM}",
        f"# Completion of {PROGRAM} for zsh. {_MADE}",
        "",
        "local curcontext=$curcontext state line",
        "local -A opt_args",
        "local -a common=(",
        *(f"    {_specify(option)}" for option in shared),
        ")",
        f"_arguments -C {' '.join(map(_specify, own))} \\",
        "    $common '1: :->command' '*:: :->rest'",
        "case $state in",
        "    command)",
        "        local -a commands=(",
        *(f"            {shlex.quote(f'{c.name}:{c.text}')}" for c in named),
        "        )",
        "        _describe command commands ;;",
        "    rest)",
        "        case $words[1] in",
    ]
    for command in named:
        words = [_specify(option) for option in command.options if option not in shared]
        words += [_specify_argument(i, *a) for i, a in enumerate(command.arguments, 1)]
        start = f"            {command.name}) _arguments"
        lines.append(" \\\n                ".join([start, *words, "$common ;;"]))
    lines += ["        esac ;;", "esac"]
    return "\n".join(lines) + "\n"


def _specify(option: Option) -> str:
    """Describe an option as _arguments wants it."""
    text = f"[{_escape(option.text)}]"
    names = option.names[0]
    if len(option.names) > 1:
        names = "{" + ",".join(option.names) + "}"
        return f"'({' '.join(option.names)})'{names}{shlex.quote(text)}"
    if not option.value:
        return shlex.quote(names + text)
    action = {"FILE": "_files"}.get(option.value, " ")
    if option.choices:
        action = f"({' '.join(option.choices)})"
    if option.is_value_optional:
        return shlex.quote(f"{names}{text}::{option.value}:{action}")
    return shlex.quote(f"{names}={text}:{option.value}:{action}")


def _specify_argument(place: int, name: str, text: str) -> str:
    # A mere message would keep zsh from completing an option in this place.
    return shlex.quote(f'{place}:{name}:_guard "^-*" "{name}, {_escape(text)}"')


def _escape(text: str) -> str:
    return re.sub(r"([\[\]:\\])", r"\\\1", text)


MAKERS = {"bash": make_bash, "zsh": make_zsh}


def main() -> None:
    """Print one, or write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("shell", nargs="?", choices=sorted(MAKERS))
    what.add_argument("--write", action="store_true", help="renew scripts/completion/")
    options = parser.parse_args()
    if not options.write:
        print(MAKERS[options.shell](read_commands()), end="")
        return
    for shell, file in FILES.items():
        file.write_text(MAKERS[shell](read_commands()))


if __name__ == "__main__":
    main()
