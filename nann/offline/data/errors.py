"""Every way reading or preparing data can fail, as one tree.

DataError
├── NotPreparedError      the directory is not the output of `nann prepare`
├── UnsupportedInputError the input is in no format that `nann prepare` reads
└── BadRowsError          rows break the format, and strict reading was asked for (or no row was good)
"""

from __future__ import annotations

__all__ = ["BadRowsError", "DataError", "NotPreparedError", "UnsupportedInputError"]


class DataError(Exception):
    """Base of the errors of `nann.offline.data`; the message says what to do."""


class NotPreparedError(DataError):
    """A directory does not hold a prepared data set, or one that was written by another format version."""


class UnsupportedInputError(DataError):
    """The input cannot be read as any accepted format; the message names those."""


class BadRowsError(DataError):
    """Some rows break the format; the message lists the first of them with file and line."""
