"""``nann prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nann.cli.output import JsonOption, emit

if TYPE_CHECKING:
    from nann.offline.data.interactions import ColumnMapping

__all__ = [
    "AttributesOption",
    "CategoryColumn",
    "ItemColumn",
    "ItemTable",
    "StrictOption",
    "TimeColumn",
    "UserColumn",
    "column_mapping",
    "prepare_command",
]

UserColumn = Annotated[str | None, typer.Option(help="Column of user ids, in a table with a header.")]
ItemColumn = Annotated[str | None, typer.Option(help="Column of item ids.")]
TimeColumn = Annotated[str | None, typer.Option(help="Column of timestamps; only their order is used.")]
CategoryColumn = Annotated[str | None, typer.Option(help="Column of the items' categories.")]
AttributesOption = Annotated[
    list[str] | None, typer.Option("--attribute", help="Column that describes the item; repeatable.")
]
ItemTable = Annotated[
    Path | None,
    typer.Option("--items", exists=True, help="Table with one row an item: item_id, title, any attribute."),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Fail on rows that break the format.")]


def column_mapping(
    user: str | None, item: str | None, time: str | None, category: str | None, attributes: list[str] | None
) -> ColumnMapping | None:
    """The columns that were named, None when none was."""
    from nann.offline.data.interactions import ColumnMapping

    if not (user or item or time or category or attributes):
        return None
    return ColumnMapping(user, item, time, category, tuple(attributes or ()))


def prepare_command(
    input: Annotated[Path, typer.Option(exists=True, help="The click log: a file or a directory.")],
    output: Annotated[Path, typer.Option(help="Directory of the prepared data set.")],
    seed: Annotated[int, typer.Option(help="Decides which users are held out.")] = 0,
    strict: StrictOption = False,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    category_column: CategoryColumn = None,
    attribute: AttributesOption = None,
    items: ItemTable = None,
    as_json: JsonOption = False,
) -> None:
    """Read a click log and split its users.

    Accepted: UserBehavior.csv, MovieLens directories, CSV, TSV or Parquet of interactions with named
    columns; text also as .gz or .zst.
    """
    from nann.offline.data.prepare import prepare
    from nann.offline.progress import Progress

    with Progress() as progress:
        report = prepare(
            input,
            output,
            seed=seed,
            strict=strict,
            columns=column_mapping(user_column, item_column, time_column, category_column, attribute),
            item_attributes=items,
            progress=progress,
        )
        if report.bad_rows.count:
            progress.line(report.bad_rows.report())
    meta = report.meta
    emit(
        {"output": report.output, "bad_rows": report.bad_rows.count, "meta": meta.model_dump(mode="json")},
        as_json=as_json,
        words=f"{output}: {meta.num_interactions:,} behaviours of {meta.num_users:,} users with "
        f"{meta.num_items:,} items ({report.bad_rows.count:,} bad rows left out); "
        f"next: nann train --data {output} --output MODEL",
    )
