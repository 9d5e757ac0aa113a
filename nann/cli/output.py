"""What commands print: a report for people or JSON for machines on stdout, the rest on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["JsonOption", "console", "emit", "table"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of words.")]


def console() -> Console:
    """stdout as it is now; on no terminal, wide enough that no line is folded."""
    console = Console()
    return console if console.is_terminal else Console(width=160, soft_wrap=True)


def emit(report: Any, *, as_json: bool, words: str | Table) -> None:
    """Print `report` (a dataclass, a model or a mapping) as JSON, or else `words`."""
    if as_json:
        typer.echo(json.dumps(_plain(report), indent=2))
    elif isinstance(words, str):
        typer.echo(words)
    else:
        console().print(words)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table whose first column is text and whose numbers are aligned to the right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        numeric = index > 0 and all(_is_number(row[index]) for row in rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def _is_number(cell: object) -> bool:
    return str(cell).lstrip("-")[:1].isdigit() or cell == ""


def _plain(value: Any) -> Any:
    """Values as JSON has them; dataclasses and pydantic models as objects, paths as text."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return value.tolist()
    return str(value) if isinstance(value, Path) else value
