"""A made-up catalogue and its users: clusters within clusters, and several interests a user.

Everything is drawn by NumPy from one seed, so every machine measures the same corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["DIM", "HISTORY_LENGTH", "Corpus", "make_corpus"]

# NANN's embedding and history (reference/nann.md, "Model").
DIM = 64
HISTORY_LENGTH = 50

# Standard deviations of the four levels of the tree: sections around the origin, shelves around their
# section, kinds around their shelf, items around their kind. With the last as large as the others a kind
# overlaps its neighbours, so that near items have no simple boundary between them.
_SPREAD = (1.0, 0.6, 0.4, 0.65)
_ITEMS_A_KIND = 128
_KINDS_A_SHELF = 12
_SHELVES_A_SECTION = 4
_MAX_SECTIONS = 32
# Variance falls along the axes, as in trained embeddings: flat variance in 64 dimensions would make all
# items of a kind equally far from each other.
_AXIS_DECAY, _AXIS_SCALE = 0.6, 6.0
_POPULARITY_EXPONENT = 0.7  # of rank, Zipf-like
_MIN_INTERESTS, _MAX_INTERESTS = 3, 6
_HOME_SHARE = 0.6  # of a user's interests lie in one section
_SIBLING_SHARE = 0.3  # of the behaviours of an interest fall on another kind of the same shelf
_FULL_HISTORY_SHARE = 0.7  # of users; the others have 10 items and more
_MIN_HISTORY = 10


@dataclass(frozen=True, slots=True)
class Corpus:
    """Items and users. ``history`` is oldest first, -1 padded at the end; weights sum to 1."""

    embeddings: Float32[np.ndarray, "N dim"]
    weights: Float32[np.ndarray, " N"]
    history: Int32[np.ndarray, "users length"]

    @property
    def num_items(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True, slots=True)
class _Tree:
    """Which shelf a kind stands on and which section a shelf, and the kinds' items, grouped by kind."""

    shelf_of_kind: np.ndarray
    section_of_shelf: np.ndarray
    items: np.ndarray
    first: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.first)


def make_corpus(num_items: int, num_users: int, *, seed: int = 0) -> Corpus:
    """`num_items` embeddings of about unit length, and histories of `num_users` users.

    Raises:
        ValueError: fewer than 256 items, too few for two kinds of them.
    """
    if num_items < 2 * _ITEMS_A_KIND:
        raise ValueError(f"a corpus has at least {2 * _ITEMS_A_KIND} items, not {num_items}")
    rng = np.random.default_rng([seed, 0])
    embeddings, tree = _items(num_items, rng)
    weights = (1.0 / (1 + rng.permutation(num_items)) ** _POPULARITY_EXPONENT).astype(np.float32)
    history = _histories(num_users, tree, np.random.default_rng([seed, 1]))
    return Corpus(embeddings, weights / weights.sum(), history)


def _items(num_items: int, rng: np.random.Generator) -> tuple[np.ndarray, _Tree]:
    n_kinds = num_items // _ITEMS_A_KIND
    n_shelves = max(2, n_kinds // _KINDS_A_SHELF)
    n_sections = min(_MAX_SECTIONS, max(2, n_shelves // _SHELVES_A_SECTION))
    axes = (1 + np.arange(DIM) / _AXIS_SCALE) ** -_AXIS_DECAY
    axes = (axes / np.linalg.norm(axes)).astype(np.float32)

    def around(centres: np.ndarray, spread: float) -> np.ndarray:
        noise = rng.standard_normal(centres.shape, dtype=np.float32)
        noise *= axes * np.float32(spread)
        noise += centres
        return noise

    sections = around(np.zeros((n_sections, DIM), np.float32), _SPREAD[0])
    section_of_shelf = rng.integers(0, n_sections, n_shelves)
    shelves = around(sections[section_of_shelf], _SPREAD[1])
    shelf_of_kind = rng.integers(0, n_shelves, n_kinds)
    kinds = around(shelves[shelf_of_kind], _SPREAD[2])
    sizes = rng.gamma(1.0, 1.0, n_kinds) + 0.05
    kind = rng.choice(n_kinds, num_items, p=sizes / sizes.sum())
    grouped = np.argsort(kind, kind="stable")
    first = np.searchsorted(kind[grouped], np.arange(n_kinds + 1))
    return around(kinds[kind], _SPREAD[3]), _Tree(shelf_of_kind, section_of_shelf, grouped, first)


def _histories(num_users: int, tree: _Tree, rng: np.random.Generator) -> np.ndarray:
    history = np.full((num_users, HISTORY_LENGTH), -1, dtype=np.int32)
    filled = np.flatnonzero(tree.sizes)
    share = tree.sizes[filled] / tree.sizes.sum()
    section = tree.section_of_shelf[tree.shelf_of_kind[filled]]
    by_shelf = {shelf: filled[tree.shelf_of_kind[filled] == shelf] for shelf in np.unique(tree.shelf_of_kind)}
    for row in history:
        n_interests = int(rng.integers(_MIN_INTERESTS, _MAX_INTERESTS + 1))
        home = rng.choice(filled, p=share)
        at_home = section == tree.section_of_shelf[tree.shelf_of_kind[home]]
        local = np.where(at_home, share, 0.0)
        local /= local.sum()
        chosen = [home] + [
            rng.choice(filled, p=local if rng.random() < _HOME_SHARE else share)
            for _ in range(n_interests - 1)
        ]
        interests = rng.choice(chosen, HISTORY_LENGTH, p=rng.dirichlet(np.full(n_interests, 1.5)))
        full = rng.random() < _FULL_HISTORY_SHARE
        length = HISTORY_LENGTH if full else int(rng.integers(_MIN_HISTORY, HISTORY_LENGTH))
        for position, interest in enumerate(interests[:length]):
            kind = interest
            if rng.random() < _SIBLING_SHARE:
                kind = rng.choice(by_shelf[tree.shelf_of_kind[interest]])
            row[position] = tree.items[rng.integers(tree.first[kind], tree.first[kind + 1])]
    return history
