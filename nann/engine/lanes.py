"""Where searches run: an engine's lanes, in this process or wherever else somebody keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nann.engine.retrievers.exhaustive import ExhaustiveRetriever
from nann.engine.retrievers.hnsw import HnswRetriever
from nann.engine.retrievers.inner_product import InnerProductRetriever
from nann.engine.retrievers.retriever import Answer, PreparedQuery, Retriever

if TYPE_CHECKING:
    from nann.engine.artifacts import Artifact
    from nann.engine.backend import Backend
    from nann.engine.scoring.scorer import Scorer

__all__ = ["LaneProcess", "Lanes", "LocalLanes"]


@dataclass(frozen=True, slots=True)
class LaneProcess:
    """A process that keeps lanes, and how often one has been started for them."""

    pid: int
    n_starts: int


class Lanes(Protocol):
    """Numbered lanes over the tables of one version."""

    @property
    def count(self) -> int: ...

    @property
    def depth(self) -> int:
        """Threads that may search on one lane at a time; they take turns there."""
        ...

    @property
    def takes_comm_seq(self) -> bool:
        """Whether the model encodes users by ``comm_seq`` too."""
        ...

    @property
    def n_compilations(self) -> int:
        """Programs compiled so far, or loaded from XLA's cache; returns at once."""
        ...

    @property
    def process(self) -> LaneProcess | None:
        """The process that they are in, where that is not this one; returns at once."""
        ...

    def warm_up(self) -> bool:
        """Compile every program; True when a score is independent of the shape it is computed in.

        Raises:
            BackendError: a program failed.
        """
        ...

    def search(
        self, batch: Sequence[PreparedQuery], lane: int, probe: Callable[[str], None]
    ) -> tuple[list[Answer], int]:
        """The answers to a batch of equal `compat`, and the kernels launched for them on a device.

        Raises:
            BackendError: the model or device failed.
        """
        ...

    def close(self) -> None:
        """Give memory and weights back."""
        ...


class LocalLanes:
    """Lanes of this process: a backend and a scorer each; lanes may share a scorer."""

    process: LaneProcess | None = None
    depth = 1

    def __init__(self, artifact: Artifact, pairs: Sequence[tuple[Backend[Any, Any], Scorer]]) -> None:
        self.count = len(pairs)
        self._backends = [backend for backend, _ in pairs]
        self._scorers = list(dict.fromkeys(scorer for _, scorer in pairs))
        self.takes_comm_seq = self._scorers[0].takes_comm_seq
        self._retrievers: list[Mapping[str, Retriever]] = [
            {
                "hnsw": HnswRetriever(backend, scorer, num_items=artifact.num_items),
                "exhaustive": ExhaustiveRetriever(backend, scorer, num_items=artifact.num_items),
                "inner_product": InnerProductRetriever(backend, scorer, item_vectors=artifact.item_vectors),
            }
            for backend, scorer in pairs
        ]

    @property
    def n_compilations(self) -> int:
        return sum(scorer.n_compilations for scorer in self._scorers)

    def warm_up(self) -> bool:
        in_every_shape = [scorer.warm_up() for scorer in self._scorers]
        return all(in_every_shape)

    def search(
        self, batch: Sequence[PreparedQuery], lane: int, probe: Callable[[str], None]
    ) -> tuple[list[Answer], int]:
        backend = self._backends[lane]
        before = backend.launches
        answers = self._retrievers[lane][batch[0].retriever].search(batch, probe)
        return answers, backend.launches - before

    def close(self) -> None:
        self._retrievers, self._backends = [], []
        for scorer in self._scorers:
            close = getattr(scorer, "close", None)
            if close is not None:
                close()
