"""The gate's tables and what they say of a user and an item; the engine computes the same, item by item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nann.offline.gate.teacher import Pairs

if TYPE_CHECKING:
    from jaxtyping import Float16, Float32, Int32

__all__ = ["LearnedTables", "Quality", "measure"]

_TOP, _WITHIN = 200, 1000  # coverage: how much of the true top the estimate's own top holds
_ITEMS_PER_CALL = 8_192  # times 50 histories items: in the processor's cache


@dataclass(frozen=True, slots=True)
class LearnedTables:
    """What an item contributes in a history (`keys`) and what it brings as a candidate (`queries`).

    A row is a bias, `dim` numbers, and context: G = 1 + dim + context_dim.
    """

    keys: Float16[np.ndarray, "N G"]
    queries: Float16[np.ndarray, "N G"]
    dim: int

    def estimate(
        self, history: Int32[np.ndarray, " n"], items: Int32[np.ndarray, " m"] | slice
    ) -> Float32[np.ndarray, " m"]:
        """b_i + max_j (a_j + k_j · q_i) + mean_j(x_j) · y_i over the items j of a history that has some."""
        keys, queries = self.keys[history].astype(np.float32), self.queries[items].astype(np.float32)
        attended = queries[:, 1 : 1 + self.dim] @ keys[:, 1 : 1 + self.dim].T + keys[:, 0]
        context = queries[:, 1 + self.dim :] @ keys[:, 1 + self.dim :].mean(axis=0)
        estimate: Float32[np.ndarray, " m"] = queries[:, 0] + attended.max(axis=1) + context
        return estimate


@dataclass(frozen=True, slots=True)
class Quality:
    """How near the estimate is to the score, over users it was not trained on.

    `rmse` and `correlation` (mean over users) are about the recorded pairs, `rmse` in units of the score;
    `spread` is the scores' own deviation. `coverage` is the share of the 200 best items that are among the
    estimate's best 1,000 of the whole corpus.
    """

    rmse: float
    spread: float
    correlation: float
    coverage: float
    users: int


def measure(tables: LearnedTables, pairs: Pairs) -> Quality:
    """The quality of `tables` as they are stored, over the users of `pairs`."""
    errors, spreads, correlations, coverages = [], [], [], []
    for history, items, scores in zip(pairs.histories, pairs.items, pairs.scores, strict=True):
        known = history[history >= 0]
        estimate = tables.estimate(known, items)
        errors.append(np.mean(np.square(estimate - scores), dtype=np.float64))
        spreads.append(np.var(scores, dtype=np.float64))
        deviations = np.std(estimate) * np.std(scores)
        covariance = np.mean((estimate - estimate.mean()) * (scores - scores.mean()))
        correlations.append(covariance / deviations if deviations > 0 else 0.0)
        everything = np.concatenate([*_estimates(tables, known)])
        within = min(_WITHIN, everything.size)
        best = np.argpartition(-everything, within - 1)[:within]
        coverages.append(np.isin(items[: min(_TOP, pairs.n_best)], best).mean())
    return Quality(
        rmse=float(np.sqrt(np.mean(errors))),
        spread=float(np.sqrt(np.mean(spreads))),
        correlation=float(np.mean(correlations)),
        coverage=float(np.mean(coverages)),
        users=len(pairs),
    )


def _estimates(
    tables: LearnedTables, history: Int32[np.ndarray, " n"]
) -> Iterator[Float32[np.ndarray, " some"]]:
    for start in range(0, len(tables.queries), _ITEMS_PER_CALL):
        yield tables.estimate(history, slice(start, start + _ITEMS_PER_CALL))
