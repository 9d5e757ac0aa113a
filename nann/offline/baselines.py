"""What a trained model has to beat: popularity, chance, and item-to-item nearest neighbours.

All learn from the training users alone, so no evaluated user's target is known to them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from nann.offline.data.dataset import Dataset, EvalSplit
from nann.offline.metrics.ranking import HeldOutMetrics, Interval, bootstrap_mean, held_out_metrics, hits_at_k
from nann.offline.progress import Progress

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64
    from scipy.sparse import csr_matrix

__all__ = ["Baseline", "BaselineResult", "ItemKnn", "Popularity", "Random", "evaluate_baselines"]

Weighting = Literal["cosine", "bm25"]

BATCH_USERS = 256  # whose neighbours' scores are held at once: up to 50 x 200 each


class Baseline(Protocol):
    """Answers histories with items; -1 in a history is padding."""

    @property
    def name(self) -> str: ...

    def top_k(
        self, histories: Int32[np.ndarray, "users length"], k: int, *, exclude_seen: bool = False
    ) -> Int32[np.ndarray, "users k"]:
        """The k best items of each row, best first; k is at most the number of items.

        With `exclude_seen` items of the history are left out, and a row may end in -1.
        """
        ...


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """A baseline's metrics on one split, with a 95 % interval of the hit rate over users."""

    name: str
    metrics: HeldOutMetrics
    hit_rate: Interval


@dataclass(frozen=True, slots=True)
class Popularity:
    """The same most read items for everyone, ties by item index."""

    ranking: Int32[np.ndarray, " items"]
    name: str = "popularity"

    @classmethod
    def fit(cls, dataset: Dataset) -> Popularity:
        counts = _training_counts(dataset)
        return cls(np.argsort(-counts, kind="stable").astype(np.int32))

    def top_k(
        self, histories: Int32[np.ndarray, "users length"], k: int, *, exclude_seen: bool = False
    ) -> Int32[np.ndarray, "users k"]:
        answers = np.broadcast_to(self.ranking, (len(histories), len(self.ranking)))
        return _first_unseen(answers, histories, k, exclude_seen=exclude_seen)


@dataclass(frozen=True, slots=True)
class Random:
    """k distinct items, every item as likely: a window, begun anywhere, of one seeded permutation."""

    num_items: int
    seed: int = 0
    name: str = "random"

    def top_k(
        self, histories: Int32[np.ndarray, "users length"], k: int, *, exclude_seen: bool = False
    ) -> Int32[np.ndarray, "users k"]:
        rng = np.random.default_rng(self.seed)
        permutation = rng.permutation(self.num_items).astype(np.int32)
        width = min(self.num_items, k + histories.shape[1] if exclude_seen else k)
        start = rng.integers(0, self.num_items, len(histories))
        answers = permutation[(start[:, None] + np.arange(width)) % self.num_items]
        return _first_unseen(answers, histories, k, exclude_seen=exclude_seen)


@dataclass(frozen=True, slots=True)
class ItemKnn:
    """The sum over the history of the similarity to each of its items, ties by item index.

    `similarity` [items, items] holds the nearest neighbours of each item by the users they share. Where
    the neighbours are fewer than asked for, popular items follow.
    """

    similarity: csr_matrix
    popularity: Popularity
    name: str = "item-kNN"

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        *,
        neighbours: int = 200,
        weighting: Weighting = "cosine",
        num_threads: int = 2,
    ) -> ItemKnn:
        """Nearest neighbours by `implicit` (cosine or BM25 weighted counts); needs the `offline` extra."""
        from implicit.nearest_neighbours import BM25Recommender, CosineRecommender
        from implicit.utils import ParameterWarning
        from scipy.sparse import csr_matrix

        users = dataset.users_of("train")
        items = _items_of(dataset, users)
        rows = np.repeat(np.arange(len(users)), dataset.user_lengths[users])
        matrix = csr_matrix(
            (np.ones(len(items), np.float32), (rows, items)), shape=(len(users), dataset.num_items)
        )
        recommender = {"cosine": CosineRecommender, "bm25": BM25Recommender}[weighting]
        # One more: every item is its own nearest neighbour, which says nothing.
        model = recommender(K=neighbours + 1, num_threads=num_threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParameterWarning)  # about a conversion inside implicit itself
            model.fit(matrix, show_progress=False)
        similarity = csr_matrix(model.similarity, dtype=np.float32)
        similarity.setdiag(0)
        similarity.eliminate_zeros()
        return cls(similarity, Popularity.fit(dataset), f"item-kNN ({weighting})")

    def top_k(
        self, histories: Int32[np.ndarray, "users length"], k: int, *, exclude_seen: bool = False
    ) -> Int32[np.ndarray, "users k"]:
        parts = [
            self._top_k(histories[start : start + BATCH_USERS], k, exclude_seen=exclude_seen)
            for start in range(0, len(histories), BATCH_USERS)
        ]
        return np.concatenate([np.empty((0, k), np.int32), *parts])

    def _top_k(
        self, histories: Int32[np.ndarray, "users length"], k: int, *, exclude_seen: bool
    ) -> Int32[np.ndarray, "users k"]:
        from scipy.sparse import csr_matrix

        num_users, num_items = len(histories), self.similarity.shape[0]
        rows, columns = np.nonzero(histories >= 0)
        items = histories[rows, columns]
        seen = csr_matrix((np.ones(len(items), np.float32), (rows, items)), shape=(num_users, num_items))
        seen.data[:] = 1.0  # an item read twice speaks once
        scored = (seen @ self.similarity).tocoo()
        order = np.lexsort((scored.col, -scored.data, scored.row))
        row, item = scored.row[order].astype(np.int64), scored.col[order].astype(np.int64)
        if exclude_seen:
            unseen = ~np.isin(row * num_items + item, rows.astype(np.int64) * num_items + items)
            row, item = row[unseen], item[unseen]

        # The neighbours, best first, then the popular items that are not among them.
        found = np.bincount(row, minlength=num_users)
        rank = np.arange(len(row)) - (np.cumsum(found) - found)[row]
        row, item, rank = row[rank < k], item[rank < k], rank[rank < k]
        answers = np.full((num_users, k), -1, dtype=np.int32)
        answers[row, rank] = item
        popular = self.popularity.top_k(histories, min(2 * k, num_items), exclude_seen=exclude_seen)
        keys = np.arange(num_users)[:, None] * num_items + popular
        fresh = (popular >= 0) & ~np.isin(keys, row * num_items + item)
        fresh_row, fresh_column = np.nonzero(fresh)
        place = np.minimum(found, k)[fresh_row] + (np.cumsum(fresh, axis=1) - 1)[fresh_row, fresh_column]
        fits = place < k
        answers[fresh_row[fits], place[fits]] = popular[fresh_row[fits], fresh_column[fits]]
        return answers


def evaluate_baselines(
    dataset: Dataset,
    *,
    split: EvalSplit = "test",
    k: int = 200,
    seed: int = 0,
    exclude_seen: bool = False,
    with_item_knn: bool = True,
    progress: Progress | None = None,
) -> list[BaselineResult]:
    """Fit every baseline on the training users and measure it on a split."""
    progress = progress if progress is not None else Progress(silent=True)
    k = min(k, dataset.num_items)
    _, histories, targets = dataset.eval_samples(split)
    baselines: list[Baseline] = [Random(dataset.num_items, seed), Popularity.fit(dataset)]
    if with_item_knn:
        with progress.stage("fit item-kNN"):
            baselines += [ItemKnn.fit(dataset), ItemKnn.fit(dataset, weighting="bm25")]
    results = []
    with progress.stage("evaluate baselines", len(baselines)) as stage:
        for baseline in baselines:
            answers = baseline.top_k(histories, k, exclude_seen=exclude_seen)
            hits = hits_at_k(answers, targets, k).astype(np.float64)
            metrics = held_out_metrics(answers, targets, k)
            results.append(BaselineResult(baseline.name, metrics, bootstrap_mean(hits, seed=seed)))
            stage.advance()
    return results


def _items_of(dataset: Dataset, users: Int64[np.ndarray, " users"]) -> Int32[np.ndarray, " behaviours"]:
    chosen = np.zeros(dataset.num_users, dtype=bool)
    chosen[users] = True
    return np.asarray(dataset.user_items[np.repeat(chosen, dataset.user_lengths)])


def _training_counts(dataset: Dataset) -> Int64[np.ndarray, " items"]:
    return np.bincount(_items_of(dataset, dataset.users_of("train")), minlength=dataset.num_items)


def _first_unseen(
    answers: Int32[np.ndarray, "users width"],
    histories: Int32[np.ndarray, "users length"],
    k: int,
    *,
    exclude_seen: bool,
) -> Int32[np.ndarray, "users k"]:
    if not exclude_seen:
        return np.array(answers[:, :k])
    reach = answers[:, : k + histories.shape[1]]  # no more than a history's length can be dropped
    unseen = ~(reach[:, :, None] == histories[:, None, :]).any(axis=2)
    order = np.argsort(~unseen, axis=1, kind="stable")
    moved = np.take_along_axis(np.where(unseen, reach, np.int32(-1)), order, axis=1)
    return np.asarray(moved[:, :k])
