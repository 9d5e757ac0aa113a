"""What a retriever takes and gives: queries resolved to item indices in, ranked item indices out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from nann.engine.backend import Admission
from nann.engine.gate import GateRequest
from nann.engine.types import Note, SearchParams

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32, Int32

__all__ = ["Answer", "PreparedQuery", "Retriever", "silent"]


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: it holds arrays
class PreparedQuery:
    """A checked query with every id resolved. Opaque outside the engine but for `compat`, `cost`,
    `known_history` and `notes`.

    Exactly one of `history` (int32 [history_length], -1 padded) and `comm_seq` is set. `known_history`
    is the number of known items it was built from (None for comm_seq). Queries with equal `compat`
    may share a batch. `cost` estimates the items that will be scored.
    """

    k: int
    params: SearchParams
    retriever: Literal["hnsw", "inner_product", "exhaustive"]
    history: Int32[np.ndarray, " length"] | None
    comm_seq: Float32[np.ndarray, " width"] | None
    known_history: int | None
    starts: Int32[np.ndarray, " n"]
    admission: Admission | None
    gate: GateRequest | None
    cost: int
    notes: tuple[Note, ...]
    with_attributes: bool

    @property
    def compat(self) -> Hashable:
        return (self.retriever, self.params, self.history is None)


@dataclass(frozen=True, slots=True)
class Answer:
    """A ranked answer in item indices; ``scored_per_step[i]`` items were scored in step i, and a gate made
    `estimated` estimates."""

    item_index: Int32[np.ndarray, " n"]
    score: Float32[np.ndarray, " n"]
    scored_per_step: tuple[int, ...]
    remainder_scored: int
    nonfinite: int
    estimated: int = 0


class Retriever(Protocol):
    """One search algorithm on one lane; used by one thread at a time."""

    def search(self, batch: Sequence[PreparedQuery], probe: Callable[[str], None]) -> list[Answer]:
        """Answer every query of a batch of equal `compat`. Raises `BackendError`."""
        ...


def silent(_phase: str) -> None:
    """The probe that observes nothing."""
