"""Which shapes the scorer is compiled for, and how ragged candidates are laid out in them.

A compiled program has a fixed shape [tiles, rows]. One query alone is one tile as wide as needed
(`wide`); several queries are cut into tiles of `tile_rows` rows, each of one query, so that the
queries' different candidate counts cost no more padding than half a tile each (`tiled`). On a GPU one
query is tiled too: what fills it is the number of pairs, not the shape of a tile.
docs/adr/0004-scoring-shapes.md has the measurements behind both families.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["TILE_ROWS", "BucketGrid", "Plan", "Segment", "Shape"]

TILE_ROWS = 32
MAX_ROWS = 4096
# Neighbouring sizes differ by 14 to 25 %, so a scored row is padding with a mean probability of 8 to
# 11 % whatever the count. Below 64 rows a program costs the same as one of 64 (dispatch dominates).
_SMALLEST = 64
_FIRST_OCTAVE = 256
_STEPS_PER_OCTAVE = 4


def _sizes(smallest: int, largest: int) -> list[int]:
    """Pairs of the compiled shapes from `smallest` to `largest`: multiples of 32 below 256, then four
    sizes an octave; `largest` itself is one."""
    sizes = list(range(_SMALLEST, _FIRST_OCTAVE, TILE_ROWS))
    octave = _FIRST_OCTAVE
    while octave < largest:
        sizes += [octave + octave * step // _STEPS_PER_OCTAVE for step in range(_STEPS_PER_OCTAVE)]
        octave *= 2
    return [*(size for size in sizes if smallest <= size < largest), largest]


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

    ``max_rows`` bounds the pairs of one call; larger work is chunked. ``wide=False`` leaves out the
    shapes of one wide tile. With ``crossed_rows`` there is also a program that scores so many items
    for each of `max_batch` users at once (`Tiles` without a `tile_query`).
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_rows: int = MAX_ROWS,
        tile_rows: int = TILE_ROWS,
        wide: bool = True,
        crossed_rows: int | None = None,
    ) -> None:
        if tile_rows % TILE_ROWS or max_rows < 2 * tile_rows or max_rows % tile_rows:
            raise ValueError(
                f"tile_rows must be a multiple of {TILE_ROWS}; max_rows one of tile_rows, at least twice it"
            )
        self.max_batch = max_batch
        self.max_rows = max_rows
        self.tile_rows = tile_rows
        self.crossed_rows = crossed_rows
        # A step may well be smaller than four tiles, but a program of one costs no less.
        smallest = _SMALLEST if wide else min(4 * tile_rows, max_rows)
        sizes = _sizes(smallest, max_rows)
        self._wide = tuple(sizes) if wide else ()
        tiled = tuple(size // tile_rows for size in sizes if size % tile_rows == 0)
        self._tiled = tiled if max_batch > 1 or not wide else ()

    @property
    def max_tiles(self) -> int:
        """Tiles of the largest tiled shape."""
        return self._tiled[-1]

    @property
    def scan_rows(self) -> int:
        """Items that a scan of the corpus scores for each query between two merges."""
        # A merge costs about as much as a call of the smallest shape; several calls amortise it.
        return 4 * self.max_rows if self.crossed_rows is None else 16 * self.crossed_rows

    def shapes(self) -> Iterator[Shape]:
        """Every shape that `plan` and `tiles_for` may name, smallest first."""
        for rows in self._wide:
            yield Shape(1, rows)
        for tiles in self._tiled:
            yield Shape(tiles, self.tile_rows)

    def tiles_for(self, n_tiles: int) -> int:
        """The tiles of the smallest tiled shape that holds `n_tiles`, at most `max_tiles`."""
        return self._tiled[bisect_left(self._tiled, n_tiles)]

    def plan(self, row_splits: Sequence[int]) -> Iterator[Plan]:
        """Calls that together score every candidate of every query once."""
        starts = list(row_splits[:-1])
        stops = row_splits[1:]
        active = [b for b, stop in enumerate(stops) if stop > starts[b]]
        for b in active:  # where one query alone fills the widest shape, a pair is cheapest
            while self._wide and (len(active) == 1 or stops[b] - starts[b] >= self.max_rows):
                end = min(stops[b], starts[b] + self.max_rows)
                rows = self._wide[bisect_left(self._wide, end - starts[b])]
                yield Plan(Shape(1, rows), (Segment(b, starts[b], end, 0),))
                starts[b] = end
                if end == stops[b]:
                    break
        yield from self._plan_tiled([b for b in active if stops[b] > starts[b]], starts, stops)

    def _plan_tiled(
        self, active: Sequence[int], starts: Sequence[int], stops: Sequence[int]
    ) -> Iterator[Plan]:
        segments: list[Segment] = []
        used = 0
        for query in active:
            start, stop = starts[query], stops[query]
            while start < stop:
                if used == self.max_tiles:
                    yield Plan(Shape(used, self.tile_rows), tuple(segments))
                    segments, used = [], 0
                end = min(stop, start + (self.max_tiles - used) * self.tile_rows)
                segments.append(Segment(query, start, end, used * self.tile_rows))
                used += -(-(end - start) // self.tile_rows)
                start = end
        if segments:
            yield Plan(Shape(self.tiles_for(used), self.tile_rows), tuple(segments))
