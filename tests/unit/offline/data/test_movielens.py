from __future__ import annotations

from pathlib import Path

from nann.offline.data.dataset import Dataset
from nann.offline.data.prepare import prepare


def test_ml_1m_directory(tmp_path: Path) -> None:
    source = tmp_path / "ml-1m"
    source.mkdir()
    (source / "ratings.dat").write_text("1::20::5::200\n1::10::3::100\n2::30::1::50\n2::x::1::50\n")
    films = [
        "10::Misérables, Les (1995)::Drama|Musical",
        "20::Up: A Story\x85 (2009)::Comedy",
        "40::Unseen (1990)::War",
    ]
    (source / "movies.dat").write_bytes("\n".join(films).encode("latin-1"))
    report = prepare(source, tmp_path / "data")
    data = Dataset.load(tmp_path / "data")
    assert data.item_ids.tolist() == [10, 20, 30]
    assert data.user_items.tolist() == [0, 1, 2]
    assert data.items.to_dicts() == [
        {
            "item_id": 10,
            "title": "Misérables, Les (1995)",
            "category": "Drama",
            "year": 1995,
            "genres": ["Drama", "Musical"],
        },
        {
            "item_id": 20,
            "title": "Up: A Story\x85 (2009)",
            "category": "Comedy",
            "year": 2009,
            "genres": ["Comedy"],
        },
        {"item_id": 30, "title": None, "category": None, "year": None, "genres": None},
    ]
    assert data.item_categories.tolist() == [2, 1, 0]
    assert [e.split(": ")[0] for e in report.bad_rows.examples] == ["ratings.dat:4"]


def test_ml_100k_directory(tmp_path: Path) -> None:
    source = tmp_path / "ml-100k"
    source.mkdir()
    (source / "u.data").write_text("1\t2\t5\t200\n1\t1\t3\t100\n")
    (source / "u.genre").write_text("unknown|0\nAction|1\nComedy|2\n\n")
    (source / "u.item").write_bytes(
        "1|Toy (1995)|01-Jan-1995||http://a|0|1|1\n2|Été|01-Jan-1995||http://b|0|0|1\n".encode("latin-1")
    )
    prepare(source, tmp_path / "data")
    data = Dataset.load(tmp_path / "data")
    assert data.user_items.tolist() == [0, 1]
    assert data.items.to_dicts() == [
        {
            "item_id": 1,
            "title": "Toy (1995)",
            "category": "Action",
            "year": 1995,
            "genres": ["Action", "Comedy"],
        },
        {"item_id": 2, "title": "Été", "category": "Comedy", "year": None, "genres": ["Comedy"]},
    ]
