"""The columnar converter equals a plain one, row by row, on random logs and block sizes."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nann.offline.data import prepare as prepare_module
from nann.offline.data.dataset import Dataset
from nann.offline.data.interactions import BadRows
from nann.offline.data.readers import blocks, userbehavior
from nann.offline.progress import Progress

NUMBER = st.integers(0, 12).map(str)
FIELD = st.one_of(NUMBER, st.sampled_from(["", "x", "-3", "1.5", "9" * 25]))
GOOD_ROW = st.tuples(NUMBER, NUMBER, NUMBER, st.sampled_from(["pv", "buy", ""]), NUMBER).map(list)
ROW = st.one_of(GOOD_ROW, GOOD_ROW, GOOD_ROW, st.lists(FIELD, min_size=1, max_size=7))


def _is_good(row: list[str]) -> bool:
    return len(row) == 5 and all(row[i].isdecimal() and int(row[i]) < 2**63 for i in (0, 1, 2, 4))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=60),
    long_user=st.lists(GOOD_ROW, min_size=1, max_size=80),
    block_bytes=st.integers(8, 400),
)
def test_equals_a_plain_reference(
    rows: list[list[str]], long_user: list[list[str]], block_bytes: int
) -> None:
    lines = [*rows, *([row[0] and "1", *row[1:]] for row in long_user)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "UserBehavior.csv"
        path.write_text("\n".join(",".join(row) for row in lines) + "\n")

        def read(path: Path, progress: Progress) -> object:
            return blocks.read_blocks(path, progress, block_bytes=block_bytes)

        with (
            patch.object(userbehavior, "read_blocks", read),
            patch.object(blocks, "CHUNK_BYTES", max(1, block_bytes // 3)),
            patch.object(prepare_module, "looks_like_user_behavior", lambda path: True),
        ):
            report = prepare_module.prepare(path, Path(name) / "data", seed=5)
        data = Dataset.load(Path(name) / "data")

        numbered = [(i, row) for i, row in enumerate(lines, 1) if ",".join(row).strip()]
        bad = [i for i, row in numbered if not _is_good(row)]
        good = [tuple(int(row[j]) for j in (0, 1, 2, 4)) for _, row in numbered if _is_good(row)]
        assert report.bad_rows.count == len(bad)
        if len(bad) <= 20:
            assert sorted(int(e.split(":")[1]) for e in report.bad_rows.examples) == bad

        items = sorted({item for _, item, _, _ in good})
        categories: dict[int, int] = {}
        behaviours: dict[int, list[tuple[int, int]]] = {}
        for user, item, category, second in good:
            categories.setdefault(item, category)
            behaviours.setdefault(user, []).append((second, item))
        ranks = {c: i for i, c in enumerate(sorted(set(categories.values())), 1)}
        counts = Counter(item for _, item, _, _ in good)
        assert data.item_ids.tolist() == items
        assert data.user_ids.tolist() == sorted(behaviours)
        assert data.item_categories.tolist() == [ranks[categories[item]] for item in items]
        assert data.item_weights.tolist() == pytest.approx(
            [counts[item] / len(good) for item in items], rel=1e-6
        )
        for row, user in enumerate(sorted(behaviours)):
            expected = [item for _, item in sorted(behaviours[user], key=lambda pair: pair[0])]
            stored = data.user_items[data.user_row_splits[row] : data.user_row_splits[row + 1]]
            assert data.item_ids[stored].tolist() == expected
            assert (data.user_split[row] == -1) == (len(expected) <= 7)


def test_no_line_is_lost_between_blocks(tmp_path: Path) -> None:
    lines = [f"{i},{'x' * (i % 7)}" for i in range(200)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    with patch.object(blocks, "CHUNK_BYTES", 13):
        read = list(blocks.read_blocks(path, Progress(silent=True), block_bytes=29))
    assert b"".join(block.data for block in read).decode() == "\n".join(lines)
    assert [block.first_line for block in read] == [int(b.data.split(b",")[0]) + 1 for b in read]
    assert len(read) > 20


def test_bad_rows_without_any_do_not_raise() -> None:
    BadRows().raise_if_any()
