"""The cost of a recall, read off a measured sweep, and queries in both forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nann.engine.types import SearchParams
from nann.offline.build_index import build_index
from nann.offline.data.dataset import Dataset
from nann.offline.evaluate import EvaluateOptions, evaluate
from nann.offline.extract_embeddings import extract
from nann.offline.progress import Progress
from nann.offline.search_quality import EvalUsers, items_scored_at
from nann.offline.train import TrainConfig, train

SILENT = Progress(silent=True)


def rows(*points: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"recall": recall, "items_scored": cost} for recall, cost in points]


@pytest.mark.parametrize(
    ("recall", "cost"),
    [(0.9, 100), (0.85, 100), (0.95, 150), (0.98, 180), (1.0, 200), (1.01, None)],
)
def test_costs_lie_on_the_lines_between_the_best_settings(recall: float, cost: float | None) -> None:
    measured = rows((1.0, 200), (0.9, 100), (0.89, 150), (0.99, 1000))
    assert items_scored_at(recall, measured) == (None if cost is None else pytest.approx(cost))


def test_no_settings_reach_nothing() -> None:
    assert items_scored_at(0.1, []) is None


def test_users_ask_in_the_form_they_have(tiny_data: Path) -> None:
    dataset = Dataset.load(tiny_data)

    def embed(histories: np.ndarray) -> np.ndarray:
        return histories.astype(np.float16)

    plain = EvalUsers.of(dataset, "test", limit=3, seed=0)
    embedded = EvalUsers.of(dataset, "test", limit=3, seed=0, embed=embed)
    assert embedded.targets == plain.targets
    params = SearchParams()
    assert [query.history for query in plain.queries(5, params)] == plain.histories
    for query, history in zip(embedded.queries(5, params), plain.histories, strict=True):
        assert query.history is None
        assert query.comm_seq is not None
        assert dataset.item_ids[query.comm_seq[query.comm_seq >= 0].astype(int)].tolist() == history


@pytest.fixture
def run(tiny_data: Path, tmp_path: Path) -> Path:
    config = TrainConfig(
        model="dnn", batch_size=32, num_neg=20, negative_groups=2, adv_groups=1, max_steps=3, jit=False
    )
    train(tiny_data, tmp_path / "model", config, progress=SILENT)
    extract(tmp_path / "model", tmp_path / "embeddings", progress=SILENT)
    build_index(tmp_path / "embeddings", tmp_path / "index")
    return tmp_path


def test_profiles_tuned_for_answers_of_another_size_are_measured_too(run: Path, monkeypatch) -> None:
    tuned = {"policy": "best_first", "ef": 7, "beam_width": 3, "max_steps": 9}
    monkeypatch.setattr(
        "nann.offline.evaluate.tuned_profiles",
        lambda run_dir, engine: ({"fast": tuned, "balanced": tuned}, {"fast": True, "balanced": False}),
    )
    options = EvaluateOptions(k=5, n_report=2, lanes=1, baselines=False)
    report = evaluate(run, options=options, progress=SILENT)
    assert report["served"]["params"] == {"ef": 7, "beam_width": 3, "max_steps": 9}
    assert json.loads((run / "profiles.json").read_text())["balanced"] == tuned


def test_an_evaluation_by_embedded_histories_leaves_what_is_published_alone(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    options = EvaluateOptions(k=5, n_report=2, lanes=1)
    report = evaluate(run, options=options, query_form="comm_seq", progress=SILENT)
    assert {path.name for path in run.iterdir()} - before == {"report_comm_seq.json"}
    assert json.loads((run / "report_comm_seq.json").read_text()) == report
    assert report["query_form"] == "comm_seq"
    assert {row["policy"] for row in report["sweep"]} == {"best_first", "level", "level_pruned"}
    assert set(report["items_scored_at"]["best_first"]) == {"0.95", "0.98", "0.99"}
    assert all(row["recall"] > 0.9 for row in report["sweep"])  # 60 items, of which most are scored
