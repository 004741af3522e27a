"""Run an event loop in a thread, so that a plain test can have thousands of sockets served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from .waiting import DEADLINE_S

T = TypeVar("T")


class LoopThread:
    """Own a loop and its thread until `close`.

    What reaches the loop's exception handler is kept in `errors`, and `close` fails on it.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.errors: list[str] = []
        self.loop = uvloop.new_event_loop()
        # Debugging a loop records a stack for each callback: thousands of connections cannot wait.
        self.loop.set_debug(False)
        self.loop.set_exception_handler(self._on_error)
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def __enter__(self) -> LoopThread:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the loop's thread and return what it returns."""

        async def called() -> T:
            return function(*arguments)

        return self.run(called())

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float = 4 * DEADLINE_S) -> T:
        """Run a coroutine in the loop's thread and return what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        """Cancel what still runs and end the thread; nothing may have gone wrong in it."""
        if not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), f"{self._thread.name} does not end"
        assert not self.errors, self.errors

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(asyncio.sleep(0))  # what was aborted is closed only now
        finally:
            self.loop.close()

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(f"{context['message']}: {context.get('exception')!r}")
