"""Guard against slower code, on machines of any speed: the work of a message does not grow.

What is counted depends on the code alone, so the bounds are tight. Who exceeds one on purpose, or
has made something cheaper, runs `.venv/bin/python -m tests.harness.work` with the version of Python
named below and puts the first three columns into SEEN.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Final

import pytest
from harness.work import AT_ONCE, Rig, Work, count, idle_bytes, operations

SEEN_ON: Final = (3, 11)
# Bytecodes, calls of Python, calls of C.
SEEN: Final = {
    "message": (665, 16, 20),
    f"message, {AT_ONCE} at once": (665, 16, 20),
    "message, unknown head": (1136, 31, 38),
    "push": (524, 14, 22),
    "push, unknown head": (1303, 39, 44),
    f"push, {AT_ONCE} at once": (1065, 33, 34),
    "connect and close": (5335, 189, 216),
    "ping": (638, 20, 17),
}
# 3.12 and 3.13 take a tenth less for the same code; nobody knows what the next one will do.
SLACK: Final = 1.12 if sys.version_info[:2] == SEEN_ON else 1.3

IDLE_BYTES: Final = 424

# Not zero, because the interpreter's own lists of free objects come and go.
NOTHING_KEPT: Final = 0.1


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


@pytest.fixture(scope="module")
def works(rig: Rig) -> dict[str, Work]:
    """Count everything once; `pytest -s` shows it."""
    works = {name: count(rig, operation) for name, operation in operations(rig).items()}
    for name, work in works.items():
        print(f"{name}: {work}")
    return works


def test_bounds_are_for_what_is_counted(works: dict[str, Work]) -> None:
    assert works.keys() == SEEN.keys()


@pytest.mark.parametrize("name", SEEN)
def test_takes_no_more_work_than_it_did(works: dict[str, Work], name: str) -> None:
    work = works[name]
    bytecodes, calls, c_calls = SEEN[name]
    assert 0 < work.bytecodes <= bytecodes * SLACK
    assert 0 < work.calls <= calls * SLACK + 1
    assert 0 < work.c_calls <= c_calls * SLACK + 1


@pytest.mark.parametrize("name", [name for name in SEEN if name.startswith("message")])
def test_message_is_written_once_each_way(works: dict[str, Work], name: str) -> None:
    work = works[name]
    assert (work.api_writes, work.client_writes, work.push_writes) == (1, 1, 0)


def test_push_is_written_once_and_answered_once(works: dict[str, Work]) -> None:
    work = works["push"]
    assert (work.api_writes, work.client_writes, work.push_writes) == (0, 1, 1)


def test_pushes_of_one_packet_are_answered_in_one(works: dict[str, Work]) -> None:
    work = works[f"push, {AT_ONCE} at once"]
    assert (work.api_writes, work.client_writes, work.push_writes) == (0, 1, 1 / AT_ONCE)


@pytest.mark.parametrize("name", [name for name in SEEN if name != "connect and close"])
def test_leaves_no_memory_behind_even_for_the_collector(works: dict[str, Work], name: str) -> None:
    assert works[name].blocks < NOTHING_KEPT


def test_client_that_has_gone_leaves_no_memory_behind(rig: Rig, works: dict[str, Work]) -> None:
    assert works  # so that everything has been done before
    come_and_go, _ = operations(rig)["connect and close"]
    sizes = []
    for _ in range(3):
        for _ in range(500):
            come_and_go()
        rig.rests()
        gc.collect()
        sizes.append(sys.getallocatedblocks())
    assert (sizes[2] - sizes[1]) / 500 < NOTHING_KEPT


def test_idle_client_keeps_no_more_memory_than_it_did() -> None:
    kept = idle_bytes()
    print(f"idle client: {kept:.0f} bytes")
    assert 0 < kept <= IDLE_BYTES * SLACK
