"""From a directory of embeddings to a published version: complete, checked, never overwritten."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nann.engine.artifacts import Artifact, read_manifest
from nann.engine.errors import ArtifactError
from nann.offline import export as export_module
from nann.offline.build_index import GRAPH_FILE, PRESETS, GraphOptions, build_index
from nann.offline.builders.reachability import unreachable_from
from nann.offline.export import published_versions

N, D, L = 300, 6, 5
# The SavedModel here is none; test_export_programs.py has what programs need.
export = functools.partial(export_module.export, programs=())


def _write_embeddings(directory: Path, *, string_ids: bool = False) -> np.ndarray:
    """What `nann extract` leaves, with a SavedModel that nobody here opens."""
    rng = np.random.default_rng(11)
    embeddings = rng.standard_normal((N, D)).astype(np.float32)
    arrays = directory / "arrays"
    arrays.mkdir(parents=True)
    (directory / "variables").mkdir()
    (directory / "saved_model.pb").write_bytes(b"a graph")
    (directory / "variables" / "variables.index").write_bytes(b"weights")
    np.save(directory / "item_embs.npy", embeddings)
    if string_ids:
        pl.DataFrame({"item_id": [f"item{i:04}" for i in range(N)]}).write_parquet(
            directory / "item_ids.parquet"
        )
        pl.DataFrame({"user_id": ["a", "b"]}).write_parquet(arrays / "history_id_strings.parquet")
    else:
        np.save(directory / "item_ids.npy", np.arange(N, dtype=np.int64) * 3)
        np.save(arrays / "history_ids.npy", np.array([4, 9], np.int64))
    np.save(arrays / "history_row_splits.npy", np.array([0, 2, 3], np.int64))
    np.save(arrays / "history_items.npy", np.array([1, 2, 7], np.int32))
    np.save(arrays / "item_weights.npy", np.full(N, 1 / N, np.float32))
    np.save(arrays / "start_points.npy", np.arange(20, dtype=np.int32))
    np.save(arrays / "item_state_item_vector.npy", embeddings.astype(np.float16))
    model = {
        "model": "two_sided",
        "history_length": L,
        "input_dim": 4,
        "embedding_dim": D,
        "user_tensors": {"user_vector": {"shape": [1, D], "dtype": "float32"}},
        "item_tensors": {"item_vector": {"shape": [D], "dtype": "float16"}},
        "training": {"steps": 7},
        "data_hash": "abc",
        "seeds": {"train": 1},
    }
    (directory / "model.json").write_text(json.dumps(model))
    return embeddings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    _write_embeddings(run / "embeddings")
    build_index(run / "embeddings", run / "index")
    return run


def test_an_index_is_an_artifact_that_the_engine_opens(run: Path) -> None:
    artifact = Artifact.open(run / "index", verify="full")
    manifest = artifact.manifest
    assert (manifest.version, manifest.num_items, manifest.embedding_dim) == (0, N, D)
    assert manifest.model_type == "two_sided"
    assert manifest.item_id_type == manifest.user_id_type == "int"
    assert manifest.seeds == {"train": 1, "graph": 12345}
    assert manifest.graph["unreachable"] == {"entry_points": 0, "start_points": 0}
    assert manifest.graph["degree"] == [32, 16]
    assert [table.shape for table in artifact.neighbors] == [(N, 32), (N, 16)]
    assert len(artifact.walk_entry_points) == 64
    for roots in (artifact.walk_entry_points, artifact.start_points):
        assert len(unreachable_from(artifact.neighbors[0], roots)) == 0
    on_disk = {p.relative_to(run / "index").as_posix() for p in (run / "index").rglob("*") if p.is_file()}
    assert set(manifest.files) == on_disk - {"manifest.json"}


@pytest.mark.parametrize("level", [0, 1])
def test_nanns_ragged_arrays_say_the_same_as_the_padded_ones(run: Path, level: int) -> None:
    arrays = run / "index" / "arrays"
    values = np.load(arrays / f"neighbors_level_{level}_values.npy")
    splits = np.load(arrays / f"neighbors_level_{level}_row_splits.npy")
    table = np.load(arrays / f"neighbors_level_{level}.npy")
    assert len(splits) == N + 1
    for row in range(N):
        assert values[splits[row] : splits[row + 1]].tolist() == [n for n in table[row].tolist() if n >= 0]


def test_string_ids_are_told_from_integers(tmp_path: Path) -> None:
    _write_embeddings(tmp_path / "embeddings", string_ids=True)
    build_index(tmp_path / "embeddings", tmp_path / "index")
    artifact = Artifact.open(tmp_path / "index")
    assert artifact.manifest.item_id_type == artifact.manifest.user_id_type == "str"
    assert artifact.item_ids[1] == "item0001"


def test_without_a_model_the_index_is_nanns_arrays_alone(tmp_path: Path) -> None:
    _write_embeddings(tmp_path / "all")
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "all" / "item_embs.npy").rename(bare / "item_embs.npy")
    report = build_index(bare, tmp_path / "index", options=PRESETS["nann"])
    assert not report.complete
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"arrays", GRAPH_FILE}
    written = json.loads((tmp_path / "index" / GRAPH_FILE).read_text())
    assert (written["degree"], written["space"], written["edges_added"]) == ([64, 32], "l2", 0)


def test_an_index_replaces_an_index_and_nothing_else(run: Path) -> None:
    report = build_index(run / "embeddings", run / "index", options=GraphOptions(m=8))
    assert report.graph["degree"] == [16, 8]
    (run / "notes").mkdir()
    (run / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="something else"):
        build_index(run / "embeddings", run / "notes")
    assert (run / "notes" / "mine.txt").read_text() == "keep"


def test_a_failed_build_leaves_nothing_behind(run: Path) -> None:
    (run / "embeddings" / "model.json").write_text("{}")
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(KeyError):
        build_index(run / "embeddings", run / "other")
    assert sorted(path.name for path in run.iterdir()) == before


def test_export_publishes_ascending_versions_with_quality_and_profiles(run: Path, tmp_path: Path) -> None:
    (run / "quality.json").write_text('{"hit_rate_at_200": 0.5}')
    (run / "profiles.json").write_text('{"fast": {"ef": 200}}')
    first = export(run, tmp_path / "repository", "films")
    second = export(run, tmp_path / "repository", "films")
    assert [first, second] == [tmp_path / "repository" / "films" / v for v in ("1", "2")]
    manifest = Artifact.open(second, verify="full").manifest
    assert (manifest.model_name, manifest.version) == ("films", 2)
    assert manifest.quality == {"hit_rate_at_200": 0.5}
    assert manifest.profiles == {"fast": {"ef": 200}}
    assert manifest.files == read_manifest(run / "index").files
    assert published_versions(tmp_path / "repository" / "films") == [1, 2]
    assert {path.name for path in (tmp_path / "repository" / "films").iterdir()} == {"1", "2"}


def test_a_published_file_shares_nothing_with_the_run(run: Path, tmp_path: Path) -> None:
    version = export(run, tmp_path / "repository")
    for file in version.rglob("*"):
        assert file.is_dir() or file.stat().st_nlink == 1


def test_export_refuses_to_overwrite(run: Path, tmp_path: Path) -> None:
    version = export(run, tmp_path / "repository", "nann", 7)
    before = (version / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError, match="never changes"):
        export(run, tmp_path / "repository", "nann", 7)
    assert (version / "manifest.json").read_bytes() == before
    assert export(run, tmp_path / "repository").name == "8"


def test_a_damaged_index_is_not_published(run: Path, tmp_path: Path) -> None:
    weights = run / "index" / "arrays" / "item_weights.npy"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="item_weights"):
        export(run, tmp_path / "repository")
    weights.unlink()
    with pytest.raises(ArtifactError, match="no file"):
        export(run, tmp_path / "repository")
    assert list((tmp_path / "repository" / "nann").iterdir()) == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_a_name_that_is_no_directory_name_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        export(run, tmp_path / "repository", name)
    assert not (tmp_path / "repository").exists()


def test_a_version_is_positive_and_a_run_has_an_index(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positive"):
        export(run, tmp_path / "repository", version=0)
    with pytest.raises(FileNotFoundError, match="nann index"):
        export(tmp_path, tmp_path / "repository")


def test_what_a_version_brings_for_servers_is_published_with_its_hash(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    extra = copy / "index" / "assets.extra" / "tf_serving_warmup_requests"
    extra.parent.mkdir()
    extra.write_bytes(b"records")
    version = export(copy, tmp_path / "repository")
    assert (version / "assets.extra" / extra.name).read_bytes() == b"records"
    assert read_manifest(version).files[f"assets.extra/{extra.name}"].bytes == len(b"records")
    (version / "assets.extra" / extra.name).write_bytes(b"RECORDS")
    with pytest.raises(ArtifactError, match=r"assets\.extra"):
        Artifact.open(version, verify="full")
