"""Live recall of real searches: what the metric says is what an exhaustive query of the same user shows."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from fake_engine import PATIENCE_S
from golden import GOLDEN, load_engine

from nann.engine.recall import recall_of_hits
from nann.engine.types import Query, SearchParams
from nann.service.health import Health
from nann.service.metrics import Metrics
from nann.service.registry import Registry
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings
from nann.service.types import ParamOverrides, RetrieveRequest
from nann.service.user_store import MemoryUserStore

# Too narrow for this graph, so that some items are missed.
NARROW = ParamOverrides(policy="best_first", ef=5, beam_width=1, max_steps=1)
LEVEL = ParamOverrides(policy="level", level_topn=(1, 1, 1, 1, 1, 5))


async def test_live_recall_is_that_of_the_answers(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "artifact", tmp_path / "nann" / "1")
    settings = Settings(repository=tmp_path, shadow_exact_every=1, lanes=1, max_batch_size=1)
    metrics = Metrics()
    registry = Registry(settings, metrics, load_engine)
    await registry.load()
    service = RetrievalService(
        registry, MemoryUserStore(history_limit=10), settings, health=Health(), metrics=metrics
    )

    def sampled(outcome: str) -> float:
        labels = {"model": "nann", "outcome": outcome}
        return metrics.registry.get_sample_value("nann_shadow_samples_total", labels) or 0.0

    recalls = []
    try:
        with registry.served().lease() as served:
            item_ids = served.engine.popular(Query(k=8, params=SearchParams(), history=())).item_ids
        for item_id in item_ids:
            for params in (NARROW, LEVEL):
                request = RetrieveRequest(history=[item_id], k=5, params=params)
                reply = await service.retrieve(request)
                give_up_s = time.monotonic() + PATIENCE_S
                while sampled("measured") == len(recalls) and time.monotonic() < give_up_s:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                exact = await service.retrieve(RetrieveRequest(history=[item_id], k=5, profile="exact"))
                recalls.append(recall_of_hits(reply.hits, exact.hits, 5))
    finally:
        await registry.close()
    assert sampled("measured") == len(recalls) == 16
    assert 0 < sum(recalls) < len(recalls)  # else this would show nothing
    told = metrics.registry.get_sample_value("nann_shadow_recall_sum", {"model": "nann", "profile": "other"})
    assert told is not None
    assert abs(told - sum(recalls)) < 1e-9
