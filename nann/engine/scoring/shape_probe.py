"""Whether a user's tensors, and a pair's score, depend on the compiled shape they are computed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.errors import BackendError
from nann.engine.scoring.buckets import BucketGrid, Shape

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Shaped

__all__ = ["made_up_comm_seqs", "made_up_histories", "scores_by_shape", "users_by_shape"]

# Made-up items scored in every shape; a kernel that rounds differently changes 40 % of scores and more,
# so 32 do not all agree by chance. No shape has fewer rows.
_PROBE_ITEMS = 32
# Made-up users encoded in batches of every size. An encoder that rounded differently has been seen to change
# one user in twelve, those with the fullest histories.
_PROBE_USERS = 64


def made_up_histories(num_items: int, length: int) -> Int32[np.ndarray, "users length"]:
    """Full ones: of a user without any, all attention is alike however it was rounded."""
    items = np.random.default_rng(1).integers(0, max(num_items, 1), (_PROBE_USERS, length))
    return items.astype(np.int32)


def made_up_comm_seqs(width: int) -> Float32[np.ndarray, "users width"]:
    """The same, embedded already."""
    return np.random.default_rng(1).standard_normal((_PROBE_USERS, width), dtype=np.float32)


def users_by_shape(
    encode: Callable[[np.ndarray], Sequence[Any]],
    rows: Shaped[np.ndarray, "users width"],
    sizes: Sequence[int],
) -> bool:
    """Encode `rows` in batches of each size; whether every user got the same bits in all of them.

    ``encode(rows)`` gives arrays whose leading rows are those users'.
    """
    seen: list[np.ndarray] = []
    bit_equal = True
    for size in sizes:
        parts = []
        for start in range(0, len(rows), size):
            users = rows[start : start + size]
            parts.append([np.asarray(tensor)[: len(users)] for tensor in encode(users)])
        tensors = [np.concatenate(tensor) for tensor in zip(*parts, strict=True)]
        seen = seen or tensors
        bit_equal = bit_equal and all(map(np.array_equal, tensors, seen))
    return bit_equal


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
