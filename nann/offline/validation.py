"""Hit rate while training: held-out users against the whole corpus, through the folded serving functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from nann.offline.data.dataset import Dataset
from nann.offline.models.model import ServingModel

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int32, Int64

__all__ = ["Validation", "ValidationSample", "rank_of_target"]

USERS_PER_CALL = 8
ITEMS_PER_CALL = 4096  # 8 x 4096 pairs x 128 floats = 16 MiB a layer, about the size of a last-level cache


@dataclass(frozen=True, slots=True)
class ValidationSample:
    """A seeded choice of validation users, the same at every evaluation of a run."""

    histories: Int32[np.ndarray, "users length"]
    targets: Int32[np.ndarray, " users"]

    @classmethod
    def of(cls, dataset: Dataset, *, max_users: int, seed: int) -> ValidationSample:
        """At most `max_users` of the validation users, chosen at random, in row order."""
        _, histories, targets = dataset.eval_samples("validation")
        if len(targets) > max_users:
            chosen = np.sort(np.random.default_rng(seed).choice(len(targets), max_users, replace=False))
            histories, targets = histories[chosen], targets[chosen]
        return cls(histories, targets)

    def popularity_hit_rate(self, item_weights: Float32[np.ndarray, " items"], k: int) -> float:
        """Share of users whose target is among the k most popular items: the floor to beat."""
        popular = np.argsort(-item_weights, kind="stable")[:k]
        return float(np.isin(self.targets, popular).mean())


def rank_of_target(
    scores: Float32[np.ndarray, "users items"], targets: Int32[np.ndarray, " users"]
) -> Int64[np.ndarray, " users"]:
    """0-based rank of each user's target in the order (score descending, item index ascending).

    A score that is not finite never ranks: such a target is last, such rivals are passed over.
    """
    own = scores[np.arange(len(targets)), targets][:, None]
    earlier: Bool[np.ndarray, " items"] = np.arange(scores.shape[1])[None, :] < targets[:, None]
    before = np.isfinite(scores) & ((scores > own) | ((scores == own) & earlier))
    ranks: np.ndarray = np.where(np.isfinite(own[:, 0]), before.sum(axis=1), scores.shape[1])
    return ranks


class Validation:
    """Exhaustive scoring of a validation sample; compiled once, used for every evaluation of a run."""

    def __init__(self, sample: ValidationSample, *, jit: bool) -> None:
        self.sample = sample
        self._score = tf.function(
            lambda model, user, item: model.score(user, item), jit_compile=jit, autograph=False
        )

    def hit_rate(self, serving: ServingModel, k: int) -> float:
        """Share of the users whose held-out item is among the k best of all items."""
        ranks = self.ranks(serving)
        return float((ranks < k).mean()) if len(ranks) else 0.0

    def ranks(self, serving: ServingModel) -> Int64[np.ndarray, " users"]:
        """0-based rank of every sampled user's target among all items."""
        n_items = serving.spec.num_items
        n_chunk = min(ITEMS_PER_CALL, n_items)
        # Both axes are padded to one shape by repeating the last entry, so one program serves all calls.
        starts = range(0, n_items, n_chunk)
        chunks = [np.minimum(np.arange(s, s + n_chunk), n_items - 1).astype(np.int32) for s in starts]
        items = [_with_leading_axis(serving.encode_items(tf.constant(chunk))) for chunk in chunks]
        ranks = []
        for start in range(0, len(self.sample.targets), USERS_PER_CALL):
            users = np.minimum(np.arange(start, start + USERS_PER_CALL), len(self.sample.targets) - 1)
            user = serving.encode_user(tf.constant(self.sample.histories[users]))
            scores = np.concatenate([self._scores(serving, user, item) for item in items], axis=1)
            ranks.append(rank_of_target(scores[:, :n_items], self.sample.targets[users]))
        found = np.concatenate(ranks) if ranks else np.empty(0, np.int64)
        return found[: len(self.sample.targets)]

    def _scores(self, serving: ServingModel, user: Any, item: Any) -> Float32[np.ndarray, "users items"]:
        scores: np.ndarray = self._score(serving, user, item).numpy()
        return scores


def _with_leading_axis(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor[None] for name, tensor in tensors.items()}
