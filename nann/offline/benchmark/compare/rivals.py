"""An approximate index over inner products as a contender, alone or with the deep model behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.offline.benchmark.compare.contender import Found, Setting, Skipped, UserSet
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.indexes import INDEXES, Index, vectors_key
from nann.offline.benchmark.compare.loops import TimingBudget, keep_busy, one_at_a_time
from nann.offline.benchmark.compare.vectors import VectorSource

if TYPE_CHECKING:
    from jaxtyping import Float64, Int32

__all__ = ["RERANKED", "IndexContender", "index_contenders", "rerank_settings"]

RERANKED = (1000, 2000, 5000, 10_000, 20_000)  # issue: candidates between 1,000 and 20,000
_ALONE = (1, 2, 4, 8)  # times k: how many candidates an index alone looks at for its k answers
_BATCH = 16


def rerank_settings(k: int, num_items: int) -> list[int]:
    """Numbers of candidates worth reranking in a corpus of this size."""
    return [count for count in RERANKED if k < count < 0.7 * num_items]


class IndexContender:
    """Candidates of an index in this process; with `rerank` the deep model orders them."""

    def __init__(self, corpus: Corpus, source: VectorSource, index: Index, *, rerank: bool) -> None:
        self._corpus = corpus
        self._source = source
        self._index = index
        self._rerank = rerank
        self.name = f"{index.name} + rerank" if rerank else f"{index.name} alone"
        self.note = f"{index.note}; vectors: {source.name}"
        self.fingerprint = f"{self.note} {vectors_key(source.items)}"
        counts = (
            rerank_settings(corpus.k, corpus.num_items)
            if rerank
            else sorted({min(factor * corpus.k, corpus.num_items) for factor in _ALONE})
        )
        found = {
            setting.key: setting
            for count in counts
            for effort in index.efforts(count)
            for setting in [self._setting(count, effort)]
        }
        self.settings: Sequence[Setting] = list(found.values())

    def _setting(self, count: int, effort: dict[str, int]) -> Setting:
        return Setting(self.name, {"candidates": count, **effort} if self._rerank else effort)

    def answers(self, setting: Setting, users: UserSet, k: int) -> list[Found]:
        count, effort = self._parts(setting, k)
        products = self._index.count_products(
            self._source.of_users(users.histories), min(count, self._corpus.num_items), effort
        )
        width = self._source.items.shape[1]
        other = self._source.multiply_adds + products * width
        if self._rerank:
            other += self._corpus.multiply_adds.encode
        lanes = len(self._corpus.rerankers)

        def search(lane: int) -> list[Any]:
            mine = range(lane, len(users), lanes)
            return [
                answer
                for start in range(0, len(mine), _BATCH)
                for answer in self._ask(setting, users, k, mine[start : start + _BATCH], lane)
            ]

        with ThreadPoolExecutor(lanes) as pool:
            by_lane = list(pool.map(search, range(lanes)))
        answers = [by_lane[i % lanes][i // lanes] for i in range(len(users))]
        return [Found(rows, scores, n_scored, other) for rows, scores, n_scored in answers]

    def latencies_s(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> Float64[np.ndarray, " requests"]:
        return one_at_a_time(lambda chosen: self._ask(setting, users, k, chosen, 0), rows, budget)

    def saturated_qps(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> float:
        return keep_busy(
            lambda chosen, lane: self._ask(setting, users, k, chosen, lane),
            rows,
            budget,
            lanes=len(self._corpus.rerankers),
            batch=_BATCH,
        )

    def _parts(self, setting: Setting, k: int) -> tuple[int, dict[str, int]]:
        effort = dict(setting.params)
        return effort.pop("candidates", k), effort

    def _ask(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], lane: int
    ) -> list[tuple[Int32[np.ndarray, " n"], Any, int]]:
        """Items, scores and how many were scored, of one batch, on one lane."""
        count, effort = self._parts(setting, k)
        histories = users.histories[list(rows)]
        found = self._index.search(
            self._source.of_users(histories), min(count, self._corpus.num_items), effort
        )
        items = [row[row >= 0] for row in found]
        if not self._rerank:
            return [(row, None, 0) for row in items]
        best = self._corpus.rerankers[lane].best(histories, items, k)
        return [(index, score, len(row)) for (index, score), row in zip(best, items, strict=True)]


def index_contenders(
    corpus: Corpus, source: VectorSource | None, *, wants: Callable[[str], bool] = lambda _name: True
) -> Iterator[IndexContender | Skipped]:
    """Every index that is installed and wanted, alone and with rerank; built where it is not there yet."""
    for kind in INDEXES:
        name = getattr(kind, "name", kind.__name__)
        if not wants(name):
            continue
        if source is None:
            yield Skipped(name, "this version has no vectors whose inner product means anything")
            continue
        directory = corpus.work / "indexes" / vectors_key(source.items)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            index = kind(source.items, directory)
        except ImportError as error:
            yield Skipped(name, f"{error}; make bench installs it where it can")
            continue
        yield IndexContender(corpus, source, index, rerank=False)
        if rerank_settings(corpus.k, corpus.num_items):
            yield IndexContender(corpus, source, index, rerank=True)
        else:
            yield Skipped(f"{index.name} + rerank", "the corpus is too small to rerank a part of it")
