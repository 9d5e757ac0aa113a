"""NANN's rules of what is a sample, in one place (reference/nann.md, "Data")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int8, Int32, Int64

__all__ = [
    "HISTORY_LENGTH",
    "INELIGIBLE",
    "MAX_EVAL_USERS",
    "MIN_BEHAVIOURS",
    "SPLIT_CODES",
    "TRAIN",
    "Split",
    "eval_position",
    "histories_before",
    "split_users",
    "train_sample_counts",
]

Split = Literal["train", "validation", "test"]

HISTORY_LENGTH = 50
MIN_BEHAVIOURS = 7  # a user is eligible with more behaviours than this
FIRST_TRAIN_POSITION = 10
MAX_EVAL_USERS = 10_000
MAX_EVAL_SHARE = 10  # validation and test: each at most one in ten of the eligible users

TRAIN, VALIDATION, TEST, INELIGIBLE = 0, 1, 2, -1
SPLIT_CODES: dict[Split, int] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def split_users(lengths: Int64[np.ndarray, " users"], seed: int) -> Int8[np.ndarray, " users"]:
    """Assign every user to a split: min(10,000, 10 % of the eligible) each to test and validation.

    A split by user, not by time. Users with at most `MIN_BEHAVIOURS` behaviours get `INELIGIBLE`.
    """
    split = np.full(len(lengths), INELIGIBLE, dtype=np.int8)
    eligible = np.flatnonzero(lengths > MIN_BEHAVIOURS)
    split[eligible] = TRAIN
    n_eval = min(MAX_EVAL_USERS, len(eligible) // MAX_EVAL_SHARE)
    shuffled = np.random.default_rng(seed).permutation(eligible)
    split[shuffled[:n_eval]] = TEST
    split[shuffled[n_eval : 2 * n_eval]] = VALIDATION
    return split


def eval_position(lengths: Int64[np.ndarray, " users"]) -> Int64[np.ndarray, " users"]:
    """0-based target position of a validation or test user: 7 + floor((len - 7) / 2)."""
    position: Int64[np.ndarray, " users"] = MIN_BEHAVIOURS + (lengths - MIN_BEHAVIOURS) // 2
    return position


def train_sample_counts(lengths: Int64[np.ndarray, " users"]) -> Int64[np.ndarray, " users"]:
    """Train samples of users of these lengths: the target positions 10 .. len-2."""
    counts: Int64[np.ndarray, " users"] = np.maximum(lengths - 1 - FIRST_TRAIN_POSITION, 0)
    return counts


def histories_before(
    items: Int32[np.ndarray, " interactions"],
    user_start: Int64[np.ndarray, " batch"],
    position: Int64[np.ndarray, " batch"],
    length: int = HISTORY_LENGTH,
) -> Int32[np.ndarray, "batch length"]:
    """The up to `length` items before `position` of each user's row, oldest first, -1 padded at the end.

    `user_start` is where the user's behaviours begin in `items`, `position` counts from there.
    """
    n_history = np.minimum(position, length)
    column = np.arange(length, dtype=np.int64)
    present = column < n_history[:, None]
    source = np.where(present, (user_start + position - n_history)[:, None] + column, 0)
    histories: Int32[np.ndarray, "batch length"] = np.where(present, items[source], np.int32(-1))
    return histories
