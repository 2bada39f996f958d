"""Progress on stderr: a bar where it is a terminal and rich is installed, else a line for each part."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Use in a `with`. `part` names what begins, `step` moves on by one of `total` steps."""

    def __init__(self, total: int, parts: int) -> None:
        self._parts, self._part = parts, 0
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            self._bar, self._task = _rich_bar(total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def part(self, name: str) -> None:
        """A part begins."""
        self._part += 1
        if self._bar is not None:
            self._bar.update(self._task, description=name, detail="")
        else:
            elapsed = time.monotonic() - self._start
            self.note(f"[{self._part:>2}/{self._parts}] {elapsed:5.1f} s  {name}")

    def detail(self, text: str) -> None:
        """What is being done just now; only the bar shows it."""
        if self._bar is not None:
            self._bar.update(self._task, detail=text)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _rich_bar(total: int) -> tuple[Any, Any]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        print("(for a progress bar: pip install fastnorm[bench])", file=sys.stderr)
        return None, None
    bar = RichProgress(
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[detail]}", style="dim"),
        console=Console(stderr=True),
        transient=True,
    )
    return bar, bar.add_task("", total=total, detail="")
