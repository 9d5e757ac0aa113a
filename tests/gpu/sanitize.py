"""Drives every kernel of the engine through random searches, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

No XLA in here: only the kernels of `nann/engine/cuda/kernels`. Each search is compared with the CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

_SEQUENCES = 12


def main() -> int:
    """0 when every search was that of the CPU."""
    if os.environ.get("NANN_GPU_TESTS") == "shim":
        from cuda_shim.fixtures import installed

        with installed(seed=5):
            return _drive(2)
    import cupy

    # Every array an allocation of its own: inside a pool nobody notices a read past the end.
    cupy.cuda.set_allocator(None)
    return _drive(_SEQUENCES)


def _drive(sequences: int) -> int:
    from gpu_sequences import Case, cpu_lane, cuda_lane, run_sequence

    from nann.engine.cuda.lane_memory import LaneLimits
    from nann.engine.cuda.modules import BlockSizes

    small = BlockSizes(
        expand_block=64,
        gate_block=64,
        gather_block=64,
        gather_rows=16,
        merge_block=64,
        sort_piece=64,
        filter_block=64,
    )
    cases = (
        (Case.random(1, num_items=130, degree=5, batch=4, max_rows=256), small, LaneLimits(8, 2, 16)),
        (Case.random(2, num_items=3001, degree=32, batch=8, max_rows=4096, tile_rows=64), None, None),
    )
    wrong = 0
    for case, sizes, limits in cases:
        cpu, on_host = cpu_lane(case)
        cuda, on_device = cuda_lane(case, sizes=sizes, limits=limits)
        for seed in range(sequences):
            same = run_sequence(case, cuda, on_device, seed) == run_sequence(case, cpu, on_host, seed)
            wrong += not same
        print(f"{case.num_items} items: {sequences} searches, {cuda.launches} launches", flush=True)
    print(f"{wrong} searches differ from the CPU's")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
