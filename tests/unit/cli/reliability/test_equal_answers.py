"""A few queries over every surface of a golden artifact, and that one wrong answer is seen."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from golden import GOLDEN, load_engine
from transports import Transports

from nann.cli.reliability.equal_answers import EqualAnswers, compare_surfaces
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Hits

LEVEL_TOPN = (16, 24, 24, 24, 24, 10)
N_QUERIES = 40
SURFACES = {
    "REST",
    "REST queries",
    "gRPC Retrieve",
    "gRPC BatchRetrieve",
    ":predict inputs",
    ":predict instances",
    "Predict",
}


async def compared(tmp_path: Path, load: Any, level_topn: Sequence[int] = LEVEL_TOPN) -> EqualAnswers:
    shutil.copytree(GOLDEN / "artifact", tmp_path / "nann" / "2")
    async with Transports(tmp_path, FakeEngine(), load_engine=load).open() as world:
        shape = world.service.metadata()
        # Whole numbers, which the golden model scores exactly in every shape.
        size = (N_QUERIES, shape.history_length, shape.input_dim)
        histories = np.random.default_rng(7).integers(-3, 4, size).astype(np.float16)
        return await compare_surfaces(
            f"http://127.0.0.1:{world.address[1]}",
            f"grpc://127.0.0.1:{world.grpc_port}",
            "nann",
            histories,
            level_topn,
            in_flight=3,
            seed=1,
        )


@pytest.mark.slow
async def test_equal_answers_are_counted_over_every_surface(tmp_path: Path) -> None:
    result = await compared(tmp_path, lambda path: load_engine(path, max_batch=4))
    assert result.kept, result.words()
    # Alone over five surfaces, in batches over five.
    assert result.answers == 10 * N_QUERIES
    assert result.short == 0
    assert sum(result.engine_batches.values()) > 0


@pytest.mark.slow
async def test_answers_shorter_than_k_are_equal_too(tmp_path: Path) -> None:
    # Five entry points, and no step that adds to them.
    result = await compared(tmp_path, lambda path: load_engine(path, max_batch=4), (2, 2, 2, 2, 2, 100))
    assert result.kept, result.words()
    assert result.short == N_QUERIES


class _Rounding:
    """An engine whose scores, or items, are others when a search is shared."""

    def __init__(self, engine: SearchEngine, wrong: str) -> None:
        self._engine = engine
        self._wrong = wrong

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def search(self, batch: Sequence[Any], lane: int, *more: Any, **others: Any) -> list[Hits]:
        found = self._engine.search(batch, lane, *more, **others)
        if len(batch) > 1:
            for hits in found:
                if self._wrong == "scores":
                    hits.scores[-1] = float(np.nextafter(np.float32(hits.scores[-1]), np.float32(-np.inf)))
                else:
                    hits.item_ids[:2] = reversed(hits.item_ids[:2])
        return found


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["scores", "ids"])
async def test_the_last_bit_of_a_score_and_the_order_of_two_items_are_seen(
    tmp_path: Path, wrong: str
) -> None:
    result = await compared(tmp_path, lambda path: _Rounding(load_engine(path, max_batch=4), wrong))
    assert not result.kept
    seen, other = (result.scores, result.ids) if wrong == "scores" else (result.ids, result.scores)
    # Every surface but the two of single queries is sure to have had a batch.
    assert {
        name for name in SURFACES if "queries" in name or "Batch" in name or "predict" in name.lower()
    } <= set(seen)
    assert not other
    assert result.first is not None
    assert result.first[0] == min(result.unequal_queries)
    assert f"first: query {result.first[0]}: {result.first[1]}" in result.words()
    assert (result.worst > 0) is (wrong == "scores" or result.worst > 0)
