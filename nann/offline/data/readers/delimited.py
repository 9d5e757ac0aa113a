"""Lines of delimited text to columns, keeping the line number of every row that breaks the format."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from nann.offline.data.interactions import BadRows
from nann.offline.data.readers.blocks import Block

__all__ = ["LINE", "Layout", "parse_block"]

TEXT = "__text"
LINE = "__line"  # 1-based line of a row


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a delimited file, in order.

    `required` columns may not be missing, nor negative where they are integers; they include the last
    column read. Columns in neither `integers` nor `strings` are passed over.
    """

    names: tuple[str, ...]
    integers: tuple[str, ...]
    strings: tuple[str, ...]
    required: tuple[str, ...]
    separator: str = ","
    quote_char: str | None = None

    @property
    def read(self) -> list[str]:
        return [name for name in self.names if name in self.integers or name in self.strings]


def parse_block(block: Block, layout: Layout, bad_rows: BadRows) -> pl.DataFrame:
    """The good rows of a block, in order: the read columns and `LINE`.

    The whole block is parsed at once; only a block that holds a bad row is looked at line by line (by
    columns, all the same). Blank lines are no rows.
    """
    rows = _parse_clean(block, layout)
    if rows is not None:
        return rows
    return _parse_line_by_line(block, layout, bad_rows)


def _parse_clean(block: Block, layout: Layout) -> pl.DataFrame | None:
    """The block's rows if every one of them is good, else None."""
    n_lines = block.n_lines
    # Quotes may hide separators. With as many separators as there should be, no row has too many fields
    # unless another has too few, and that one lacks its last column.
    if layout.quote_char is not None and layout.quote_char.encode() in block.data:
        return None
    if block.data.count(layout.separator.encode()) != (len(layout.names) - 1) * n_lines:
        return None
    if layout.names[-1] not in layout.required and len(layout.read) != len(layout.names):
        return None
    try:
        rows = _read_csv(block.data, layout, ignore_errors=False)
    except pl.exceptions.PolarsError:
        return None
    if rows.height != n_lines or any(not _is_good(rows[name]).all() for name in layout.required):
        return None
    return rows.with_columns(pl.int_range(block.first_line, block.first_line + n_lines).alias(LINE))


def _parse_line_by_line(block: Block, layout: Layout, bad_rows: BadRows) -> pl.DataFrame:
    text = pl.Series(TEXT, [block.data.decode("utf-8", errors="replace")]).str.split("\n").explode()
    lines = pl.DataFrame(
        [text.str.strip_suffix("\r"), pl.int_range(len(text), eager=True).alias(LINE) + block.first_line]
    ).filter(pl.col(TEXT).str.strip_chars() != "")

    unquoted = pl.col(TEXT)
    if layout.quote_char is not None:
        quote = layout.quote_char
        lines = _drop(
            lines,
            pl.col(TEXT).str.count_matches(quote, literal=True) % 2 == 0,
            "a quote is not closed on its line",
            block,
            bad_rows,
        )
        unquoted = pl.col(TEXT).str.replace_all(f"{quote}[^{quote}]*{quote}", "")
    n_fields = unquoted.str.count_matches(layout.separator, literal=True) + 1
    expected = len(layout.names)
    lines = _drop(lines, n_fields == expected, f"not {expected} fields", block, bad_rows)
    if not lines.height:
        return _empty(layout)

    rows = _read_csv(lines[TEXT].str.join("\n").item().encode(), layout, ignore_errors=True)
    lines = lines.with_columns(rows)
    for name in layout.required:
        what = "a non-negative integer" if name in layout.integers else "given"
        lines = _drop(lines, _is_good(lines[name]), f"{name} is not {what}", block, bad_rows)
    return lines.select(*layout.read, LINE)


def _drop(
    lines: pl.DataFrame, good: pl.Expr | pl.Series, reason: str, block: Block, bad_rows: BadRows
) -> pl.DataFrame:
    marked = lines.with_columns(good.alias("__good"))
    bad = marked.filter(~pl.col("__good"))
    if bad.height:
        bad_rows.add(block.file, bad[LINE], reason, bad[TEXT])
    return marked.filter("__good").drop("__good")


def _is_good(column: pl.Series) -> pl.Series:
    good = column >= 0 if column.dtype.is_integer() else column != ""
    return good.fill_null(False)


def _read_csv(data: bytes, layout: Layout, *, ignore_errors: bool) -> pl.DataFrame:
    types = {name: pl.Int64 if name in layout.integers else pl.String for name in layout.names}
    indices = [i for i, name in enumerate(layout.names) if name in layout.read]
    return pl.read_csv(
        data,
        has_header=False,
        schema=types,
        columns=None if len(indices) == len(layout.names) else indices,
        separator=layout.separator,
        quote_char=layout.quote_char,
        ignore_errors=ignore_errors,
        encoding="utf8",
    )


def _empty(layout: Layout) -> pl.DataFrame:
    types = {name: pl.Int64 if name in layout.integers else pl.String for name in layout.read}
    return pl.DataFrame(schema={**types, LINE: pl.Int64})
