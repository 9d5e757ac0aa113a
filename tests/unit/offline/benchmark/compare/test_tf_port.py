"""The TensorFlow port's side of the seam, with a worker that answers as it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from nann.offline.benchmark.compare import tf_port
from nann.offline.benchmark.compare.contender import Skipped
from nann.offline.benchmark.compare.corpus import NANN_GRAPH, Corpus
from nann.offline.benchmark.compare.engine_contenders import BASELINE, EngineContender, Sweep
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.benchmark.compare.tf_port import TfPortContender, tf_port_contenders
from nann.offline.benchmark.compare.worker import WorkerError

TOPN = [5, 10, 10, 10, 10, 10]


class FakeWorker:
    """With TensorFlow's own threads it is slower alone and faster under load."""

    answers: ClassVar[list[list[int]]] = []

    def __init__(self, python: str, module: str, arguments: list[str], *, log: Path) -> None:
        self.threads = int(arguments[-1])

    def ask(self, **request: Any) -> dict[str, Any]:
        assert request["level_topn"] == TOPN
        assert np.load(request["users"]).shape[0] > 0
        if request["do"] == "search":
            return {"item_ids": self.answers[: len(request["rows"])]}
        return {"latencies_s": [0.5 if self.threads else 0.9] * 3, "qps": 20.0 if self.threads else 30.0}

    def close(self) -> None:
        pass


class DeadWorker(FakeWorker):
    def ask(self, **request: Any) -> dict[str, Any]:
        raise WorkerError("no SavedModel")


@pytest.fixture
def level(corpus: Corpus) -> EngineContender:
    corpus.work.mkdir(parents=True)
    return EngineContender(corpus, Sweep(BASELINE, NANN_GRAPH, "level", lambda k, n: [{"level_topn": TOPN}]))


def _embed(histories: np.ndarray) -> np.ndarray:
    return np.zeros((len(histories), 12), dtype=np.float16)


def test_the_better_of_two_ways_to_thread_is_taken(
    corpus: Corpus, level: EngineContender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf_port, "Worker", FakeWorker)
    ids = np.asarray(corpus.item_ids)
    ours = level.answers(level.settings[0], corpus.test, corpus.k)
    FakeWorker.answers = [ids[answer.item_index].tolist() for answer in ours]
    FakeWorker.answers[0] = FakeWorker.answers[0][1:]  # one of ten items differs for the first user
    port = TfPortContender(corpus, level, corpus.work, "TF 2 port", _embed)
    budget = TimingBudget(requests=3)
    latencies = port.latencies_s(port.settings[0], corpus.test, corpus.k, [0, 1], budget)
    assert latencies.tolist() == [0.5] * 3
    assert port.saturated_qps(port.settings[0], corpus.test, corpus.k, [0, 1], budget) == 30.0
    assert "95.00 %" in port.note


def test_its_counts_are_those_of_our_level(
    corpus: Corpus, level: EngineContender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf_port, "Worker", FakeWorker)
    port = TfPortContender(corpus, level, corpus.work, "TF 2 port", _embed)
    assert port.settings[0].key == level.settings[0].key
    ours = level.answers(level.settings[0], corpus.tune, corpus.k)
    theirs = port.answers(port.settings[0], corpus.tune, corpus.k)
    assert [answer.n_scored for answer in theirs] == [answer.n_scored for answer in ours]


def test_a_port_that_cannot_start_is_left_out(
    corpus: Corpus, level: EngineContender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf_port, "Worker", DeadWorker)
    (found,) = tf_port_contenders(corpus, [(level, corpus.work, "TF 2 port")], _embed)
    assert found == Skipped("TF 2 port", "no SavedModel")
