"""Two questions about compiled shapes: how many rows a tile should have, and what choosing a bucket saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.scoring.buckets import BucketGrid
from nann.engine.scoring.pjrt_programs import PjrtPrograms
from nann.engine.scoring.programs import ENCODE_HISTORY, SCORE

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["TileRows", "always_largest", "measure_tile_rows", "padding", "step_counts"]

_REPEATS = 8


@dataclass(frozen=True, slots=True)
class TileRows:
    """The model's program at one number of rows a tile. `padding` is rows computed for each candidate of a
    real search; `useful_pairs_per_s` is the rate without them."""

    tile_rows: int
    pairs: int
    ms: float
    pairs_per_s: float
    padding: float

    @property
    def useful_pairs_per_s(self) -> float:
        return self.pairs_per_s / self.padding


def step_counts(hits: Sequence[Any], batch: int) -> list[list[int]]:
    """Candidates of each query (inner) in each step (outer) of the searches that gave `hits`."""
    steps: list[list[int]] = []
    for start in range(0, len(hits), batch):
        counts = [found.explain["scored_per_step"] for found in hits[start : start + batch]]
        steps += [[row[step] for row in counts if len(row) > step] for step in range(max(map(len, counts)))]
    return steps


def padding(steps: Sequence[Sequence[int]], grid: BucketGrid) -> float:
    """Rows that the grid's tiled shapes compute for each candidate of these steps, at least 1."""
    computed = 0
    for counts in steps:
        tiles = sum(-(-count // grid.tile_rows) for count in counts)
        whole, rest = divmod(tiles, grid.max_tiles)
        computed += whole * grid.max_tiles + (grid.tiles_for(rest) if rest else 0)
    return computed * grid.tile_rows / max(1, sum(map(sum, steps)))


def measure_tile_rows(
    programs: PjrtPrograms,
    item_state: Mapping[str, np.ndarray],
    history: Int32[np.ndarray, "batch length"],
    steps: Sequence[Sequence[int]],
) -> TileRows:
    """Time the largest tiled program over random items; `steps` decide the padding."""
    grid, device = programs.grid, programs.device
    tiles, rows = grid.max_tiles, grid.tile_rows
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(next(iter(item_state.values()))), tiles * rows)
    items = [
        device.put(item_state[name][chosen].reshape(tiles, rows, *item_state[name].shape[1:]))
        for name in sorted(item_state)
    ]
    tile_query = device.put(np.sort(rng.integers(0, len(history), tiles)).astype(np.int32))
    encode, _ = programs.compile(ENCODE_HISTORY, (programs.batches[-1],))
    padded = np.full((programs.batches[-1], history.shape[1]), -1, dtype=np.int32)
    padded[: len(history)] = history
    users = encode([device.put(padded), *programs.weights[ENCODE_HISTORY]])
    score, _ = programs.compile(SCORE, (tiles, rows))
    arguments = [*users, tile_query, *items, *programs.weights[SCORE]]
    ms = 1e3 * _median_s(lambda: score(arguments)[0])
    return TileRows(rows, tiles * rows, ms, 1e3 * tiles * rows / ms, padding(steps, grid))


def _median_s(call: Callable[[], Any]) -> float:
    call().block_until_ready()
    times = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        outputs = [call() for _ in range(4)]
        outputs[-1].block_until_ready()  # one stream runs them in order
        times.append((time.perf_counter() - started_s) / len(outputs))
    return statistics.median(times)


class _Largest(BucketGrid):
    """A grid that never looks how many tiles there are."""

    def tiles_for(self, n_tiles: int) -> int:
        return self.max_tiles


@contextmanager
def always_largest(programs: PjrtPrograms) -> Iterator[None]:
    """Inside the block every step of every search is scored in the largest tiled shape."""
    grid = programs.grid
    programs.grid = _Largest(
        max_batch=grid.max_batch,
        max_rows=grid.max_rows,
        tile_rows=grid.tile_rows,
        wide=False,
        crossed_rows=grid.crossed_rows,
    )
    try:
        yield
    finally:
        programs.grid = grid
