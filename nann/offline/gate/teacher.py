"""What the student learns from: pairs of a user and an item, scored by the engine that serves.

Of every user the best items, as a wide search finds them, and others of two kinds: neighbours of items that
a walk goes through, which is what a gate decides on, and items at random, so that the estimate is right
about what is far away as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.artifacts import Artifact
from nann.engine.catalog import Catalog
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Hits, Query, SearchParams
from nann.offline.data import rules
from nann.offline.data.dataset import Dataset
from nann.offline.progress import Progress
from nann.offline.search_quality import on_all_lanes

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64

__all__ = ["N_BEST", "N_OTHERS", "Pairs", "draw_histories", "score_pairs"]

N_BEST = 2000  # best items recorded of each user: the answer and ten times as many that are near it
N_OTHERS = 1000  # items beside them
_NEAR_SHARE = 0.5  # of the others that are neighbours of items on a walk
_WALKED = 64  # of a user's best items whose neighbours are looked at
_BEAM_WIDTH = 256


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scores of P items a user: the best items first, in descending order of score, then the others.

    `histories` are item indices, oldest first, -1 padded at the end.
    """

    histories: Int32[np.ndarray, "users length"]
    items: Int32[np.ndarray, "users P"]
    scores: Float32[np.ndarray, "users P"]
    n_best: int

    def __len__(self) -> int:
        return len(self.histories)


def draw_histories(
    dataset: Dataset, *, n_train: int, n_held_out: int, seed: int
) -> tuple[Int32[np.ndarray, "train length"], Int32[np.ndarray, "held length"]]:
    """Histories of training users, cut at a random length from one item on; no user is in both parts.

    Where there are fewer users than histories wanted, a user gives several.

    Raises:
        ValueError: fewer than two users of the training split have a behaviour.
    """
    rng = np.random.default_rng(seed)
    users = dataset.users_of("train")
    users = rng.permutation(users[dataset.user_lengths[users] > 0])
    if len(users) < 2:
        raise ValueError(
            f"{dataset.directory} has {len(users)} training users with a history; a gate needs two at least"
        )
    n_apart = min(n_held_out, max(len(users) // 5, 1))

    def cut(of: Int64[np.ndarray, " users"], n: int) -> Int32[np.ndarray, "n length"]:
        rows = np.resize(of, n)
        length = rng.integers(1, dataset.user_lengths[rows] + 1)
        return rules.histories_before(
            dataset.user_items, dataset.user_row_splits[rows], length, dataset.history_length
        )

    return cut(users[n_apart:], n_train), cut(users[:n_apart], n_held_out)


def score_pairs(
    engine: SearchEngine,
    artifact: Artifact,
    histories: Int32[np.ndarray, "users length"],
    *,
    seed: int,
    progress: Progress,
    title: str,
) -> Pairs:
    """Ask the engine, on all its lanes, for each user's best items and for the scores of others.

    Raises:
        ValueError: the model gives an item no finite score.
    """
    n_best, n_others = min(N_BEST, artifact.num_items), min(N_OTHERS, artifact.num_items)
    ask = _Teacher(engine, artifact, n_best, n_others, seed)
    items = np.empty((len(histories), n_best + n_others), np.int32)
    scores = np.empty(items.shape, np.float32)
    with progress.stage(title, total=len(histories), unit="users") as stage:
        answers = on_all_lanes(
            engine, lambda lane, row: ask(lane, row, histories[row]), range(len(histories))
        )
        for row, (found, score) in enumerate(answers):
            items[row], scores[row] = found, score
            stage.advance()
    return Pairs(histories, items, scores, n_best)


class _Teacher:
    """The two questions about one user."""

    def __init__(
        self, engine: SearchEngine, artifact: Artifact, n_best: int, n_others: int, seed: int
    ) -> None:
        self._engine, self._artifact, self._seed = engine, artifact, seed
        self._n_best, self._n_others = n_best, n_others
        self._catalog = Catalog(artifact)
        self._params = SearchParams(ef=n_best, beam_width=min(_BEAM_WIDTH, n_best))

    def __call__(
        self, lane: int, row: int, history: Int32[np.ndarray, " length"]
    ) -> tuple[Int32[np.ndarray, " P"], Float32[np.ndarray, " P"]]:
        known = history[history >= 0]
        ids = self._catalog.item_ids(known)
        best, best_scores = self._search(lane, Query(k=self._n_best, params=self._params, history=ids))
        others = self._others(np.random.default_rng([self._seed, row]), known, best)
        asked = np.unique(others)
        found, scores = self._search(
            lane,
            Query(k=len(asked), params=self._params, history=ids, include=self._catalog.item_ids(asked)),
        )
        order = np.argsort(found)
        other_scores = scores[order][np.searchsorted(asked, others)]
        return np.concatenate([best, others]), np.concatenate([best_scores, other_scores])

    def _others(
        self, rng: np.random.Generator, history: Int32[np.ndarray, " n"], best: Int32[np.ndarray, " k"]
    ) -> Int32[np.ndarray, " others"]:
        artifact = self._artifact
        walked = np.concatenate([history, artifact.start_points, rng.choice(best, _WALKED)])
        near = artifact.neighbors[0][walked]
        near = near[near >= 0]
        n_near = round(_NEAR_SHARE * self._n_others) if near.size else 0
        anywhere = rng.integers(0, artifact.num_items, self._n_others - n_near)
        return np.concatenate([rng.choice(near, n_near), anywhere]).astype(np.int32)

    def _search(self, lane: int, query: Query) -> tuple[Int32[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
        hits: Hits = self._engine.search([self._engine.check(query)], lane)[0]
        if len(hits.item_ids) != query.k:
            raise ValueError(
                f"{query.k} items were asked for and {len(hits.item_ids)} ranked: the model gives the others "
                "no finite score"
            )
        return self._catalog.item_index(hits.item_ids), np.asarray(hits.scores, np.float32)
