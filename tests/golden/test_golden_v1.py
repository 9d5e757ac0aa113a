"""Format version 1 as it was first written still loads, still answers the same, and still refuses damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damage import flip_byte, truncate
from golden import GOLDEN, load_engine, query_of

from nann.engine.artifacts import Artifact, hash_files, read_manifest
from nann.engine.errors import ArtifactError
from nann.engine.search_engine import SearchEngine

ARTIFACT = GOLDEN / "artifact"
ANSWERS = json.loads((GOLDEN / "hits.json").read_text(encoding="utf-8"))
FILES = sorted(read_manifest(ARTIFACT).files)


@pytest.fixture(scope="module")
def engine() -> SearchEngine:
    return load_engine(ARTIFACT, max_batch=2)


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(ARTIFACT, tmp_path / "1"))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answers_are_the_golden_ones(engine, name) -> None:
    wanted = ANSWERS[name]["hits"]
    (hits,) = engine.search([engine.check(query_of(ANSWERS[name]["query"]))], 0)
    assert hits.item_ids == wanted["item_ids"]
    assert hits.scores == pytest.approx(wanted["scores"], rel=1e-6)
    assert (hits.n_scored, hits.steps) == (wanted["n_scored"], wanted["steps"])
    assert {note.code: note.count for note in hits.notes} == wanted["notes"]
    assert hits.attributes == wanted["attributes"]


def test_the_golden_queries_cover_both_policies_and_filters() -> None:
    assert len(ANSWERS) >= 12
    assert {a["query"]["params"]["policy"] for a in ANSWERS.values()} == {"best_first", "level", "exhaustive"}
    assert {"filter", "include", "exclude", "seen", "comm_seq"} <= {
        f for a in ANSWERS.values() for f in a["query"]
    }
    assert len({tuple(a["hits"]["item_ids"]) for a in ANSWERS.values()}) >= 10


def test_the_whole_engine_loads_it() -> None:
    loaded = SearchEngine.load(ARTIFACT, lanes=1, max_batch=1)
    assert loaded.manifest.model_name == "golden"
    assert loaded.manifest.format_version == 1


def test_loading_left_the_committed_files_as_they_were() -> None:
    """Also that a checkout did not change them: the manifest knows every file but itself."""
    assert hash_files(ARTIFACT) == read_manifest(ARTIFACT).files
    assert {"saved_model.pb", "arrays/item_ids.npy", "arrays/items.parquet"} <= set(FILES)
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) <= 200_000


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_any_damaged_file_is_refused_by_name(copy, file, damage) -> None:
    path = copy / file
    if damage == "flipped":
        flip_byte(path, path.stat().st_size // 2)
    elif damage == "truncated":
        truncate(path)
    else:
        path.unlink()
    for load in (Artifact.open, SearchEngine.load):
        with pytest.raises(ArtifactError) as caught:
            load(copy)
        assert caught.value.file == str(path)
        assert caught.value.expected != caught.value.found
    if damage != "flipped":
        with pytest.raises(ArtifactError):
            Artifact.open(copy, verify="fast")


def test_a_damaged_manifest_is_refused(copy) -> None:
    truncate(copy / "manifest.json", 5)
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected valid JSON"):
        SearchEngine.load(copy)
