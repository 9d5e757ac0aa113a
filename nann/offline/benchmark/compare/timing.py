"""How long it takes: contenders in rounds, so that a slow minute of the machine hits them all."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nann.offline.benchmark.compare.contender import Contender, Setting, UserSet
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.progress import Progress

__all__ = ["Timed", "time_in_rounds"]


@dataclass(frozen=True, slots=True)
class Timed:
    """One setting. Latencies are of single requests, one in flight, pooled over rounds; `qps` by round."""

    contender: str
    setting: str
    requests: int
    p50_ms: float
    p99_ms: float
    mean_ms: float
    qps: tuple[float, ...]

    @property
    def median_qps(self) -> float:
        return float(np.median(self.qps))


def time_in_rounds(
    timed: Sequence[tuple[Contender, Setting]],
    users: UserSet,
    k: int,
    *,
    rounds: int,
    budget: TimingBudget,
    progress: Progress,
    seed: int = 0,
) -> list[Timed]:
    """Time every setting once a round, in a new order each round, for the same users.

    A round before them is not counted: it fills caches, and indexes and processes start.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(users)).tolist()
    latencies: list[list[np.ndarray]] = [[] for _ in timed]
    qps: list[list[float]] = [[] for _ in timed]
    short = TimingBudget(requests=budget.warm_up_requests, latency_s=0.0, load_s=0.0)
    with progress.stage("time", total=(rounds + 1) * len(timed), unit="settings") as stage:
        for round_ in range(-1, rounds):
            gc.collect()
            for place in rng.permutation(len(timed)).tolist():
                contender, setting = timed[place]
                now = short if round_ < 0 else budget
                found = contender.latencies_s(setting, users, k, rows, now)
                rate = contender.saturated_qps(setting, users, k, rows, now)
                if round_ >= 0:
                    latencies[place].append(found)
                    qps[place].append(rate)
                stage.advance()
            rows = rows[budget.requests :] + rows[: budget.requests]
    return [
        _timed(setting, np.concatenate(latencies[place]) * 1e3, qps[place])
        for place, (_, setting) in enumerate(timed)
    ]


def _timed(setting: Setting, latencies_ms: np.ndarray, qps: Sequence[float]) -> Timed:
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return Timed(
        setting.contender,
        setting.words,
        len(latencies_ms),
        float(p50),
        float(p99),
        float(latencies_ms.mean()),
        tuple(qps),
    )
