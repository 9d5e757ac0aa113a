"""Checking queries, notes, popular items, histories: everything of the engine but the walk itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import reseal, rewrite
from engine_world import DIM, HISTORY_LENGTH, IntegerScorer, World, add_gate, make_world

from nann.engine.artifacts import Artifact, read_manifest, write_manifest
from nann.engine.devices import cpu_lanes
from nann.engine.errors import BackendError, InvalidQuery, Unsupported
from nann.engine.gate import GateBatch, GateTables
from nann.engine.search_engine import DEFAULT_PROFILES, SearchEngine
from nann.engine.types import Hits, Query, SearchParams

N = 200
WIDTH = HISTORY_LENGTH * 2  # the worlds' input_dim
SMALL = SearchParams(ef=8, beam_width=3)
LEVEL = SearchParams(policy="level", level_topn=(4, 6, 8, 8, 8, 5))
EXHAUSTIVE = SearchParams(policy="exhaustive")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world") / "1", num_items=N)


@pytest.fixture(scope="module")
def engine(world) -> SearchEngine:
    return world.engine(max_batch=4)


def query(world: World, **fields) -> Query:
    defaults = {"k": 5, "params": SMALL}
    if "comm_seq" not in fields:
        defaults["history"] = world.item_ids[:3].tolist()
    return Query(**{**defaults, **fields})


def ask(engine: SearchEngine, question: Query) -> Hits:
    (hits,) = engine.search([engine.check(question)], 0)
    return hits


def codes(hits) -> dict[str, int]:
    return {note.code: note.count for note in hits.notes}


# -- what check refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"k": 0}, "k must be between 1 and 10000, not 0"),
        ({"k": -1}, "k must be"),
        ({"k": 10_001}, "k must be"),
        ({"params": SearchParams(ef=0)}, "ef must be at least 1"),
        ({"params": SearchParams(beam_width=0)}, "beam_width must be at least 1"),
        ({"params": SearchParams(max_steps=0)}, "max_steps must be at least 1"),
        ({"params": SearchParams(ef=-5)}, "ef must be at least 1, not -5"),
        ({"params": SearchParams(level_topn=(1,) * 6)}, "belongs to the policy 'level'"),
        ({"params": SearchParams(policy="greedy")}, "unknown policy 'greedy'"),
        ({"params": SearchParams(policy="level")}, "six numbers"),
        ({"params": SearchParams(policy="level", level_topn=(1,) * 5)}, "six numbers"),
        ({"params": SearchParams(policy="level", level_topn=(1,) * 7)}, "six numbers"),
        ({"params": SearchParams(policy="level", level_topn=(1, 1, 0, 1, 1, 5))}, "six numbers"),
        ({"params": SearchParams(policy="level", level_topn=(1, 1, 1, 1, 1, 65537))}, "six numbers"),
        ({"params": SearchParams(policy="level", level_topn=(9, 9, 9, 9, 9, 4))}, "k is 5, more than"),
        ({"params": SearchParams(policy="level_pruned", level_ef=(1, 1))}, "level_ef must be three numbers"),
        ({"params": SearchParams(policy="level_pruned", level_ef=(1, 0, 5))}, "level_ef must be three"),
        ({"params": SearchParams(policy="level_pruned", level_ef=(9, 9, 4))}, "more than level_ef.2. = 4"),
        ({"params": SearchParams(policy="level_pruned", level_steps=0)}, "level_steps must be at least 1"),
        ({"params": SearchParams(policy="level_pruned", level_topn=(1,) * 6)}, "belongs to the policy"),
        ({"params": SearchParams(gate_width=-1)}, "gate_width must be at least 0"),
        ({"params": SearchParams(gate_width=1, gate_margin=np.nan)}, "gate_margin a number"),
        ({"params": SearchParams(policy="exhaustive", gate_width=1)}, "gate_width belongs to"),
        (
            {"params": SearchParams(policy="level", level_topn=(9,) * 6, gate_width=1)},
            "gate_width belongs to",
        ),
        ({"filter": {"colour": 1}}, "unknown attribute"),
        ({"filter": {}}, "no condition"),
        ({"history": None}, "exactly one of history and comm_seq"),
        ({"history": [-7], "strict": True}, "history: 1 unknown item ids, the first is -7"),
        ({"include": [-7, -8], "strict": True}, "include: 2 unknown item ids, the first is -7"),
        ({"exclude": ["x"], "strict": True}, "exclude: 1 unknown item ids, the first is 'x'"),
        ({"comm_seq": np.zeros(WIDTH - 1)}, f"must hold {WIDTH} numbers, not \\[{WIDTH - 1}\\]"),
        ({"comm_seq": np.zeros((1, WIDTH))}, "must hold"),
        ({"comm_seq": np.array(0.0)}, "must hold"),
        ({"comm_seq": np.full(WIDTH, np.nan)}, "NaN"),
        ({"comm_seq": np.append(np.zeros(WIDTH - 1), np.inf)}, "infinity"),
        ({"comm_seq": np.append(np.zeros(WIDTH - 1), 1e39)}, "too large for float32"),
        ({"comm_seq": np.append(np.zeros(WIDTH - 1), -np.inf).astype(np.float16)}, "infinity"),
        ({"comm_seq": np.array([None] * WIDTH)}, "real numbers, not object"),
        ({"comm_seq": np.zeros(WIDTH, complex)}, "real numbers, not complex"),
        ({"comm_seq": np.array(["1"] * WIDTH)}, "real numbers"),
        ({"comm_seq": np.zeros(WIDTH, bool)}, "real numbers, not bool"),
    ],
)
def test_an_invalid_query_is_refused_with_its_reason(world, engine, fields, match) -> None:
    with pytest.raises(InvalidQuery, match=match):
        engine.check(query(world, **fields))


def test_history_and_comm_seq_exclude_each_other(world, engine) -> None:
    with pytest.raises(InvalidQuery, match="exactly one"):
        engine.check(query(world, history=[1], comm_seq=np.zeros(WIDTH)))


def test_the_limits_themselves_are_allowed(world, engine) -> None:
    for k in (1, 10_000):
        assert engine.check(query(world, k=k)).k == k
    engine.check(query(world, params=SearchParams(policy="level", level_topn=(65536,) * 6)))
    engine.check(query(world, comm_seq=np.full(WIDTH, np.finfo(np.float32).max, np.float64)))


def test_seen_items_are_never_strict(world, engine) -> None:
    assert engine.check(query(world, seen=[-7, "x"], strict=True)).notes == ()


def test_comm_seq_is_unsupported_where_the_model_says_so(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=30)
    engine = world.engine()
    engine._lanes.takes_comm_seq = False
    with pytest.raises(Unsupported, match="comm_seq"):
        engine.check(query(world, comm_seq=np.zeros(WIDTH)))


# -- what check resolves ----------------------------------------------------------------------------


def test_the_newest_known_items_are_encoded_oldest_first(world, engine) -> None:
    ids = world.item_ids.tolist()
    long = [ids[0], -1, *ids[10:18], "no"]
    prepared = engine.check(query(world, history=long))
    assert prepared.history.tolist() == list(range(12, 18))
    assert prepared.known_history == 9
    short = engine.check(query(world, history=[ids[7], ids[3]]))
    assert short.history.tolist() == [7, 3, -1, -1, -1, -1]
    assert short.history.dtype == np.int32


def test_a_walk_starts_from_the_history_and_the_popular_items(world, engine) -> None:
    start = np.load(world.directory / "arrays" / "start_points.npy")
    assert engine.check(query(world)).starts.tolist() == [0, 1, 2, *start]
    assert engine.check(query(world, comm_seq=np.zeros(WIDTH))).starts.tolist() == start.tolist()
    assert engine.check(query(world, k=5, params=LEVEL)).starts.tolist() == world.entry_points.tolist()


def test_without_start_points_a_walk_starts_from_the_entry_points(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=60, start_points=0)
    np.save(world.directory / "arrays" / "walk_entry_points.npy", np.array([5, 9], np.int64))
    reseal(world.directory)
    engine = world.engine()
    assert engine.check(query(world, comm_seq=np.zeros(WIDTH))).starts.tolist() == [5, 9]
    assert engine.check(query(world, history=[])).starts.tolist() == [5, 9]
    assert engine.check(query(world)).starts.tolist() == [0, 1, 2]
    assert engine.check(query(world, params=LEVEL)).starts.tolist() == world.entry_points.tolist()


def test_comm_seq_becomes_float32_whatever_real_numbers_it_was(world, engine) -> None:
    for dtype in (np.float16, np.float32, np.float64, np.int8, np.uint16):
        found = engine.check(query(world, comm_seq=np.ones(WIDTH, dtype))).comm_seq
        assert found.dtype == np.float32
        assert (found == 1).all()


def test_only_queries_of_equal_parameters_and_kind_share_a_batch(world, engine) -> None:
    base = engine.check(query(world)).compat
    same = [{"k": 2}, {"history": world.item_ids[4:6].tolist()}, {"with_attributes": True}, {"strict": True}]
    other = [
        {"params": SearchParams(ef=9, beam_width=3)},
        {"params": SearchParams(ef=8, beam_width=4)},
        {"params": SearchParams(ef=8, beam_width=3, max_steps=3)},
        {"params": EXHAUSTIVE},
        {"params": LEVEL},
        {"comm_seq": np.zeros(WIDTH)},
        {"k": 9},  # raises ef
    ]
    assert {engine.check(query(world, **fields)).compat for fields in same} == {base}
    assert base not in {engine.check(query(world, **fields)).compat for fields in other}
    hash(base)


def test_parameters_beyond_the_corpus_are_cut_to_it(world, engine) -> None:
    params = engine.check(
        query(world, params=SearchParams(ef=10**30, beam_width=10**30, max_steps=10**30))
    ).params
    assert (params.ef, params.beam_width, params.max_steps) == (N, N, N)
    assert len(ask(engine, query(world, k=N, params=SearchParams(max_steps=2**70))).item_ids) == N


def test_the_cost_is_an_estimate_within_the_corpus(world, engine) -> None:
    assert engine.check(query(world, params=EXHAUSTIVE)).cost == N
    assert 0 < engine.check(query(world)).cost <= N
    assert 0 < engine.check(query(world, params=LEVEL)).cost <= N
    assert engine.check(query(world, params=EXHAUSTIVE, include=world.item_ids[:7].tolist())).cost == 7


def test_few_admissible_items_are_all_scored_and_it_says_so(world, engine) -> None:
    prepared = engine.check(query(world, include=world.item_ids[:7].tolist()))
    assert prepared.retriever == "exhaustive"
    hits = ask(engine, query(world, include=world.item_ids[:7].tolist()))
    assert codes(hits) == {"scored_all_admissible": 7}
    assert hits.n_scored == 7


def test_exclusions_leave_room_in_the_pool(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=3000)
    engine = world.engine()
    plain = engine.check(query(world)).params.ef
    some = engine.check(query(world, exclude=world.item_ids[:20].tolist()))
    assert plain == 8
    assert some.retriever == "hnsw"
    assert some.params.ef == 32  # the least multiple of 8 that holds k = 5 and 20 excluded
    half = engine.check(query(world, filter={"genres": {"contains": "c"}}))
    assert half.params.ef == 16


def test_an_item_excluded_twice_is_one(world, engine) -> None:
    ids = world.item_ids[[7, 3, 5]].tolist()
    checked = engine.check(query(world, exclude=[*ids, ids[0]], seen=ids[::-1]))
    assert checked.admission.excluded.tolist() == [3, 5, 7]
    assert checked.admission.count == len(world.item_ids) - 3


# -- gates ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> World:
    world = make_world(tmp_path_factory.mktemp("gated") / "1", num_items=3000)
    add_gate(world.directory)
    return world


GATED = SearchParams(ef=8, beam_width=3, gate_width=4)


@pytest.mark.parametrize("fields", [{}, {"include": []}, {"history": []}])
def test_without_tables_every_query_with_a_gate_is_refused(world, engine, fields) -> None:
    with pytest.raises(Unsupported, match="nann distill"):
        engine.check(query(world, params=GATED, **fields))


def test_a_gate_looks_at_the_place_of_the_last_item_of_the_answer(gated) -> None:
    engine = gated.engine()

    def check(**fields):
        return engine.check(query(gated, params=GATED, **fields))

    plain, excluding = check(), check(exclude=gated.item_ids[:20].tolist())
    assert (plain.gate.rank, plain.params.ef) == (5, 8)
    assert (excluding.gate.rank, excluding.params.ef) == (26, 32)  # 25 places, of which 2,980 / 3,000 count
    # With a fifth of the items left out, the fifth place is about the seventh of all, the seventh the ninth.
    most = {"category": {"in": [0, 1, 2, 3]}}
    assert (check(filter=most).gate.rank, check(filter=most).params.ef) == (7, 8)
    assert (check(filter=most, k=7).gate.rank, check(filter=most, k=7).params.ef) == (9, 16)
    ungated = engine.check(query(gated, k=7, filter=most))
    assert (ungated.gate, ungated.params.ef) == (None, 8)


def test_a_gate_knows_the_window_of_the_history(gated) -> None:
    engine = gated.engine()
    keys = engine._artifact.gate_keys.astype(np.float32)
    history = gated.item_ids[: HISTORY_LENGTH + 3].tolist()
    gate = engine.check(query(gated, params=GATED, history=[-7, *history])).gate
    assert gate.make().bias.tolist() == keys[3 : HISTORY_LENGTH + 3, 0].tolist()
    assert engine.check(query(gated, params=GATED, history=[-7])).gate is None
    assert engine.check(query(gated, history=history)).gate is None


@pytest.mark.parametrize("rmse", [0.0, 1e30])
@pytest.mark.parametrize(("margin", "limit"), [(np.inf, np.inf), (-np.inf, -np.inf), (1e30, None)])
def test_margins_of_any_size_are_float32(rmse, margin, limit) -> None:
    tables = GateTables(np.ones((1, 2), np.float16), np.ones((1, 2), np.float16), 1, 0.75, rmse)
    gate = tables.request(np.zeros(1, np.int32), rank=1, margin=margin).make()
    found = float(GateBatch([gate], lanes=1).margin[0])
    assert found == (limit if limit is not None else np.inf if rmse else 0.0)


# -- searching --------------------------------------------------------------------------------------


def test_one_step_expands_the_start_once(world, engine) -> None:
    start = set(engine.check(query(world)).starts.tolist())
    ranked = sorted(start, key=lambda i: (-world.scores(np.arange(3))[i], i))
    reached = start | {int(i) for node in ranked[:3] for i in world.neighbors[0][node] if i >= 0}
    hits = ask(engine, query(world, params=SearchParams(ef=8, beam_width=3, max_steps=1)))
    assert hits.n_scored == len(reached)
    assert hits.explain["scored_per_step"] == [len(start), len(reached) - len(start)]


def test_hits_say_what_was_done(world, engine) -> None:
    hits = ask(engine, query(world))
    assert hits.explain["retriever"] == "hnsw"
    assert hits.explain["policy"] == "best_first"
    assert hits.explain["ef"] == 8
    assert sum(hits.explain["scored_per_step"]) == hits.n_scored
    assert len(hits.explain["scored_per_step"]) == hits.steps
    assert hits.attributes is None
    exact = ask(engine, query(world, params=EXHAUSTIVE)).explain
    assert (exact["retriever"], exact["policy"], exact["ef"]) == ("exhaustive", "exhaustive", None)


@pytest.mark.parametrize("params", [SMALL, EXHAUSTIVE, LEVEL])
def test_attributes_are_parallel_to_the_ids(world, engine, params) -> None:
    hits = ask(engine, query(world, params=params, with_attributes=True))
    row = {item: i for i, item in enumerate(world.item_ids.tolist())}
    assert [a["title"] for a in hits.attributes] == [f"Item {row[i]}" for i in hits.item_ids]


def test_an_answer_is_plain_python(world, engine) -> None:
    hits = ask(engine, query(world))
    assert {type(i) for i in hits.item_ids} == {int}
    assert {type(s) for s in hits.scores} == {float}
    assert {type(hits.n_scored), type(hits.steps)} == {int}


def test_unknown_ids_are_skipped_and_counted(world, engine) -> None:
    known = world.item_ids[:3].tolist()
    hits = ask(
        engine,
        query(world, history=[*known, -1, "x"], exclude=[-2], include=[*world.item_ids.tolist(), -3, -4, -5]),
    )
    wanted = {"unknown_history_items": 2, "unknown_exclude_items": 1, "unknown_include_items": 3}
    assert wanted.items() <= codes(hits).items()


@pytest.mark.parametrize("history", [[], [-1, "x"]])
def test_an_empty_history_is_noted_and_searched(world, engine, history) -> None:
    hits = ask(engine, query(world, history=history))
    assert "empty_history" in codes(hits)
    assert len(hits.item_ids) == 5


def test_an_unreached_remainder_is_scored_and_counted(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=120)
    rewrite(world.directory / "arrays" / "neighbors_level_0.npy", lambda t: np.full_like(t, -1))
    reseal(world.directory)
    hits = ask(world.engine(), query(world, k=50))
    assert len(hits.item_ids) == 50
    reached = hits.explain["scored_per_step"][0]
    assert codes(hits) == {"remainder_scored": 120 - reached}
    assert hits.n_scored == 120


def test_of_the_remainder_only_admissible_items_are_scored(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=3000)
    rewrite(world.directory / "arrays" / "neighbors_level_0.npy", lambda t: np.full_like(t, -1))
    reseal(world.directory)
    start = set(world.engine().check(query(world)).starts.tolist())
    excluded = [i for i in range(1000, 1030) if i not in start][:20]
    inside = {i for i in start | set(excluded) if i % 2}  # the odd ones are of the genre "b"
    odd = {"genres": {"contains": "b"}}
    for fields, rest in (
        ({}, 3000 - len(start)),
        ({"exclude": world.item_ids[excluded].tolist()}, 3000 - len(start) - 20),
        ({"exclude": world.item_ids[excluded].tolist(), "filter": odd}, 1500 - len(inside)),
    ):
        hits = ask(world.engine(), query(world, k=30, **fields))
        assert codes(hits) == {"remainder_scored": rest}
        assert len(hits.item_ids) == 30


def test_an_empty_include_list_admits_nothing(world, engine) -> None:
    for params in (SMALL, EXHAUSTIVE, LEVEL):
        hits = ask(engine, query(world, params=params, include=[]))
        assert (hits.item_ids, hits.scores) == ([], [])


def test_string_ids_come_back_as_strings(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=50, string_ids=True)
    engine = world.engine()
    history = world.item_ids[:3].tolist()
    hits = ask(engine, query(world, history=history, exclude=history[:1]))
    assert set(hits.item_ids) <= set(world.item_ids.tolist()) - {history[0]}
    assert {type(i) for i in hits.item_ids} == {str}
    assert engine.user_history(10) == tuple(engine.user_history(10))
    assert {type(i) for i in engine.user_history(10)} == {str}


def test_a_batch_of_another_size_or_of_mixed_kinds_is_our_own_bug(world, engine) -> None:
    one, other = engine.check(query(world)), engine.check(query(world, params=EXHAUSTIVE))
    for batch in ([], [one] * 5, [one, other]):
        with pytest.raises(ValueError, match="1 to 4 queries of one compat"):
            engine.search(batch, 0)


def test_the_probe_hears_every_phase_as_it_ends(world, engine) -> None:
    heard: list[str] = []
    engine.search([engine.check(query(world))], 0, heard.append)
    assert set(heard) == {"encode", "expand", "gather", "score", "merge", "results"}
    assert heard[0] == "encode" and heard[-1] == "results"
    heard.clear()
    engine.search([engine.check(query(world, params=EXHAUSTIVE))], 0, heard.append)
    assert heard == ["encode", "gather", "score", "merge", "results"]


def test_a_failing_batch_leaves_the_lane_usable(world) -> None:
    engine = world.engine()
    before = ask(engine, query(world))
    score = engine._lanes._scorers[0].score
    calls = iter(range(10))

    def failing(users, tiles):
        if next(calls) == 1:
            raise BackendError("device lost")
        return score(users, tiles)

    engine._lanes._scorers[0].score = failing
    with pytest.raises(BackendError, match="device lost"):
        ask(engine, query(world))
    engine._lanes._scorers[0].score = score
    assert ask(engine, query(world)) == before


# -- popular ----------------------------------------------------------------------------------------


def test_popular_items_are_ranked_by_their_share(world, engine) -> None:
    weights = np.load(world.directory / "arrays" / "item_weights.npy")
    order = np.lexsort((np.arange(N), -weights))
    hits = engine.popular(query(world, k=7, history=[]))
    assert hits.item_ids == world.item_ids[order[:7]].tolist()
    assert hits.scores == weights[order[:7]].tolist()
    assert (hits.n_scored, hits.steps) == (0, 0)
    assert codes(hits) == {"popular_fallback": 0}


def test_popular_items_honour_every_rule_of_admission(world, engine) -> None:
    top = engine.popular(query(world, k=N)).item_ids
    assert len(top) == N
    row = {item: i for i, item in enumerate(world.item_ids.tolist())}
    hits = engine.popular(
        query(
            world, k=30, exclude=top[:2], seen=top[2:4], include=top[:50], filter={"category": {"ne": 1}},
            with_attributes=True,
        )
    )  # fmt: skip
    wanted = [item for item in top[4:50] if row[item] % 5 != 1][:30]
    assert hits.item_ids == wanted
    assert [a["title"] for a in hits.attributes] == [f"Item {row[i]}" for i in wanted]


@pytest.mark.parametrize("fields", [{"k": 0}, {"k": 10_001}, {"filter": {"colour": 1}}])
def test_popular_refuses_what_check_refuses(world, engine, fields) -> None:
    with pytest.raises(InvalidQuery):
        engine.popular(query(world, **fields))


def test_popular_leaves_cached_masks_alone(world, engine) -> None:
    question = query(world, k=N, filter={"category": 1})
    first = engine.popular(question)
    engine.popular(query(world, k=N, filter={"category": 1}, exclude=first.item_ids[:3]))
    assert engine.popular(question) == first


# -- the rest ---------------------------------------------------------------------------------------


def test_users_and_items_are_looked_up(world, engine) -> None:
    rows = np.load(world.directory / "arrays" / "history_items.npy")[:4]
    assert engine.user_history(10) == tuple(world.item_ids[rows].tolist())
    assert engine.user_history(11) is None
    assert engine.item_attributes(int(world.item_ids[11]))["title"] == "Item 11"
    assert engine.item_attributes(-1) is None
    assert engine.item_attributes("x") is None


def test_the_artifacts_profiles_go_over_the_defaults(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=20)
    assert world.engine().profiles == dict(DEFAULT_PROFILES)
    manifest = read_manifest(world.directory)
    own = {"fast": {"ef": 3}, "mine": {"policy": "exhaustive"}}
    write_manifest(world.directory, manifest.model_copy(update={"profiles": own}))
    assert world.engine().profiles == {**DEFAULT_PROFILES, **own}
    for profile in DEFAULT_PROFILES.values():
        SearchParams(**profile)


@pytest.mark.parametrize("wrong", [{"lanes": 0}, {"max_batch": 0}, {"max_k": 0}])
def test_an_engine_of_no_size_is_refused(world, wrong) -> None:
    scorer = IntegerScorer(world.item_vectors, max_batch=1)
    with pytest.raises(ValueError, match="at least 1"):
        sizes = {"lanes": 1, "max_batch": 1, "max_k": 1, **wrong}
        artifact = Artifact.open(world.directory)
        opened = cpu_lanes(artifact, [scorer] * sizes.pop("lanes"), max_batch=1)
        SearchEngine(artifact, opened, **sizes)


def test_another_device_is_unsupported(world) -> None:
    with pytest.raises(Unsupported, match="--device cpu"):
        SearchEngine.load(world.directory, device="cuda")


def test_the_memory_shared_by_lanes_is_counted(world, engine) -> None:
    assert engine.memory_bytes == 2 * N * 6 * 4 + N * DIM * 2


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_warming_up_compiles_and_searches_on_every_lane(world, max_batch) -> None:
    engine = world.engine(lanes=2, max_batch=max_batch)
    assert engine.n_compilations == 0
    report = engine.warm_up()
    assert report.n_programs == engine.n_compilations == len(list(engine._lanes._scorers[0].grid.shapes()))
    assert report.seconds > 0
    assert engine._lanes._scorers[0].calls


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_score_fails_the_warm_up(tmp_path, bad) -> None:
    world = make_world(tmp_path / "1", num_items=50)

    def poison(state: np.ndarray) -> np.ndarray:
        state[np.argsort(-np.load(world.directory / "arrays" / "item_weights.npy"))[0]] = bad
        return state

    rewrite(world.directory / "arrays" / "item_state_item_vector.npy", poison)
    reseal(world.directory)
    with np.errstate(invalid="ignore"), pytest.raises(BackendError, match="NaN or infinite"):
        world.engine().warm_up()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_item_tensors_of_any_row_size_can_be_gathered(tmp_path, shape, dtype) -> None:
    world = make_world(tmp_path / "1", num_items=40)
    extra = np.random.default_rng(0).normal(size=(40, *shape)).astype(dtype)
    np.save(world.directory / "arrays" / "item_state_extra.npy", extra)
    manifest = read_manifest(world.directory).model_dump()
    manifest["item_tensors"]["extra"] = {"shape": shape, "dtype": dtype}
    write_manifest(world.directory, type(read_manifest(world.directory)).model_validate(manifest))
    reseal(world.directory)
    engine = world.engine()
    seen = []
    score = engine._lanes._scorers[0].score

    def watch(users, tiles):
        seen.append(tiles.items["extra"][0, :40].copy())
        return score(users, tiles)

    engine._lanes._scorers[0].score = watch
    ask(engine, query(world, params=EXHAUSTIVE))
    np.testing.assert_array_equal(seen[0], extra)


def test_a_closed_engine_answers_no_more(world) -> None:
    engine = world.engine()
    prepared = engine.check(query(world))
    engine.close()
    with pytest.raises(IndexError):
        engine.search([prepared], 0)


def test_importing_the_engine_imports_no_heavy_library() -> None:
    program = (
        "import sys, nann.engine.search_engine;"
        "print([m for m in ('tensorflow', 'keras', 'faiss', 'jaxtyping', 'asyncio') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_inner_product_scores_exactly_ef_items_and_agrees_with_the_model(world, engine) -> None:
    history = world.item_ids[[3, 9, 20]].tolist()
    params = SearchParams(policy="inner_product", ef=30)
    (hits,) = engine.search([engine.check(Query(k=10, params=params, history=history))], 0)
    assert (hits.n_scored, hits.steps) == (30, 1)
    truth = world.scores(np.array([3, 9, 20]))
    rows = [world.item_ids.tolist().index(item) for item in hits.item_ids]
    assert hits.scores == truth[rows].tolist() == sorted(hits.scores, reverse=True)
    vectors = world.item_vectors.astype(np.float32)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    near = np.argsort(-(unit @ unit[[3, 9, 20]].mean(axis=0)), kind="stable")[:30]
    assert set(rows) <= set(near.tolist())


def test_inner_product_needs_a_history_and_item_vectors(world, engine) -> None:
    params = SearchParams(policy="inner_product", ef=30)
    comm_seq = np.zeros(HISTORY_LENGTH * 2, np.float32)
    with pytest.raises(Unsupported, match="needs a history"):
        engine.check(Query(k=1, params=params, comm_seq=comm_seq))


def test_inner_product_without_item_vectors_is_unsupported(tmp_path) -> None:
    world = make_world(tmp_path / "1", num_items=30)
    (world.directory / "arrays" / "item_embs.npy").unlink()
    reseal(world.directory)
    engine = world.engine()
    params = SearchParams(policy="inner_product", ef=5)
    with pytest.raises(Unsupported, match="no item vectors"):
        engine.check(Query(k=1, params=params, history=world.item_ids[:2].tolist()))


def test_inner_product_of_few_admissible_items_scores_them_all(world, engine) -> None:
    include = world.item_ids[:12].tolist()
    params = SearchParams(policy="inner_product", ef=30)
    prepared = engine.check(Query(k=10, params=params, history=include[:3], include=include))
    assert prepared.retriever == "exhaustive"
    (hits,) = engine.search([prepared], 0)
    assert hits.n_scored == 12 and set(hits.item_ids) <= set(include)
