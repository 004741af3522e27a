"""Keep the README in step with the settings and with the examples that the tests run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def options_table() -> dict[str, Any]:
    """Load the script that makes the table."""
    return runpy.run_path(str(ROOT / "scripts" / "options_table.py"))


def test_holds_the_table_of_options_that_the_settings_make(options_table: dict[str, Any]) -> None:
    assert options_table["replace_table"](README) == README, "run scripts/options_table.py --write"


def test_table_names_every_option(options_table: dict[str, Any]) -> None:
    from ws2api.gateway.settings import Settings

    table = options_table["table"]()
    for name in Settings.model_fields:
        assert f"`--{name.replace('_', '-')}" in table
        assert f"`WS2API_{name.upper()}`" in table


@pytest.mark.parametrize(
    ("name", "language"), [("api.php", "php"), ("api.mjs", "js"), ("api.py", "python")]
)
def test_shows_the_example_that_the_tests_run(name: str, language: str) -> None:
    example = (ROOT / "docs" / "examples" / name).read_text()
    assert f"```{language}\n{example}```\n" in README


def test_names_only_files_that_exist() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    paths = re.findall(r"\b(?:scripts|docs|haproxy|gateway|supervisor|tests)/[\w./-]*\w", README)
    assert paths
    for path in {*links, *paths}:
        assert (ROOT / path).exists(), path


def test_links_only_to_headings_that_exist() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_keeps_its_promise_of_two_commands_first() -> None:
    first_commands = re.findall(r"^(?:\$ )?(scripts/\w+)", README, re.MULTILINE)[:2]
    assert first_commands == ["scripts/run", "scripts/test"]
