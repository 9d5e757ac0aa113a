"""Embedded histories as they are read from a published SavedModel."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engine_world import make_world
from golden import GOLDEN
from tiny_models import publish, real_model

from nann.engine.artifacts import Artifact, hash_files, read_manifest, write_manifest
from nann.engine.input_rows import InputRows, hash_rows
from nann.offline.benchmark.embedded import embedded_histories

N = 60
LENGTH = 5


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    directory: Path = tmp_path_factory.mktemp("embedded") / "1"
    make_world(directory, num_items=N)
    model = real_model("dnn", N, history_length=LENGTH)
    publish(model, directory)
    return directory, model.item_inputs


def test_rows_are_the_models_own_of_the_last_items(version: tuple[Path, np.ndarray]) -> None:
    directory, inputs = version
    artifact = Artifact.open(directory)
    splits, items = artifact.history_row_splits, artifact.history_items
    n_users = int(np.count_nonzero(np.diff(splits)))
    found = embedded_histories(directory, limit=n_users, seed=3)
    assert found.dtype == np.float16
    wanted = set()
    for start, end in pairwise(splits):
        if start < end:
            rows = np.zeros((LENGTH, inputs.shape[1]), np.float16)
            last = items[start:end][-LENGTH:]
            rows[: len(last)] = inputs[last]
            wanted.add(rows.tobytes())
    assert {rows.tobytes() for rows in found} == wanted
    assert (embedded_histories(directory, limit=2, seed=3) == found[:2]).all()


def test_what_cannot_be_asked_is_said(version: tuple[Path, np.ndarray]) -> None:
    directory, _ = version
    with pytest.raises(ValueError, match="users with a history, not 100000"):
        embedded_histories(directory, limit=100_000, seed=0)
    with pytest.raises(ValueError, match="no input tables"):
        embedded_histories(GOLDEN / "artifact", limit=1, seed=0)


def test_tables_of_another_model_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "1"
    make_world(directory, num_items=N)
    model = real_model("dnn", N, history_length=LENGTH)
    publish(model, directory)
    for inputs, refused in ((model.item_inputs, False), (model.item_inputs + 1, True)):
        table = InputRows.of(hash_rows(inputs))
        np.save(directory / "arrays" / "input_row_hashes.npy", table.hashes)
        np.save(directory / "arrays" / "input_row_items.npy", table.items)
        manifest = read_manifest(directory)
        write_manifest(directory, manifest.model_copy(update={"files": hash_files(directory)}))
        if refused:
            with pytest.raises(ValueError, match="row hashes"):
                embedded_histories(directory, limit=1, seed=0)
        else:
            embedded_histories(directory, limit=1, seed=0)
