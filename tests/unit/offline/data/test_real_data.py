"""The counts that the data sets' own description gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from nann.offline.data.dataset import Dataset
from nann.offline.data.prepare import prepare

SHARED = Path(__file__).resolve().parents[5] / "shared" / "data"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data sets in ../shared/data"),
]


@pytest.mark.parametrize(
    ("source", "rows", "users", "items", "categories"),
    [
        ("brunch/UserBehavior-brunch-small.csv.zst", 1_667_905, 30_000, 226_337, 13_859),
        ("ml-1m", 1_000_209, 6_040, 3_706, 18),
        ("ml-100k", 100_000, 943, 1_682, 19),
    ],
)
def test_counts(tmp_path: Path, source: str, rows: int, users: int, items: int, categories: int) -> None:
    meta = prepare(SHARED / source, tmp_path / "data", strict=True).meta
    assert (meta.num_interactions, meta.num_users, meta.num_items) == (rows, users, items)
    assert meta.num_categories == categories


def test_films_have_titles(tmp_path: Path) -> None:
    prepare(SHARED / "ml-1m", tmp_path / "data")
    films = Dataset.load(tmp_path / "data").items
    assert films["title"].null_count() == 0
    assert films.row(0, named=True)["title"] == "Toy Story (1995)"
