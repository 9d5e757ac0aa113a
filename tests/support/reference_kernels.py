"""The engine's inner loops as plain Python over sets and lists: what `cpu/kernels.py` must agree with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["ReferencePool", "bitmap_of", "first_sights", "ranked_pairs", "set_of"]


def bitmap_of(items: Iterable[int], num_items: int) -> np.ndarray:
    """Item indices as the backend's visited bitmap: bit ``i % 64`` of word ``i // 64``."""
    words = [0] * -(-num_items // 64)
    for item in items:
        words[item // 64] |= 1 << (item % 64)
    return np.array(words, dtype=np.uint64)


def set_of(bitmap: np.ndarray) -> set[int]:
    """The inverse of `bitmap_of`."""
    return {64 * w + b for w, word in enumerate(bitmap.tolist()) for b in range(64) if word >> b & 1}


def first_sights(items: Iterable[int], visited: set[int]) -> list[int]:
    """The items not visited yet, in order, once each; they are visited from now on."""
    new = []
    for item in items:
        if item not in visited:
            visited.add(item)
            new.append(item)
    return new


def ranked_pairs(pairs: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    """(score, item index) by score descending, then item index ascending; -0.0 equals 0.0."""
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


class ReferencePool:
    """One query's pool: (score, item) best first, and which items were expanded."""

    def __init__(self) -> None:
        self.ranked: list[tuple[float, int]] = []
        self.expanded: set[int] = set()
        self.nonfinite = 0

    def merge(
        self,
        items: Sequence[int],
        scores: Sequence[float],
        *,
        keep: int,
        capacity: int,
        allowed: Sequence[bool] | None = None,
    ) -> None:
        """Pool = the best `capacity` of pool and the best `keep` of the new ones."""
        new = []
        for j, (item, score) in enumerate(zip(items, scores, strict=True)):
            if not np.isfinite(score):
                self.nonfinite += 1
            elif allowed is None or allowed[j]:
                new.append((float(score), int(item)))
        held = self.ranked[:capacity]
        self.ranked = ranked_pairs([*held, *ranked_pairs(new)[:keep]])[:capacity]
        self.expanded &= {item for _, item in self.ranked}

    def select(self, width: int) -> list[int]:
        """The `width` best items not expanded yet, expanded from now on."""
        chosen = [item for _, item in self.ranked if item not in self.expanded][:width]
        self.expanded |= set(chosen)
        return chosen
