from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard

from nann.offline.data.dataset import Dataset
from nann.offline.data.errors import BadRowsError, UnsupportedInputError
from nann.offline.data.prepare import ColumnMapping, prepare

LOG = "\n".join(
    [
        "9,300,7,pv,20",
        "9,100,5,buy,10",
        "2,100,5,fav,30",
        "9,200,5,pv,10",  # a tie with line 2: file order decides
        "2,300,7,unheard_of,30",
        "2,100,5,pv,30",
    ]
)


def _histories(data: Dataset) -> dict[object, list[object]]:
    splits = data.user_row_splits
    return {
        user: data.item_ids[data.user_items[splits[i] : splits[i + 1]]].tolist()
        for i, user in enumerate(data.user_ids.tolist())
    }


def _prepare_text(tmp_path: Path, text: str, name: str = "UserBehavior.csv", **options: object) -> Dataset:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    prepare(path, tmp_path / "data", **options)  # type: ignore[arg-type]
    return Dataset.load(tmp_path / "data")


def test_user_behavior_by_hand(tmp_path: Path) -> None:
    data = _prepare_text(tmp_path, LOG + "\n")
    assert data.item_ids.tolist() == [100, 200, 300]
    assert data.user_ids.tolist() == [2, 9]
    assert _histories(data) == {2: [100, 300, 100], 9: [100, 200, 300]}
    assert data.item_categories.tolist() == [1, 1, 2]
    assert data.item_weights.tolist() == pytest.approx([3 / 6, 1 / 6, 2 / 6])
    assert data.items.to_dicts()[2] == {"item_id": 300, "category": 7}
    assert data.user_split.tolist() == [-1, -1]
    assert data.meta.source.rows_read == 6


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_input_gives_the_same_data(tmp_path: Path, suffix: str) -> None:
    plain = _prepare_text(tmp_path, LOG)
    packed = gzip.compress(LOG.encode()) if suffix == ".gz" else _zst(LOG[:30]) + _zst(LOG[30:])
    path = tmp_path / f"UserBehavior.csv{suffix}"
    path.write_bytes(packed)
    report = prepare(path, tmp_path / "packed")
    assert report.meta.data_hash == plain.meta.data_hash


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_damaged_compressed_input_is_refused(tmp_path: Path, suffix: str, damage: str) -> None:
    text = "\n".join(f"{i % 97},{i * 7919 % 1009},{i % 5},pv,{i}" for i in range(60_000))
    packed = bytearray(gzip.compress(text.encode()) if suffix == ".gz" else _zst(text))
    if damage == "cut":
        del packed[-100:]
    else:
        packed[len(packed) // 2 : len(packed) // 2 + 50] = bytes(50)
    path = tmp_path / f"UserBehavior.csv{suffix}"
    path.write_bytes(packed)
    with pytest.raises(UnsupportedInputError, match="damaged"):
        prepare(path, tmp_path / "data")


def _zst(text: str) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(text.encode())


BAD = [
    (3, "1,2,3,pv"),
    (4, "1,2,3,pv,4,5"),
    (6, "1,x,3,pv,4"),
    (7, "-1,2,3,pv,4"),
    (9, "1,2,3,pv,99999999999999999999"),
    (10, "1,2,3.5,pv,4"),
    (11, ",2,3,pv,4"),
]


def _log_with_bad_rows() -> str:
    lines = dict(BAD)
    lines[8] = ""  # a blank line is no row
    return "\n".join(lines.get(i, f"1,{i},3,pv,{i}") for i in range(1, 31)) + "\n"


def test_bad_rows_are_left_out_and_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "UserBehavior.csv").write_text(_log_with_bad_rows())
    report = prepare(tmp_path / "UserBehavior.csv", tmp_path / "data")
    assert report.bad_rows.count == report.meta.source.bad_rows == len(BAD)
    named = sorted(int(text.split(":")[1]) for text in report.bad_rows.examples)
    assert named == [line for line, _ in BAD]
    for line, text in BAD:
        assert any(f"UserBehavior.csv:{line}: " in e and text in e for e in report.bad_rows.examples)
    assert report.meta.num_interactions == 30 - 1 - len(BAD)
    assert report.meta.source.rows_read == 29


def test_strict_refuses_bad_rows_with_the_report_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "UserBehavior.csv").write_text(_log_with_bad_rows())
    with pytest.raises(BadRowsError, match=r"(?s)7 bad rows.*UserBehavior\.csv:6: item_id"):
        prepare(tmp_path / "UserBehavior.csv", tmp_path / "data", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["UserBehavior.csv"]


def test_only_the_first_twenty_bad_rows_are_kept(tmp_path: Path) -> None:
    text = "".join("1,2,3,pv,4\n" * 3 + "1,2,3,pv\n" * 2 for _ in range(15))
    (tmp_path / "a.csv").write_text(text)
    report = prepare(tmp_path / "a.csv", tmp_path / "data")
    assert report.bad_rows.count == 30
    assert len(report.bad_rows.examples) == 20
    assert "10 more" in report.bad_rows.report()


def test_windows_line_ends_and_a_missing_last_one(tmp_path: Path) -> None:
    unix = _prepare_text(tmp_path, LOG)
    (tmp_path / "w.csv").write_bytes(LOG.replace("\n", "\r\n").encode())
    assert prepare(tmp_path / "w.csv", tmp_path / "w").meta.data_hash == unix.meta.data_hash


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n1,,3\n")
    with pytest.raises(BadRowsError, match="no behaviour"):
        prepare(tmp_path / "a.csv", tmp_path / "data")


def test_preparing_again_replaces_and_repeats(tmp_path: Path) -> None:
    first = _prepare_text(tmp_path, LOG).meta
    (tmp_path / "data" / "stale.npy").write_bytes(b"")
    assert _prepare_text(tmp_path, LOG).meta == first
    assert not (tmp_path / "data" / "stale.npy").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["UserBehavior.csv", "data"]


def test_a_directory_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(UnsupportedInputError, match="no prepared data set"):
        _prepare_text(tmp_path, LOG)
    assert (tmp_path / "data" / "thesis.txt").exists()


def test_a_table_with_string_ids_is_ordered_by_bytes(tmp_path: Path) -> None:
    items = ["é", "z", "Z", "10", "9", "007", "𝄞", "\uffee"]
    rows = "\n".join(f"{'u' if i % 2 else 'v'},{item},{i}" for i, item in enumerate(items))
    data = _prepare_text(tmp_path, f"user,item,ts\n{rows}\n", "clicks.csv")
    assert data.meta.id_type.item == data.meta.id_type.user == "str"
    assert data.item_ids.tolist() == sorted(items, key=str.encode)
    assert _histories(data) == {"u": items[1::2], "v": items[0::2]}


def test_integer_ids_stay_integers_only_when_written_as_such(tmp_path: Path) -> None:
    data = _prepare_text(tmp_path, "user_id,item_id,timestamp\n1,7,1\n2,12,2\n", "a.csv")
    assert data.item_ids.tolist() == [7, 12]
    data = _prepare_text(tmp_path, "user_id,item_id,timestamp\n1,7,1\n2,007,2\n", "a.csv")
    assert data.item_ids.tolist() == ["007", "7"]
    assert data.user_ids.tolist() == [1, 2]


def test_columns_can_be_named_and_attributes_kept(tmp_path: Path) -> None:
    text = (
        "who;x,what,when,genre,price\na,1,2020-01-02T00:00:00,,1.5\n"
        "a,2,2020-01-01T00:00:00,pop,2\na,1,2020-01-03T00:00:00,rock,9\n"
    )
    columns = ColumnMapping(
        user="who;x", item="what", timestamp="when", category="genre", attributes=("price",)
    )
    data = _prepare_text(tmp_path, text, "a.csv", columns=columns)
    assert _histories(data) == {"a": [2, 1, 1]}
    assert data.items.to_dicts() == [
        {"item_id": 1, "category": "rock", "price": 1.5},
        {"item_id": 2, "category": "pop", "price": 2.0},
    ]
    assert data.item_categories.tolist() == [2, 1]
    assert data.meta.attribute_columns == ["category", "price"]


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("9", "10"),
        ("9.25", "10.5"),
        ("2020-01-31", "2020-02-01"),
        ("2020-01-31 23:00:00", "2020-02-01 01:00:00"),
        ("2020-01-31T23:00:00Z", "2020-02-01T01:00:00Z"),
        ("2020-01-31T23:00:00.500", "2020-01-31T23:00:00.750"),
    ],
)
def test_times_are_numbers_or_dates(tmp_path: Path, early: str, late: str) -> None:
    data = _prepare_text(tmp_path, f"user,item,time\nu,1,{late}\nu,2,{early}\n", "a.csv", strict=True)
    assert _histories(data) == {"u": [2, 1]}


def test_a_header_of_five_columns_is_not_taken_for_user_behavior(tmp_path: Path) -> None:
    rows = "\n".join(f"{i % 2},{i},{i},3,{i}" for i in range(20))
    data = _prepare_text(tmp_path, f"item_id,user_id,shop,rating,timestamp\n{rows}\n", "a.csv")
    assert data.meta.source.bad_rows == 0
    assert data.num_items == 2


def test_a_table_names_its_bad_lines(tmp_path: Path) -> None:
    text = (
        'user_id,item_id,timestamp,text\n1,2,3,"a, b"\n1,,3,x\n1,2,later,x\n1,-2,3,x\n'
        '1,2\n1,2,3,"open\n1,5,4,x\n'
    )
    (tmp_path / "a.csv").write_text(text)
    report = prepare(tmp_path / "a.csv", tmp_path / "data")
    assert sorted(e.split(":")[1] for e in report.bad_rows.examples) == ["3", "4", "5", "6", "7"]
    assert report.meta.num_interactions == 2


@pytest.mark.parametrize("suffix", [".parquet", ".tsv", ".csv.gz"])
def test_other_tables_give_the_same_data(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        {name: rng.integers(0, 50, 400) for name in ("userId", "movieId", "timestamp")}
    ).with_columns(category_id=pl.col("movieId") % 5)
    table.write_csv(tmp_path / "a.csv")
    expected = prepare(tmp_path / "a.csv", tmp_path / "csv").meta
    path = tmp_path / f"b{suffix}"
    match suffix:
        case ".parquet":
            table.write_parquet(path)
        case ".tsv":
            table.write_csv(path, separator="\t")
        case _:
            path.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    got = prepare(path, tmp_path / "other").meta
    assert got.data_hash == expected.data_hash
    assert got.num_categories == 5


def test_parquet_rows_without_an_id_are_bad(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["a", None, "b"], "item_id": [1, 2, -3], "time": [1.5, 2.5, 3.5]}).write_parquet(
        tmp_path / "a.parquet"
    )
    report = prepare(tmp_path / "a.parquet", tmp_path / "data")
    assert report.meta.num_interactions == 1
    assert [e.split(":")[0] for e in report.bad_rows.examples] == ["a.parquet, row 2", "a.parquet, row 3"]


def test_item_attributes_beside_the_log_are_used(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        'item_id,title,year\n300,"Sea, calm",1999\n100,Sun,\n999,Unread,2000\n'
    )
    data = _prepare_text(tmp_path, LOG)
    assert data.items.to_dicts() == [
        {"item_id": 100, "title": "Sun", "category": 5, "year": None},
        {"item_id": 200, "title": None, "category": 5, "year": None},
        {"item_id": 300, "title": "Sea, calm", "category": 7, "year": 1999},
    ]


def test_a_directory_holding_one_log(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "UserBehavior.csv").write_text(LOG)
    (source / "README.md").write_text("about")
    assert prepare(source, tmp_path / "data").meta.num_interactions == 6
    (source / "more.csv").write_text(LOG)
    with pytest.raises(UnsupportedInputError, match=r"UserBehavior\.csv, more\.csv"):
        prepare(source, tmp_path / "data")


def test_inputs_that_are_not_accepted_say_what_is(tmp_path: Path) -> None:
    for name in ("absent.csv", "notes.txt", "ub_train.tfrecords"):
        if not name.startswith("absent"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UnsupportedInputError, match="ml-100k"):
            prepare(tmp_path / name, tmp_path / "data")
    (tmp_path / "a.csv").write_text("shop,basket\n1,2\n")
    with pytest.raises(UnsupportedInputError, match=r"no user column.*shop, basket"):
        prepare(tmp_path / "a.csv", tmp_path / "data")
    with pytest.raises(UnsupportedInputError, match="no column 'who' for the user"):
        prepare(tmp_path / "a.csv", tmp_path / "data", columns=ColumnMapping(user="who"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UnsupportedInputError, match="not a Parquet file"):
        prepare(tmp_path / "b.parquet", tmp_path / "data")
