"""What the kernels that find candidates write (`candidates.cuh`), and random graphs to find them in."""

from __future__ import annotations

import numpy as np
from cuda_kernels import bitmaps, sets

__all__ = ["UNTOUCHED", "Step", "graph"]

I32 = np.int32
UNTOUCHED = -77


class Step:
    """The memory that each of them writes, and what it must hold afterwards."""

    def __init__(self, visited: list[set[int]], num_items: int, stride: int) -> None:
        self.visited = [set(items) for items in visited]
        self.words = -(-num_items // 32)
        self.bitmap = bitmaps(visited, self.words)
        self.batch, self.stride = len(visited), stride
        self.items = np.full((self.batch, stride), UNTOUCHED, I32)
        self.cursor = np.zeros(self.batch, I32)
        self.count = np.full(self.batch, UNTOUCHED, I32)
        self.tile_start = np.full(self.batch + 1, UNTOUCHED, I32)
        self.ticket = np.zeros(1, I32)
        self.report = np.full(2 * self.batch, UNTOUCHED, I32)

    def plan(self) -> list[np.ndarray]:
        return [self.cursor, self.count, self.tile_start, self.ticket, self.report]

    def check(self, near: list[list[int]], tile_rows: int, frontier_count: list[int]) -> None:
        new = [set(items) - {-1} - seen for items, seen in zip(near, self.visited, strict=True)]
        counts = [len(items) for items in new]
        for b, items in enumerate(new):
            assert sorted(self.items[b, : len(items)].tolist()) == sorted(items)
            assert (self.items[b, len(items) :] == UNTOUCHED).all()
        assert sets(self.bitmap) == [seen | items for seen, items in zip(self.visited, new, strict=True)]
        assert self.count.tolist() == counts
        tiles = [-(-n // tile_rows) for n in counts]
        assert self.tile_start.tolist() == np.cumsum([0, *tiles]).tolist()
        assert self.report.tolist() == [*counts, *frontier_count]
        assert not self.cursor.any() and not self.ticket.any()


def graph(rng: np.random.Generator, num_items: int, degree: int) -> np.ndarray:
    """Random neighbours, rows padded with -1 at their end, some of them empty."""
    table = rng.integers(0, num_items, (num_items, degree)).astype(I32)
    used = rng.integers(0, degree + 1, num_items)
    table[np.arange(degree) >= used[:, None]] = -1
    return table
