"""Random sequences of primitives on the device against the CPU backend, which the contract suite tests."""

from __future__ import annotations

import pytest
from gpu_place import Place
from gpu_sequences import Case, cpu_lane, cuda_lane, run_sequence

from nann.engine.cuda.lane_memory import LaneLimits
from nann.engine.cuda.modules import BlockSizes

# Small blocks make many blocks, pieces and rounds out of little work.
SMALL = BlockSizes(
    expand_block=32,
    gate_block=32,
    gate_sums=4,
    gather_block=32,
    gather_rows=16,
    merge_block=64,
    sort_piece=64,
    filter_block=32,
    scan_tile=32,
)


def compare(case: Case, sequences: int, **lane: object) -> None:
    cpu, on_host = cpu_lane(case)
    cuda, on_device = cuda_lane(case, **lane)
    for seed in range(sequences):
        wanted = run_sequence(case, cpu, on_host, seed)
        assert run_sequence(case, cuda, on_device, seed) == wanted, f"sequence {seed}"


def test_small_blocks_over_a_small_corpus(place: Place) -> None:
    case = Case.random(1, num_items=130, degree=5, batch=4, max_rows=256)
    compare(case, 2 * place.sequences, sizes=SMALL, limits=LaneLimits(8, 2, 16))


@pytest.mark.parametrize(("batch", "tile_rows"), [(1, 32), (4, 64), (64, 64)])
def test_real_blocks_over_a_larger_corpus(place: Place, batch: int, tile_rows: int) -> None:
    if batch > 4 and not place.on_gpu:
        batch = 8
    num_items = place.num_items + 13  # no multiple of 32
    case = Case.random(
        2, num_items=num_items, degree=32, batch=batch, max_rows=64 * tile_rows, tile_rows=tile_rows
    )
    compare(case, max(1, place.sequences // 4))
