"""A lane cut down to what its hand-overs are about: steps whose candidates depend on the scores before."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda_shim.errors import Misuse
from cuda_shim.machine import Machine
from cuda_shim.program import host_view
from fake_xla import FakeXla, score_by_rows

__all__ = ["SEEDS", "STEPS", "TILES", "Lane", "calls", "truth"]

N, DIM, ROWS, USERS, STEPS = 40, 4, 3, 2, 6
TILES = (2, 4)  # two shapes, so that views are made of both and used again
SEEDS = range(40)

TABLE = np.random.default_rng(0).integers(-3, 4, (N, DIM)).astype(np.float16)
USER_VECTORS = np.random.default_rng(1).integers(-3, 4, (USERS, DIM)).astype(np.float32)


def chosen(state: int, chunk: int, tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """Which items a call scores, and for whom: [tiles, rows] and [tiles]."""
    rng = np.random.default_rng([state % 2**31, chunk])  # what was not written yet may be negative
    return rng.integers(0, N, (tiles, ROWS)), rng.integers(0, USERS, tiles).astype(np.int32)


def digest(state: int, scores: np.ndarray) -> int:
    """A new state that any other score would have made another."""
    return zlib.crc32((scores + np.float32(0)).tobytes(), state) % 2**31  # + 0: there is no -0


def calls(step: int) -> list[int]:
    """The tiles of each call of a step: one or two calls, of both shapes."""
    return [TILES[step % 2]] if step % 3 else [TILES[1], TILES[0]]


def truth() -> int:
    state = 1
    for step in range(STEPS):
        found = 0
        for chunk, tiles in enumerate(calls(step)):
            items, tile_query = chosen(state, chunk, tiles)
            found = digest(found, score_by_rows(slice(None), tile_query, TABLE[items], USER_VECTORS))
        state = digest(state, np.array([found]))
    return state


class Lane:
    """Steps of a search whose candidates depend on the scores before: gather → score → collect, merge."""

    def __init__(self, cupy: Any, machine: Machine, xla: FakeXla) -> None:
        self.cupy, self.machine, self.xla = cupy, machine, xla
        self.stream = cupy.cuda.Stream(non_blocking=True)
        with self.stream:
            self.tile_query = cupy.empty((TILES[-1],), np.int32)
            self.items = cupy.empty((TILES[-1], ROWS, DIM), np.float16)
            self.state = cupy.empty((2,), np.int64)  # of the step, and of its calls so far

    def enqueue(self, name: str, run: Callable[[], None]) -> None:
        self.machine.enqueue(self.machine.queue(self.stream.ptr), name, run)

    def memory(self, array: Any) -> Callable[[], np.ndarray]:
        """Reads and writes an array without keeping it, as a kernel does that was given its address."""
        address, shape, dtype, machine = array.data.ptr, array.shape, array.dtype, self.machine

        def view() -> np.ndarray:
            if machine.space.find(address, int(np.prod(shape)) * dtype.itemsize) is None:
                raise Misuse(f"the lane touches freed memory at {address:#x}")
            return host_view(address, shape, dtype)

        return view

    def gather(self, chunk: int, tiles: int) -> tuple[Any, Any]:
        tile_query, items = self.tile_query[:tiles], self.items[:tiles]
        state, to_query, to_items = map(self.memory, (self.state, tile_query, items))

        def write_items() -> None:
            to_items()[...] = TABLE[chosen(int(state()[0]), chunk, tiles)[0]]

        def write_query() -> None:
            to_query()[...] = chosen(int(state()[0]), chunk, tiles)[1]

        self.enqueue("gather items", write_items)
        self.enqueue("gather tile_query", write_query)
        return tile_query, items

    def collect(self, scores: Any) -> None:
        state, given = self.memory(self.state), self.memory(scores)

        def run() -> None:
            state()[1] = digest(int(state()[1]), given())

        self.enqueue("collect", run)

    def merge(self) -> None:
        state = self.memory(self.state)

        def run() -> None:
            state()[...] = digest(int(state()[0]), state()[1:]), 0

        self.enqueue("merge", run)

    def search(self, handover: Any) -> int:
        """A whole search by way of a handover; the last state."""
        users = self.xla.put(USER_VECTORS)
        state = self.memory(self.state)

        def begin() -> None:
            state()[...] = 1, 0

        self.enqueue("begin", begin)
        for step in range(STEPS):
            for chunk, tiles in enumerate(calls(step)):
                tile_query, items = handover.lend(*self.gather(chunk, tiles))
                output = self.xla.run(score_by_rows, (tiles, ROWS), tile_query, items, users)
                scores = handover.take(output)
                del tile_query, items, output
                self.collect(scores)
                del scores
            self.merge()
        self.stream.synchronize()
        return int(state()[0])
