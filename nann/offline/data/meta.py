"""`meta.json` of a prepared data set: what it holds and where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nann.offline.data.errors import NotPreparedError

__all__ = ["FORMAT_VERSION", "META_FILE", "DatasetMeta", "IdTypes", "SourceMeta", "SplitSizes"]

FORMAT_VERSION = 1
META_FILE = "meta.json"

IdType = Literal["int", "str"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IdTypes(_Frozen):
    """Whether ids are integers or strings, as they were in the input."""

    item: IdType
    user: IdType


class SplitSizes(_Frozen):
    """Users of each split; `ineligible` users have too few behaviours to be in any."""

    train: int
    validation: int
    test: int
    ineligible: int


class SourceMeta(_Frozen):
    """The input: its format and file names, and how its rows fared.

    `repeated_rows` are those that repeat the behaviour before them (same user, item and time); they are
    kept, as NANN keeps them.
    """

    format: str
    files: list[str]
    rows_read: int
    bad_rows: int
    repeated_rows: int


class DatasetMeta(_Frozen):
    """Everything about a prepared data set that is not an array."""

    format_version: int = FORMAT_VERSION
    id_type: IdTypes
    num_items: int
    num_categories: int
    num_users: int
    num_interactions: int
    num_eligible_users: int
    num_train_samples: int
    history_length: int
    min_behaviours: int
    seed: int
    splits: SplitSizes
    attribute_columns: list[str]
    source: SourceMeta
    data_hash: str

    def write(self, directory: Path) -> None:
        """Write `meta.json` into `directory`."""
        (directory / META_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> DatasetMeta:
        """Read `meta.json` of `directory`; NotPreparedError when it is absent or not ours."""
        path = directory / META_FILE
        if not path.is_file():
            raise NotPreparedError(
                f"{directory} is not a prepared data set (no {META_FILE}); "
                f"make one with: nann prepare --input PATH --output {directory}"
            )
        try:
            meta = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise NotPreparedError(
                f"{path} is not the {META_FILE} of a prepared data set: {error}"
            ) from error
        if meta.format_version != FORMAT_VERSION:
            raise NotPreparedError(
                f"{path}: format version {meta.format_version}, this program reads {FORMAT_VERSION}; "
                "run nann prepare again"
            )
        return meta
