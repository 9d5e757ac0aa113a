"""The rules of design.md, "Search semantics", on random corpora with many tied scores."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_world import HISTORY_LENGTH, World, add_gate, make_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nann.engine.types import Hits, Query, SearchParams

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
_WORLDS: dict[tuple[int, int, bool], World] = {}
_ROOT = tempfile.TemporaryDirectory()


def world_of(num_items: int, seed: int, connected: bool = True) -> World:
    key = (num_items, seed, connected)
    if key not in _WORLDS:
        directory = Path(_ROOT.name) / "-".join(map(str, key))
        _WORLDS[key] = make_world(directory, num_items=num_items, seed=seed, connected=connected)
        add_gate(directory, seed=seed)
    return _WORLDS[key]


worlds = st.builds(world_of, st.sampled_from([1, 7, 33, 64, 300]), st.integers(0, 3), st.booleans())
gates = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"gate_width": st.integers(1, 40), "gate_margin": st.sampled_from([-np.inf, -1.0, 0.0, 0.5, np.inf])}
    ),
)


def ask(
    world: World, rng: np.random.Generator, *, shortest_history: int = 1, **fields
) -> tuple[np.ndarray, Query]:
    """A random user's history and a query for it."""
    n = len(world.item_ids)
    history = rng.integers(0, n, int(rng.integers(shortest_history, HISTORY_LENGTH + 1)))
    params = fields.pop("params", SearchParams(ef=8, beam_width=3))
    query = Query(k=fields.pop("k", 5), params=params, history=world.item_ids[history].tolist(), **fields)
    return history, query


def expected(world: World, history: np.ndarray, admissible: np.ndarray, k: int) -> tuple[list, list]:
    """The exhaustive answer by the total order."""
    scores = world.scores(history)
    order = np.lexsort((np.arange(scores.size), -scores))
    order = order[admissible[order]][:k]
    return world.item_ids[order].tolist(), scores[order].tolist()


def assert_total_order(world: World, hits: Hits) -> None:
    assert len(set(hits.item_ids)) == len(hits.item_ids)
    rows = [(-score, item) for score, item in zip(hits.scores, hits.item_ids, strict=True)]
    assert rows == sorted(rows)


@EXAMPLES
@given(
    world=worlds,
    seed=st.integers(0, 10**6),
    k=st.integers(1, 400),
    ef=st.integers(1, 50),
    width=st.integers(1, 20),
    gate=gates,
)
def test_best_first_returns_k_unique_items_in_the_total_order(world, seed, k, ef, width, gate) -> None:
    rng = np.random.default_rng(seed)
    history, query = ask(world, rng, k=k, params=SearchParams(ef=ef, beam_width=width, **gate))
    engine = world.engine()
    (hits,) = engine.search([engine.check(query)], lane=0)
    n = len(world.item_ids)
    assert len(hits.item_ids) == min(k, n)
    assert_total_order(world, hits)
    truth = dict(zip(world.item_ids.tolist(), world.scores(history).tolist(), strict=True))
    assert hits.scores == [truth[item] for item in hits.item_ids]
    assert len(hits.item_ids) <= hits.n_scored <= n


@EXAMPLES
@given(
    world=st.builds(world_of, st.sampled_from([7, 64, 300]), st.integers(0, 3)), seed=st.integers(0, 10**6)
)
def test_a_wide_enough_walk_equals_exhaustive(world, seed) -> None:
    n = len(world.item_ids)
    params = SearchParams(ef=n, beam_width=7, max_steps=10_000)
    history, query = ask(world, np.random.default_rng(seed), k=min(n, 50), params=params)
    engine = world.engine()
    (walked,) = engine.search([engine.check(query)], lane=0)
    exact = Query(k=query.k, params=SearchParams(policy="exhaustive"), history=query.history)
    (exhaustive,) = engine.search([engine.check(exact)], lane=0)
    ids, scores = expected(world, history, np.ones(n, bool), query.k)
    assert (walked.item_ids, walked.scores) == (ids, scores)
    assert (exhaustive.item_ids, exhaustive.scores) == (ids, scores)
    assert exhaustive.n_scored == n


@EXAMPLES
@given(
    world=worlds,
    seed=st.integers(0, 10**6),
    k=st.integers(1, 60),
    n_exclude=st.integers(0, 40),
    n_include=st.one_of(st.none(), st.integers(0, 250)),
    category=st.one_of(st.none(), st.integers(0, 6)),
    policy=st.sampled_from(["best_first", "exhaustive"]),
    gate=gates,
)
def test_filters_admit_exactly_what_they_say(
    world, seed, k, n_exclude, n_include, category, policy, gate
) -> None:
    rng = np.random.default_rng(seed)
    n = len(world.item_ids)
    admissible = np.ones(n, bool)
    excluded = rng.integers(0, n, n_exclude)
    admissible[excluded] = False
    half = n_exclude // 2
    fields = {
        "exclude": world.item_ids[excluded[:half]].tolist(),
        "seen": world.item_ids[excluded[half:]].tolist(),
    }
    if n_include is not None:
        included = rng.integers(0, n, n_include)
        fields["include"] = world.item_ids[included].tolist()
        admissible &= np.isin(np.arange(n), included)
    if category is not None:
        fields["filter"] = {"category": category}
        admissible &= np.arange(n) % 5 == category
    params = (
        SearchParams(policy=policy, ef=8, beam_width=3, **gate)
        if policy == "best_first"
        else SearchParams(policy=policy)
    )
    history, query = ask(world, rng, k=k, params=params, **fields)
    engine = world.engine()
    (hits,) = engine.search([engine.check(query)], lane=0)
    assert set(hits.item_ids) <= set(world.item_ids[admissible].tolist())
    assert len(hits.item_ids) == min(k, int(admissible.sum()))
    assert_total_order(world, hits)
    if policy == "exhaustive" or any(note.code == "scored_all_admissible" for note in hits.notes):
        assert (hits.item_ids, hits.scores) == expected(world, history, admissible, k)


@EXAMPLES
@given(
    world=st.builds(world_of, st.sampled_from([33, 300]), st.integers(0, 3)),
    seed=st.integers(0, 10**6),
    size=st.integers(2, 8),
    policy=st.sampled_from(["best_first", "gated", "level", "level_pruned", "exhaustive"]),
    max_rows=st.sampled_from([64, 256, 1024]),
)
def test_an_answer_does_not_depend_on_batch_lane_or_bucket(world, seed, size, policy, max_rows) -> None:
    rng = np.random.default_rng(seed)
    params = {
        "best_first": SearchParams(ef=12, beam_width=4),
        "gated": SearchParams(ef=12, beam_width=4, gate_width=5, gate_margin=0.2),
        "level": SearchParams(policy="level", level_topn=(4, 6, 8, 8, 8, 5)),
        "level_pruned": SearchParams(policy="level_pruned", level_ef=(4, 6, 15)),
        "exhaustive": SearchParams(policy="exhaustive"),
    }[policy]
    engine = world.engine(lanes=2, max_rows=max_rows)
    other = world.engine(lanes=1, max_rows=128)
    queries = [
        ask(world, rng, shortest_history=0, params=params, exclude=barred)[1]
        for barred in (world.item_ids[rng.integers(0, 33, 2)].tolist() if i % 2 else () for i in range(size))
    ]
    prepared = [engine.check(query) for query in queries]
    groups: dict = {}
    for query in prepared:
        groups.setdefault(query.compat, []).append(query)
    for group in groups.values():
        together = engine.search(group, lane=1)
        for query, hits in zip(group, together, strict=True):
            (alone,) = other.search([query], lane=0)
            assert (hits.item_ids, hits.scores, hits.n_scored) == (
                alone.item_ids,
                alone.scores,
                alone.n_scored,
            )
            assert hits.explain["estimated"] == alone.explain["estimated"]


@EXAMPLES
@given(
    world=worlds,
    seed=st.integers(0, 10**6),
    k=st.integers(1, 60),
    ef=st.integers(1, 50),
    n_exclude=st.integers(0, 5),
    steps=st.integers(1, 20),
)
def test_a_gate_without_a_limit_changes_nothing(world, seed, k, ef, n_exclude, steps) -> None:
    rng = np.random.default_rng(seed)
    plain = SearchParams(ef=ef, beam_width=4, max_steps=steps)
    open_gate = replace(plain, gate_width=10**6, gate_margin=np.inf)
    excluded = world.item_ids[rng.integers(0, len(world.item_ids), n_exclude)].tolist()
    _, query = ask(world, rng, k=k, params=plain, exclude=excluded)
    engine = world.engine()
    (ungated,) = engine.search([engine.check(query)], lane=0)
    (gated,) = engine.search([engine.check(replace(query, params=open_gate))], lane=0)
    assert (gated.item_ids, gated.scores) == (ungated.item_ids, ungated.scores)
    assert gated.explain["scored_per_step"] == ungated.explain["scored_per_step"]
    assert (gated.n_scored, gated.notes) == (ungated.n_scored, ungated.notes)


@EXAMPLES
@given(
    world=st.builds(world_of, st.sampled_from([33, 300]), st.integers(0, 3)),
    seed=st.integers(0, 10**6),
    params=st.sampled_from(
        [
            SearchParams(policy="level", level_topn=(2, 3, 8, 8, 8, 40)),
            SearchParams(policy="level_pruned", level_ef=(2, 3, 40), level_steps=2),
        ]
    ),
)
def test_a_filtered_level_search_names_no_item_twice(world, seed, params) -> None:
    """It may score an item on two levels of the graph, since visits are forgotten between them."""
    rng = np.random.default_rng(seed)
    excluded = world.item_ids[rng.integers(0, len(world.item_ids), 3)].tolist()
    _, query = ask(world, rng, k=40, params=params, exclude=excluded)
    engine = world.engine()
    (hits,) = engine.search([engine.check(query)], lane=0)
    assert not set(hits.item_ids) & set(excluded)
    assert_total_order(world, hits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_never_rank_and_are_counted(tmp_path, bad) -> None:
    world = make_world(tmp_path / "1", num_items=120)
    engine = world.engine()
    score = engine._lanes._scorers[0].score
    poisoned = {3, 50, 77}

    def poison(users, tiles):
        out = score(users, tiles)
        vectors = tiles.items["item_vector"]
        for item in poisoned:
            out[(vectors == world.item_vectors[item]).all(axis=-1)] = bad
        return out

    engine._lanes._scorers[0].score = poison
    query = Query(k=200, params=SearchParams(policy="exhaustive"), history=[int(world.item_ids[0])])
    (hits,) = engine.search([engine.check(query)], lane=0)
    assert len(hits.item_ids) == 120 - 3
    assert not set(hits.item_ids) & set(world.item_ids[list(poisoned)].tolist())
    assert [note.count for note in hits.notes if note.code == "nonfinite_scores"] == [3]
