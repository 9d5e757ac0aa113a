"""Ids to rows and back, histories, attributes."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest
from damage import reseal
from engine_world import make_world

from nann.engine.artifacts import Artifact
from nann.engine.catalog import Catalog
from nann.engine.errors import ArtifactError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("catalog")
    kinds = {"int": False, "str": True}
    return {
        kind: Artifact.open(make_world(root / kind, num_items=60, string_ids=strings).directory)
        for kind, strings in kinds.items()
    }


@pytest.fixture
def ints(artifacts) -> Catalog:
    return Catalog(artifacts["int"])


@pytest.fixture
def strings(artifacts) -> Catalog:
    return Catalog(artifacts["str"])


def with_ids(artifact: Artifact, ids: list[int]) -> Catalog:
    return Catalog(dataclasses.replace(artifact, item_ids=np.array(ids, np.int64)))


@pytest.mark.parametrize("kind", ["int", "str"])
def test_every_id_finds_its_row_and_back(artifacts, kind) -> None:
    catalog = Catalog(artifacts[kind])
    rows = np.random.default_rng(0).permutation(60).astype(np.int32)
    ids = catalog.item_ids(rows)
    assert all(type(name) is {"int": int, "str": str}[kind] for name in ids)
    found = catalog.item_index(ids)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("kind", ["int", "str"])
def test_no_ids_are_no_rows(artifacts, kind) -> None:
    found = Catalog(artifacts[kind]).item_index([])
    assert (found.dtype, found.size) == (np.int32, 0)


def test_unknown_integers_are_unknown_on_every_side(ints) -> None:
    ids = ints.item_ids(np.arange(60, dtype=np.int32))
    gaps = sorted(set(range(ids[0], ids[-1])) - set(ids))
    assert gaps
    unknown = [ids[0] - 1, ids[-1] + 1, *gaps]
    assert (ints.item_index(unknown) == -1).all()


@pytest.mark.parametrize("huge", [2**63, -(2**63) - 1, 2**64, 2**200, -(2**200), INT64_MAX, INT64_MIN])
def test_integers_of_any_size_are_looked_up(ints, huge) -> None:
    known = ints.item_ids(np.array([3], np.int32))[0]
    assert ints.item_index([huge, known]).tolist() == [-1, 3]


def test_an_id_of_another_type_is_unknown(ints, strings) -> None:
    known = ints.item_ids(np.array([0], np.int32))[0]
    assert ints.item_index([str(known), 1.5, None]).tolist() == [-1, -1, -1]
    name = strings.item_ids(np.array([0], np.int32))[0]
    assert strings.item_index([1, None, name.encode(), name]).tolist() == [-1, -1, -1, 0]


def test_a_bool_is_no_integer_id(artifacts) -> None:
    catalog = with_ids(artifacts["int"], [0, 1])
    assert catalog.item_index([True, False, 1, 0]).tolist() == [-1, -1, 1, 0]


def test_the_extreme_ids_are_ids_like_others(artifacts) -> None:
    ids = [INT64_MIN, INT64_MIN + 1, 0, INT64_MAX]
    catalog = with_ids(artifacts["int"], ids)
    assert catalog.item_index(ids).tolist() == [0, 1, 2, 3]
    assert catalog.item_index(["x", 2**70, -(2**70), True]).tolist() == [-1] * 4


def test_an_empty_catalogue_knows_nothing(artifacts) -> None:
    found = with_ids(artifacts["int"], []).item_index([1, "a", 2**70])
    assert (found.dtype, found.tolist()) == (np.int32, [-1, -1, -1])


def test_popularity_is_descending_and_ties_go_by_index(artifacts) -> None:
    weights = np.array([0.5, 0.25, 0.5, 0.0], np.float32)
    catalog = Catalog(dataclasses.replace(artifacts["int"], item_weights=weights))
    assert catalog.by_popularity.tolist() == [0, 2, 1, 3]


def test_a_users_history_is_its_row_oldest_first(artifacts, ints) -> None:
    artifact = artifacts["int"]
    rows = artifact.history_items[8:12]
    assert ints.user_history(30) == tuple(ints.item_ids(rows))
    assert ints.user_history(31) is None
    assert ints.user_history("30") is None
    assert ints.user_history(2**80) is None


def test_a_user_without_items_is_known_with_an_empty_history(artifacts) -> None:
    artifact = dataclasses.replace(
        artifacts["int"],
        history_ids=np.array([5, 6], np.int64),
        history_row_splits=np.array([0, 0, 2], np.int64),
        history_items=np.array([1, 2], np.int32),
    )
    assert Catalog(artifact).user_history(5) == ()
    assert len(Catalog(artifact).user_history(6)) == 2


@pytest.mark.parametrize("item", [-1, 60, 2**31 - 1])
@pytest.mark.parametrize("kind", ["int", "str"])
def test_a_history_that_holds_no_item_is_refused_when_asked_for(artifacts, kind, item) -> None:
    artifact = artifacts[kind]
    items = np.array(artifact.history_items)
    items[artifact.history_row_splits[1]] = item
    catalog = Catalog(dataclasses.replace(artifact, history_items=items))
    first, second = (user if isinstance(user, str) else int(user) for user in artifact.history_ids[:2])
    assert catalog.user_history(first) is not None
    with pytest.raises(ArtifactError, match=r"history_items\.npy: expected item indices from 0 to 59"):
        catalog.user_history(second)


def test_attributes_leave_nulls_and_the_id_out(ints) -> None:
    first, second = ints.attributes(np.array([0, 11], np.int32))
    assert first == {"title": "Item 0", "category": 0, "genres": ["c"]}  # year is null
    assert second == {"title": "Item 11", "category": 1, "year": 1991, "genres": ["a", "b"]}
    assert ints.attributes(np.empty(0, np.int32)) == []


def test_without_a_table_there_are_no_attributes(tmp_path) -> None:
    directory = make_world(tmp_path / "1", num_items=20).directory
    (directory / "arrays" / "items.parquet").unlink()
    reseal(directory)
    catalog = Catalog(Artifact.open(directory))
    assert catalog.table is None
    assert catalog.attributes(np.array([1, 2], np.int32)) == [{}, {}]


def test_a_table_of_ids_alone_has_no_attributes(tmp_path) -> None:
    directory = make_world(tmp_path / "1", num_items=20).directory
    pl.DataFrame({"item_id": range(20)}).write_parquet(directory / "arrays" / "items.parquet")
    reseal(directory)
    assert Catalog(Artifact.open(directory)).attributes(np.array([1], np.int32)) == [{}]


@pytest.mark.parametrize("rows", [0, 19, 21])
def test_a_table_of_another_number_of_rows_is_refused(tmp_path, rows) -> None:
    directory = make_world(tmp_path / "1", num_items=20).directory
    pl.DataFrame({"item_id": range(rows)}).write_parquet(directory / "arrays" / "items.parquet")
    reseal(directory)
    with pytest.raises(ArtifactError, match=rf"items\.parquet: expected 20 rows, found {rows} rows"):
        _ = Catalog(Artifact.open(directory)).table


def test_a_table_that_is_no_parquet_is_refused(tmp_path) -> None:
    directory = make_world(tmp_path / "1", num_items=20).directory
    (directory / "arrays" / "items.parquet").write_bytes(b"nothing")
    reseal(directory)
    with pytest.raises(ArtifactError, match=r"items\.parquet: expected a Parquet file"):
        _ = Catalog(Artifact.open(directory)).table
