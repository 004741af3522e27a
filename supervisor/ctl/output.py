"""Write a file that is whole or not there."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from .errors import UsageError


@contextlib.contextmanager
def open_output(name: str) -> Iterator[BinaryIO]:
    """Open a file that appears, or replaces an older one, when all of it is there.

    Args:
        name: of the file; a dash for standard output.

    Raises:
        UsageError: if it cannot be written.
    """
    if name == "-":
        yield sys.stdout.buffer
        return
    try:
        with _open(Path(name)) as output:
            yield output
    except OSError as error:
        raise UsageError(f"--output: cannot write {name}: {error.strerror}") from None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    if path.exists() and not path.is_file():  # a pipe, or /dev/null
        with path.open("wb") as special:
            yield special
        return
    with (
        tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as output,
        _removed_unless_done(output.name),
    ):
        yield cast(BinaryIO, output)
        output.flush()
        os.replace(output.name, path)


@contextlib.contextmanager
def _removed_unless_done(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.unlink(name)
        raise
