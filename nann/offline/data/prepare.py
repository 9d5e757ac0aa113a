"""`nann prepare`: a click log in any accepted format to a prepared data set."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from nann.offline.data import rules
from nann.offline.data.convert import Converted, convert
from nann.offline.data.errors import BadRowsError, UnsupportedInputError
from nann.offline.data.interactions import BadRows, ColumnMapping, Interactions
from nann.offline.data.meta import META_FILE, DatasetMeta, IdTypes, SourceMeta, SplitSizes
from nann.offline.data.readers.blocks import plain_suffix
from nann.offline.data.readers.movielens import (
    is_movielens_1m,
    is_movielens_100k,
    read_movielens_1m,
    read_movielens_100k,
)
from nann.offline.data.readers.tabular import TEXT_SUFFIXES, read_item_attributes, read_table
from nann.offline.data.readers.userbehavior import looks_like_user_behavior, read_user_behavior
from nann.offline.progress import Progress

__all__ = ["ACCEPTED", "ColumnMapping", "PrepareReport", "prepare"]

ACCEPTED = (
    "UserBehavior.csv (headerless), CSV, TSV or Parquet of interactions with named columns "
    "(text also as .gz or .zst), a directory holding one of these, an ml-1m or an ml-100k directory"
)
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
TFRECORD_SUFFIX = ".tfrecords"
_NO_TFRECORDS = (
    "{}: NANN's TFRecords hold samples already cut from the log, not the log; prepare the UserBehavior.csv "
    f"they were made from. Accepted: {ACCEPTED}"
)
ITEM_FILES = ("items.csv", "items.tsv", "items.parquet")


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was written where, and the rows that were left out (the first of them in words)."""

    output: Path
    meta: DatasetMeta
    bad_rows: BadRows


def prepare(
    input: Path,
    output: Path,
    *,
    seed: int = 0,
    strict: bool = False,
    columns: ColumnMapping | None = None,
    item_attributes: Path | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Read `input`, apply NANN's rules (reference/nann.md, "Data") and write the directory `output`.

    `columns` says which column is which in a table with a header. `item_attributes` is a table with one
    row an item; without it, an `items.csv`, `.tsv` or `.parquet` beside the interactions is used.
    `output` appears whole or not at all; an earlier prepared data set there is replaced.

    Raises UnsupportedInputError for an input in no accepted format, BadRowsError when no row is good or,
    with `strict`, when any row is bad.
    """
    progress = progress if progress is not None else Progress(silent=True)
    _check_replaceable(output)
    bad_rows = BadRows()
    log = _read(input, columns, item_attributes, bad_rows, progress)
    if strict:
        bad_rows.raise_if_any()
    if not len(log.items):
        raise BadRowsError(f"{input} holds no behaviour that can be read; {bad_rows.report()}")
    with progress.stage("sort and number"):
        converted = convert(log, seed)
    meta = _describe(converted, log, bad_rows, seed)
    with progress.stage(f"write {output}"):
        _write(converted, meta, output)
    return PrepareReport(output, meta, bad_rows)


def _read(
    path: Path,
    columns: ColumnMapping | None,
    item_attributes: Path | None,
    bad_rows: BadRows,
    progress: Progress,
) -> Interactions:
    if not path.exists():
        raise UnsupportedInputError(f"{path} does not exist; accepted: {ACCEPTED}")
    if path.is_dir():
        if is_movielens_1m(path):
            return read_movielens_1m(path, bad_rows, progress)
        if is_movielens_100k(path):
            return read_movielens_100k(path, bad_rows, progress)
        path = _only_data_file(path)
    if path.suffix == TFRECORD_SUFFIX:
        raise UnsupportedInputError(_NO_TFRECORDS.format(path))
    if plain_suffix(path) not in DATA_SUFFIXES:
        raise UnsupportedInputError(f"{path} is in no accepted format; accepted: {ACCEPTED}")
    is_text = plain_suffix(path) in TEXT_SUFFIXES
    if is_text and columns is None and looks_like_user_behavior(path):
        log = read_user_behavior(path, bad_rows, progress)
    else:
        log = read_table(path, columns or ColumnMapping(), bad_rows, progress)
    beside = next((path.parent / name for name in ITEM_FILES if (path.parent / name).is_file()), None)
    table = item_attributes or (beside if beside != path else None)
    return log if table is None else read_item_attributes(table, log, bad_rows, progress)


def _only_data_file(directory: Path) -> Path:
    found = sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and plain_suffix(path) in DATA_SUFFIXES and path.name not in ITEM_FILES
    )
    if not found and any(directory.glob(f"*{TFRECORD_SUFFIX}")):
        raise UnsupportedInputError(_NO_TFRECORDS.format(directory))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UnsupportedInputError(
            f"{directory} should hold one file of interactions, found: {names}; accepted: {ACCEPTED}"
        )
    return found[0]


def _describe(converted: Converted, log: Interactions, bad_rows: BadRows, seed: int) -> DatasetMeta:
    lengths = np.diff(converted.user_row_splits)
    users = {code: int((converted.user_split == code).sum()) for code in (-1, 0, 1, 2)}
    trains = converted.user_split == rules.TRAIN
    return DatasetMeta(
        id_type=IdTypes(**converted.id_types),
        num_items=len(converted.item_ids),
        num_categories=int(converted.item_categories.max()),
        num_users=len(converted.user_ids),
        num_interactions=len(converted.user_items),
        num_eligible_users=len(lengths) - users[rules.INELIGIBLE],
        num_train_samples=int(rules.train_sample_counts(lengths[trains]).sum()),
        history_length=rules.HISTORY_LENGTH,
        min_behaviours=rules.MIN_BEHAVIOURS,
        seed=seed,
        splits=SplitSizes(
            train=users[rules.TRAIN],
            validation=users[rules.VALIDATION],
            test=users[rules.TEST],
            ineligible=users[rules.INELIGIBLE],
        ),
        attribute_columns=[name for name in converted.items.columns if name != "item_id"],
        source=SourceMeta(
            format=log.format,
            files=list(log.files),
            rows_read=len(log.items) + bad_rows.count,
            bad_rows=bad_rows.count,
            repeated_rows=converted.repeated_rows,
        ),
        data_hash=converted.data_hash(),
    )


def _check_replaceable(output: Path) -> None:
    """Refuse to replace anything but an earlier prepared data set or an empty directory."""
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / META_FILE).is_file()):
        raise UnsupportedInputError(f"{output} exists and is no prepared data set; name another --output")


def _write(converted: Converted, meta: DatasetMeta, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.writing-{os.getpid()}"
    replaced = output.parent / f".{output.name}.replaced-{os.getpid()}"
    staging.mkdir()
    try:
        for name, array in converted.arrays().items():
            np.save(staging / f"{name}.npy", array)
        for name, ids in (("item_id", converted.item_ids), ("user_id", converted.user_ids)):
            if ids.dtype == pl.String:
                pl.DataFrame({name: ids}).write_parquet(staging / f"{name}s.parquet")
        converted.items.write_parquet(staging / "items.parquet")
        meta.write(staging)
        if output.exists():
            output.rename(replaced)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
