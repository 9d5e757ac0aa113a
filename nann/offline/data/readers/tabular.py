"""Tables with named columns: CSV and TSV (also .gz, .zst) and Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import polars as pl

from nann.offline.data.errors import UnsupportedInputError
from nann.offline.data.interactions import BadRows, ColumnMapping, Interactions, first_known
from nann.offline.data.readers.blocks import Block, first_lines, plain_suffix, read_blocks
from nann.offline.data.readers.delimited import LINE, Layout, parse_block
from nann.offline.progress import Progress

__all__ = ["TEXT_SUFFIXES", "read_item_attributes", "read_table"]

TEXT_SUFFIXES = (".csv", ".tsv")

# Names that common data sets use, the most telling first; compared without case.
USER_NAMES = ("user_id", "userid", "user", "uid", "visitor_id", "visitorid", "customer_id", "session_id")
ITEM_NAMES = ("item_id", "itemid", "item", "iid", "movie_id", "movieid", "product_id", "article_id")
TIME_NAMES = ("timestamp", "time", "ts", "event_time", "datetime", "created_at", "date")
CATEGORY_NAMES = ("category_id", "categoryid", "category", "cate_id")


@dataclass(frozen=True, slots=True)
class _Columns:
    user: str
    item: str
    timestamp: str
    category: str | None
    attributes: tuple[str, ...]

    @property
    def required(self) -> tuple[str, str, str]:
        return self.user, self.item, self.timestamp

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.required, *([self.category] if self.category else []), *self.attributes)


def read_table(path: Path, mapping: ColumnMapping, bad_rows: BadRows, progress: Progress) -> Interactions:
    """Read a table of interactions, one row each.

    An id column whose values are all integers, written as integers are, holds integers; any other holds
    strings. Times may be numbers or ISO 8601 dates; what most of the column is, all of it must be. Rows
    lacking an id or a time, and negative integer ids, are bad rows.
    """
    if plain_suffix(path) == ".parquet":
        table, columns = _read_parquet(path, mapping, progress)
    else:
        table, columns = _read_text(path, mapping, bad_rows, progress)
    unit: Literal["line", "row"] = "row" if plain_suffix(path) == ".parquet" else "line"

    table = table.with_columns(
        _as_ids(table[columns.user]), _as_ids(table[columns.item]), _as_times(table[columns.timestamp])
    )
    for name in columns.required:
        column = table[name]
        good = column.is_not_null() & ((column != "") if column.dtype == pl.String else (column >= 0))
        bad = table.filter(~good)
        if bad.height:
            texts = bad.select(
                pl.concat_str(pl.col(columns.required).cast(pl.String).fill_null("?"), separator=",")
            )
            bad_rows.add(path.name, bad[LINE], f"{name} is missing or not usable", texts.to_series(), unit)
            table = table.filter(good)

    attributes = None
    named = {name: name for name in columns.attributes}
    if columns.category:
        named["category"] = columns.category
    if named:
        values = {new: pl.col(old) for new, old in named.items()}
        attributes = first_known(table.select(item_id=pl.col(columns.item), **values))
        attributes = attributes.with_columns(_narrowed(attributes[name]) for name in named)
    return Interactions(
        format="table",
        files=(path.name,),
        users=table[columns.user],
        items=table[columns.item],
        timestamps=table[columns.timestamp],
        item_attributes=attributes,
    )


def read_item_attributes(
    path: Path, log: Interactions, bad_rows: BadRows, progress: Progress
) -> Interactions:
    """The log with the attributes of a second table, one row an item, in front of those it has."""
    if plain_suffix(path) == ".parquet":
        with progress.stage(f"read {path.name}"):
            table = _scan_parquet(path).collect()
    elif plain_suffix(path) in TEXT_SUFFIXES:
        header = _header(path)
        layout = Layout(header, (), header, (), _separator(path), '"')
        blocks = [parse_block(block, layout, bad_rows) for block in _blocks_after_header(path, progress)]
        table = pl.concat(blocks).drop(LINE)
    else:
        raise UnsupportedInputError(f"{path}: item attributes come as CSV, TSV or Parquet")
    item = _find(None, ITEM_NAMES, table.columns, "item", path)
    table = table.rename({item: "item_id"})
    category = next((name for name in CATEGORY_NAMES if name in table.columns), None)
    if category is not None:
        table = table.rename({category: "category"})
    ids = table["item_id"].cast(log.items.dtype, strict=False)
    table = table.with_columns(ids).drop_nulls("item_id")
    table = table.with_columns(_narrowed(table[name]) for name in table.columns if name != "item_id")
    attributes = first_known(table)
    if log.item_attributes is not None:
        known = log.item_attributes.select(
            pl.exclude([name for name in attributes.columns if name != "item_id"])
        )
        attributes = attributes.join(known, on="item_id", how="full", coalesce=True)
    return replace(log, files=(*log.files, path.name), item_attributes=attributes)


def _read_text(
    path: Path, mapping: ColumnMapping, bad_rows: BadRows, progress: Progress
) -> tuple[pl.DataFrame, _Columns]:
    header = _header(path)
    columns = _resolve(mapping, header, path)
    layout = Layout(header, (), header, columns.required, _separator(path), '"')
    parts = [
        parse_block(block, layout, bad_rows).select(*columns.all, LINE)
        for block in _blocks_after_header(path, progress)
    ]
    empty = pl.DataFrame(schema={**dict.fromkeys(columns.all, pl.String), LINE: pl.Int64})
    return pl.concat([empty, *parts]), columns


def _read_parquet(path: Path, mapping: ColumnMapping, progress: Progress) -> tuple[pl.DataFrame, _Columns]:
    scan = _scan_parquet(path)
    columns = _resolve(mapping, tuple(scan.collect_schema().names()), path)
    with progress.stage(f"read {path.name}"):
        table = scan.select(columns.all).collect()
    return table.with_columns(pl.int_range(1, table.height + 1).alias(LINE)), columns


def _scan_parquet(path: Path) -> pl.LazyFrame:
    try:
        scan = pl.scan_parquet(path)
        scan.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UnsupportedInputError(f"{path} is not a Parquet file ({error})") from error
    return scan


def _separator(path: Path) -> str:
    return "\t" if plain_suffix(path) == ".tsv" else ","


def _header(path: Path) -> tuple[str, ...]:
    lines = first_lines(path)
    if not lines:
        raise UnsupportedInputError(f"{path} is empty")
    names = tuple(name.strip().strip('"') for name in lines[0].lstrip("\ufeff").split(_separator(path)))
    if len(set(names)) != len(names) or "" in names:
        raise UnsupportedInputError(
            f"{path}:1: column names must be given and differ, found: {', '.join(names)}"
        )
    return names


def _blocks_after_header(path: Path, progress: Progress) -> Iterator[Block]:
    for block in read_blocks(path, progress):
        if block.first_line > 1:
            yield block
            continue
        rest = block.data.partition(b"\n")[2]
        if rest:
            yield replace(block, first_line=2, data=rest)


def _resolve(mapping: ColumnMapping, names: tuple[str, ...], path: Path) -> _Columns:
    category = mapping.category
    if category is None:
        category = next((n for n in names if n.lower() in CATEGORY_NAMES), None)
    elif category not in names:
        raise _no_column(path, "category", category, names)
    for attribute in mapping.attributes:
        if attribute not in names:
            raise _no_column(path, "attribute", attribute, names)
    columns = _Columns(
        user=_find(mapping.user, USER_NAMES, names, "user", path),
        item=_find(mapping.item, ITEM_NAMES, names, "item", path),
        timestamp=_find(mapping.timestamp, TIME_NAMES, names, "timestamp", path),
        category=category,
        attributes=tuple(name for name in mapping.attributes if name != category),
    )
    if len(set(columns.all)) != len(columns.all):
        raise UnsupportedInputError(f"{path}: one column is given two roles: {', '.join(columns.all)}")
    return columns


def _find(
    given: str | None, common: tuple[str, ...], names: tuple[str, ...] | list[str], role: str, path: Path
) -> str:
    if given is not None:
        if given not in names:
            raise _no_column(path, role, given, names)
        return given
    by_lower = {name.lower(): name for name in reversed(names)}
    for name in common:
        if name in by_lower:
            return by_lower[name]
    raise UnsupportedInputError(
        f"{path} has no {role} column that can be guessed; name one of its columns: {', '.join(names)}"
    )


def _no_column(
    path: Path, role: str, given: str, names: tuple[str, ...] | list[str]
) -> UnsupportedInputError:
    return UnsupportedInputError(f"{path} has no column {given!r} for the {role}; it has: {', '.join(names)}")


def _as_ids(column: pl.Series) -> pl.Series:
    """Int64, or String where a value is not an integer; nulls where a value is missing."""
    if column.dtype == pl.String:
        return _narrowed_ids(column)
    if column.dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    if column.dtype in (pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    raise UnsupportedInputError(f"column {column.name!r} holds {column.dtype}; ids are integers or strings")


def _narrowed_ids(column: pl.Series) -> pl.Series:
    """Integers only where the text survives: "007" and "+7" are ids of their own, not 7."""
    present = column.replace("", None)
    integers = present.cast(pl.Int64, strict=False)
    same = (integers.cast(pl.String) == present).fill_null(False) | present.is_null()
    return integers if same.all() else present


def _as_times(column: pl.Series) -> pl.Series:
    """Int64 or Float64, nulls where a time is missing or of another kind than most."""
    if column.dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    if column.dtype.is_float():
        return column.cast(pl.Float64).fill_nan(None)
    if column.dtype.is_temporal():
        return column.cast(pl.Datetime("us")).cast(pl.Int64)
    if column.dtype != pl.String:
        raise UnsupportedInputError(
            f"column {column.name!r} holds {column.dtype}; times are numbers or dates"
        )
    integers = column.cast(pl.Int64, strict=False)
    if integers.null_count() == 0:
        return integers
    floats = column.cast(pl.Float64, strict=False).fill_nan(None)
    candidates = [integers, floats]
    with suppress(pl.exceptions.ComputeError):  # no date format fits the first values
        candidates.append(column.str.to_datetime(time_unit="us", strict=False).cast(pl.Int64))
    return min(candidates, key=lambda parsed: parsed.null_count())


def _narrowed(column: pl.Series) -> pl.Series:
    """Text that is wholly integers, or wholly numbers, as such; an empty text as missing."""
    if column.dtype != pl.String:
        return column
    ids = _narrowed_ids(column)
    if ids.dtype != pl.String or ids.null_count() == len(ids):
        return ids
    floats = ids.cast(pl.Float64, strict=False)
    return floats if floats.null_count() == ids.null_count() else ids
