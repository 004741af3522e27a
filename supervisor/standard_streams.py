"""Make sure that descriptors 0 to 2 are taken before anything else can get one of them.

Whoever starts a program may have closed them. The next socket would be standard output then: what
is printed would reach a client, and libuv refuses to close it. Python has None for the stream.
"""

from __future__ import annotations

import os
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def ensure() -> None:
    """Open the null device in place of each that is closed."""
    for number, (name, mode) in enumerate(_STREAMS):
        if not _is_open(number):
            # The lowest free one, which is this: those below are open by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
