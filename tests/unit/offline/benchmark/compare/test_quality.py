"""Recall and counts, user by user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from nann.offline.benchmark.compare.contender import Found, Setting, UserSet
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.engine_contenders import SWEEPS, EngineContender
from nann.offline.benchmark.compare.quality import Truth, exhaustive_truth, measure, measured_truth


class Planted:
    """Answers the first `n` of the exhaustive answer, then items that are no part of it."""

    name = note = fingerprint = "planted"

    def __init__(self, truth: Truth, n: int, *, with_scores: bool = True, twice: bool = False) -> None:
        self.truth, self.n, self.with_scores, self.twice = truth, n, with_scores, twice
        self.settings = [Setting("planted", {"n": n, "scores": with_scores, "twice": twice})]
        self.calls = 0

    def answers(self, setting: Setting, users: UserSet, k: int) -> list[Found]:
        self.calls += 1
        return [
            self._found(index, score)
            for index, score in zip(self.truth.item_index, self.truth.score, strict=True)
        ]

    def _found(self, index: np.ndarray, score: np.ndarray) -> Found:
        chosen = index[: self.n]
        if self.twice:
            chosen = np.concatenate([chosen[:1], chosen])
            score = np.concatenate([score[:1], score])
        return Found(chosen, score[: len(chosen)] if self.with_scores else None, 40, 8.0)

    def latencies_s(self, *_arguments: Any) -> np.ndarray:
        raise NotImplementedError

    def saturated_qps(self, *_arguments: Any) -> float:
        raise NotImplementedError


@pytest.fixture
def truth(corpus: Corpus) -> Truth:
    exhaustive = EngineContender(corpus, next(s for s in SWEEPS if s.policy == "exhaustive"))
    return exhaustive_truth(corpus, exhaustive, corpus.test)


@pytest.mark.parametrize("with_scores", [True, False])
def test_half_the_answer_is_half_the_recall(corpus: Corpus, truth: Truth, with_scores: bool) -> None:
    contender = Planted(truth, corpus.k // 2, with_scores=with_scores)
    found = measure(corpus, contender, contender.settings[0], corpus.test, truth)
    np.testing.assert_allclose(found.recall, 0.5)
    np.testing.assert_allclose(found.cost(8.0), 41.0)


def test_the_exhaustive_search_misses_nothing(corpus: Corpus, truth: Truth) -> None:
    contender = Planted(truth, corpus.k)
    found = measure(corpus, contender, contender.settings[0], corpus.test, truth)
    whole = measured_truth(corpus, contender.settings[0], corpus.test, truth)
    np.testing.assert_array_equal(found.recall, whole.recall)
    np.testing.assert_array_equal(found.hit, whole.hit)
    assert (whole.n_scored == corpus.num_items).all()


def test_hits_are_held_out_items(corpus: Corpus, truth: Truth) -> None:
    users = corpus.test
    wanted = UserSet(users.split, users.history_ids, users.histories, truth.item_index[:, 0].astype(np.int64))
    contender = Planted(truth, 1)
    assert measure(corpus, contender, contender.settings[0], wanted, truth).hit.all()


def test_a_repeated_item_is_refused(corpus: Corpus, truth: Truth) -> None:
    contender = Planted(truth, 3, twice=True)
    with pytest.raises(RuntimeError, match="twice"):
        measure(corpus, contender, contender.settings[0], corpus.test, truth)


def test_what_was_measured_is_not_measured_again(corpus: Corpus, truth: Truth) -> None:
    contender = Planted(truth, 4)
    setting = contender.settings[0]
    first = measure(corpus, contender, setting, corpus.test, truth)
    again = measure(corpus, contender, setting, corpus.test, truth)
    assert contender.calls == 1
    np.testing.assert_array_equal(first.recall, again.recall)
    contender.fingerprint = "another library"  # type: ignore[assignment]
    measure(corpus, contender, setting, corpus.test, truth)
    assert contender.calls == 2


def test_the_truth_is_kept(corpus: Corpus, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> Sequence[Found]:
        raise AssertionError("it was scanned again")

    exhaustive = EngineContender(corpus, next(s for s in SWEEPS if s.policy == "exhaustive"))
    monkeypatch.setattr(exhaustive, "answers", fail)
    kept = exhaustive_truth(corpus, exhaustive, corpus.test)
    np.testing.assert_array_equal(kept.score, truth.score)
    with pytest.raises(AssertionError):
        exhaustive_truth(corpus, exhaustive, corpus.tune)
