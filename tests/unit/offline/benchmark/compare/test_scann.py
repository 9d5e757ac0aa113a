"""ScaNN's side of the seam; ScaNN itself runs where it is installed, by the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nann.offline.benchmark.compare import scann
from nann.offline.benchmark.compare.contender import Setting, Skipped
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.benchmark.compare.scann import ScannContender, scann_contenders
from nann.offline.benchmark.compare.vectors import VectorSource, embedding_vectors
from nann.offline.benchmark.compare.worker import WorkerError


class FakeProcess:
    """Finds the nearest by a scan; a request takes 2 s of search by its own account."""

    leaves = 4

    def __init__(self, items: np.ndarray) -> None:
        self.items = items

    def search(self, users: np.ndarray, count: int, effort: dict[str, int]) -> np.ndarray:
        order = np.argsort(-(users @ self.items.T), axis=1)[:, :count].astype(np.int32)
        order[:, -1] = -1  # one fewer than asked for
        return order

    def ask(self, do: str, users: np.ndarray, count: int, effort: dict[str, int], **more: Any) -> Any:
        return {"latencies_s": [2.0] * more["budget"]["requests"], "qps": 10.0}

    def multiply_adds(self, effort: dict[str, int]) -> float:
        return 100.0 * effort["leaves_to_search"]


@pytest.fixture
def source(corpus: Corpus) -> VectorSource:
    found = embedding_vectors(corpus.artifact)
    assert found is not None
    return found


def test_both_halves_are_counted_and_timed(corpus: Corpus, source: VectorSource) -> None:
    process: Any = FakeProcess(source.items)
    contender = ScannContender(corpus, source, process, rerank=True)
    setting = Setting(contender.name, {"candidates": 50, "leaves_to_search": 3, "reorder": 75})
    found = contender.answers(setting, corpus.test, corpus.k)
    assert {answer.n_scored for answer in found} == {49}
    assert {answer.multiply_adds for answer in found} == {300.0 + 16.0 + source.multiply_adds}
    assert all(len(answer.item_index) == corpus.k for answer in found)
    budget = TimingBudget(requests=3, latency_s=100.0, load_s=0.0)
    latencies = contender.latencies_s(setting, corpus.test, corpus.k, [0, 1], budget)
    assert len(latencies) == 3
    assert latencies.min() > 2.0
    assert contender.saturated_qps(setting, corpus.test, corpus.k, [0, 1], budget) < 10.0


def test_alone_it_scores_nothing(corpus: Corpus, source: VectorSource) -> None:
    process: Any = FakeProcess(source.items)
    contender = ScannContender(corpus, source, process, rerank=False)
    found = contender.answers(contender.settings[0], corpus.test, corpus.k)
    assert {answer.n_scored for answer in found} == {0}
    assert all(answer.score is None for answer in found)


def test_an_environment_that_cannot_be_made_is_a_reason(
    corpus: Corpus, source: VectorSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scann, "_REQUIREMENTS", ("a requirement that pip cannot read",))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    (tmp_path / "no-such-python").write_text("#!/bin/sh\necho 'no venv here' >&2\nexit 1\n")
    (tmp_path / "no-such-python").chmod(0o755)
    corpus.work.mkdir(parents=True)
    (found,) = scann_contenders(corpus, source, tmp_path / "environment")
    assert isinstance(found, Skipped)
    assert "could not be installed: no venv here" in found.reason
    with pytest.raises(WorkerError):
        scann._python_of(tmp_path / "environment")
