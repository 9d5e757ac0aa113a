"""Progress of long jobs: bars on a terminal, plain lines anywhere else, nothing when silent.

with Progress() as progress, progress.stage("read", total=n_bytes, unit="B") as stage:
    stage.advance(1024)
    stage.note("loss 0.31")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import rich.progress
from rich.console import Console
from typing_extensions import Self

__all__ = ["Progress", "Stage"]

PLAIN_INTERVAL_S = 10.0  # between two lines of one stage in a log: enough to see life, few enough to read


class Stage:
    """One step of a job; `completed` of `total` units are done (`total` None: not known)."""

    def __init__(self, owner: Progress, title: str, total: float | None, unit: str) -> None:
        self._owner = owner
        self._started_s = time.monotonic()
        self._printed_s = self._started_s
        self._bar: rich.progress.TaskID | None = None
        self._note = ""
        self.title = title
        self.total = total
        self.unit = unit
        self.completed = 0.0

    def advance(self, amount: float = 1.0) -> None:
        """Count `amount` more units as done."""
        self.move_to(self.completed + amount)

    def move_to(self, completed: float) -> None:
        """Say how many units are done in all."""
        self.completed = completed
        self._owner.show(self)

    def note(self, text: str) -> None:
        """Show a few words beside the bar, such as the loss; the newest replaces the one before."""
        self._note = text
        self._owner.show(self)

    def words(self) -> str:
        """The stage's state as one plain line."""
        parts = [f"{self.title}:"]
        if self.total:
            parts.append(f"{100 * min(self.completed / self.total, 1):.0f} %")
        if self.completed:
            of_total = f" of {self.total:,.0f}" if self.total else ""
            parts.append(f"({self.completed:,.0f}{of_total}{' ' + self.unit if self.unit else ''})")
        parts.append(f"{time.monotonic() - self._started_s:.1f} s")
        return " ".join([*parts, self._note]).rstrip()


class Progress:
    """Shows stages, one after another or nested, on stderr (or on `console`); `silent` shows none.

    Not for several threads. Leaving the `with` block, also by an exception, gives the terminal back.
    """

    def __init__(self, *, console: Console | None = None, silent: bool = False) -> None:
        self._console = console if console is not None else Console(file=sys.stderr)
        self._silent = silent
        self._bars: rich.progress.Progress | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bars()

    @contextmanager
    def stage(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Stage]:
        """Show a stage while the block runs, and that it ended when the block ends well."""
        stage = Stage(self, title, total, unit)
        self._depth += 1
        self._open(stage)
        try:
            yield stage
        except BaseException:
            self._depth -= 1
            self._stop_bars()
            raise
        self._depth -= 1
        self._close(stage)

    def line(self, text: str) -> None:
        """Print one line above the bars."""
        if not self._silent:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, stage: Stage) -> None:
        """Bring what is shown of `stage` up to date; stages call this themselves."""
        if self._bars is not None and stage._bar is not None:
            self._bars.update(stage._bar, completed=stage.completed, total=stage.total, note=stage._note)
        elif time.monotonic() - stage._printed_s >= PLAIN_INTERVAL_S:
            stage._printed_s = time.monotonic()
            self.line(stage.words())

    def _open(self, stage: Stage) -> None:
        if self._silent or not self._console.is_terminal:
            return
        if self._bars is None:
            self._bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bars.start()
        stage._bar = self._bars.add_task(stage.title, total=stage.total, note="")

    def _close(self, stage: Stage) -> None:
        if self._bars is None:
            self.line(f"{stage.words()} done")
            return
        if stage._bar is not None:
            done = stage.total or stage.completed or 1
            self._bars.update(stage._bar, completed=done, total=done, note=stage._note)
        if self._depth == 0:
            self._stop_bars()

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
