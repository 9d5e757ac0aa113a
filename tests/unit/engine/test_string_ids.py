"""String ids as one block: what a list and a dictionary would answer."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nann.engine.string_ids import StringIds

# Prefixes of each other, characters of one to four bytes, and a zero byte.
TEXTS = st.text(alphabet="ab\0é€😀", max_size=4) | st.text(max_size=8)


@settings(deadline=None)  # the first example compiles
@given(known=st.sets(TEXTS, max_size=40), asked=st.lists(TEXTS, max_size=40))
def test_ids_and_positions_are_those_of_a_list(known: set[str], asked: list[str]) -> None:
    wanted = sorted(known, key=str.encode)
    ids = StringIds(wanted)
    assert (len(ids), list(ids)) == (len(wanted), wanted)
    positions = {name: i for i, name in enumerate(wanted)}
    found = ids.find([*wanted, *asked])
    assert found.dtype == np.int32
    assert found.tolist() == [*range(len(wanted)), *(positions.get(name, -1) for name in asked)]


def test_a_column_of_several_chunks_is_one_block() -> None:
    series = pl.concat([pl.Series(["a", "b"]), pl.Series(["c" * 20])], rechunk=False)
    assert series.n_chunks() == 2
    assert list(StringIds(series)) == ["a", "b", "c" * 20]


@pytest.mark.parametrize("ids", [["b", "a"], ["a", "a"], ["", ""], ["ab", "a"], ["😀", "\uffff"]])
def test_unordered_or_repeated_ids_are_refused(ids: list[str]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        StringIds(ids)


def test_what_is_no_string_or_no_text_is_unknown() -> None:
    ids = StringIds(["", "1", "a"])
    assert ids.find([1, None, b"a", 1.5, True, "\ud800", "a", ""]).tolist() == [-1] * 6 + [2, 0]
    assert ids.find([]).tolist() == []
    assert StringIds([]).find(["a"]).tolist() == [-1]


def test_positions_are_taken_as_from_a_list() -> None:
    ids = StringIds(["a", "b", "c"])
    assert ids.take(np.array([2, 0, 2], np.int32)) == ["c", "a", "c"]
    assert (ids[0], ids[-1], ids[1:], ids[::-1]) == ("a", "c", ["b", "c"], ["c", "b", "a"])
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            ids[wrong]
    with pytest.raises(IndexError):
        ids.take(np.array([3]))
    assert "b" in ids
    assert "d" not in ids
