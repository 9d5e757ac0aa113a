"""Whether a pair's score depends on the compiled shape it is computed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.errors import BackendError
from nann.engine.scoring.buckets import BucketGrid, Shape

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = ["scores_by_shape"]

# Made-up items scored in every shape; a kernel that rounds differently changes 40 % of scores and more,
# so 32 do not all agree by chance. No shape has fewer rows.
_PROBE_ITEMS = 32


def scores_by_shape(
    score: Callable[[Shape, np.ndarray | None, Mapping[str, np.ndarray]], Float32[np.ndarray, "tiles rows"]],
    grid: BucketGrid,
    item_tensors: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    all_shapes: bool = True,
) -> bool:
    """Run ``score(shape, tile_query, items)`` in every shape of the grid on the same pairs, of query 0.

    Whether each pair got the same bits in all of them, or without `all_shapes` in the smallest and the
    crossed one, which has no `tile_query`.

    Raises:
        BackendError: a score is not finite.
    """
    rng = np.random.default_rng(0)
    probes = {
        name: rng.standard_normal((_PROBE_ITEMS, *shape)).astype(dtype)
        for name, (shape, dtype) in item_tensors.items()
    }
    seen: np.ndarray | None = None
    bit_equal = True
    tiled = list(grid.shapes())
    shapes = [(shape, False) for shape in (tiled if all_shapes else [min(tiled, key=lambda one: one.pairs)])]
    if grid.crossed_rows is not None:
        shapes.append((Shape(1, grid.crossed_rows), True))
    for shape, crossed in shapes:
        which = np.arange(shape.pairs) % _PROBE_ITEMS
        items = {
            name: probe[which].reshape(shape.tiles, shape.rows, *probe.shape[1:])
            for name, probe in probes.items()
        }
        scores = score(shape, None if crossed else np.zeros(shape.tiles, dtype=np.int32), items)
        if not np.isfinite(scores).all():
            raise BackendError(f"the model's scores are not finite in shape {shape}")
        flat = scores[0] if crossed else scores.reshape(-1)
        seen = flat[:_PROBE_ITEMS] if seen is None else seen
        bit_equal = bit_equal and bool((flat == seen[which]).all())
    return bit_equal
