"""Keep docs/guarantees.md in step with the tests that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[^`]+)`", TEXT)))


def names_in(body: list[ast.stmt], path: list[str]) -> bool:
    """Tell whether a path of classes and a test leads somewhere."""
    if not path:
        return True
    for node in body:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and node.name == path[0]:
            return names_in(node.body, path[1:])
    return False


@pytest.mark.parametrize("name", NAMED)
def test_names_a_test_that_exists(name: str) -> None:
    file, *path = name.split("::")
    assert (ROOT / file).is_file()
    assert names_in(ast.parse((ROOT / file).read_text()).body, path), name


def test_names_tests_for_each_promise() -> None:
    promises = TEXT.partition("## Disconnects")[2].partition("## What is not promised")[0]
    assert promises.count("\n**") <= promises.count("Shown by") + 1
    assert len(NAMED) > 20
