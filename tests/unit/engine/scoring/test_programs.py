"""The file of exported programs, and weights read from where they lie."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from nann.engine.artifacts import WeightSpec
from nann.engine.errors import ArtifactError, BackendError
from nann.engine.scoring.buckets import BucketGrid, Shape
from nann.engine.scoring.programs import (
    ProgramFile,
    encoder_batches,
    program_name,
    read_weights,
    write_program_file,
)
from nann.engine.scoring.shape_probe import made_up_histories, scores_by_shape, users_by_shape

ITEMS = {"item_vector": ((3,), "float16")}


def test_programs_are_read_as_they_were_written(tmp_path: Path) -> None:
    programs = {program_name("score", 2, 32): b"one" * 1000, program_name("encode_user", 4): b"\x00\xff"}
    write_program_file(tmp_path / "a.zip", programs.items())
    file = ProgramFile(tmp_path / "a.zip")
    assert {name: file.module(name) for name in programs} == programs
    assert "score-2x32" in file
    assert "score-1x32" not in file
    assert (tmp_path / "a.zip").stat().st_size < 1000
    with pytest.raises(ArtifactError, match=r"a\.zip: expected a program score-1x32, found none"):
        file.module("score-1x32")


def test_equal_programs_make_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    write_program_file(tmp_path / "a.zip", [("score-1x32", b"module")])
    monkeypatch.setattr(time, "time", lambda: 4e9)
    write_program_file(tmp_path / "b.zip", [("score-1x32", b"module")])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_changed_entry_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("score-1x32.hlo", b"module " * 9)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"module", b"Module", 1))
    with pytest.raises(ArtifactError, match="expected a ZIP file of programs"):
        ProgramFile(path)


@pytest.mark.parametrize(
    ("max_batch", "wanted"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_encoders_take_powers_of_two(max_batch: int, wanted: list[int]) -> None:
    assert encoder_batches(max_batch) == wanted


def test_weights_lie_anywhere_in_a_file(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "data").write_bytes(b"abc" + values.tobytes() + np.int32(7).tobytes())
    weights = {
        "table": WeightSpec(file="data", offset=3, dtype="float32", shape=(2, 3)),
        "scalar": WeightSpec(file="data", offset=27, dtype="int32", shape=()),
        "nothing": WeightSpec(file="data", offset=0, dtype="float32", shape=(0, 4)),
    }
    found = read_weights(tmp_path, weights)
    assert np.array_equal(found["table"], values)
    assert found["scalar"].shape == ()
    assert int(found["scalar"]) == 7
    assert found["nothing"].shape == (0, 4)
    with pytest.raises(ValueError, match="read-only"):
        found["table"][0, 0] = 1


@pytest.mark.parametrize("change", [{"file": "gone"}, {"offset": 20}, {"shape": (9, 9)}])
def test_weights_beyond_their_file_are_an_artifact_error(tmp_path: Path, change: dict) -> None:
    (tmp_path / "data").write_bytes(bytes(31))
    spec = WeightSpec(file="data", offset=3, dtype="float32", shape=(2, 3)).model_copy(update=change)
    with pytest.raises(ArtifactError, match=r"expected float32 .* of weight table from byte"):
        read_weights(tmp_path, {"table": spec})


# -- the probe of shapes -----------------------------------------------------------------------


def _scores(shape: Shape, tile_query: np.ndarray | None, items: dict) -> np.ndarray:
    scores = items["item_vector"].astype(np.float32).sum(-1)
    return scores if tile_query is not None else np.concatenate([scores, scores + 1])


def test_scores_that_are_alike_in_every_shape_are_bit_equal() -> None:
    grid = BucketGrid(max_batch=2, max_rows=128, crossed_rows=64)
    seen: list[tuple[Shape, bool]] = []

    def score(shape: Shape, tile_query: np.ndarray | None, items: dict) -> np.ndarray:
        seen.append((shape, tile_query is None))
        return _scores(shape, tile_query, items)

    assert scores_by_shape(score, grid, ITEMS)
    assert seen == [*((shape, False) for shape in grid.shapes()), (Shape(1, 64), True)]


@pytest.mark.parametrize("crossed", [False, True])
def test_one_score_that_differs_in_one_shape_is_noticed(crossed: bool) -> None:
    def score(shape: Shape, tile_query: np.ndarray | None, items: dict) -> np.ndarray:
        scores = _scores(shape, tile_query, items)
        if (tile_query is None) if crossed else shape == Shape(1, 128):
            scores[0, 40] = np.nextafter(scores[0, 40], np.float32(np.inf))
        return scores

    assert not scores_by_shape(score, BucketGrid(max_batch=2, max_rows=128, crossed_rows=64), ITEMS)


@pytest.mark.parametrize(("wrong", "alike"), [(None, True), ((4, 0), False), ((4, 1), False)])
def test_one_user_who_differs_in_one_size_of_batch_is_noticed(
    wrong: tuple[int, int] | None, alike: bool
) -> None:
    histories = made_up_histories(100, 8)
    assert histories.min() >= 0

    def encode(rows: np.ndarray) -> list[np.ndarray]:
        """Two tensors a user, the rows of others behind them; one bit of the last user is `wrong`."""
        size = 4 if len(rows) > 2 else len(rows)
        tensors = [np.full((5, 8), np.nan, dtype=np.float32), np.zeros((5, 1), dtype=np.float32)]
        tensors[0][: len(rows)] = rows
        tensors[1][: len(rows)] = rows.sum(1, keepdims=True)
        if wrong is not None and wrong[0] == size and (rows[-1] == histories[-1]).all():
            one = tensors[wrong[1]]
            one[len(rows) - 1, 0] = np.nextafter(one[len(rows) - 1, 0], np.float32(np.inf))
        return tensors

    assert users_by_shape(encode, histories, [1, 2, 4]) == alike
    assert users_by_shape(encode, histories[:-1], [1, 2, 4]), "the last batch is not full"


def test_a_score_that_is_not_finite_is_an_error() -> None:
    def score(shape: Shape, tile_query: np.ndarray | None, items: dict) -> np.ndarray:
        return _scores(shape, tile_query, items) * np.float32(np.inf)

    with pytest.raises(BackendError, match="not finite in shape"):
        scores_by_shape(score, BucketGrid(max_batch=2, max_rows=64), ITEMS)
