"""Taobao's UserBehavior.csv: `user_id,item_id,category_id,behavior_type,timestamp`, without a header."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from nann.offline.data.interactions import BadRows, Interactions, first_known
from nann.offline.data.readers.blocks import first_lines, read_blocks
from nann.offline.data.readers.delimited import Layout, parse_block
from nann.offline.progress import Progress

__all__ = ["looks_like_user_behavior", "read_user_behavior"]

# Every behaviour type counts, known or not: NANN merges them all (reference/nann.md, "Data").
LAYOUT = Layout(
    names=("user_id", "item_id", "category_id", "behavior_type", "timestamp"),
    integers=("user_id", "item_id", "category_id", "timestamp"),
    strings=(),
    required=("user_id", "item_id", "category_id", "timestamp"),
)


def looks_like_user_behavior(path: Path) -> bool:
    """Whether most of the file's first lines are rows of the format (a few may be bad) and none a header."""
    fields = [line.split(",") for line in first_lines(path)[:100]]
    if not fields or not any(field.strip().isdecimal() for field in fields[0]):
        return False
    n_good = sum(len(row) == 5 and all(row[i].strip().isdecimal() for i in (0, 1, 2, 4)) for row in fields)
    return 2 * n_good > len(fields)


def read_user_behavior(path: Path, bad_rows: BadRows, progress: Progress) -> Interactions:
    """Read a UserBehavior file, plain, .gz or .zst; an item's category is the first the file gives it."""
    behaviours: list[pl.DataFrame] = []
    categories: list[pl.DataFrame] = []
    for block in read_blocks(path, progress):
        rows = parse_block(block, LAYOUT, bad_rows)
        behaviours.append(rows.select("user_id", "item_id", "timestamp"))
        categories.append(first_known(rows.select("item_id", category="category_id")))
    log = pl.concat(behaviours) if behaviours else pl.DataFrame(schema=dict.fromkeys(LAYOUT.read, pl.Int64))
    return Interactions(
        format="UserBehavior",
        files=(path.name,),
        users=log["user_id"],
        items=log["item_id"],
        timestamps=log["timestamp"],
        item_attributes=first_known(pl.concat(categories)) if categories else None,
    )
