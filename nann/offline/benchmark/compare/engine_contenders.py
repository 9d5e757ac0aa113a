"""This engine as contenders: each is a policy on one of the two graphs, with a sweep of its settings.

The sweeps are data. A new policy or mode of the engine is one more entry of `SWEEPS`: its parameters
are fields of `SearchParams`. Work that is not scoring: encoding the user, the products of a scan, the
gate's estimates (``Hits.explain["estimated"]``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from nann.engine.errors import RetrievalError
from nann.engine.types import Hits, Policy, Query, SearchParams
from nann.offline.benchmark.compare.contender import Found, Setting, Skipped, UserSet
from nann.offline.benchmark.compare.corpus import NANN_GRAPH, OWN_GRAPH, Corpus
from nann.offline.benchmark.compare.loops import TimingBudget, keep_busy, one_at_a_time

if TYPE_CHECKING:
    from jaxtyping import Float64

    from nann.engine.search_engine import SearchEngine

__all__ = ["BASELINE", "EXHAUSTIVE", "SWEEPS", "EngineContender", "Sweep", "engine_contenders", "level_sweep"]

Params = Mapping[str, Any]
BASELINE = "level, NANN's graph"  # what NANN serves: costs are quoted as shares of it
EXHAUSTIVE = "exhaustive"


@dataclass(frozen=True, slots=True)
class Sweep:
    """A contender: `settings(k, num_items)` are the parameters to try, `policy` is what they ask for.

    `batch` is how many queries a lane takes at a time under load.
    """

    contender: str
    graph: str
    policy: str
    settings: Callable[[int, int], Sequence[Params]]
    note: str = ""
    batch: int = 16


def _best_first(k: int, num_items: int) -> list[Params]:
    # What ends a walk early: the smallest pool is k, so below it only the number of steps is left.
    short = [{"ef": k, "beam_width": 32, "max_steps": steps} for steps in (3, 4, 5, 6, 8)]
    full = [
        {"ef": ef, "beam_width": width}
        for ef in (1.0, 1.2, 1.5, 2, 2.5, 3, 4, 6, 8)
        for width in (16, 32, 64, 128)
        if (width <= 64 or ef >= 4) and (width >= 32 or ef <= 2)
    ]
    return [*short, *({**walk, "ef": round(walk["ef"] * k)} for walk in full)]


def _gated(k: int, num_items: int) -> list[Params]:
    widths = ((32, 128), (64, 128), (64, 256), (128, 384))
    pools = ((1.0, 0.0), (1.0, 0.2), (1.25, 0.4), (1.5, 0.55), (2, 0.75), (3, 1.0))
    return [
        {"ef": round(ef * k), "beam_width": beam, "gate_width": gate, "gate_margin": margin}
        for beam, gate in widths
        for ef, margin in pools
    ]


def _pruned(k: int, num_items: int) -> list[Params]:
    # NANN's pools, level 2 first (reference/nann.md, "Evaluated"), times scales; the last is at least k.
    return [
        {"level_ef": [round(100 * scale), round(200 * scale), max(k, round(400 * scale))]}
        for scale in (0.5, 1, 1.5, 2, 3, 4, 6)
        if 400 * scale < 0.7 * num_items
    ]


def level_sweep(k: int, num_items: int) -> list[Params]:
    """NANN's two published settings and what lies between and above: shapes times scales."""
    # reference/nann.md, "Served", and reference/search-findings.md; t5 is the number of answers.
    shapes = ((100, 200, 200, 200, 200), (100, 200, 400, 400, 400))
    scales = (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6)
    return [
        {"level_topn": [*(round(width * scale) for width in shape), k]}
        for shape in shapes
        for scale in scales
        if scale * max(shape) < 0.7 * num_items
    ]


def _inner_product(k: int, num_items: int) -> list[Params]:
    return [{"ef": count} for count in (1000, 2000, 5000, 10_000, 20_000) if k < count < 0.7 * num_items]


def _once(k: int, num_items: int) -> list[Params]:
    return [{}]


SWEEPS: tuple[Sweep, ...] = (
    Sweep("best_first", OWN_GRAPH, "best_first", _best_first),
    Sweep(
        "best_first, gated", OWN_GRAPH, "best_first", _gated, "neighbours scored only where a gate lets them"
    ),
    Sweep(BASELINE, NANN_GRAPH, "level", level_sweep, "NANN's served search on the graph NANN publishes"),
    Sweep(
        "level, own graph", OWN_GRAPH, "level", level_sweep, "NANN's served search on this artifact's graph"
    ),
    Sweep("level_pruned, NANN's graph", NANN_GRAPH, "level_pruned", _pruned, "the search NANN evaluates"),
    Sweep("inner-product scan + rerank", OWN_GRAPH, "inner_product", _inner_product),
    Sweep(EXHAUSTIVE, OWN_GRAPH, "exhaustive", _once, "every item scored, XLA-compiled", batch=2),
)


class EngineContender:
    """One policy on one graph."""

    def __init__(self, corpus: Corpus, sweep: Sweep) -> None:
        self._corpus = corpus
        self._sweep = sweep
        self._engine: SearchEngine = corpus.engines[sweep.graph]
        self._row_of = {item: row for row, item in enumerate(_plain(corpus.item_ids))}
        self.name = sweep.contender
        self.note = sweep.note
        self.fingerprint = f"{sweep.graph} graph, {sweep.policy}"
        self.settings = [
            Setting(sweep.contender, params) for params in sweep.settings(corpus.k, corpus.num_items)
        ]

    def answers(self, setting: Setting, users: UserSet, k: int) -> list[Found]:
        ask = self._asker(setting, users, k)
        lanes, batch = self._engine.n_lanes, self._batch

        def search(lane: int) -> list[Hits]:
            mine = range(lane, len(users), lanes)
            return [
                hits
                for start in range(0, len(mine), batch)
                for hits in ask(mine[start : start + batch], lane)
            ]

        with ThreadPoolExecutor(lanes) as pool:
            by_lane = list(pool.map(search, range(lanes)))
        known = (users.histories >= 0).sum(axis=1)
        return [self._found(by_lane[i % lanes][i // lanes], int(known[i])) for i in range(len(users))]

    def latencies_s(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> Float64[np.ndarray, " requests"]:
        ask = self._asker(setting, users, k)
        return one_at_a_time(lambda chosen: ask(chosen, 0), rows, budget)

    def saturated_qps(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> float:
        ask = self._asker(setting, users, k)
        return keep_busy(ask, rows, budget, lanes=self._engine.n_lanes, batch=self._batch)

    @property
    def _batch(self) -> int:
        return min(self._sweep.batch, self._engine.max_batch)

    def _asker(self, setting: Setting, users: UserSet, k: int) -> Callable[[Sequence[int], int], list[Hits]]:
        """One search for these rows of `users`, from item ids to item ids, on a lane."""
        params, engine = search_params(self._sweep.policy, setting.params), self._engine

        def ask(rows: Sequence[int], lane: int) -> list[Hits]:
            queries = [Query(k=k, params=params, history=users.history_ids[row]) for row in rows]
            return engine.search([engine.check(query) for query in queries], lane)

        return ask

    def _found(self, hits: Hits, known: int) -> Found:
        encode = self._corpus.multiply_adds.encode
        estimates = hits.explain.get("estimated", 0) * self._products_of_an_estimate(known)
        return Found(
            item_index=np.array([self._row_of[item] for item in hits.item_ids], dtype=np.int32),
            score=np.asarray(hits.scores, dtype=np.float32),
            n_scored=hits.n_scored,
            multiply_adds=encode + self._scan() + estimates,
        )

    def _products_of_an_estimate(self, known: int) -> float:
        """Of the gate: a key of each of the `known` history items, and the context, times the candidate's."""
        gate = self._corpus.artifact.manifest.gate
        return 0.0 if gate is None else float(known * gate.dim + gate.context_dim)

    def _scan(self) -> float:
        """Of the policy `inner_product`: every item's vector times the user's."""
        if self._sweep.policy != "inner_product" or self._corpus.artifact.item_vectors is None:
            return 0.0
        return float(self._corpus.artifact.item_vectors.size)


def search_params(policy: str, params: Params) -> SearchParams:
    """The engine's parameters of plain values; lists become tuples, so that queries can share a batch."""
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in params.items()}
    return SearchParams(policy=policy, **plain)  # type: ignore[arg-type]


def engine_contenders(
    corpus: Corpus, sweeps: Sequence[Sweep] = SWEEPS
) -> Iterator[EngineContender | Skipped]:
    """A contender for each sweep, or why this engine or this version has none."""
    known = {field.name for field in fields(SearchParams)}
    for sweep in sweeps:
        if sweep.policy not in get_args(Policy):
            yield Skipped(sweep.contender, f"this engine has no policy {sweep.policy}")
            continue
        settings = sweep.settings(corpus.k, corpus.num_items)
        if unknown := {name for params in settings for name in params} - known:
            yield Skipped(sweep.contender, f"this engine has no parameter {min(unknown)}")
        elif not settings:
            yield Skipped(sweep.contender, "the corpus is too small for any of its settings")
        elif refusal := _refusal(corpus, sweep, settings[0]):
            yield Skipped(sweep.contender, refusal)
        else:
            yield EngineContender(corpus, sweep)


def _refusal(corpus: Corpus, sweep: Sweep, params: Params) -> str | None:
    """Why this version cannot be asked so."""
    query = Query(k=corpus.k, params=search_params(sweep.policy, params), history=corpus.tune.history_ids[0])
    try:
        corpus.engines[sweep.graph].check(query)
    except RetrievalError as error:
        return str(error)
    return None


def _plain(item_ids: Any) -> list[Any]:
    return item_ids.tolist() if isinstance(item_ids, np.ndarray) else list(item_ids)
