"""`gather.cu` against NumPy: every candidate's rows in its query's tiles, zeros elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import REAL, SMALL, Device, program

from nann.engine.cuda.modules import BlockSizes

I32, I64 = np.int32, np.int64
LOG2 = {16: 4, 4: 2, 2: 1, 1: 0}  # of the bytes in a word


def random_tables(rng: np.random.Generator, num_items: int, which: list[str]) -> list[np.ndarray]:
    shapes = {
        "16 bytes": ((8,), np.float16),
        "640 bytes": ((320,), np.float16),
        "4 bytes": ((3,), np.float32),
        "2 bytes": ((3, 5), np.float16),
        "1 byte": ((5,), np.uint8),
        "a number": ((), np.float32),
    }
    tables = []
    for name in which:
        shape, dtype = shapes[name]
        size = num_items * int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = rng.integers(0, 256, size).astype(np.uint8)
        tables.append(raw.view(dtype).reshape(num_items, *shape))
    return tables


def check(
    sizes: BlockSizes,
    counts: list[int],
    *,
    which: list[str],
    tile_rows: int = 32,
    first_tile: int = 0,
    tiles: int | None = None,
    ragged: bool = False,
    seed: int = 0,
) -> None:
    rng = np.random.default_rng(seed)
    num_items, batch = 97, len(counts)
    per_query = [-(-n // tile_rows) for n in counts]
    tile_start = np.cumsum([0, *per_query]).astype(I32)
    tiles = max(1, int(tile_start[-1])) if tiles is None else tiles
    stride = max([1, *counts])
    if ragged:
        item_start = np.cumsum([0, *counts])[:-1].astype(I64)
        items = rng.integers(0, num_items, max(1, sum(counts))).astype(I32)
    else:
        item_start = np.arange(batch) * stride
        items = rng.integers(0, num_items, (batch, stride)).astype(I32).reshape(-1)
    tables = random_tables(rng, num_items, which)
    with Device() as device:
        outs, descriptors = [], []
        for table in tables:
            word = next(size for size in LOG2 if table[0].nbytes % size == 0)
            from_address, _ = device.put(table)
            to_address, out = device.put(np.zeros((tiles, tile_rows, table[0].nbytes), np.uint8))
            outs.append(out)
            out[...] = 0xEE
            descriptors.append([from_address, to_address, table[0].nbytes // word, LOG2[word]])
        query_address, owner = device.put(np.full(tiles, -7, I32))
        arrays = (
            np.array(descriptors, I64),
            items,
            item_start.astype(I64),
            np.array(counts, I32),
            tile_start,
        )
        on_tables, on_items, on_starts, on_counts, on_tile_start = (device.put(array)[0] for array in arrays)
        program("gather.cu", sizes)["gather"].launch(
            (tiles, tile_rows // sizes.gather_rows),
            (sizes.gather_block,),
            [
                *(on_tables, I32(len(which)), on_items, on_starts if ragged else np.uint64(0), I64(stride)),
                *(on_counts, on_tile_start, I32(batch), I32(first_tile), I32(tile_rows), query_address),
            ],
            shared_bytes=4 * sizes.gather_rows,
            seed=seed,
        )
        for t in range(tiles):
            tile, b, picked = first_tile + t, 0, np.empty(0, I32)
            if tile < tile_start[-1]:
                b = int(np.searchsorted(tile_start, tile, "right")) - 1
                own = (tile - tile_start[b]) * tile_rows
                picked = items[item_start[b] + own :][: min(counts[b] - own, tile_rows)]
            assert owner[t] == b
            for table, out in zip(tables, outs, strict=True):
                rows = table.view(np.uint8).reshape(num_items, -1)[picked]
                np.testing.assert_array_equal(out[t, : picked.size], rows)
                assert not out[t, picked.size :].any()


ALL = ["16 bytes", "4 bytes", "2 bytes", "1 byte", "a number"]


@pytest.mark.parametrize("counts", [[1], [31], [32], [33], [0, 5, 0, 0, 70, 0], [64, 1, 32], [0, 0, 3]])
@pytest.mark.parametrize("ragged", [False, True])
def test_rows_of_every_width_in_every_query(counts, ragged) -> None:
    check(SMALL, counts, which=ALL, ragged=ragged, seed=sum(counts))


@pytest.mark.parametrize("tile_rows", [16, 32, 64])
def test_tiles_of_several_blocks(tile_rows) -> None:
    check(SMALL, [70, 0, 17], which=["16 bytes", "2 bytes"], tile_rows=tile_rows)


def test_tiles_past_the_last_query_belong_to_the_first_and_are_zero() -> None:
    check(SMALL, [0, 33, 0], which=ALL, tiles=5)


def test_no_candidate_at_all() -> None:
    check(SMALL, [0, 0], which=["4 bytes"], tiles=2)


@pytest.mark.parametrize("first_tile", [1, 3, 4])
def test_a_later_call_takes_up_where_the_last_one_ended(first_tile) -> None:
    check(SMALL, [70, 33, 0, 2], which=["16 bytes", "a number"], first_tile=first_tile, tiles=3)


def test_a_batch_of_64() -> None:
    rng = np.random.default_rng(0)
    check(SMALL, rng.integers(0, 60, 64).tolist(), which=["4 bytes"])


@pytest.mark.parametrize("seed", range(2))
def test_the_real_block(seed) -> None:
    check(REAL, [130, 0, 1, 64], which=["640 bytes", *ALL], tile_rows=64, seed=seed)
