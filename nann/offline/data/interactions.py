"""What every reader returns, and how it tells of rows it could not read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from nann.offline.data.errors import BadRowsError

__all__ = ["BadRows", "ColumnMapping", "Interactions", "first_known"]

KEPT_EXAMPLES = 20
SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """Which column is what, in a table of interactions; None: guessed from common names.

    `attributes` are columns that describe the item and go to `items.parquet`.
    """

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    category: str | None = None
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Interactions:
    """A log of behaviours in file order, one row each, parallel and without nulls.

    `users` and `items` are Int64 or String, `timestamps` Int64 or Float64 (any unit: only their order is
    used). `item_attributes` has one row an item: `item_id`, and optionally `category`, `title`, others;
    it may lack items of the log and name others.
    """

    format: str
    files: tuple[str, ...]
    users: pl.Series
    items: pl.Series
    timestamps: pl.Series
    item_attributes: pl.DataFrame | None = None


@dataclass
class BadRows:
    """Counts the rows that break the format and keeps the first of them in words."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(
        self,
        file: str,
        lines: pl.Series,
        reason: str,
        texts: pl.Series,
        unit: Literal["line", "row"] = "line",
    ) -> None:
        """Record bad rows by their 1-based numbers, parallel to what they say."""
        self.count += len(lines)
        kept = KEPT_EXAMPLES - len(self.examples)
        for line, text in zip(lines.head(kept), texts.head(kept), strict=True):
            place = f"{file}:{line}" if unit == "line" else f"{file}, row {line}"
            self.examples.append(f"{place}: {reason}: {str(text).rstrip()[:SHOWN_CHARACTERS]!r}")

    def report(self) -> str:
        """The count and the first bad rows, one a line."""
        more = self.count - len(self.examples)
        rest = [f"… and {more:,} more"] if more else []
        return "\n".join([f"{self.count:,} bad rows", *self.examples, *rest])

    def raise_if_any(self) -> None:
        """BadRowsError with the report when a row was bad: what strict reading does."""
        if self.count:
            raise BadRowsError(f"{self.report()}\nrepair them, or prepare without --strict to leave them out")


def first_known(attributes: pl.DataFrame) -> pl.DataFrame:
    """One row an `item_id`: of each other column the first value, in row order, that is not null."""
    values = [name for name in attributes.columns if name != "item_id"]
    if len(values) == 1:  # the one column of UserBehavior: three times faster than the aggregation
        return attributes.drop_nulls().unique("item_id", keep="first", maintain_order=True)
    return attributes.group_by("item_id", maintain_order=True).agg(pl.col(values).drop_nulls().first())
