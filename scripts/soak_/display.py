"""Show how the run goes, and in the end the ledger."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_LINE_EVERY_S: Final = 30.0
"""Where there is no terminal to draw on."""


class Display:
    """Draw a bar with a line of figures on stderr, or print a line now and then.

    Args:
        total_s: how long the run is to take.
    """

    def __init__(self, total_s: float) -> None:
        self._total_s = total_s
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("soak", total=total_s, figures="")
        self._said_at = -_LINE_EVERY_S

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def show(self, done_s: float, what: str, figures: str) -> None:
        """Show how far it is, what is being done, and some figures."""
        self._progress.update(self._task, completed=done_s, description=what, figures=figures)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said_at >= _LINE_EVERY_S:
            self._said_at = now
            self.say(f"{done_s:6.0f} of {self._total_s:.0f} s  {what}  {figures}")


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print names and figures on stdout."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(min_width=44)
    table.add_column(justify="right")
    for name, figure in rows:
        table.add_row(name, figure)
    console = Console(file=sys.stdout, width=100)
    console.print(table)
    console.print()
