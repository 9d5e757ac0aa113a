"""The report's steps: make the world, open the engine, measure. State goes from step to step in here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Any

import numpy as np

from nann.engine.types import Query, SearchParams
from nann.offline.benchmark.gpu.loads import GroupTarget, LoadFigures, Served, capacity, rate
from nann.offline.benchmark.gpu.measure import (
    Bench,
    Found,
    K,
    Setting,
    as_rows,
    profile,
    try_settings,
)
from nann.offline.benchmark.gpu.plan import Deadline, Step
from nann.offline.benchmark.gpu.preparation import Options, Preparation
from nann.offline.benchmark.gpu.quality import Ranked, recall
from nann.offline.benchmark.gpu.shapes import always_largest, measure_tile_rows, step_counts
from nann.offline.benchmark.gpu.verdict import GATE

__all__ = ["Serve", "Session"]

Serve = Callable[[Bench, Sequence[Query], int, int], "AbstractAsyncContextManager[Served]"]
"""(engine, every user's query, lanes, largest batch) -> the engine behind a batcher."""

_BEST_FIRST = (
    (200, 64),
    (400, 64),
    (400, 128),
    (800, 64),
    (800, 128),
    (1600, 128),
    (1600, 256),
    (2400, 256),
    (3200, 256),
    (4800, 256),
    (6400, 256),
)
# NANN's own settings (reference/nann.md, "Served").
_LEVEL = ((100, 200, 200, 200, 200, 200), (100, 200, 400, 400, 400, 200))
_RIVAL_CANDIDATES = (1000, 2000, 5000, 10_000, 20_000)
_LANES = (1, 2, 4)
_BATCH_SHARES = (1, 4, 64)  # of the largest batch
_ORACLE_USERS = 4
_PROFILED = 8  # searches
_GPU_FIRST_QPS, _CPU_FIRST_QPS = 500.0, 100.0  # of single queries, then doubled
_TILE_ROWS = (32, 64, 128)


class Session:
    """One run of the report."""

    def __init__(self, options: Options, serve: Serve) -> None:
        self.options = options
        self._serve = serve
        self._made = Preparation(options)
        self._exact_hits: list[Any]
        self._exact: Ranked
        self._nann_load: Setting
        self._cheapest: Setting
        self._hits: dict[str, Any] = {}
        self._lanes = options.lanes

    def steps(self) -> list[Step]:
        """All measurements, what the verdict needs first. Seconds are meant for 1.3 million items."""
        needs = {"needs": ("exhaustive",)}
        chosen = {"needs": ("settings",)}
        return [
            *self._made.steps(),
            Step("exhaustive", 60, self._scan_all, needs=("warm-up",)),
            Step("settings", 40, self._try_settings, least_s=5, **needs),
            Step("lanes and batches", 90, self._vary_lanes, least_s=10, **chosen),
            Step("gate", 45, self._load_gate, least_s=5, **chosen),
            Step("profile", 10, self._profile, least_s=2, **chosen),
            Step("rivals", 20, self._try_rivals, least_s=2, **needs),
            Step("cheapest", 20, self._load_cheapest, least_s=4, **chosen),
            Step("single queries", 20, self._load_singles, least_s=4, **chosen),
            Step("oracle", 20, self._check_oracle, least_s=3, **needs),
            Step("buckets", 10, self._ablate_buckets, least_s=3, **chosen),
            # Two further programs of the largest shape are compiled.
            Step("tile rows", 40, self._sweep_tiles, least_s=15 if self.options.on_gpu else 3, **chosen),
        ]

    # -- searches --------------------------------------------------------------------------------

    def _scan_all(self, deadline: Deadline) -> dict[str, Any]:
        setting = Setting("exhaustive", SearchParams(policy="exhaustive"))
        (found,), answers = try_settings(
            self._made.bench, [setting], None, deadline, users=self.options.users
        )
        self._exact_hits = answers["exhaustive"]
        self._exact = Ranked.of(self._exact_hits, K)
        return {"rows": as_rows([found])}

    def _try_settings(self, deadline: Deadline) -> dict[str, Any]:
        settings = [
            Setting(f"best_first ef {ef}, beam {beam}", SearchParams(ef=ef, beam_width=beam))
            for ef, beam in _BEST_FIRST
        ]
        settings += [
            Setting(f"level {list(topn)}", SearchParams(policy="level", level_topn=topn)) for topn in _LEVEL
        ]
        found, self._hits = self._try(settings, deadline)
        best_first = [one for one in found if one.name.startswith("best_first")]
        by_name = {setting.name: setting for setting in settings}
        enough = [one for one in best_first if (one.recall or 0.0) >= GATE.recall]
        cheapest = max(enough, key=lambda one: one.qps) if enough else max(best_first, key=_recall)
        heavy = [one for one in best_first if one.mean_items_scored >= GATE.items_scored]
        nann = min(heavy or best_first, key=lambda one: abs(one.mean_items_scored - GATE.items_scored))
        self._cheapest, self._nann_load = by_name[cheapest.name], by_name[nann.name]
        return {
            "rows": as_rows(found),
            "cheapest": cheapest.name,
            "cheapest_reaches": bool(enough),
            "nann_load": nann.name,
            "nann_load_reaches": bool(heavy),
            "scratch_growths": self._made.bench.growths(),
        }

    def _try_rivals(self, deadline: Deadline) -> dict[str, Any]:
        settings = [
            Setting(f"inner product {n:,} + rerank", SearchParams(policy="inner_product", ef=n))
            for n in _RIVAL_CANDIDATES
            if n <= self.options.items
        ]
        found, _ = self._try(settings, deadline)
        return {"rows": as_rows(found)}

    def _try(self, settings: Sequence[Setting], deadline: Deadline) -> tuple[list[Found], dict[str, Any]]:
        return try_settings(self._made.bench, settings, self._exact, deadline, users=self.options.users)

    def _profile(self, deadline: Deadline) -> dict[str, Any]:
        settings = dict.fromkeys((self._nann_load, self._cheapest))
        rows = [profile(self._made.bench, one, deadline, repeats=_PROFILED) for one in settings]
        return {"rows": [row for row in rows if row]}

    def _check_oracle(self, deadline: Deadline) -> dict[str, Any]:
        """The engine's exhaustive answers against the model in NumPy float32, for a few users."""
        differences, recalls = [], []
        for user, found in enumerate(self._exact_hits[:_ORACLE_USERS]):
            if not deadline.allows(f"user {user}", 1.0):
                break
            tensors = self._made.weights.encode_user(
                self._made.corpus.embeddings, self._made.corpus.history[user]
            )
            scores = self._made.weights.score(tensors, self._made.world.item_state)
            own = scores[np.array(found.item_ids)]
            differences.append(float(np.abs(own - np.array(found.scores)).max()))
            best = np.argsort(-scores, kind="stable")[:K]
            exact = Ranked(best[None].astype(np.int64), scores[best][None])
            recalls.append(float(recall(self._exact.some([user]), exact)[0]))
        return {
            "users": len(differences),
            "largest_difference": max(differences),
            "recall": float(np.mean(recalls)),
        }

    # -- loads -----------------------------------------------------------------------------------

    def _load_gate(self, deadline: Deadline) -> dict[str, Any]:
        # Arrivals are random, so a rate must lie above the gate's to be no lower when measured.
        return {"rows": asyncio.run(self._rates(self._nann_load, deadline, (GATE.qps * 1.1,), 3.0))}

    def _load_cheapest(self, deadline: Deadline) -> dict[str, Any]:
        return {"rows": asyncio.run(self._rates(self._cheapest, deadline, (), 1.0))}

    async def _rates(
        self, setting: Setting, deadline: Deadline, also: Sequence[float], longer: float
    ) -> list[dict[str, Any]]:
        """Capacity on the best number of lanes, with groups of a whole batch; then open loops at shares of
        it, which last `longer` times as long as other loads."""
        options, lanes, rows = self.options, self._lanes, []
        async with self._serving(setting, lanes, options.batch) as served:
            target = GroupTarget(served, users=options.users, group=options.batch)
            top = await capacity(target, self._exact, in_flight=2 * lanes, seconds=options.load_s)
            rows.append(_row(top, setting, lanes, options.batch))
            for qps in (*(qps for qps in also if qps < top.qps), *(top.qps * s for s in (0.5, 0.7, 0.85))):
                if deadline.allows(f"open loop at {qps:,.0f} QPS", longer * options.load_s):
                    figures = await rate(target, self._exact, qps=qps, seconds=longer * options.load_s)
                    rows.append(_row(figures, setting, lanes, options.batch))
        return rows

    def _vary_lanes(self, deadline: Deadline) -> dict[str, Any]:
        options = self.options
        rows: list[dict[str, Any]] = []
        for setting in dict.fromkeys((self._nann_load, self._cheapest)):
            for batch in dict.fromkeys(max(1, options.batch // share) for share in _BATCH_SHARES):
                for lanes in _LANES:
                    what = f"{setting.name}, {lanes} lanes, batches of {batch}"
                    if lanes <= options.lanes and deadline.allows(what, 2.2 * options.load_s):
                        rows += asyncio.run(self._lanes_and_batch(setting, lanes, batch))
        full = [row for row in rows if row["loop"] == "closed" and row["batch"] == options.batch]
        heavy = [row for row in full if row["setting"] == self._nann_load.name]
        if heavy:
            self._lanes = max(heavy, key=lambda row: row["qps"])["lanes"]
        return {"rows": rows, "best_lanes": self._lanes}

    async def _lanes_and_batch(self, setting: Setting, lanes: int, batch: int) -> list[dict[str, Any]]:
        options = self.options
        async with self._serving(setting, lanes, batch) as served:
            target = GroupTarget(served, users=options.users, group=batch)
            top = await capacity(target, self._exact, in_flight=2 * lanes, seconds=options.load_s)
            at = await rate(target, self._exact, qps=0.7 * top.qps, seconds=options.load_s)
        return [_row(figures, setting, lanes, batch) for figures in (top, at)]

    def _load_singles(self, deadline: Deadline) -> dict[str, Any]:
        return {"rows": asyncio.run(self._singles(deadline))}

    async def _singles(self, deadline: Deadline) -> list[dict[str, Any]]:
        """Single queries, checked one by one, at doubling rates until the event loop falls behind."""
        options, setting = self.options, self._cheapest
        rows = []
        async with self._serving(setting, self._lanes, options.batch) as served:
            qps = _GPU_FIRST_QPS if options.on_gpu else _CPU_FIRST_QPS
            while deadline.allows(f"single queries at {qps:,.0f} QPS", 2 * options.load_s):
                target = GroupTarget(served, users=options.users, group=1, single=True)
                figures = await rate(target, self._exact, qps=qps, seconds=options.load_s)
                rows.append(_row(figures, setting, self._lanes, options.batch))
                if figures.qps < 0.95 * qps or not figures.p99_ms < 10 * GATE.p99_ms:
                    break
                qps *= 2
        return rows

    def _serving(self, setting: Setting, lanes: int, batch: int) -> AbstractAsyncContextManager[Served]:
        return self._serve(self._made.bench, self._made.bench.queries(setting.params), lanes, batch)

    # -- shapes ----------------------------------------------------------------------------------

    def _ablate_buckets(self, deadline: Deadline) -> dict[str, Any]:
        """The cheapest setting with the bucket chosen by each step's count, and with the largest always."""
        setting = self._cheapest
        (fitted,), _ = self._try([setting], deadline)
        with always_largest(self._made.programs):
            largest, _ = self._try([Setting(f"{setting.name}, largest bucket", setting.params)], deadline)
        return {"rows": as_rows([fitted, *largest])}

    def _sweep_tiles(self, deadline: Deadline) -> dict[str, Any]:
        options, rows = self.options, []
        last_s = 0.0
        for setting in (self._nann_load,):
            steps = step_counts(self._hits[setting.name], options.batch)
            for tile_rows in _TILE_ROWS:
                if not deadline.allows(f"{tile_rows} rows a tile", last_s):
                    continue
                started_s = time.perf_counter()
                programs = self._made.programs
                if tile_rows != programs.grid.tile_rows:
                    programs = self._made.open_programs(tile_rows)
                history = self._made.corpus.history[: options.batch]
                found = measure_tile_rows(programs, self._made.world.item_state, history, steps)
                rows.append({**asdict(found), "useful_pairs_per_s": found.useful_pairs_per_s})
                last_s = time.perf_counter() - started_s
        return {"rows": rows, "setting": self._nann_load.name}


def _recall(found: Found) -> float:
    return found.recall or 0.0


def _row(figures: LoadFigures, setting: Setting, lanes: int, batch: int) -> dict[str, Any]:
    return {"setting": setting.name, "lanes": lanes, "batch": batch, **asdict(figures)}
