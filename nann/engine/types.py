"""The values that cross the border between service and engine. All frozen, none of them an index.

An *item id* is the caller's name of an item (an integer or a string, as in the input data); an
*item index* is its row in the artifact's arrays and never leaves the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

__all__ = ["Hits", "ItemId", "Note", "Policy", "Query", "SearchParams", "UserId"]

ItemId: TypeAlias = int | str
UserId: TypeAlias = int | str
Policy: TypeAlias = Literal["best_first", "level", "level_pruned", "inner_product", "exhaustive"]


@dataclass(frozen=True, slots=True)
class SearchParams:
    """How hard to search; which queries may share a batch depends on nothing else.

    ``best_first``: `ef` best nodes seen so far are kept (raised to k when smaller), each step
    expands the `beam_width` best of them not expanded yet, for at most `max_steps` steps. With
    `gate_width` > 0 the version's gate (engine/gate.py) chooses which neighbours are scored: at most so many
    a step, and only those whose estimate comes within `gate_margin` errors (rmse) of a place in the answer.
    ``level``: NANN's served search with `level_topn` = (t0 … t5); see ``reference/nann.md``.
    ``level_pruned``: the search that NANN evaluates, with `level_ef` = the pool's size on graph level 2, 1
    and 0, and `level_steps` = the steps on level 0 (one on each level above); the defaults are NANN's.
    ``inner_product``: the `ef` items nearest to the user by inner product are scored, and no others.
    ``exhaustive``: every item is scored.
    """

    policy: Policy = "best_first"
    ef: int = 400
    beam_width: int = 64
    max_steps: int = 64
    gate_width: int = 0
    gate_margin: float = 1.0
    level_topn: tuple[int, ...] = ()
    level_ef: tuple[int, ...] = (100, 200, 400)
    level_steps: int = 3


@dataclass(frozen=True, slots=True)
class Query:
    """One user's question: who they are (exactly one of `history`, `comm_seq`), and how many items.

    `history` holds item ids, oldest first; only the newest `history_length` known ones are encoded.
    `comm_seq` is NANN's already embedded history, flattened [history_length * input_dim].
    `seen` are items never to be returned (they are walked through); `include` limits the answer to
    these ids, `exclude` removes ids, `filter` is an attribute predicate (see engine/filters.py).
    """

    k: int
    params: SearchParams
    history: Sequence[ItemId] | None = None
    comm_seq: Float[np.ndarray, " width"] | None = None
    seen: Sequence[ItemId] = ()
    include: Sequence[ItemId] | None = None
    exclude: Sequence[ItemId] = ()
    filter: Mapping[str, Any] | None = None
    strict: bool = False
    with_attributes: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """Something the caller should know about an answer: a stable code, a text, and a count."""

    code: str
    message: str
    count: int = 0


@dataclass(frozen=True, slots=True)
class Hits:
    """The answer to one query, best first by (score descending, item index ascending).

    `n_scored` counts the (user, item) pairs the model scored for this query, `steps` the calls of
    the model that carried them. `attributes` is parallel to `item_ids` when they were asked for.
    """

    item_ids: Sequence[ItemId]
    scores: Sequence[float]
    n_scored: int
    steps: int
    notes: tuple[Note, ...] = ()
    attributes: Sequence[Mapping[str, Any]] | None = None
    explain: Mapping[str, Any] = field(default_factory=dict)
