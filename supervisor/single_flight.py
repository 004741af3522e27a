"""Let all who ask for the same thing at the same time share one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Make an answer, and no other before that one is there.

    So that a crowd at the admin port, whoever it is, costs no more connections to Redis and hardly
    more time than one who asks. Nothing is kept: who comes after the answer gets a fresh one.

    Args:
        make: makes the answer.
    """

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._task: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Return the answer that is being made, or one that is made from now on."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())
        # Whoever asked first may go away: the others wait on.
        return await asyncio.shield(self._task)

    async def _run(self) -> T:
        try:
            return await self._make()
        finally:
            self._task = None
