from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import GOLDEN

from nann.engine.artifacts import FileEntry, Manifest, read_manifest
from nann.engine.footprint import expected_load_bytes

MIB = 1 << 20


def manifest(**files: int) -> Manifest:
    raw = json.loads((GOLDEN / "artifact" / "manifest.json").read_text())
    entries = {name.replace("__", "/"): FileEntry(sha256="", bytes=size) for name, size in files.items()}
    return Manifest.model_validate({**raw, "num_items": 8 * MIB, "files": entries})


@pytest.mark.parametrize(
    ("files", "more"),
    [
        ({"arrays__neighbors_level_0.npy": 100 * MIB}, 100),
        ({"arrays__neighbors_level_0_values.npy": 100 * MIB}, 0),
        ({"arrays__item_state_query.npy": 50 * MIB, "arrays__item_embs.npy": 7 * MIB}, 50),
        ({"variables__variables.data-00000-of-00001": 30 * MIB}, 60),
        ({"arrays__items.parquet": 2 * MIB}, 16),
        ({"arrays__gate_queries.npy": 11 * MIB, "arrays__gate_keys.npy": 11 * MIB}, 22),
    ],
)
def test_what_is_copied_counts_and_what_is_mapped_does_not(files: dict[str, int], more: int) -> None:
    nothing = expected_load_bytes(manifest(), lanes=2, max_batch=16)
    assert expected_load_bytes(manifest(**files), lanes=2, max_batch=16) - nothing == more * MIB


def test_lanes_remember_what_they_visited() -> None:
    one, four = (expected_load_bytes(manifest(), lanes=lanes, max_batch=16) for lanes in (1, 4))
    assert four - one == 3 * 16 * MIB


def test_a_small_version_takes_what_its_programs_take() -> None:
    golden: Path = GOLDEN / "artifact"
    assert 64 * MIB < expected_load_bytes(read_manifest(golden), lanes=2, max_batch=16) < 128 * MIB
