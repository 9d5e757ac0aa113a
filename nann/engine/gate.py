"""The gate: which neighbours are worth the deep model, estimated from tables learned by distillation.

A walk meets several times as many items as it needs to score. With j over the known items of the user's
history,

    estimate(user, i) = b_i + max_j(a_j + k_j · q_i) + mean_j(x_j) · y_i

costs a few hundred multiply-adds where the model takes tens of thousands. What the model said of the node
that led to an item corrects the estimate: the two share most of their error. docs/adr/0018-gate.md has the
measurements, `nann distill` makes the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float16, Float32, Int32

__all__ = ["Gate", "GateBatch", "GateRequest", "GateTables"]


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: it holds arrays
class Gate:
    """One query's side of the estimate, and its rule.

    ``bias[j]`` = a_j, ``keys[j]`` = k_j for each known item j of the history (at least one), and
    ``context`` = mean_j(x_j). An item is admitted to scoring when its corrected estimate is at least
    the score of rank `rank` in the pool less `margin`; everything is, while the pool holds fewer.
    """

    bias: Float32[np.ndarray, " known"]
    keys: Float32[np.ndarray, "known dim"]
    context: Float32[np.ndarray, " context_dim"]
    rank: int
    margin: float
    residual_weight: float


class GateBatch:
    """The gates of one batch as kernels take them, at least one of them there.

    `bias` float32 [batch, width], `keys` [batch, dim, width] (transposed), `context` [batch, context_dim];
    `rank` int32, `margin` and `residual_weight` float32 [batch]. ``known[b]`` is the number of query b's
    keys, rounded up to a multiple of `lanes` by biases of -inf, and 0 for a query without a gate.
    """

    def __init__(self, gates: Sequence[Gate | None], *, lanes: int) -> None:
        given = [gate for gate in gates if gate is not None]
        widest = _rounded_up(max(gate.bias.size for gate in given), lanes)
        dim, context_dim = given[0].keys.shape[1], given[0].context.size
        batch = len(gates)
        self.bias = np.full((batch, widest), -np.inf, dtype=np.float32)
        self.keys = np.zeros((batch, dim, widest), dtype=np.float32)
        self.context = np.zeros((batch, context_dim), dtype=np.float32)
        self.known = np.zeros(batch, dtype=np.int32)
        self.rank = np.ones(batch, dtype=np.int32)
        self.margin = np.zeros(batch, dtype=np.float32)
        self.residual_weight = np.zeros(batch, dtype=np.float32)
        for b, gate in enumerate(gates):
            if gate is not None:
                self.bias[b, : gate.bias.size] = gate.bias
                self.keys[b, :, : gate.bias.size] = gate.keys.T
                self.context[b] = gate.context
                self.known[b] = _rounded_up(gate.bias.size, lanes)
                self.rank[b] = gate.rank
                with np.errstate(over="ignore"):  # beyond float32 a margin is infinite
                    self.margin[b] = gate.margin
                self.residual_weight[b] = gate.residual_weight


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True, slots=True, eq=False)
class GateTables:
    """What every query's gate is made from: rows (bias, `dim` columns, `context_dim` columns) of each item.

    ``keys`` is an item's part as a member of a history (a, k, x), ``queries`` its part as a candidate
    (b, q, y). `rmse` is the estimate's error on users it was not fitted to, in units of score: margins are
    given in multiples of it.
    """

    keys: Float16[np.ndarray, "N columns"]
    queries: Float16[np.ndarray, "N columns"]
    dim: int
    residual_weight: float
    rmse: float

    def request(
        self, history: Int32[np.ndarray, " known"], *, rank: int, margin: float
    ) -> GateRequest | None:
        """The gate of a user with these known items, `margin` in multiples of `rmse`; None without any."""
        return GateRequest(self, history, rank, margin) if history.size else None


@dataclass(frozen=True, slots=True, eq=False)
class GateRequest:
    """What one query's gate is made of, which is done where the query is searched.

    A user's rows of the table are far apart in memory: a thread that serves many callers has better things
    to do than to wait for them.
    """

    tables: GateTables
    history: Int32[np.ndarray, " known"]
    rank: int
    margin: float

    def make(self) -> Gate:
        """The gate itself."""
        tables = self.tables
        rows = tables.keys[self.history].astype(np.float32)
        return Gate(
            bias=rows[:, 0],
            keys=rows[:, 1 : 1 + tables.dim],
            context=np.add.reduce(rows[:, 1 + tables.dim :], axis=0) / np.float32(len(rows)),
            rank=self.rank,
            # An `rmse` may be 0.
            margin=self.margin if math.isinf(self.margin) else self.margin * tables.rmse,
            residual_weight=tables.residual_weight,
        )
