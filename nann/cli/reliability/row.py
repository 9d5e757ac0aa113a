"""A row of the table in docs/reliability.md."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

import typer

from nann.cli.output import emit
from nann.offline.benchmark.machine import Machine

__all__ = ["Row", "print_row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what is promised, what was measured, and whether that keeps the promise."""

    promise: str
    measured: str
    kept: bool
    command: str
    machine: Machine


def print_row(promise: str, measured: str, *, kept: bool, as_json: bool) -> None:
    """Print the row, and end with 1 when the promise was not kept."""
    command = "python -m nann.cli.reliability " + shlex.join(sys.argv[1:])
    row = Row(promise, measured, kept, command, Machine.here())
    cells = (promise, measured, "yes" if kept else "**no**", f"`{command}`")
    emit(row, as_json=as_json, words=f"| {' | '.join(cells)} |\n\n{row.machine.line()}")
    raise typer.Exit(0 if kept else 1)
