"""`expand` with a gate, of every Backend, against plain Python in float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import BACKENDS, BackendCase
from test_backend import MAX_BATCH, NO_LIMIT, NUM_ITEMS, score, tables

from nann.engine.errors import Unsupported
from nann.engine.gate import Gate

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
F32 = np.float32


@pytest.fixture(scope="module", params=BACKENDS)
def case(request) -> Iterator[BackendCase]:
    case = BACKENDS[request.param]
    with case.around():
        yield case


def estimate(gate: Gate, row: np.ndarray) -> np.float32:
    """The formula of engine/gate.py, one rounding after the other."""
    products = []
    for bias, key in zip(gate.bias, gate.keys, strict=True):
        total = F32(bias)
        for t, number in enumerate(key):
            total = F32(total + F32(number * row[1 + t]))
        products.append(total)
    total = F32(row[0] + max(products))
    for t, number in enumerate(gate.context):
        total = F32(total + F32(number * row[1 + gate.keys.shape[1] + t]))
    return total


def admitted(
    gate: Gate,
    queries: np.ndarray,
    neighbors: np.ndarray,
    frontier: list[tuple[int, float]],
    pool: list[tuple[float, int]],
    visited: set[int],
    admit: int,
) -> tuple[list[int], int]:
    """What the gate lets through, and how many estimates it makes."""
    threshold = F32(-np.inf)
    if len(pool) >= gate.rank:
        threshold = F32(F32(-pool[gate.rank - 1][0]) - F32(gate.margin))
    found: dict[int, np.float32] = {}
    made = 0
    for parent, its_score in frontier:
        residual = F32(F32(gate.residual_weight) * F32(F32(its_score) - estimate(gate, queries[parent])))
        made += 1
        for item in neighbors[parent]:
            if item < 0 or item in visited:
                continue
            value = F32(estimate(gate, queries[item]) + residual)
            made += 1
            if value >= threshold:
                found[int(item)] = max(value, found.get(int(item), F32(-np.inf)))
    best = sorted(found, key=lambda item: (-found[item], item))[:admit]
    return best, made


def random_gate(rng: np.random.Generator, dim: int, context_dim: int, integers: bool) -> Gate:
    """Small integers make estimates tie; other numbers make their last bits tell the order of sums."""
    known = int(rng.integers(1, 40))
    numbers = (
        (lambda *shape: rng.integers(-2, 3, shape)) if integers else (lambda *shape: rng.normal(size=shape))
    )
    return Gate(
        bias=numbers(known).astype(F32),
        keys=numbers(known, dim).astype(F32),
        context=numbers(context_dim).astype(F32),
        rank=int(rng.integers(1, 12)),
        margin=float(rng.choice([0.0, 0.5, 2.0, np.inf])),
        residual_weight=0.75,
    )


@EXAMPLES
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, MAX_BATCH),
    dim=st.sampled_from([1, 5, 16]),
    context_dim=st.sampled_from([0, 3]),
    integers=st.booleans(),
    admit=st.sampled_from([1, 3, 8, 10_000]),
    width=st.integers(1, 6),
)
def test_a_gate_admits_the_best_estimates(
    case, seed, batch, dim, context_dim, integers, admit, width
) -> None:
    rng = np.random.default_rng(seed)
    given_tables = tables(seed % 5)
    numbers = (
        rng.integers(-2, 3, (NUM_ITEMS, 1 + dim + context_dim))
        if integers
        else rng.normal(size=(NUM_ITEMS, 1 + dim + context_dim))
    )
    queries = numbers.astype(np.float16).astype(F32)
    backend = case.make(**given_tables, gate_queries=queries)
    gates = [
        random_gate(rng, dim, context_dim, integers) if rng.random() < 0.8 else None for _ in range(batch)
    ]
    beam = backend.begin(batch, with_answer=[None] * batch, gates=gates)
    starts = [np.unique(rng.integers(0, NUM_ITEMS, 14)).astype(np.int32) for _ in range(batch)]
    scores = rng.integers(-6, 7, (batch, NUM_ITEMS)).astype(F32)
    candidates = backend.seed(beam, starts)
    visited = [set(row.tolist()) for row in starts]
    pools: list[list[tuple[float, int]]] = [[] for _ in range(batch)]
    expanded: list[set[int]] = [set() for _ in range(batch)]
    new = [row.tolist() for row in starts]
    made = [0] * batch
    for _ in range(3):
        score(case, backend, candidates, scores)
        backend.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=20, width=width, forget=False)
        for b in range(batch):
            pools[b] = sorted([*pools[b], *((-float(scores[b, i]), i) for i in new[b])])[:20]
        frontier = [
            [(i, -s) for s, i in pool if i not in done][:width]
            for pool, done in zip(pools, expanded, strict=True)
        ]
        for b in range(batch):
            expanded[b] |= {i for i, _ in frontier[b]}
        candidates = backend.expand(beam, 0, admit=admit)
        if candidates is None:
            assert not any(frontier)
            break
        for b, gate in enumerate(gates):
            table = given_tables["neighbors"][0]
            if gate is None:
                reached = dict.fromkeys(int(i) for node, _ in frontier[b] for i in table[node] if i >= 0)
                new[b] = [i for i in reached if i not in visited[b]]
            else:
                new[b], count = admitted(gate, queries, table, frontier[b], pools[b], visited[b], admit)
                made[b] += count
            visited[b] |= set(new[b])
        assert [sorted(row) for row in case.rows_of(candidates)] == [sorted(row) for row in new]
        assert beam.estimated.tolist() == made
    for b in range(batch):
        assert set(backend.unvisited(beam, b).tolist()) == set(range(NUM_ITEMS)) - visited[b]


def test_admitting_none_in_particular_admits_all(case) -> None:
    """Without `admit` a gate is not asked: policies that know of none walk as ever."""
    rng = np.random.default_rng(1)
    backend = case.make(**tables(), gate_queries=rng.normal(size=(NUM_ITEMS, 4)).astype(F32))
    beam = backend.begin(1, with_answer=[None], gates=[random_gate(rng, 2, 1, integers=False)])
    candidates = backend.seed(beam, [np.arange(5, dtype=np.int32)])
    score(case, backend, candidates, np.ones((1, NUM_ITEMS), F32))
    backend.merge_beam(beam, candidates, keep=NO_LIMIT, capacity=9, width=2, forget=False)
    found = case.rows_of(backend.expand(beam, 0))[0]
    table = tables()["neighbors"][0]
    assert set(found) == {int(i) for node in (0, 1) for i in table[node] if i >= 5}
    assert beam.estimated.tolist() == [0]


def test_without_tables_there_is_no_gate(case) -> None:
    backend = case.make(**tables())
    gate = random_gate(np.random.default_rng(0), 2, 1, integers=True)
    with pytest.raises(Unsupported, match="gate"):
        backend.begin(1, with_answer=[None], gates=[gate])
