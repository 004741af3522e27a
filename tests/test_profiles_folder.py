"""Make the folder for profiles, and remove what a killed supervisor left."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from harness.waiting import DEADLINE_S
from ws2api.supervisor import profiles_folder

HOLD = """
import os, sys
from ws2api.supervisor import profiles_folder
with profiles_folder.held() as folder:
    (folder / "17-1.part").touch()
    if sys.argv[1:] and os.fork() == 0:
        sys.stdin.read()  # a worker that still drains
        os._exit(0)
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed_holder(base: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run a program that holds a folder and is killed then, with a child if asked for one."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(base)},
    )


def test_folder_is_there_for_as_long_as_it_is_held() -> None:
    with profiles_folder.held() as folder:
        (folder / "1-1").touch()
    assert not folder.exists()


def test_is_safe_from_tidying() -> None:
    """What tidies /tmp passes over what it cannot lock; tmpfiles.d(5), age."""
    with profiles_folder.held() as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_next_start_removes_what_a_killed_one_left(base: Path) -> None:
    with killed_holder(base) as holder:
        left = Path(holder.communicate(timeout=DEADLINE_S)[0].strip())
    assert left.exists()
    with profiles_folder.held() as folder:
        assert list(base.iterdir()) == [folder]


def test_folder_of_a_worker_that_outlives_its_supervisor_stays(base: Path) -> None:
    with killed_holder(base, "with a child") as holder:
        assert holder.stdout is not None
        left = Path(holder.stdout.readline().strip())
        holder.wait(DEADLINE_S)
        profiles_folder.remove_leftovers(base)
        assert left.exists()
        holder.communicate(timeout=DEADLINE_S)  # ends the child
    profiles_folder.remove_leftovers(base)
    assert not left.exists()


def test_folders_of_the_living_and_of_others_stay(base: Path) -> None:
    foreign = base / "ws2api-profiles-of_today"
    foreign.mkdir()
    (foreign / "precious").touch()
    mine = base / "ws2api-profiles-mine"
    mine.mkdir()
    (base / "ws2api-profiles-filefile").touch()
    (base / "ws2api-profiles-linklink").symlink_to(mine)
    with profiles_folder.held() as living:
        before = set(base.iterdir())
        with profiles_folder.held():
            pass
        assert set(base.iterdir()) == before
        assert living in before
    assert (foreign / "precious").exists()


def test_one_that_another_start_removes_at_once_is_made_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def interrupted(**options: str) -> str:
        made.append(make(**options))
        if len(made) == 1:
            profiles_folder.remove_leftovers(base)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    with profiles_folder.held() as folder:
        assert [str(folder)] == made[1:]
        assert folder.exists()
