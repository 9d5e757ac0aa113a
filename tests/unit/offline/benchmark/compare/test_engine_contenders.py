"""This engine's policies as contenders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_world import World

from nann.engine.artifacts import GateSpec
from nann.engine.types import Hits
from nann.offline.benchmark.compare.contender import Skipped
from nann.offline.benchmark.compare.corpus import OWN_GRAPH, Corpus
from nann.offline.benchmark.compare.engine_contenders import (
    BASELINE,
    SWEEPS,
    EngineContender,
    Sweep,
    engine_contenders,
    search_params,
)
from nann.offline.benchmark.compare.loops import TimingBudget

EXHAUSTIVE = next(sweep for sweep in SWEEPS if sweep.policy == "exhaustive")


def test_answers_come_in_the_order_of_the_users(corpus: Corpus, world: World) -> None:
    contender = EngineContender(corpus, EXHAUSTIVE)
    found = contender.answers(contender.settings[0], corpus.test, corpus.k)
    for user, answer in enumerate(found):
        scores = world.scores(corpus.test.histories[user])
        np.testing.assert_array_equal(answer.score, np.sort(scores)[::-1][: corpus.k])
        np.testing.assert_array_equal(answer.score, scores[answer.item_index])
        assert answer.n_scored == corpus.num_items
        assert answer.multiply_adds == corpus.multiply_adds.encode


def test_a_scan_of_vectors_costs_its_products(corpus: Corpus) -> None:
    sweep = Sweep("scan", OWN_GRAPH, "inner_product", lambda k, n: [{"ef": 20}])
    (answer, *_) = EngineContender(corpus, sweep).answers(
        EngineContender(corpus, sweep).settings[0], corpus.tune, corpus.k
    )
    assert answer.n_scored == 20
    assert answer.multiply_adds == corpus.multiply_adds.encode + corpus.num_items * 8


def test_estimates_of_a_gate_are_counted(corpus: Corpus) -> None:
    gate = GateSpec(dim=4, context_dim=2, residual_weight=0.75, rmse=1.0)
    manifest = corpus.artifact.manifest.model_copy(update={"gate": gate})
    gated = replace(corpus, artifact=replace(corpus.artifact, manifest=manifest))
    contender = EngineContender(gated, EXHAUSTIVE)
    hits = Hits([], [], n_scored=5, steps=1, explain={"estimated": 10})
    # Three known items of four columns each, and two of context.
    assert contender._found(hits, 3).multiply_adds == corpus.multiply_adds.encode + 10 * (3 * 4 + 2)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.contender)
def test_every_setting_of_a_sweep_is_understood(corpus: Corpus, sweep: Sweep) -> None:
    for params in sweep.settings(200, 200_000):
        search_params(sweep.policy, params)


def test_the_sweeps_have_the_baseline_and_names_of_their_own() -> None:
    names = [sweep.contender for sweep in SWEEPS]
    assert BASELINE in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        (Sweep("a", OWN_GRAPH, "telepathy", lambda k, n: [{}]), "no policy telepathy"),
        (Sweep("b", OWN_GRAPH, "best_first", lambda k, n: [{"luck": 3}]), "no parameter luck"),
        (Sweep("c", OWN_GRAPH, "best_first", lambda k, n: []), "too small"),
        (Sweep("d", OWN_GRAPH, "best_first", lambda k, n: [{"ef": 0}]), "ef must be at least 1"),
    ],
)
def test_what_the_engine_cannot_do_is_left_out_with_a_reason(
    corpus: Corpus, sweep: Sweep, reason: str
) -> None:
    (found,) = engine_contenders(corpus, [sweep])
    assert isinstance(found, Skipped)
    assert reason in found.reason


def test_it_is_timed_over_the_rows_it_is_given(corpus: Corpus) -> None:
    contender = EngineContender(corpus, EXHAUSTIVE)
    budget = TimingBudget(requests=3, latency_s=100.0, load_s=0.0)
    setting = contender.settings[0]
    assert len(contender.latencies_s(setting, corpus.test, corpus.k, [0, 1], budget)) == 3
    assert contender.saturated_qps(setting, corpus.test, corpus.k, [0, 1], budget) > 0
