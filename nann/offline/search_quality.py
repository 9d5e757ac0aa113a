"""Run the engine that serves over users with held-out items, and sum up what it answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from nann.engine.search_engine import SearchEngine
from nann.engine.types import Hits, ItemId, Query, SearchParams
from nann.offline.data.dataset import Dataset, EvalSplit
from nann.offline.metrics.ranking import bootstrap_mean, held_out_metrics, percentiles, recall_at_k
from nann.offline.progress import Progress

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Int, Int32

    # Histories as item indices, oldest first, -1 padded -> what NANN's clients send of each.
    Embed: TypeAlias = Callable[[Int32[np.ndarray, "users length"]], Float16[np.ndarray, "users width"]]

__all__ = [
    "ESTIMATE_COST",
    "Answers",
    "EvalUsers",
    "Setting",
    "answer_users",
    "exhaustive_answers",
    "items_scored_at",
    "on_all_lanes",
    "summarise",
]


ResultT = TypeVar("ResultT")

# Of one score: 50 keys of 16 numbers and a context of 8 against the attention model's 23,000 multiply-adds.
ESTIMATE_COST = 0.035


@dataclass(frozen=True, slots=True)
class Setting:
    """A named way to search."""

    name: str
    params: SearchParams


@dataclass(frozen=True, slots=True)
class EvalUsers:
    """Users to ask for: their histories as item ids, oldest first, and the held-out item of each.

    Where there are `comm_seqs`, the histories embedded, the engine is asked with those instead.
    """

    split: EvalSplit
    histories: Sequence[Sequence[ItemId]]
    targets: Sequence[ItemId]
    comm_seqs: Float16[np.ndarray, "users width"] | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        split: EvalSplit,
        *,
        limit: int | None,
        seed: int,
        embed: Embed | None = None,
    ) -> EvalUsers:
        """The split's users, or a seeded sample of `limit` of them. ValueError when it has none."""
        _, histories, targets = dataset.eval_samples(split)
        if not len(targets):
            raise ValueError(f"the data has no {split} users: none has more than 7 behaviours")
        rows = np.arange(len(targets))
        if limit is not None and limit < len(rows):
            rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
        ids = dataset.item_ids
        return cls(
            split,
            [ids[row[row >= 0]].tolist() for row in histories[rows]],
            ids[targets[rows]].tolist(),
            None if embed is None else embed(histories[rows]),
        )

    def queries(self, k: int, params: SearchParams) -> list[Query]:
        """One for each user, in their order."""
        if self.comm_seqs is not None:
            return [Query(k=k, params=params, comm_seq=row) for row in self.comm_seqs]
        return [Query(k=k, params=params, history=row) for row in self.histories]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True)
class Answers:
    """What one setting answered each user, and what that took; scores padded with -inf to [users, k]."""

    setting: Setting
    hits: Sequence[Hits]
    scores: Float[np.ndarray, "users k"]
    latency_s: Float[np.ndarray, " users"]


def answer_users(
    engine: SearchEngine,
    users: EvalUsers,
    setting: Setting,
    *,
    k: int,
    progress: Progress,
    with_latency: bool = True,
) -> Answers:
    """Ask for every user alone, nothing excluded, as NANN evaluates.

    With latency, one query is in flight at a time; without, every lane is kept busy.
    """
    prepared = [engine.check(query) for query in users.queries(k, setting.params)]
    hits: list[Hits] = []
    latency_s = np.full(len(users), np.nan)
    with progress.stage(f"{setting.name} ({users.split})", total=len(users), unit="users") as stage:
        if with_latency:
            for row, query in enumerate(prepared):
                started = time.perf_counter()
                hits += engine.search([query], 0)
                latency_s[row] = time.perf_counter() - started
                stage.advance()
        else:
            for answer in on_all_lanes(engine, lambda lane, query: engine.search([query], lane)[0], prepared):
                hits.append(answer)
                stage.advance()
    scores = np.full((len(users), k), -np.inf)
    for row, answer in enumerate(hits):
        scores[row, : len(answer.scores)] = answer.scores
    return Answers(setting, hits, scores, latency_s)


def exhaustive_answers(engine: SearchEngine, users: EvalUsers, *, k: int, progress: Progress) -> Answers:
    """The truth: every item scored for every user (NANN's test_all)."""
    setting = Setting("exhaustive", SearchParams(policy="exhaustive"))
    return answer_users(engine, users, setting, k=k, progress=progress, with_latency=False)


def summarise(
    answers: Answers, users: EvalUsers, exhaustive: Answers | None, *, k: int, num_items: int, seed: int = 0
) -> dict[str, Any]:
    """The measured row of one setting, ready for JSON.

    ``recall`` is against the exhaustive search under the same model, by score with ties ("coverage" in
    NANN's paper); ``hit_rate`` is the share of users whose held-out item is found ("recall" there).
    ``cost`` is in scores: an estimate of the gate counts as `ESTIMATE_COST` of one.
    """
    retrieved, targets = _as_codes(answers.hits, users.targets, k)
    metrics = held_out_metrics(retrieved, targets, k)
    hit = (retrieved[:, :k] == targets[:, None]).any(axis=1).astype(np.float64)
    interval = bootstrap_mean(hit, seed=seed)
    scored = np.array([answer.n_scored for answer in answers.hits], dtype=np.float64)
    estimated = np.array([answer.explain.get("estimated", 0) for answer in answers.hits], dtype=np.float64)
    steps = [answer.explain["scored_per_step"] for answer in answers.hits]
    depth = max(map(len, steps), default=0)
    row: dict[str, Any] = {
        "name": answers.setting.name,
        "policy": answers.setting.params.policy,
        "params": _params(answers.setting.params),
        "n_users": len(users),
        "hit_rate": metrics.hit_rate,
        "hit_rate_low": interval.low,
        "hit_rate_high": interval.high,
        "precision": metrics.precision,
        "recall_held_out": metrics.recall,
        "f1": metrics.f1,
        "ndcg": metrics.ndcg,
        "items_scored": float(scored.mean()),
        "estimated": float(estimated.mean()),
        "cost": float((scored + ESTIMATE_COST * estimated).mean()),
        "share_scored": float(scored.mean() / num_items),
        "steps": float(np.mean([answer.steps for answer in answers.hits])),
        "scored_per_step": [
            float(np.mean([s[i] if i < len(s) else 0 for s in steps])) for i in range(min(depth, 32))
        ],
    }
    if not np.isnan(answers.latency_s).any():
        row["latency_ms"] = percentiles(answers.latency_s * 1000, (50, 95, 99))
    if exhaustive is not None:
        recall = recall_at_k(answers.scores, exhaustive.scores, k)
        mean = bootstrap_mean(recall, seed=seed)
        row |= {
            "recall": mean.mean,
            "recall_low": mean.low,
            "recall_high": mean.high,
            "recall_p5": float(np.percentile(recall, 5)),
        }
    return row


def items_scored_at(recall: float, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Items scored for a mean recall, read off the straight lines between the best of the measured rows.

    None where no row reaches it; the cheapest row's own cost where that is better already.
    """
    front: list[tuple[float, float]] = []
    for found, cost in sorted(((row["recall"], row["items_scored"]) for row in rows), key=lambda p: p[1]):
        if not front or found > front[-1][0]:
            front.append((found, cost))
    if not front or front[-1][0] < recall:
        return None
    recalls, costs = zip(*front, strict=True)
    return float(np.interp(recall, recalls, costs))


def _params(params: SearchParams) -> dict[str, Any]:
    if params.policy == "level":
        return {"level_topn": list(params.level_topn)}
    if params.policy == "level_pruned":
        return {"level_ef": list(params.level_ef), "level_steps": params.level_steps}
    if params.policy == "best_first":
        walk = {"ef": params.ef, "beam_width": params.beam_width, "max_steps": params.max_steps}
        gate = {"gate_width": params.gate_width, "gate_margin": params.gate_margin}
        return {**walk, **gate} if params.gate_width else walk
    return {}


def _as_codes(
    hits: Sequence[Hits], targets: Sequence[ItemId], k: int
) -> tuple[Int[np.ndarray, "users k"], Int[np.ndarray, " users"]]:
    """Ids as small integers, so that string ids compare as fast as integer ones; short answers end in -1."""
    codes: dict[ItemId, int] = {}
    wanted = np.array([codes.setdefault(item, len(codes)) for item in targets])
    retrieved = np.full((len(hits), k), -1, dtype=np.int64)
    for row, answer in enumerate(hits):
        found = [codes.setdefault(item, len(codes)) for item in answer.item_ids[:k]]
        retrieved[row, : len(found)] = found
    return retrieved, wanted


def on_all_lanes(
    engine: SearchEngine, call: Callable[[int, Any], ResultT], queries: Sequence[Any]
) -> Iterator[ResultT]:
    """``call(lane, query)`` of each, in their order, with every lane of the engine at work."""

    def run(lane: int) -> list[ResultT]:
        return [call(lane, query) for query in queries[start + lane : stop : engine.n_lanes]]

    block = 16 * engine.n_lanes  # small enough for a progress bar to move, large enough to hide the joins
    with ThreadPoolExecutor(engine.n_lanes) as pool:
        for start in range(0, len(queries), block):
            stop = min(start + block, len(queries))
            by_lane = list(pool.map(run, range(engine.n_lanes)))
            for i in range(stop - start):
                yield by_lane[i % engine.n_lanes][i // engine.n_lanes]
