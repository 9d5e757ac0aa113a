"""`gate.cu` and `choose.cu` against NumPy: the estimates to the last bit, and the best of what passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from cuda_kernels import REAL, SMALL, bitmaps, items_of, keys_of, program, sets
from cuda_step import UNTOUCHED, Step, graph

from nann.engine.cuda.launches import Launches
from nann.engine.cuda.modules import BlockSizes, Modules
from nann.engine.gate import Gate, GateBatch

F32, I32, I64, U64 = np.float32, np.int32, np.int64, np.uint64


def about(gate: Gate, row: np.ndarray) -> np.float32:
    """The formula of engine/gate.py, every product and sum rounded."""
    totals = gate.bias.copy()
    for t in range(gate.keys.shape[1]):
        totals = totals + gate.keys[:, t] * row[1 + t]
    total = row[0] + totals.max()
    for t, number in enumerate(gate.context):
        total = total + number * row[1 + gate.keys.shape[1] + t]
    return F32(total)


@dataclass
class World:
    """One batch before a gated step: a graph, frontiers with scores, pools, and what each query has seen."""

    neighbors: np.ndarray
    queries: np.ndarray
    gates: list[Gate | None]
    frontiers: list[list[int]]
    scores: list[np.ndarray]
    pools: list[np.ndarray]
    visited: list[set[int]]
    width: int

    @classmethod
    def random(
        cls, seed: int, *, num_items: int, degree: int, batch: int, width: int, dim: int, context_dim: int
    ) -> World:
        rng = np.random.default_rng(seed)
        queries = rng.normal(size=(num_items, 1 + dim + context_dim)).astype(np.float16)
        queries[rng.random(queries.shape) < 0.1] = F32(2**-24)  # the smallest there is
        counts = rng.integers(0, width + 1, batch)
        counts[rng.integers(batch)] = width  # at least one full
        frontiers = [rng.permutation(num_items)[:n].tolist() for n in np.minimum(counts, num_items)]
        scores = [rng.normal(size=len(nodes)).astype(F32) for nodes in frontiers]
        pools = [np.sort(rng.normal(size=rng.integers(0, 30)).astype(F32))[::-1] for _ in range(batch)]
        seen = [set(rng.permutation(num_items)[: rng.integers(0, num_items)].tolist()) for _ in range(batch)]
        gates = [
            None
            if b and rng.random() < 0.25
            else Gate(
                bias=rng.normal(size=known).astype(F32),
                keys=rng.normal(size=(known, dim)).astype(F32),
                context=rng.normal(size=context_dim).astype(F32),
                rank=max(1, pools[b].size + int(rng.choice([-5, 0, 1]))),  # the pool's last place, and beyond
                margin=float(rng.uniform(0, 2)),
                residual_weight=float(rng.random()),
            )
            for b, known in enumerate(rng.integers(1, 30, batch))
        ]
        neighbors = graph(rng, num_items, degree)
        return cls(neighbors, queries, gates, frontiers, scores, pools, seen, width)

    def found(self, b: int) -> tuple[list[int], int]:
        """The keys of query b, sorted, and how many estimates that takes."""
        gate, rows, keys, made = self.gates[b], self.queries.astype(F32), [], 0
        least = F32(-np.inf)
        if gate is not None and gate.rank <= self.pools[b].size:
            least = self.pools[b][gate.rank - 1] - F32(gate.margin)
        for node, score in zip(self.frontiers[b], self.scores[b], strict=True):
            rest = F32(0)
            if gate is not None:
                rest = F32(gate.residual_weight) * (score - about(gate, rows[node]))
                made += 1
            for item in self.neighbors[node].tolist():
                if item < 0 or item in self.visited[b]:
                    continue
                value = F32(0) if gate is None else about(gate, rows[item]) + rest
                made += gate is not None
                if value >= least:
                    keys.append(int(keys_of(np.array([value]), np.array([item]))[0]))
        return sorted(keys), made


def estimate(world: World, sizes: BlockSizes, *, nodes: int, block: int, seed: int = 0) -> None:
    """One launch of `estimate`, and what it leaves is that of the reference."""
    num_items, degree = world.neighbors.shape
    batch, width = len(world.gates), world.width
    frontier, score = np.full((batch, width), 2**30, I32), np.full((batch, width), np.nan, F32)
    pools = np.full((batch, 30), 2**63, U64)
    for b, of_query in enumerate(world.frontiers):
        frontier[b, : len(of_query)], score[b, : len(of_query)] = of_query, world.scores[b]
        pools[b, : world.pools[b].size] = keys_of(world.pools[b], np.arange(world.pools[b].size), 1)
    gates = GateBatch(world.gates, lanes=sizes.gate_sums)
    _, dim, stride = gates.keys.shape
    columns, words, room = world.queries.shape[1], -(-num_items // 32), width * degree
    found, n_found = np.full((batch, room), UNTOUCHED % 2**64, U64), np.zeros(batch, I32)
    estimated = np.full(batch, 7, U64)  # of earlier steps
    program("gate.cu", sizes).run(
        "estimate",
        (-(-width // nodes), batch),
        block,
        [
            *(world.neighbors, I32(degree), frontier, score),
            *(np.array([len(nodes) for nodes in world.frontiers], I32), I32(width)),
            *(bitmaps(world.visited, words), I64(words)),
            *(pools, I32(pools.shape[1]), np.array([pool.size for pool in world.pools], I32)),
            *(world.queries.view(np.uint16), I32(dim), I32(columns - 1 - dim)),
            *(gates.bias, gates.keys, I32(stride), gates.context, gates.known),
            *(gates.rank, gates.margin, gates.residual_weight, I32(nodes)),
            *(found, I64(room), n_found, estimated),
        ],
        shared_bytes=256 + 12 * block + 4 * columns * (block + 1),
        seed=seed,
    )
    for b in range(batch):
        keys, made = world.found(b)
        assert sorted(found[b, : n_found[b]].tolist()) == keys
        assert (found[b, n_found[b] :] == UNTOUCHED % 2**64).all()
        assert estimated[b] == 7 + made


@pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (4, 1), (7, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_estimates_are_those_of_the_formula(dim, context_dim, seed) -> None:
    world = World.random(seed, num_items=90, degree=7, batch=4, width=9, dim=dim, context_dim=context_dim)
    estimate(world, SMALL, nodes=4, block=32, seed=seed)


@pytest.mark.parametrize("margin", [0, 2, np.inf])
def test_an_estimate_at_the_threshold_passes(margin) -> None:
    """Estimates, scores and margins are small integers, so that many are just what they must be."""
    world = World.random(5, num_items=90, degree=7, batch=4, width=9, dim=3, context_dim=2)
    rng = np.random.default_rng(5)
    world.queries = rng.integers(-1, 2, world.queries.shape).astype(np.float16)
    for b in range(4):
        world.scores[b] = rng.integers(-4, 5, len(world.frontiers[b])).astype(F32)
        world.pools[b] = np.repeat(F32(1), 5)
        world.gates[b] = Gate(
            bias=rng.integers(-1, 2, 3).astype(F32),
            keys=rng.integers(-1, 2, (3, 3)).astype(F32),
            context=rng.integers(-1, 2, 2).astype(F32),
            rank=5,
            margin=margin,
            residual_weight=1.0,
        )
    estimate(world, SMALL, nodes=4, block=32)


@pytest.mark.parametrize(("degree", "nodes"), [(1, 16), (31, 1), (32, 1), (70, 1)])
@pytest.mark.parametrize("seed", range(2))
def test_blocks_of_one_node_and_of_many(degree, nodes, seed) -> None:
    """A node with more neighbours than its block has threads takes several rounds."""
    world = World.random(seed, num_items=130, degree=degree, batch=3, width=5, dim=3, context_dim=2)
    estimate(world, SMALL, nodes=nodes, block=32, seed=seed)


def test_the_real_block_of_estimates() -> None:
    world = World.random(0, num_items=2001, degree=32, batch=3, width=16, dim=16, context_dim=8)
    estimate(world, REAL, nodes=7, block=REAL.gate_block)


def choose(
    sizes: BlockSizes,
    found: list[list[tuple[float, int]]],
    gated: list[bool],
    *,
    admit: int,
    num_items: int,
    seed: int = 0,
) -> None:
    """One launch of `choose` on (estimate, item) as found; its candidates are those of the reference."""
    batch, most = len(found), max(1, *(len(of_query) for of_query in found))
    keys = np.full((batch, most), 3, U64)
    visited = [set(range(0, num_items, 50)) - {item for _, item in of_query} for of_query in found]
    new: list[list[int]] = []
    for b, of_query in enumerate(found):
        if of_query:
            estimates, items = (np.array(column) for column in zip(*of_query, strict=True))
            keys[b, : len(of_query)] = keys_of(estimates, items)
        in_order = items_of(np.sort(keys[b, : len(of_query)])).tolist()
        new.append(list(dict.fromkeys(in_order))[: admit if gated[b] else None])
    step = Step(visited, num_items, most)
    n_found = np.array([len(of_query) for of_query in found], I32)
    room = Launches(Modules(sizes), None).room_to_choose(most)
    spill = np.zeros((batch, room) if room > sizes.sort_piece else 1, U64)
    expanded = np.arange(batch, dtype=I32)
    program("choose.cu", sizes).run(
        "choose",
        (1, batch),
        sizes.merge_block,
        [
            *(keys, I64(most), n_found, np.array(gated, I32) * 8, I32(admit), spill, I32(room)),
            *(step.bitmap, I64(step.words), step.items, I64(step.stride), I32(32), expanded, *step.plan()),
        ],
        shared_bytes=256 + 8 * min(room, sizes.sort_piece),
        seed=seed,
    )
    step.check(new, 32, expanded.tolist())
    assert sets(step.bitmap) == [seen | set(items) for seen, items in zip(visited, new, strict=True)]
    assert not n_found.any()


def meetings(rng: np.random.Generator, count: int, num_items: int) -> list[tuple[float, int]]:
    """Estimates with many ties, of items met several times."""
    items = rng.integers(0, num_items, count)
    return list(zip(rng.integers(-4, 5, count).astype(float), items.tolist(), strict=True))


@pytest.mark.parametrize("admit", [1, 5, 20, 63, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_items_once_each(admit, seed) -> None:
    """Up to 42 keys meet in shared memory here, more in the spill."""
    rng = np.random.default_rng(seed)
    found = [meetings(rng, n, 60) for n in (0, 1, 21, 42, 43, 150)]
    gated = [bool(rng.random() < 0.8) for _ in found]
    choose(SMALL, found, gated, admit=admit, num_items=200, seed=seed)


@pytest.mark.parametrize("count", [300, 2730, 2731, 5000])
def test_the_real_block_chooses(count) -> None:
    rng = np.random.default_rng(count)
    choose(
        REAL, [meetings(rng, count, 4000), meetings(rng, 9, 4000)], [True, True], admit=256, num_items=4000
    )


def test_one_item_met_by_all_is_one_candidate() -> None:
    found = [(float(i % 7), 33) for i in range(60)] + [(6.5, 5), (-1.0, 9)]
    choose(SMALL, [found], [True], admit=2, num_items=64)
    choose(SMALL, [found], [True], admit=99, num_items=64)


def test_items_whose_places_collide_all_find_one() -> None:
    """A full table but for a third: items a power of two apart."""
    found = [(float(i % 5), 64 * i % 4096 + i // 64) for i in range(1000)]
    choose(SMALL, [found], [True], admit=700, num_items=4096)
