"""Measuring growth: what is saved computes what the oracle does, sizes resume, tables say what is there."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from engine_world import make_world

from nann.cli import growth as command
from nann.engine.artifacts import Artifact
from nann.engine.search_engine import SearchEngine
from nann.offline.benchmark.gpu.corpus import make_corpus
from nann.offline.benchmark.gpu.model import make_weights
from nann.offline.benchmark.growth import opening, searching, session
from nann.offline.benchmark.growth.corpus import ITEMS_A_USER, write_embeddings
from nann.offline.benchmark.growth.plots import draw
from nann.offline.benchmark.growth.report import growth_section
from nann.offline.benchmark.growth.session import Options, measure_sizes, read_results
from nann.offline.build_index import build_index

N, USERS = 600, 3
OPTIONS = Options(users=USERS, seed=1, ef_construction=40)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("growth")
    (root / "embeddings").mkdir()
    write_embeddings(root / "embeddings", num_items=N, users=USERS, seed=1)
    build_index(root / "embeddings", root / "index")
    return root / "index"


# -- the corpus as a version --------------------------------------------------------------------------


def test_the_made_up_corpus_is_a_version(index: Path) -> None:
    artifact = Artifact.open(index)
    corpus = make_corpus(N, USERS, seed=1)
    assert artifact.num_items == N
    assert len(artifact.history_ids) == N // ITEMS_A_USER
    for user, history in enumerate(corpus.history):
        start, stop = artifact.history_row_splits[user : user + 2]
        np.testing.assert_array_equal(artifact.history_items[start:stop], history[history >= 0])
    weights = make_weights().encode_items(corpus.embeddings)
    for name, table in weights.items():
        np.testing.assert_array_equal(artifact.item_state[name], table)
    assert artifact.input_rows is not None
    items, unknown = artifact.input_rows.recognise(corpus.embeddings[:5])
    assert (items.tolist(), unknown) == ([0, 1, 2, 3, 4], 0)


def test_the_saved_model_scores_like_the_oracle(index: Path) -> None:
    import tensorflow as tf

    corpus, weights = make_corpus(N, USERS, seed=1), make_weights()
    signatures = tf.saved_model.load(str(index)).signatures
    users = signatures["encode_user"](history=tf.constant(corpus.history))
    embedded = np.where(corpus.history[..., None] >= 0, corpus.embeddings[corpus.history], 0)
    flat = signatures["encode_user_comm_seq"](comm_seq=tf.constant(embedded.reshape(USERS, -1)))
    items = signatures["encode_items"](item_index=tf.range(N))
    scores = signatures["score"](**users, **{name: tensor[None] for name, tensor in items.items()})["score"]
    table = weights.encode_items(corpus.embeddings)
    for user, history in enumerate(corpus.history):
        oracle = weights.encode_user(corpus.embeddings, history)
        for name, tensor in oracle.items():
            np.testing.assert_allclose(users[name][user], tensor, atol=1e-4)
            np.testing.assert_allclose(flat[name][user], tensor, atol=1e-4)
        # The oracle has item tensors in half precision.
        np.testing.assert_allclose(scores[user], weights.score(oracle, table), atol=0.02)


# -- measuring ----------------------------------------------------------------------------------------


def test_opening_is_measured_cold_and_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_HASHED_BYTES", opening._BLOCK_BYTES)
    directory = make_world(tmp_path / "1").directory
    figures = opening.measure_opening(directory)
    assert figures["bytes"] == sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    for name in ("full_cold", "full_warm", "fast_cold", "fast_warm"):
        assert figures[name]["wall_s"] > 0
    assert min(figures["hash_bytes_per_s"], figures["hash_cpu_bytes_per_s"], figures["disk_bytes_per_s"]) > 0


def test_searches_are_compared_with_the_exhaustive_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path / "1", num_items=2000)
    engine = world.engine(lanes=2)
    engine._catalog._users = np.arange(1, 21, dtype=np.int64)
    monkeypatch.setattr(SearchEngine, "load", lambda *_, **__: engine)
    monkeypatch.setattr(searching, "EFS", (200, 2000))
    figures = searching.measure_searching(world.directory, users=USERS)
    narrow, wide = figures["searches"]
    assert (narrow["ef"], wide["ef"]) == (200, 2000)
    assert wide["recall"] == wide["recall_p5"] == 1  # a pool of the whole corpus
    assert wide["items_scored"] == 2000
    assert narrow["items_scored"] < 2000
    assert 0 < narrow["p50_ms"] <= narrow["p95_ms"]
    assert figures["table_bytes"] == engine.memory_bytes
    assert figures["searched"]["anonymous_bytes"] > 0


def test_a_wrong_answer_lowers_recall(tmp_path: Path) -> None:
    world = make_world(tmp_path / "1", num_items=2000)
    engine = world.engine()
    engine._catalog._users = np.arange(1, 21, dtype=np.int64)
    exact = searching._ask_on_all_lanes(
        engine, searching._prepare(engine, USERS, searching.SearchParams(policy="exhaustive")), {}
    )
    assert searching._search(engine, USERS, 2000, exact)["recall"] == 1
    assert searching._search(engine, USERS, 2000, exact + 1000)["recall"] == 0


# -- sizes, one after the other -------------------------------------------------------------------------


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have run in a fresh process, by name and size."""
    log: list[str] = []

    def run(work: Any, directory: Path, **named: Any) -> dict[str, Any]:
        log.append(f"{work.__name__} {named.get('num_items', '')}".strip())
        if work is session.build_version:
            (directory / "repository").mkdir(parents=True)
        return {"of": work.__name__}

    monkeypatch.setattr(session, "_in_a_fresh_process", run)
    return log


PARTS = ["measure_opening", "measure_loading", "measure_loading", "measure_searching"]


def test_every_size_is_built_measured_and_deleted(tmp_path: Path, done: list[str]) -> None:
    measure_sizes([300, 20], tmp_path, OPTIONS, lambda _: None)
    assert done == ["build_version 20", *PARTS, "build_version 300", *PARTS]
    results = read_results(tmp_path)
    assert [one["items"] for one in results] == [20, 300]
    assert results[0]["searching"] == {"of": "measure_searching"}
    assert {path.name for path in tmp_path.iterdir()} == {"20.json", "300.json"}


def test_what_is_measured_or_built_is_not_repeated(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_sizes([20], tmp_path, OPTIONS, lambda _: None)
    done.clear()
    run = session._in_a_fresh_process

    def stop(work: Any, *arguments: Any, **named: Any) -> Any:
        if work is session.measure_searching:
            raise KeyboardInterrupt
        return run(work, *arguments, **named)

    monkeypatch.setattr(session, "_in_a_fresh_process", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_sizes([20, 30], tmp_path, OPTIONS, lambda _: None)
    assert done == ["build_version 30", *PARTS[:3]]
    assert not (tmp_path / "30.json").exists()
    done.clear()
    monkeypatch.setattr(session, "_in_a_fresh_process", run)
    measure_sizes([20, 30], tmp_path, OPTIONS, lambda _: None)
    assert done == PARTS


def test_other_options_are_not_mixed_in(tmp_path: Path, done: list[str]) -> None:
    measure_sizes([20], tmp_path, OPTIONS, lambda _: None)
    with pytest.raises(ValueError, match="other options"):
        measure_sizes([20], tmp_path, dataclasses.replace(OPTIONS, seed=2), lambda _: None)


# -- the report ---------------------------------------------------------------------------------------


def result(items: int, *, map_s: float = 0.5, low: float = 0.9) -> dict[str, Any]:
    """Figures of a size, made up: searches cost as the fourth root of it."""
    taken = {"wall_s": 2.0, "cpu_s": 2.0}
    searches = [
        {
            "ef": ef,
            "recall": recall,
            "recall_p5": recall - 0.1,
            "items_scored": ef * items**0.25,
            "steps": 8.0,
            "p50_ms": 3.0,
            "p95_ms": 4.0,
            "cpu_ms": items**0.5,
        }
        for ef, recall in ((200, low), (400, 0.96), (800, 0.99))
    ]
    phases = {
        f"{name}_{unit}": 1.0 for name in ("open", "scorer", "tables", "catalog") for unit in ("s", "cpu_s")
    }
    memory = {"anonymous_bytes": 10**9, "mapped_bytes": 0, "peak_bytes": 0}
    kinds = ("item tensors", "graph", "embeddings", "SavedModel", "histories", "the rest")
    return {
        "items": items,
        "options": dataclasses.asdict(OPTIONS),
        "machine": {"processor": "P", "cores": 2, "memory_gib": 1, "commit": None, "load_average": 0.5},
        "build": {
            "bytes": dict.fromkeys(kinds, items * 250),
            "index_s": 9.0,
            "index_cpu_s": 8.0,
            "export_s": 1.0,
            "export_cpu_s": 1.0,
            "peak_bytes": 10**9,
            "ef_construction": 40,
            "graph": {"unreachable_before_repair": {"entry_points": 7}},
        },
        "opening": {
            "bytes": items * 1500,
            "hash_bytes_per_s": 2e9,
            "hash_cpu_bytes_per_s": items * 1000,
            "disk_bytes_per_s": 1e9,
            "fast_cold": {"wall_s": map_s, "cpu_s": 0.1},
            "fast_warm": {"wall_s": 0.1, "cpu_s": 0.1},
            "full_cold": taken,
            "full_warm": taken,
        },
        "loading": phases,
        "loading_cold": phases,
        "searching": {
            "load_s": 4.0,
            "load_cpu_s": 4.0,
            "warm_up_s": 1.0,
            "warm_up_cpu_s": 1.0,
            "exhaustive_s": 1.0,
            "exhaustive_cpu_s": items / 1000,
            "loaded": memory,
            "searched": memory,
            "table_bytes": 1,
            "searches": searches,
        },
    }


def test_the_section_says_how_cost_grows() -> None:
    text = growth_section([result(10_000), result(160_000, low=0.5)])
    assert "items scored grow as N^0.25" in text
    assert "processor time of a search as N^0.50, of an exhaustive one as N^1.00" in text
    assert "| 160,000 | 0.9600 | 0.860 | 8,000 | 5.00 % |" in text
    assert "| 10,000 | 400 | 0.9600 |" in text  # the smallest ef of recall 0.95
    assert "target 3 s: kept" in text
    assert "| 160,000 | 240 MB | 1,500 |" in text
    assert "75 %" in text  # 1,500 bytes in 2 s against 1,000 a second
    assert "load 0.5" in text


def test_one_size_has_no_slope_and_a_missed_target_is_named() -> None:
    text = growth_section([result(10_000, map_s=3.01)])
    assert "N^" not in text
    assert "**not kept**" in text
    with pytest.raises(ValueError, match="nothing"):
        growth_section([])


def test_no_ef_may_reach_the_recall() -> None:
    one = result(10_000)
    for search in one["searching"]["searches"]:
        search["recall"] = 0.9
    assert "| 10,000 | none |  |  |  |" in growth_section([one])


def test_the_picture_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    results = [result(10_000), result(160_000)]
    for name in ("a.svg", "b.svg"):
        draw(copy.deepcopy(results), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_command_replaces_the_section_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for size in (20, 300):
        (output / f"{size}.json").write_text(json.dumps(result(size)))
    docs = tmp_path / "growth.md"
    (tmp_path / "images").mkdir()
    docs.write_text(f"# Before\n{command._BEGIN}stale\n{command._END}After\n")
    command.growth(output, sizes="20,300", users=USERS, ef_construction=40, seed=1, docs=docs)
    text = docs.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("After\n")
    assert "| 300 |" in text
    assert "stale" not in text
    assert (tmp_path / "images" / "growth.svg").is_file()
    assert {"growth.json", "growth.md", "growth.svg"} <= {path.name for path in output.iterdir()}
    command.growth(output, sizes="20,300", users=USERS, ef_construction=40, seed=1, docs=docs)
    assert docs.read_text() == text


@pytest.mark.parametrize(("sizes", "text"), [("20,x", None), ("20", "no section")])
def test_wrong_usage_is_refused_before_anything_runs(tmp_path: Path, sizes: str, text: str | None) -> None:
    docs = None
    if text is not None:
        docs = tmp_path / "growth.md"
        docs.write_text(text)
    with pytest.raises(typer.BadParameter):
        command.growth(tmp_path / "out", sizes=sizes, users=1, ef_construction=40, seed=1, docs=docs)
    assert not (tmp_path / "out").exists()
