"""A walk asked for by an embedded history starts where one asked for by its items does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage import reseal, rewrite
from golden import GOLDEN, load_engine

from nann.engine.artifacts import Artifact
from nann.engine.errors import ArtifactError
from nann.engine.input_rows import InputRows, hash_rows
from nann.engine.retrievers.retriever import PreparedQuery
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Hits, Query, SearchParams

LENGTH = 6
WALK = SearchParams(ef=8, beam_width=3)
LEVEL = SearchParams(policy="level", level_topn=(4, 6, 8, 8, 8, 5))
EXHAUSTIVE = SearchParams(policy="exhaustive")
HISTORIES = ([3, 50, 7, 99], [1], [5, 5, 8, 5, 80, 2], [])


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden version, whose inputs are small integers and so equal in half precision, with its rows."""
    directory = Path(shutil.copytree(GOLDEN / "artifact", tmp_path_factory.mktemp("rows") / "1"))
    table = InputRows.of(hash_rows(np.load(directory / "arrays" / "item_embs.npy")))
    np.save(directory / "arrays" / "input_row_hashes.npy", table.hashes)
    np.save(directory / "arrays" / "input_row_items.npy", table.items)
    reseal(directory)
    return directory


@pytest.fixture(scope="module")
def engine(version: Path) -> SearchEngine:
    return load_engine(version)


@pytest.fixture
def copy(version: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(version, tmp_path / "1"))


def comm_seq(engine: SearchEngine, history: list[int], dtype: type = np.float16) -> np.ndarray:
    embedded = np.zeros((LENGTH, 8), dtype)
    embedded[: len(history)] = engine._artifact.item_vectors[history]
    return embedded.ravel()


def check(engine: SearchEngine, params: SearchParams = WALK, **who) -> PreparedQuery:
    return engine.check(Query(k=5, params=params, **who))


def codes(prepared: PreparedQuery) -> dict[str, int]:
    return {note.code: note.count for note in prepared.notes}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("history", HISTORIES)
def test_the_starts_are_those_of_the_history(engine, history, dtype) -> None:
    ids = [int(engine._artifact.item_ids[i]) for i in history]
    wanted = check(engine, history=ids)
    found = check(engine, comm_seq=comm_seq(engine, history, dtype))
    assert found.starts.tolist() == wanted.starts.tolist()
    assert found.starts.dtype == np.int32
    assert found.notes == ()


@pytest.mark.parametrize("params", [WALK, replace(WALK, ef=40), replace(WALK, max_steps=1), EXHAUSTIVE])
def test_the_answers_are_those_of_the_history(engine, params) -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 4, LENGTH):
        history = rng.integers(0, engine.manifest.num_items, n).tolist()
        ids = [int(engine._artifact.item_ids[i]) for i in history]
        answers: list[Hits] = [
            engine.search([check(engine, params, **who)], 0)[0]
            for who in ({"history": ids}, {"comm_seq": comm_seq(engine, history)})
        ]
        assert answers[0] == answers[1]


def test_rows_of_no_item_are_passed_over_and_counted(engine) -> None:
    embedded = comm_seq(engine, [3, 50, 7, 99])
    embedded[8] += 0.5  # the second row
    found = check(engine, comm_seq=embedded)
    popular = engine._artifact.start_points
    assert found.starts.tolist() == [3, 7, 99, *popular]
    assert codes(found) == {"unrecognised_comm_seq_rows": 1}
    assert check(engine, comm_seq=np.full(LENGTH * 8, 0.5)).starts.tolist() == popular.tolist()


@pytest.mark.parametrize("params", [LEVEL, EXHAUSTIVE])
def test_searches_that_start_elsewhere_recognise_nothing(engine, params) -> None:
    stranger = np.full(LENGTH * 8, 0.5)
    assert codes(check(engine, params, comm_seq=stranger)) == {}
    if params is LEVEL:
        found = check(engine, params, comm_seq=comm_seq(engine, [3, 50]))
        assert found.starts.tolist() == engine._artifact.entry_points.tolist()


def test_without_the_arrays_the_walk_starts_from_popular_items(copy) -> None:
    for path in (copy / "arrays").glob("input_row_*.npy"):
        path.unlink()
    reseal(copy)
    engine = load_engine(copy)
    found = check(engine, comm_seq=comm_seq(engine, [3, 50]))
    assert found.starts.tolist() == engine._artifact.start_points.tolist()
    assert codes(check(engine, comm_seq=np.full(LENGTH * 8, 0.5))) == {}


def test_without_popular_items_the_user_alone_is_a_start(copy) -> None:
    rewrite(copy / "arrays" / "start_points.npy", lambda a: a[:0])
    reseal(copy)
    engine = load_engine(copy)
    assert check(engine, comm_seq=comm_seq(engine, [3, 50])).starts.tolist() == [3, 50]
    nobody = check(engine, comm_seq=comm_seq(engine, []))
    assert nobody.starts.tolist() == engine._artifact.walk_entry_points.tolist()


# -- arrays of a faulty builder ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("input_row_hashes.npy", lambda a: a[::-1], "unique hashes in ascending order"),
        ("input_row_hashes.npy", lambda a: np.concatenate([a[:1], a[:-1]]), "unique hashes in ascending"),
        ("input_row_hashes.npy", lambda a: a[:-1], "uint64"),
        ("input_row_hashes.npy", lambda a: a.astype(np.int64), "uint64"),
        ("input_row_items.npy", lambda a: a + a.size, "item indices from 0"),
        ("input_row_items.npy", lambda a: a - 1, "item indices from 0"),
    ],
)
@pytest.mark.parametrize("verify", ["full", "fast"])
def test_bad_arrays_are_refused(copy, name, change, expected, verify) -> None:
    rewrite(copy / "arrays" / name, change)
    reseal(copy)
    with pytest.raises(ArtifactError, match=expected):
        Artifact.open(copy, verify=verify)


def test_hashes_without_their_items_are_refused(copy) -> None:
    (copy / "arrays" / "input_row_items.npy").unlink()
    reseal(copy)
    with pytest.raises(ArtifactError, match=r"input_row_items\.npy: expected an array, found no file"):
        Artifact.open(copy)
