"""The hash of input rows is a format and stays what it is; the table finds items by it."""

from __future__ import annotations

import numpy as np
import pytest

from nann.engine.input_rows import InputRows, hash_rows

ROWS = np.array([[1, -2, 0.5, 0], [0, 0, 0, 6e-8], [65504, -65504, 1e-5, 3], [0, 0, 0, 0]], np.float16)
HASHES = [0x129ACE280FD54C00, 0xF88BB8A8724C81EC, 0xB34C0DBC92BA1435, 0]
MASK = 2**64 - 1


def hash_of(row: np.ndarray) -> int:
    """The definition, in Python's integers."""
    state = total = 0
    for bits in row.astype(np.float16).view(np.uint16).tolist():
        state = (state + 0x9E3779B97F4A7C15) & MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
        total += (mixed ^ (mixed >> 31)) * (0 if bits == 0x8000 else bits)
    return total & MASK


def test_the_hashes_are_those_of_the_artifacts_that_are_out_there() -> None:
    assert hash_rows(ROWS).tolist() == HASHES
    wide = np.linspace(-2, 2, 64, dtype=np.float32)[None]
    assert hash_rows(wide).tolist() == [0xC7B89FF6869D13F7]


@pytest.mark.parametrize("width", [1, 2, 64, 200])
def test_the_hash_is_as_defined(width: int) -> None:
    rows = np.random.default_rng(0).normal(0, 1, (20, width)).astype(np.float32)
    assert hash_rows(rows).tolist() == [hash_of(row) for row in rows]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_wider_numbers_are_rounded_to_half_precision(dtype: type) -> None:
    assert hash_rows(ROWS.astype(dtype)).tolist() == HASHES
    if dtype != np.float16:
        assert hash_rows(ROWS.astype(dtype) * dtype(1 + 1e-4)).tolist() == HASHES  # half an ulp is 2.4e-4


def test_zeros_of_either_sign_are_one() -> None:
    assert hash_rows(np.array([[-0.0, 1.0], [0.0, 1.0]])).tolist() == [hash_of(np.array([0.0, 1.0]))] * 2
    assert hash_rows(np.full((1, 64), -0.0)).tolist() == [0]


def test_rows_in_any_layout_hash_alike() -> None:
    rows = np.random.default_rng(1).normal(0, 1, (6, 4)).astype(np.float16)
    assert hash_rows(np.asfortranarray(rows)).tolist() == hash_rows(rows).tolist()
    assert hash_rows(rows[::2]).tolist() == hash_rows(rows).tolist()[::2]
    assert hash_rows(rows[:0]).tolist() == []


def test_a_number_beyond_half_precision_is_no_error() -> None:
    assert hash_rows(np.array([[1e30, -1e30]])).tolist() == [hash_of(np.array([np.inf, -np.inf]))]


def test_the_table_is_ascending_and_keeps_the_first_of_equal_rows() -> None:
    hashes = np.array([7, 3, 0, 7, 2**64 - 1, 0], np.uint64)
    table = InputRows.of(hashes)
    assert table.hashes.tolist() == [3, 7, 2**64 - 1]
    assert table.items.tolist() == [1, 0, 4]
    assert (table.hashes.dtype, table.items.dtype) == (np.uint64, np.int32)


def test_rows_are_recognised_in_their_order() -> None:
    rows = np.random.default_rng(2).normal(0, 1, (500, 8)).astype(np.float32)
    table = InputRows.of(hash_rows(rows))
    items, unknown = table.recognise(rows[[499, 0, 17, 17, 3]])
    assert (items.tolist(), unknown) == ([499, 0, 17, 17, 3], 0)
    assert items.dtype == np.int32


def test_padding_is_passed_over_and_strangers_are_counted() -> None:
    table = InputRows.of(hash_rows(ROWS))
    stranger = np.nextafter(ROWS[0], np.float16(9))
    items, unknown = table.recognise(np.stack([ROWS[3], ROWS[2], stranger, -ROWS[3], ROWS[0]]))
    assert (items.tolist(), unknown) == ([2, 0], 1)


def test_an_empty_table_recognises_nothing() -> None:
    table = InputRows.of(np.zeros(3, np.uint64))
    assert table.items.size == 0
    items, unknown = table.recognise(ROWS)
    assert (items.tolist(), unknown) == ([], 3)
