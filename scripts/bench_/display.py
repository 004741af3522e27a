"""Show on a terminal how far a scenario is; stay quiet where there is none."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Display:
    """Show a bar with the step under way; use it as a context manager.

    Args:
        steps: how many there will be.
    """

    def __init__(self, steps: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._shows = sys.stdout.isatty() and self._console.is_terminal
        self._progress = Progress(
            BarColumn(24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._shows,
        )
        self._task = self._progress.add_task("", total=steps)
        self._text = ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, text: str) -> None:
        """Say what is done now."""
        self._text = text
        self._progress.update(self._task, description=text)

    def end(self, **figures: float) -> None:
        """Say that it is done, and what came out."""
        self._progress.advance(self._task)
        if self._shows and figures:
            said = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
            self._console.print(f"{self._text}: {said}", markup=False)


def warn(text: str) -> None:
    """Say something that the reader must know, on stderr, terminal or not."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
