"""Run a test inside a loop, in real time or in a time that passes only while nothing happens."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Final

import uvloop

DEADLINE_S: Final = 20.0

_TICK_S: Final = 0.1

Test = Callable[..., Coroutine[Any, Any, None]]


def in_loop(test: Test) -> Callable[..., None]:
    """Run a test inside a loop, in time, and let no exception get lost there."""
    return _run_in(uvloop.new_event_loop, test)


def in_virtual_time(test: Test) -> Callable[..., None]:
    """Run a test that needs no socket in a loop whose clock jumps to what is due next."""
    return _run_in(VirtualLoop, test, timeout_s=None)


def _run_in(
    factory: Callable[[], asyncio.AbstractEventLoop],
    test: Test,
    timeout_s: float | None = DEADLINE_S,
) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        complaints: list[dict[str, Any]] = []

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: complaints.append(context))
            async with asyncio.timeout(timeout_s):
                await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())
        assert not complaints

    return run


async def holds(condition: Callable[[], object]) -> None:
    """Wait until something is true."""
    while not condition():
        await asyncio.sleep(0)


class Clock:
    """Be the loop that a sweeper sees: time goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._tick: Callable[[], None] | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        self._tick = callback

    def advance(self, seconds: float) -> None:
        """Let time go by, tick by tick."""
        for _ in range(round(seconds / _TICK_S)):
            self.stall(_TICK_S)

    def stall(self, seconds: float) -> None:
        """Let time go by without a tick before its end."""
        assert self._tick is not None
        self.now += seconds
        self._tick()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Be a loop that never waits: when nothing is ready, it is the next deadline at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_VirtualSelector(self))

    def time(self) -> float:
        return self.now


class _VirtualSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nothing will ever happen"
            self._loop.now += max(0.0, timeout)
        return ready
