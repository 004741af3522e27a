"""Run the fuzzers' seeds through what the fuzzers assert; hold scripts/fuzz to its usage."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
SCRIPT: Final = ROOT / "scripts" / "fuzz.py"
CORPUS: Final = ROOT / "tests" / "corpus"
SEEDS: Final = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """Return the package with the targets."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("fuzz_")
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_seed(fuzz: ModuleType, seed: Path) -> None:
    fuzz.load(seed.parent.name).check(seed.read_bytes())


def test_every_target_has_seeds_and_every_seed_a_target(fuzz: ModuleType) -> None:
    assert {seed.parent.name for seed in SEEDS} == set(fuzz.TARGETS)
    assert all(len(seed.read_bytes()) < 1000 for seed in SEEDS)


def test_tokens_are_no_more_than_a_fuzzer_inserts(fuzz: ModuleType) -> None:
    for name in fuzz.TARGETS:
        tokens = fuzz.load(name).DICTIONARY
        assert all(0 < len(token) <= 64 for token in tokens), name


# The script.


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it with a folder in front of where modules are found."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_targets_are_listed(fuzz: ModuleType) -> None:
    done = run("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(fuzz.TARGETS)


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["push", "0"], ["push", "--replay", "no"]])
def test_wrong_usage_is_an_error(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage: scripts/fuzz" in done.stderr


def test_missing_atheris_is_told(tmp_path: Path) -> None:
    (tmp_path / "atheris.py").write_text("raise ImportError('no wheel')\n")
    done = run("envelope", "1", path=tmp_path)
    assert done.returncode == 2
    assert "atheris is not installed: no wheel" in done.stderr


def test_input_is_replayed() -> None:
    done = run("envelope", "--replay", str(CORPUS / "envelope" / "run"))
    assert done.returncode == 0, done.stderr
    assert "nothing wrong" in done.stdout


def test_finding_is_told(fuzz: ModuleType, tmp_path: Path) -> None:
    """Let a target fail, and see what the script says of it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.append({str(SCRIPT.parent)!r})\n"
        "import fuzz_.envelope\n"
        "fuzz_.envelope.decode = lambda data: 1 / 0\n"
    )
    done = run("envelope", "--replay", str(CORPUS / "envelope" / "run"), path=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
