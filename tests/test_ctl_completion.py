"""Press Tab behind ws2api-ctl in real shells."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness.terminal import Terminal

SCRIPTS = Path(__file__).parent.parent / "scripts"
FOLDER = SCRIPTS / "completion"
BASH = FOLDER / "ws2api-ctl.bash"


@pytest.fixture(scope="module")
def completion() -> dict[str, Any]:
    """Load the script that makes them."""
    return runpy.run_path(str(SCRIPTS / "completion.py"))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_is_up_to_date(completion: dict[str, Any], shell: str) -> None:
    made = completion["MAKERS"][shell](completion["read_commands"]())
    assert completion["FILES"][shell].read_text() == made, "run scripts/completion.py --write"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("st",), ["status"]),
        (("cl",), ["clients", "client", "close"]),
        (("--ver",), ["--version"]),
        (("status", "--w"), ["--watch"]),
        (("status", "--f"), []),
        (("push", "ann", "--f"), ["--file"]),
        (("push", "ann", "--file", "mes"), ["message"]),
        (("--config", "mes"), ["message"]),
        (("--config", "=", "mes"), ["message"]),
        (("--config", "="), ["message"]),
        (("--config", "status", "re"), ["reload"]),
        (("--admin", "=", "http", ":", "//127.0.0.1", ":", "7003", "re"), ["reload"]),
        (("--json", "profile", "--kind", ""), ["cpu", "memory"]),
        (("profile", "--kind", "m"), ["memory"]),
        (("drain", "--worker", ""), []),
        (("drain", "--o"), ["--off"]),
        (("reload", "--wait", "--js"), ["--json"]),
    ],
)
def test_bash_offers(tmp_path: Path, words: tuple[str, ...], offered: list[str]) -> None:
    (tmp_path / "message").touch()
    script = (
        f'source "{BASH}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ws2api_ctl; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", script, "bash", "ws2api-ctl", *words]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert process.stderr == ""
    assert process.stdout.split() == offered


class TestTab:
    @pytest.fixture(params=["bash", "zsh"])
    def shell(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        """Start a shell on a terminal that has loaded the completion."""
        if shutil.which(request.param) is None:
            pytest.skip(f"{request.param} is not installed")
        (tmp_path / "message.txt").touch()
        flags = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}[request.param]
        setup = {
            "bash": f'source "{BASH}"',
            "zsh": f'fpath=("{FOLDER}" $fpath); autoload -Uz compinit; compinit -u -D',
        }[request.param]
        with Terminal(
            [request.param, *flags, "-i"], folder=tmp_path, TERM="dumb", HISTFILE="/dev/null"
        ) as terminal:
            terminal.write(f"{setup}; PS1='re''ady> '\n")
            terminal.read_until("ready> ")
            yield terminal

    @pytest.mark.parametrize(
        ("typed", "completed"),
        [
            ("st", r"status "),
            ("--json sta", r"status "),
            ("status --wa", r"--watch "),
            ("push ann --fi", r"--file[ =]"),
            ("push ann --file mess", r"message\.txt "),
            ("push --file=mess", r"message\.txt "),
            ("profile --kind m", r"memory "),
        ],
    )
    def test_completes(self, shell: Terminal, typed: str, completed: str) -> None:
        shell.write(f"ws2api-ctl {typed}\t")
        shell.read_until(completed)

    def test_lists_the_commands(self, shell: Terminal) -> None:
        shell.write("ws2api-ctl cl\t\t")
        shell.read_until(r"(?s)(?=.*\bclient\b)(?=.*\bclients\b)(?=.*\bclose\b)")
