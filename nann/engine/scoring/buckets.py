"""Which shapes the scorer is compiled for, and how ragged candidates are laid out in them.

A compiled program has a fixed shape [tiles, rows]. One query alone is one tile as wide as needed
(`wide`); several queries are cut into tiles of `TILE_ROWS` rows, each of one query, so that the
queries' different candidate counts cost no more padding than half a tile each (`tiled`).
docs/adr/0004-scoring-shapes.md has the measurements behind both grids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["TILE_ROWS", "BucketGrid", "Plan", "Segment", "Shape"]

TILE_ROWS = 32
MAX_ROWS = 4096
# Neighbouring sizes differ by 14 to 25 %, so a scored row is padding with a mean probability of 8 to
# 11 % whatever the count. Below 64 rows a program costs the same as one of 64 (dispatch dominates).
_WIDE = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_WIDE_LARGE = (1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of one compiled program: ``tiles`` × ``rows`` (user, item) pairs."""

    tiles: int
    rows: int

    @property
    def pairs(self) -> int:
        return self.tiles * self.rows


@dataclass(frozen=True, slots=True)
class Segment:
    """Candidates ``start:stop`` (flat) of query ``query`` fill the shape's rows from flat ``row`` on."""

    query: int
    start: int
    stop: int
    row: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One call of the scorer: its shape and what goes where."""

    shape: Shape
    segments: tuple[Segment, ...]


class BucketGrid:
    """The compiled shapes for batches of up to ``max_batch`` queries.

    ``max_rows`` bounds the pairs of one call; larger work is chunked.
    """

    def __init__(self, *, max_batch: int, max_rows: int = MAX_ROWS) -> None:
        if max_rows < 2 * TILE_ROWS or max_rows % TILE_ROWS:
            raise ValueError(f"max_rows must be a multiple of {TILE_ROWS} of at least {2 * TILE_ROWS}")
        sizes = [size for size in (*_WIDE, *_WIDE_LARGE) if size < max_rows]
        self._wide = (*sizes, max_rows)
        self._tiled = tuple(size // TILE_ROWS for size in self._wide) if max_batch > 1 else ()
        self.max_rows = max_rows

    def shapes(self) -> Iterator[Shape]:
        """Every shape that `plan` may name, smallest first."""
        for rows in self._wide:
            yield Shape(1, rows)
        for tiles in self._tiled:
            yield Shape(tiles, TILE_ROWS)

    def plan(self, row_splits: Sequence[int]) -> Iterator[Plan]:
        """Calls that together score every candidate of every query once, in candidate order."""
        active = [b for b in range(len(row_splits) - 1) if row_splits[b + 1] > row_splits[b]]
        if len(active) == 1:
            yield from self._plan_wide(active[0], row_splits[active[0]], row_splits[active[0] + 1])
        elif active:
            yield from self._plan_tiled(active, row_splits)

    def _plan_wide(self, query: int, start: int, stop: int) -> Iterator[Plan]:
        while start < stop:
            end = min(stop, start + self.max_rows)
            rows = next(size for size in self._wide if size >= end - start)
            yield Plan(Shape(1, rows), (Segment(query, start, end, 0),))
            start = end

    def _plan_tiled(self, active: Sequence[int], row_splits: Sequence[int]) -> Iterator[Plan]:
        max_tiles = self._tiled[-1]
        segments: list[Segment] = []
        used = 0
        for query in active:
            start, stop = row_splits[query], row_splits[query + 1]
            while start < stop:
                if used == max_tiles:
                    yield Plan(Shape(used, TILE_ROWS), tuple(segments))
                    segments, used = [], 0
                end = min(stop, start + (max_tiles - used) * TILE_ROWS)
                segments.append(Segment(query, start, end, used * TILE_ROWS))
                used += -(-(end - start) // TILE_ROWS)
                start = end
        if segments:
            tiles = next(size for size in self._tiled if size >= used)
            yield Plan(Shape(tiles, TILE_ROWS), tuple(segments))
