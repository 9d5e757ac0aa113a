"""The search as a TensorFlow graph: the engine's `level` in every answer, and nothing in it but stock ops."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from engine_world import make_world
from golden import GOLDEN, load_engine
from nann_reference import served_search
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow.python.framework import op_def_registry
from tiny_models import integer_dot, make_model_world, publish

from nann.engine.artifacts import Artifact, hash_files, read_manifest, write_manifest
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams
from nann.offline import export_tf_serving as module_under_test
from nann.offline.export import export
from nann.offline.export_programs import PROGRAM_SETS, GridOptions
from nann.offline.export_tf_serving import SIGNATURES, build_search_module
from nann.offline.progress import Progress

LENGTH = 4
TOPNS = [
    (3, 5, 7, 7, 4, 10),
    (1, 1, 1, 1, 1, 1),  # one candidate
    (8, 8, 8, 8, 8, 3),
    (50, 60, 70, 80, 90, 300),  # more than there are
    (20, 4, 3, 2, 1, 6),  # narrowing
]
RAW = {"encode_user", "encode_user_comm_seq", "encode_items", "score"}


@dataclass(frozen=True)
class Case:
    """An artifact of integer-valued scores, its engine, its graph, and users as NANN's clients send them."""

    artifact: Artifact
    engine: SearchEngine
    module: Any
    comm_seqs: np.ndarray

    def engine_answer(self, comm_seq: np.ndarray, topn: tuple[int, ...], k: int) -> tuple[list, list]:
        params = SearchParams(policy="level", level_topn=topn)
        query = self.engine.check(Query(k=k, params=params, comm_seq=comm_seq))
        (hits,) = self.engine.search([query], 0)
        return list(hits.item_ids), list(hits.scores)

    def graph_answer(self, comm_seqs: np.ndarray, topn: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        found = self.module.search(tf.constant(comm_seqs), tf.constant(topn, tf.int32))
        return found["top_k"].numpy(), found["scores"].numpy()


def make_case(directory: Path, seed: int, *, graph: bool = True, **world: Any) -> Case:
    rng = np.random.default_rng(seed)
    made = make_world(directory, num_items=int(rng.integers(20, 400)), seed=seed, **world)
    if not graph:
        for path in directory.glob("arrays/neighbors_level_?.npy"):
            np.save(path, np.full_like(np.load(path), -1))
    model = integer_dot(made.item_vectors, history_length=LENGTH)
    publish(model, directory)
    histories = rng.integers(-1, len(made.item_ids), (4, LENGTH))
    comm_seqs = np.stack([model.comm_seq(history) for history in histories]).astype(np.float16)
    return Case(Artifact.open(directory), load_engine(directory), build_search_module(directory), comm_seqs)


@pytest.fixture(
    scope="module",
    params=[
        {"seed": 1},
        {"seed": 2, "connected": False, "degree": 3, "entries": 1},
        {"seed": 3, "degree": 12, "entries": 20},
        {"seed": 4, "graph": False, "entries": 5},
    ],
    ids=str,
)
def case(request, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("case") / "1", **request.param)


@pytest.mark.parametrize("topn", TOPNS)
def test_answers_are_the_engines(case, topn) -> None:
    for comm_seq in case.comm_seqs:
        ids, scores = case.graph_answer(comm_seq[None], topn)
        wanted_ids, wanted_scores = case.engine_answer(comm_seq, topn, topn[5])
        assert ids.dtype == np.int64 and ids.shape == scores.shape == (1, len(wanted_ids))
        assert (ids[0].tolist(), scores[0].tolist()) == (wanted_ids, wanted_scores)
        assert len(set(wanted_ids)) == len(wanted_ids)


def test_every_k_is_a_prefix_of_the_longest_answer_with_ties_by_item_index(case) -> None:
    *widths, most = (9, 12, 9, 9, 9, 48)
    (ids,), (scores,) = case.graph_answer(case.comm_seqs[:1], (*widths, most))
    pairs = list(zip((-scores).tolist(), ids.tolist(), strict=True))
    assert pairs == sorted(pairs)
    for k in range(1, most + 1):
        (shorter,), _ = case.graph_answer(case.comm_seqs[:1], (*widths, k))
        assert shorter.tolist() == ids[:k].tolist()


def test_answers_are_the_references_too(case) -> None:
    artifact = case.artifact
    vectors = artifact.item_state["item_vector"].astype(np.float32)
    for comm_seq in case.comm_seqs:
        scores = vectors @ comm_seq.reshape(LENGTH, -1).sum(axis=0, dtype=np.float32)
        wanted, _ = served_search(scores, artifact.entry_points, *artifact.neighbors, TOPNS[0])
        (ids,), (found,) = case.graph_answer(comm_seq[None], TOPNS[0])
        assert ids.tolist() == np.asarray(artifact.item_ids)[wanted].tolist()
        assert found.tolist() == scores[wanted].tolist()


@pytest.mark.parametrize("topn", TOPNS)
def test_several_queries_get_their_own_answers_padded_to_the_width_asked_for(case, topn) -> None:
    ids, scores = case.graph_answer(case.comm_seqs, topn)
    assert ids.shape == scores.shape == (len(case.comm_seqs), topn[5])
    for row, comm_seq in enumerate(case.comm_seqs):
        alone_ids, alone_scores = (found[0].tolist() for found in case.graph_answer(comm_seq[None], topn))
        n = len(alone_ids)
        assert (ids[row, :n].tolist(), scores[row, :n].tolist()) == (alone_ids, alone_scores)
        assert set(ids[row, n:]) <= {-1} and set(scores[row, n:]) <= {-np.inf}


def test_the_cases_have_ties_and_short_answers(tmp_path) -> None:
    """What the tests above rest on."""
    tied = make_case(tmp_path / "tied", 1)
    (_,), (scores,) = tied.graph_answer(tied.comm_seqs[:1], (*TOPNS[2][:5], 30))
    assert len(set(scores)) < len(scores)
    short = make_case(tmp_path / "short", 4, graph=False, entries=5)
    assert short.graph_answer(short.comm_seqs[:1], TOPNS[3])[0].shape == (1, 5)


def test_keys_order_by_score_then_by_item_index_and_keep_both() -> None:
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    scores = np.array([huge, 1.5, 1.0, tiny, 0.0, -tiny, -1.0, -huge], np.float32).repeat(3)
    items = np.tile(np.array([0, 7, 2**31 - 1], np.int32), 8)
    keys = module_under_test._keys(tf.constant(scores), tf.constant(items))
    assert bool(tf.reduce_all(keys[1:] < keys[:-1]))
    assert module_under_test._score(keys).numpy().tolist() == scores.tolist()
    assert module_under_test._item_index(keys).numpy().tolist() == items.tolist()


def test_minus_zero_ranks_as_zero() -> None:
    plus, minus = (module_under_test._keys(tf.constant([zero]), tf.constant([5])) for zero in (0.0, -0.0))
    assert plus.numpy() == minus.numpy()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_does_not_rank(tmp_path, bad) -> None:
    made = make_case(tmp_path / "1", 3, degree=12, entries=20)
    topn = (20, 30, 30, 30, 30, 60)
    (before,), _ = made.graph_answer(made.comm_seqs[:1], topn)
    table = tmp_path / "1" / "arrays" / "item_state_item_vector.npy"
    state = np.load(table)
    poisoned = before[[0, 3, 5]]
    state[np.searchsorted(np.asarray(made.artifact.item_ids), poisoned), :] = bad
    np.save(table, state)
    manifest = read_manifest(tmp_path / "1")
    write_manifest(tmp_path / "1", manifest.model_copy(update={"files": hash_files(tmp_path / "1")}))
    found = build_search_module(tmp_path / "1").search(
        tf.constant(made.comm_seqs[:1]), tf.constant(topn, tf.int32)
    )
    assert np.isfinite(found["scores"].numpy()).all()
    assert not set(found["top_k"].numpy()[0]) & set(poisoned.tolist())
    assert found["top_k"].shape[1] > 10


def test_string_ids_come_back_as_strings(tmp_path) -> None:
    made = make_case(tmp_path / "1", 5, string_ids=True)
    ids, _ = made.graph_answer(made.comm_seqs, TOPNS[3])
    assert ids.dtype == np.object_
    for row, comm_seq in zip(ids, made.comm_seqs, strict=True):
        wanted, _ = made.engine_answer(comm_seq, TOPNS[3], TOPNS[3][5])
        assert [name.decode() for name in row] == wanted + [""] * (len(row) - len(wanted))


@pytest.mark.parametrize("topn", TOPNS[:4])
def test_the_golden_artifact_answers_alike(topn) -> None:
    artifact = GOLDEN / "artifact"
    engine, module = load_engine(artifact), build_search_module(artifact)
    width = engine.manifest.history_length * engine.manifest.input_dim
    for seed in range(4):
        comm_seq = np.random.default_rng(seed).integers(-2, 3, width).astype(np.float16)
        params = SearchParams(policy="level", level_topn=topn)
        (hits,) = engine.search([engine.check(Query(k=topn[5], params=params, comm_seq=comm_seq))], 0)
        found = module.search(tf.constant(comm_seq[None]), tf.constant(topn, tf.int32))
        assert found["top_k"].numpy()[0].tolist() == hits.item_ids
        assert found["scores"].numpy()[0].tolist() == pytest.approx(hits.scores, rel=1e-6)


# -- nann export --format tf-serving --------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A version with an attention model and programs, exported for TensorFlow Serving."""
    root = tmp_path_factory.mktemp("served")
    make_model_world(root / "run" / "index", num_items=300)
    with pytest.MonkeyPatch.context() as patch:
        small = GridOptions(max_batch=4, max_rows=128, tile_rows=32, wide=True, crossed=False)
        patch.setitem(PROGRAM_SETS, "cpu", small)
        return export(
            root / "run",
            root / "repository",
            format="tf-serving",
            programs=["cpu"],
            progress=Progress(silent=True),
        )


@pytest.fixture(scope="module")
def asked(published) -> tuple[np.ndarray, np.ndarray]:
    """A query, and the ids that the engine answers."""
    manifest = read_manifest(published)
    rng = np.random.default_rng(0)
    comm_seq = rng.normal(size=manifest.history_length * manifest.input_dim).astype(np.float16)
    engine = SearchEngine.load(published, lanes=1, max_batch=1, scorer="tensorflow")
    engine.warm_up()
    params = SearchParams(policy="level", level_topn=TOPNS[0])
    (hits,) = engine.search([engine.check(Query(k=10, params=params, comm_seq=comm_seq))], 0)
    return comm_seq, np.array(hits.item_ids)


def test_the_version_is_whole_and_its_raw_signatures_stay(published) -> None:
    assert Artifact.open(published, verify="full").manifest.files == hash_files(published)
    model = tf.saved_model.load(str(published))
    assert set(model.signatures) == RAW | set(SIGNATURES)
    before = tf.saved_model.load(str(published.parents[2] / "run" / "index"))
    rows = tf.constant([[1, 2, 3, -1, -1, -1]])
    for name, wanted in before.signatures["encode_user"](history=rows).items():
        assert np.array_equal(model.signatures["encode_user"](history=rows)[name], wanted)


def test_both_signatures_answer_as_the_engine_with_either_scorer(published, asked) -> None:
    comm_seq, wanted = asked
    signatures = tf.saved_model.load(str(published)).signatures
    inputs = {"comm_seq": tf.constant(comm_seq[None]), "level_topn": tf.constant(TOPNS[0], tf.int32)}
    assert {name: set(signatures[name](**inputs)) for name in SIGNATURES} == {
        name: set(outputs) for name, outputs in SIGNATURES.items()
    }
    for name in SIGNATURES:
        assert signatures[name](**inputs)["top_k"].numpy()[0].tolist() == wanted.tolist()
    engine = SearchEngine.load(published, lanes=1, max_batch=1, scorer="pjrt")
    engine.warm_up()
    params = SearchParams(policy="level", level_topn=TOPNS[0])
    (hits,) = engine.search([engine.check(Query(k=10, params=params, comm_seq=comm_seq))], 0)
    assert list(hits.item_ids) == wanted.tolist()


def test_tables_are_variables_and_programs_still_share_them(published) -> None:
    """A table that were a constant would lie in the graph, which cannot exceed 2 GB."""
    nodes = list(_nodes(published))
    largest = max(n.attr["value"].tensor.ByteSize() for n in nodes if n.op == "Const")
    assert largest < Artifact.open(published).item_ids.nbytes  # the smallest table
    assert not list(published.glob("programs/weight-*"))


def test_every_op_is_registered_in_stock_tensorflow_and_none_is_compiled(published) -> None:
    nodes = list(_nodes(published))
    assert {"UniqueV2", "Unique"} & {node.op for node in nodes} and "TopKV2" in {node.op for node in nodes}
    functions = {f.signature.name for f in _graph(published).library.function}
    unknown = {n.op for n in nodes if n.op not in functions and op_def_registry.get(n.op) is None}
    assert not unknown
    assert not {node.op for node in nodes} & {"PyFunc", "PyFuncStateless", "EagerPyFunc", "XlaLaunch"}
    attributes = [*(n.attr for n in nodes), *(f.attr for f in _graph(published).library.function)]
    compiled = [a for a in attributes if "_XlaMustCompile" in a and a["_XlaMustCompile"].b]
    assert not compiled
    assert not any("jit_compile" in a or "_xla_compile_id" in a for a in attributes)


def test_tensorflows_own_command_line_runs_it_in_a_process_of_its_own(published, asked, tmp_path) -> None:
    comm_seq, wanted = asked
    np.save(tmp_path / "comm_seq.npy", comm_seq[None])
    np.save(tmp_path / "level_topn.npy", np.array(TOPNS[0], np.int32))
    command = [sys.executable, "-m", "tensorflow.python.tools.saved_model_cli", "run"]
    inputs = f"comm_seq={tmp_path / 'comm_seq.npy'};level_topn={tmp_path / 'level_topn.npy'}"
    options = ["--tag_set", "serve", "--signature_def", "serving_default", "--inputs", inputs]
    done = subprocess.run(
        [*command, "--dir", str(published), *options, "--outdir", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.load(tmp_path / "out" / "top_k.npy").tolist() == [wanted.tolist()]


def test_a_model_without_comm_seq_is_not_published(tmp_path) -> None:
    index = tmp_path / "run" / "index"
    make_model_world(index, num_items=40)
    model = tf.saved_model.load(str(index))
    kept = {name: function for name, function in model.signatures.items() if name != "encode_user_comm_seq"}
    tf.saved_model.save(model, str(tmp_path / "less"), signatures=kept)
    for name in ("saved_model.pb", "fingerprint.pb"):
        shutil.copyfile(tmp_path / "less" / name, index / name)
    shutil.copytree(tmp_path / "less" / "variables", index / "variables", dirs_exist_ok=True)
    manifest = read_manifest(index)
    write_manifest(index, manifest.model_copy(update={"files": hash_files(index)}))
    with pytest.raises(ValueError, match="encode_user_comm_seq"):
        export(
            tmp_path / "run",
            tmp_path / "repository",
            format="tf-serving",
            programs=[],
            progress=Progress(silent=True),
        )
    assert list((tmp_path / "repository" / "nann").iterdir()) == []


def _graph(version: Path) -> Any:
    (meta,) = SavedModel.FromString((version / "saved_model.pb").read_bytes()).meta_graphs
    return meta.graph_def


def _nodes(version: Path) -> Iterator[NodeDef]:
    """Every node of the graph and of the functions it calls."""
    graph = _graph(version)
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def
