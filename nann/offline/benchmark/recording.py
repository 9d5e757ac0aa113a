"""A scorer that notes what a search asks of it, so that the same calls can be made without the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nann.engine.backend import Tiles
from nann.engine.scoring.buckets import BucketGrid, Plan

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

    from nann.engine.scoring.scorer import Scorer

__all__ = ["RecordedSearch", "RecordingScorer", "ScoreCall"]

_ALIGNMENT_BYTES = 64  # XLA takes an input without copying it only when it is aligned to a cache line


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """One call of the model: its inputs (copies), and what of them is real."""

    tiles: Tiles
    plan: Plan

    @property
    def real_pairs(self) -> int:
        return sum(segment.stop - segment.start for segment in self.plan.segments)


@dataclass(frozen=True, slots=True)
class RecordedSearch:
    """Every call of the scorer by one search: `encoder` once with `rows`, then `calls` in their order."""

    encoder: Literal["history", "comm_seq"]
    rows: np.ndarray
    calls: list[ScoreCall] = field(default_factory=list)

    @property
    def real_pairs(self) -> int:
        """(user, item) pairs that the search wanted scored."""
        return sum(call.real_pairs for call in self.calls)

    @property
    def scored_rows(self) -> int:
        """Pairs that the model was given, padding included."""
        return sum(call.plan.shape.pairs for call in self.calls)

    def encode(self, scorer: Scorer) -> Any:
        """The search's user tensors, computed again."""
        return getattr(scorer, f"encode_{self.encoder}")(self.rows)

    def replay(self, scorer: Scorer) -> None:
        """Make the same calls again, one after the other, with nothing in between."""
        users = self.encode(scorer)
        for call in self.calls:
            scorer.score(users, call.tiles)

    def in_one_call(self, grid: BucketGrid) -> list[ScoreCall]:
        """Calls that score the same pairs all at once: one, or as few as `grid`'s largest shape allows."""
        names = sorted(self.calls[0].tiles.items) if self.calls else []
        rows = {name: self._real_rows(name) for name in names}
        splits = [0]
        for query in range(len(self.rows)):
            splits.append(splits[-1] + sum(len(part) for part in rows[names[0]][query]) if names else 0)
        flat = {name: np.concatenate([part for parts in rows[name] for part in parts]) for name in names}
        return [ScoreCall(_tiles(plan, flat), plan) for plan in grid.plan(splits)]

    def _real_rows(self, name: str) -> list[list[np.ndarray]]:
        """Rows of one item tensor that are no padding, by query, in the order they were scored."""
        found: list[list[np.ndarray]] = [[] for _ in range(len(self.rows))]
        for call in self.calls:
            array = call.tiles.items[name]
            flat = array.reshape(-1, *array.shape[2:])
            for segment in call.plan.segments:
                found[segment.query].append(flat[segment.row : segment.row + segment.stop - segment.start])
        return found


class RecordingScorer:
    """Passes every call on to `scorer`; between `start` and `stop` it also keeps their inputs.

    For the lanes of a CPU. Recording is for one search at a time, passing on for any number of threads.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._recording = False
        self._recorded: RecordedSearch | None = None

    @property
    def grid(self) -> BucketGrid:
        return self._scorer.grid

    @property
    def takes_comm_seq(self) -> bool:
        return self._scorer.takes_comm_seq

    @property
    def n_compilations(self) -> int:
        return self._scorer.n_compilations

    def encode_history(self, history: Int32[np.ndarray, "batch length"]) -> Any:
        if self._recording:
            self._recorded = RecordedSearch("history", history.copy())
        return self._scorer.encode_history(history)

    def encode_comm_seq(self, comm_seq: Float32[np.ndarray, "batch width"]) -> Any:
        if self._recording:
            self._recorded = RecordedSearch("comm_seq", comm_seq.copy())
        return self._scorer.encode_comm_seq(comm_seq)

    def score(self, users: Any, tiles: Tiles) -> Any:
        if self._recording:
            assert self._recorded is not None
            self._recorded.calls.append(ScoreCall(_copied(tiles), Plan(tiles.shape, tiles.place)))
        return self._scorer.score(users, tiles)

    def warm_up(self) -> bool:
        return self._scorer.warm_up()

    def start(self) -> None:
        """Keep the inputs of the calls that follow."""
        self._recording, self._recorded = True, None

    def stop(self) -> RecordedSearch:
        """End the recording and return it. RuntimeError when the scorer was not called."""
        recorded, self._recorded, self._recording = self._recorded, None, False
        if recorded is None:
            raise RuntimeError("no search ran between start and stop")
        return recorded


def _tiles(plan: Plan, flat: Mapping[str, np.ndarray]) -> Tiles:
    shape = plan.shape
    tile_query = np.zeros(shape.tiles, dtype=np.int32)
    items = {name: _aligned((shape.pairs, *rows.shape[1:]), rows.dtype) for name, rows in flat.items()}
    for segment in plan.segments:
        stop = segment.row + segment.stop - segment.start
        tile_query[segment.row // shape.rows : (stop - 1) // shape.rows + 1] = segment.query
        for name, rows in flat.items():
            items[name][segment.row : stop] = rows[segment.start : segment.stop]
    shaped = {name: rows.reshape(shape.tiles, shape.rows, *rows.shape[1:]) for name, rows in items.items()}
    return Tiles(shape, tile_query, shaped, plan.segments)


def _copied(tiles: Tiles) -> Tiles:
    items = {}
    for name, array in tiles.items.items():
        items[name] = _aligned(array.shape, array.dtype)
        items[name][...] = array
    assert tiles.tile_query is not None
    return Tiles(tiles.shape, tiles.tile_query.copy(), items, tiles.place)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(n_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[offset : offset + n_bytes].view(dtype).reshape(shape)
