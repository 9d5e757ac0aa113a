"""A whole comparison over a small world, and the page and plot that come of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nann.offline.benchmark.compare import run
from nann.offline.benchmark.compare.contender import Found, Setting, Skipped, UserSet
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.engine_contenders import (
    BASELINE,
    EXHAUSTIVE,
    EngineContender,
    engine_contenders,
)
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.benchmark.compare.plots import draw, front
from nann.offline.benchmark.compare.quality import Truth, exhaustive_truth
from nann.offline.benchmark.compare.report import _level_percentile, page
from nann.offline.benchmark.compare.run import CompareOptions, compare_corpus
from nann.offline.progress import Progress


def _compared(corpus: Corpus, *, timing: bool, only: tuple[str, ...] = ()) -> dict[str, Any]:
    options = CompareOptions(
        only=only,
        screening_users=len(corpus.tune) // 2,
        timing=timing,
        timed_points=1,
        rounds=2,
        budget=TimingBudget(requests=3, latency_s=100.0, load_s=0.0, warm_up_requests=1),
    )
    return compare_corpus(corpus, corpus.work, corpus.work / "none", options, Progress(silent=True))


def _left_out(name: str) -> Any:
    def contenders(*_arguments: Any) -> Iterator[Skipped]:
        yield Skipped(name, "no environment in tests")

    return contenders


@pytest.fixture(scope="module", autouse=True)
def _without_other_environments() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "tf_port_contenders", _left_out("TF 2 port"))
        patch.setattr(run, "scann_contenders", _left_out("ScaNN"))
        yield


@pytest.fixture(scope="module")
def report(shared_corpus: Corpus) -> dict[str, Any]:
    shared_corpus.work.mkdir(parents=True)
    return _compared(shared_corpus, timing=True)


def test_every_target_has_the_cheapest_setting_of_each_contender(report: dict[str, Any]) -> None:
    assert [target["target"] for target in report["targets"]] == [0.95, 0.98, 0.99]
    by_name = {entry["name"]: entry for entry in report["contenders"]}
    assert {"best_first", BASELINE, "exhaustive", "faiss HNSW alone"} <= set(by_name)
    for target in report["targets"]:
        named = [row["contender"] for row in [*target["rows"], *target["missed"]]]
        assert sorted(named) == sorted(by_name)
        costs = [row["cost"]["mean"] for row in target["rows"]]
        assert costs == sorted(costs)
        for row in target["rows"]:
            entry = by_name[row["contender"]]
            good = [
                one["cost"]["mean"] for one in entry["tuned"] if one["recall"]["mean"] >= target["target"]
            ]
            chosen = next(one for one in entry["tuned"] if one["setting"] == row["setting"])
            assert chosen["cost"]["mean"] == min(good)
            assert row["n_users"] == report["corpus"]["n_test"]
        for row in target["missed"]:
            assert row["recall"] < target["target"]


class _Made:
    """Answers the truth with `good`, and more dearly items of the truth's other end with `bad`."""

    name, note, fingerprint = "made", "", "made"

    def __init__(self, truths: dict[str, Truth]) -> None:
        self.settings = [Setting("made", {"kind": kind}) for kind in ("bad", "good")]
        self.asked: list[tuple[str, int]] = []
        self._truths = truths

    def answers(self, setting: Setting, users: UserSet, k: int) -> list[Found]:
        kind = setting.params["kind"]
        self.asked.append((kind, len(users)))
        truth = self._truths[users.split].first(len(users))
        shown = k if kind == "good" else k // 2
        return [
            Found(items[:shown], scores[:shown], 10 if kind == "good" else 20, 0.0)
            for items, scores in zip(truth.item_index, truth.score, strict=True)
        ]


def test_what_a_few_users_show_to_be_beaten_is_asked_of_no_others(shared_corpus: Corpus) -> None:
    corpus = shared_corpus
    found = [one for one in engine_contenders(corpus) if isinstance(one, EngineContender)]
    exhaustive = next(one for one in found if one.name == EXHAUSTIVE)
    tune, test = (exhaustive_truth(corpus, exhaustive, users) for users in (corpus.tune, corpus.test))
    made, few = _Made({corpus.tune.split: tune, corpus.test.split: test}), len(corpus.tune) // 2
    options = CompareOptions(screening_users=few)
    entry = run._sweep(corpus, made, tune, test, options, Progress(silent=True))  # type: ignore[arg-type]
    whole = len(corpus.tune)
    assert made.asked == [("bad", few), ("good", few), ("good", whole), ("good", len(corpus.test))]
    assert [one.params["kind"] for one in entry.tuned] == ["good"]
    assert entry.chosen == {0.95: 0, 0.98: 0, 0.99: 0}


def test_costs_are_quoted_against_the_baseline(report: dict[str, Any]) -> None:
    for target in report["targets"]:
        rows = {row["contender"]: row for row in target["rows"]}
        if BASELINE not in rows:
            assert all(row["baseline_over_cost"] is None for row in target["rows"])
            continue
        for row in target["rows"]:
            expected = rows[BASELINE]["cost"]["mean"] / row["cost"]["mean"]
            assert row["baseline_over_cost"]["mean"] == pytest.approx(expected)
        assert rows[BASELINE]["baseline_over_cost"]["low"] == pytest.approx(1.0)


def test_times_of_chosen_settings_are_taken_and_kept(shared_corpus: Corpus, report: dict[str, Any]) -> None:
    timed = {(row["contender"], row["setting"]): row for row in report["timing"]["rows"]}
    for target in report["targets"]:
        for row in target["rows"]:
            assert len(timed[row["contender"], row["setting"]]["qps"]) == 2
            assert timed[row["contender"], row["setting"]]["requests"] == 6
    again = _compared(shared_corpus, timing=False)
    assert again["timing"] == json.loads(json.dumps(report["timing"]))
    assert json.loads((shared_corpus.work / "report.json").read_text()) == json.loads(json.dumps(again))


def test_some_contenders_can_be_asked_for_alone(shared_corpus: Corpus, report: dict[str, Any]) -> None:
    kept = (shared_corpus.work / "report.json").read_bytes()
    few = _compared(shared_corpus, timing=False, only=("best_first", "faiss HNSW"))
    (shared_corpus.work / "report.json").write_bytes(kept)
    assert {entry["name"] for entry in few["contenders"]} <= {
        "best_first", "best_first, gated", "faiss HNSW alone", "faiss HNSW + rerank", "exhaustive",
    }  # fmt: skip
    assert {"best_first", "faiss HNSW alone"} <= {entry["name"] for entry in few["contenders"]}
    assert "only these were asked for: best_first, faiss HNSW, exhaustive" in page([few], [])
    assert "asked for" not in page([report], [])


def test_the_page_says_what_was_measured_and_what_was_not(report: dict[str, Any]) -> None:
    text = page([report], [Skipped("ml-1m", "its clicks are not there")])
    assert "## world" in text
    assert "300 items" in text
    assert "One score is 8 multiply-adds" in text
    assert "**ScaNN was left out**: no environment in tests" in text
    assert "## ml-1m\n\nNot measured: its clicks are not there." in text
    for target in report["targets"]:
        for row in target["rows"]:
            assert f"{row['cost']['mean']:,.0f}" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count(" | ") for line in tables}) == 1
    assert "Nothing has been measured yet." not in text
    assert "Nothing has been measured yet." in page([], [])
    without = page([{**report, "timing": None}], [])
    assert "No times were taken." in without
    assert "QPS ÷" not in without


def test_the_plot_is_drawn_with_and_without_times(report: dict[str, Any], tmp_path: Path) -> None:
    draw(report, tmp_path / "plots" / "world.png")
    draw({**report, "timing": None}, tmp_path / "plots" / "counts.png")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "plots").iterdir())]
    assert len(sizes) == 2
    assert min(sizes) > 5000


def test_the_front_has_no_point_that_another_beats() -> None:
    points = [(0.9, 5.0), (0.95, 4.0), (0.99, 9.0), (0.99, 8.0), (0.7, 3.0), (0.6, 3.5)]
    assert front(points, smaller_is_better=True) == [(0.7, 3.0), (0.95, 4.0), (0.99, 8.0)]
    assert front(points, smaller_is_better=False) == [(0.99, 9.0)]


def test_the_percentile_of_level_at_another_mean_lies_between_its_settings() -> None:
    points = [{"recall": {"mean": mean}, "recall_p5": {"mean": p5}} for mean, p5 in ((0.98, 0.9), (0.9, 0.6))]
    report = {"contenders": [{"name": "best_first", "reported": []}, {"name": BASELINE, "reported": points}]}
    assert _level_percentile(report, BASELINE, 0.92) == "0.675"
    assert _level_percentile(report, BASELINE, 0.98) == "0.900"
    assert _level_percentile(report, BASELINE, 0.99) == _level_percentile(report, "nobody", 0.92) == "–"
