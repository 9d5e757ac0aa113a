"""Where a version is searched: the backend and the scorer of every lane."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.errors import Unsupported

if TYPE_CHECKING:
    from nann.engine.artifacts import Artifact
    from nann.engine.backend import Backend
    from nann.engine.scoring.scorer import Scorer

__all__ = ["cpu_lanes", "open_lanes", "threads_per_lane"]


def open_lanes(
    artifact: Artifact,
    *,
    device: str,
    scorer: str,
    lanes: int,
    max_batch: int,
    xla_cache_dir: Path | None = None,
    intra_op_threads: int | None = None,
) -> list[tuple[Backend[Any, Any], Scorer]]:
    """The backend and the scorer of every lane; `intra_op_threads` is `threads_per_lane` when not given.

    Raises:
        Unsupported: the device or the scorer is not one this machine or version has.
    """
    if device != "cpu":
        raise Unsupported(f"device {device!r}: this build searches on the CPU only; use --device cpu")
    from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

    model = TensorFlowScorer(
        artifact.directory,
        artifact.manifest,
        max_batch=max_batch,
        xla_cache_dir=xla_cache_dir,
        intra_op_threads=threads_per_lane(lanes) if intra_op_threads is None else intra_op_threads,
    )
    return cpu_lanes(artifact, model, lanes=lanes, max_batch=max_batch)


def cpu_lanes(
    artifact: Artifact, scorer: Scorer, *, lanes: int, max_batch: int
) -> list[tuple[Backend[Any, Any], Scorer]]:
    """Lanes that search on the CPU over shared tables and share one scorer."""
    from nann.engine.cpu.backend import CpuBackend

    # Rows are read in random order, where the 4 KiB pages of a mapped file cost a TLB miss each; NumPy
    # asks for huge pages for arrays of its own.
    neighbors = [np.array(table) for table in artifact.neighbors]
    item_state = {name: np.array(table) for name, table in artifact.item_state.items()}
    return [
        (
            CpuBackend(
                num_items=artifact.num_items,
                neighbors=neighbors,
                item_state=item_state,
                max_batch=max_batch,
                max_pairs=scorer.grid.max_rows,
            ),
            scorer,
        )
        for _ in range(lanes)
    ]


def threads_per_lane(lanes: int) -> int:
    """The processors shared out between the lanes, at least one each.

    On two cores two lanes of one thread answer 14 to 25 % more queries than two lanes of two threads,
    and one query alone is no slower (docs/results.md, "Time").
    """
    return max(1, len(os.sched_getaffinity(0)) // lanes)
