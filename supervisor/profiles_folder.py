"""Give workers a folder for the profiles that the admin process asks for, while the gateway lives.

The folder is locked by the supervisor and its children, for as long as one of them lives. So the
next start can tell one that was left by a supervisor that was killed, and removes it; and what
tidies /tmp passes over it (tmpfiles.d(5), age).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

from .errors import StartError

_PREFIX: Final = "ws2api-profiles-"
_NAME: Final = re.compile(_PREFIX + r"[a-z0-9_]{8}")
_FILE: Final = re.compile(r"\d+-\d+(?:\.part)?")
_ATTEMPTS: Final = 10

_log = structlog.get_logger()


@contextlib.contextmanager
def held() -> Iterator[Path]:
    """Make the folder, after removing those of the dead; remove it in the end.

    Raises:
        StartError: if it cannot be made.
    """
    try:
        base = Path(tempfile.gettempdir())
        remove_leftovers(base)
        folder, descriptor = _create(base)
    except OSError as error:
        raise StartError(f"no folder for temporary files: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_leftovers(base: Path) -> None:
    """Remove this user's folders that nobody holds; one with foreign files in it stays."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            about = folder.lstat()
            is_ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
            if is_ours and _NAME.fullmatch(folder.name):
                _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.iterdir():
            if _FILE.fullmatch(path.name):
                path.unlink()
        folder.rmdir()
        _log.info("removed what a dead supervisor left", folder=str(folder))
    finally:
        os.close(descriptor)


def _create(base: Path) -> tuple[Path, int]:
    for _ in range(_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            if _is_locked(descriptor, folder):
                return folder, descriptor
            os.close(descriptor)
    raise FileNotFoundError(0, f"folders in {base} disappear")


def _is_locked(descriptor: int, folder: Path) -> bool:
    """Lock a new folder; tell whether another start did not take it for a left one before."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, on which none is removed either
        return True
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    return False
