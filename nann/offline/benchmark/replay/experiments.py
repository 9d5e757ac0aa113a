"""The experiments of docs/research/search.md: named sweeps, of which costs at equal recall are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.offline.benchmark.replay import graphs, walks
from nann.offline.benchmark.replay.measure import Point, Scratch, Users, at_recall, replay
from nann.offline.builders.hnsw import build_hnsw, prepare_vectors
from nann.offline.builders.nearest import join, reverse_lists
from nann.offline.co_answers import co_answered, most_answered
from nann.offline.data.dataset import Dataset

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["EXPERIMENTS", "RECALLS", "Lab", "Sweep", "markdown"]

RECALLS = (0.95, 0.98, 0.99)
_EFS = (50, 80, 120, 180, 260, 380, 500)
_NEVER = 1e9  # a margin that lets every node be expanded


@dataclass(frozen=True, slots=True)
class Sweep:
    """All settings of one search."""

    name: str
    points: Sequence[Point]


class Lab:
    """Users, corpus and the ready-made lists of one run; builds graphs and starts from them.

    `others` are the users of the other split, of whose scores something may be learned.
    """

    def __init__(self, run: Path, work: Path, users: Users, others: Users) -> None:
        dataset = Dataset.load(run / "data")
        self.run = run
        self.users = users
        self.others = others
        self.clicked = dataset.popular_items(2000)
        self.embeddings = np.load(run / "embeddings" / "item_embs.npy")
        self.vectors = prepare_vectors(self.embeddings, "cosine")
        self.index_arrays = run / "index" / "arrays"
        self.nearest = np.load(work / "nearest.npy")
        self.co_read = np.load(work / "co_read.npy")
        self.answers = np.load(work / "answers.npz")["items"]
        self.together = co_answered(self.answers, dataset.num_items, 16)
        self.answered = most_answered(self.answers, dataset.num_items, 2000)

    def near(self, degree: int, reverse: int) -> Any:
        lists = np.ascontiguousarray(self.nearest[:, :degree])
        return both(lists, reverse_lists(lists, reverse)) if reverse else lists

    def learned(self) -> Any:
        """The graph that won: 16 items answered together, 6 nearest, 16 that have the item among theirs."""
        return both(self.together, self.near(6, 16))

    def starts(
        self, common: Int32[np.ndarray, " n"], newest: int | None = None
    ) -> list[Int32[np.ndarray, " starts"]]:
        """Each user's history (its `newest` items) and the `common` items."""
        histories = [row[row >= 0] for row in self.users.history]
        return [np.concatenate([row[-newest if newest else None :], common]) for row in histories]

    def weighted_starts(
        self, weights: Float32[np.ndarray, "U length"], count: int, common: Int32[np.ndarray, " n"]
    ) -> list[Int32[np.ndarray, " starts"]]:
        """The `count` items of each history with the largest weights, and the `common` items."""
        starts = []
        for row, weight in zip(self.users.history, weights, strict=True):
            best = np.argsort(np.where(row >= 0, -weight, np.inf), kind="stable")[:count]
            starts.append(np.concatenate([row[best][row[best] >= 0], common]))
        return starts

    def attention(self) -> Float32[np.ndarray, "U length"]:
        """The attention of the 200 most answered items over each history, their mean."""
        import tensorflow as tf

        encode: Any = tf.saved_model.load(str(self.run / "index")).signatures["encode_user"]
        user = encode(history=tf.constant(self.users.history))
        queries = np.load(self.index_arrays / "item_state_item_query.npy")[self.answered[:200]]
        logits = tf.matmul(queries.astype(np.float32)[None], user["user_keys"]) + user["user_key_bias"]
        mean: Float32[np.ndarray, "U length"] = tf.reduce_mean(tf.nn.softmax(logits), axis=1).numpy()
        return mean

    def own_scores(self) -> Float32[np.ndarray, "U length"]:
        """The score of each item of a history for its own user."""
        rows = np.arange(len(self.users))[:, None]
        scores: Float32[np.ndarray, "U length"] = self.users.scores[rows, np.maximum(self.users.history, 0)]
        return scores

    def best_first(
        self, name: str, graph: Any, starts: Sequence[Any], *, efs: Sequence[int] = _EFS, **options: Any
    ) -> Sweep:
        chosen: dict[str, Any] = {"beam": 16, "patience": 0, "least_share": 0.0, "margin": _NEVER}
        chosen |= {"growth": 1.0, "most": 64, "near": graph.shape[1]} | options
        order = ("beam", "near", "answer", "patience", "least_share", "margin", "growth", "most")
        chosen["answer"] = 200

        def point(ef: int) -> Point:
            def search(user: int, scores: Any, scratch: Scratch) -> Any:
                return walks.best_first(
                    scores,
                    graph,
                    starts[user],
                    scratch.visited,
                    scratch.stamp,
                    ef,
                    *(chosen[o] for o in order),
                )

            return replay(f"ef {ef}", self.users, search)

        return Sweep(name, [point(ef) for ef in efs])


def reference(lab: Lab) -> Iterator[Sweep]:
    """NANN's searches over the run's own graph, and best-first over it."""
    ground, upper = (np.load(lab.index_arrays / f"neighbors_level_{level}.npy") for level in (0, 1))
    entries = np.load(lab.index_arrays / "enter_points.npy").astype(np.int32)
    sizes = [(100, 200, t, t, t, 200) for t in (200, 400)]
    sizes += [(200, 400, t, t, t, 200) for t in (200, 400, 800)]
    sizes += [(400, 800, t, t, t, 200) for t in (300, 400, 800, 1600)]

    def level(topn: Any) -> Point:
        def search(_user: int, scores: Any, scratch: Scratch) -> Any:
            return walks.level(scores, ground, upper, entries, scratch.visited, scratch.stamp, topn)

        return replay(f"level {topn.tolist()}", lab.users, search)

    def evaluated(efs: Any, steps: Any) -> Point:
        def search(_user: int, scores: Any, scratch: Scratch) -> Any:
            return walks.evaluated(scores, ground, upper, entries, scratch.visited, scratch.stamp, efs, steps)

        return replay(f"evaluated {efs.tolist()} {steps.tolist()}", lab.users, search)

    yield Sweep("level", [level(np.array(topn)) for topn in sizes])
    pruned = [
        evaluated(np.array((4, 2, 1)) * width, np.array(steps))
        for width in (50, 100, 200, 400)
        for steps in ((3, 1, 1), (8, 2, 1))
    ]
    yield Sweep("evaluated", pruned)
    yield lab.best_first("best-first, history + 200 clicked", ground, lab.starts(lab.clicked[:200]))


def graph_kinds(lab: Lab) -> Iterator[Sweep]:
    """Lists of nearest items with and without their reverse, and edges from clicks and from answers."""
    starts = lab.starts(lab.clicked[:100])
    for degree in (12, 32):
        yield lab.best_first(f"{degree} nearest", lab.near(degree, 0), starts)
    for degree, reverse in ((6, 6), (8, 8), (12, 12), (12, 32)):
        yield lab.best_first(f"{degree} nearest, reverse {reverse}", lab.near(degree, reverse), starts)
    for alpha in (1.0, 1.2):
        table = graphs.pruned(lab.vectors, lab.nearest, alpha, 16)
        table = both(table, reverse_lists(table, 16))
        yield lab.best_first(f"32 nearest pruned by alpha {alpha}, and reverse", table, starts)
    near = lab.near(6, 16)
    yield lab.best_first("8 co-read, 6 nearest, reverse 16", both(lab.co_read[:, :8], near), starts)
    for n in (8, 16):
        learned = both(lab.together[:, :n], near)
        yield lab.best_first(f"{n} answered together, 6 nearest, reverse 16", learned, starts)
    for queries in (1500, 3000, 6000):
        together = co_answered(lab.answers[:queries], len(near), 16)
        yield lab.best_first(f"… 16, from {queries} queries", both(together, near), starts)


def metrics(lab: Lab) -> Iterator[Sweep]:
    """NSG as faiss builds it, and nearest items by a metric learned from the model's scores."""
    starts = lab.starts(lab.clicked[:100])
    for degree in (16, 32):
        table = graphs.nsg(lab.vectors, lab.nearest, degree)
        yield lab.best_first(f"faiss NSG, degree {degree}", table, starts)
        yield lab.best_first("… and reverse 16", both(table, reverse_lists(table, 16)), starts)
    for count in (len(lab.others), len(lab.others) // 4):
        vectors = graphs.score_vectors(lab.others.scores[:count], 64)
        nearest = build_hnsw(vectors, m=16, nearest=32).neighbors[0]
        near = {n: np.ascontiguousarray(nearest[:, :n]) for n in (6, 12)}
        table = both(near[12], reverse_lists(near[12], 32))
        yield lab.best_first(f"12 nearest by {count} users' scores, reverse 32", table, starts)
        table = both(lab.together, both(near[6], reverse_lists(near[6], 16)))
        yield lab.best_first("16 answered together, 6 nearest by scores, reverse 16", table, starts)
        table = both(lab.near(6, 16), both(near[6], reverse_lists(near[6], 16)))
        yield lab.best_first("6 nearest by cosine and 6 by scores, reverse 16 each", table, starts)


def start_sets(lab: Lab) -> Iterator[Sweep]:
    """Where the walk over the learned graph starts."""
    graph = lab.learned()
    for n in (0, 100, 200, 400):
        yield lab.best_first(f"history + {n} most clicked", graph, lab.starts(lab.clicked[:n]))
    for n in (100, 200, 300, 400):
        yield lab.best_first(f"history + {n} most answered", graph, lab.starts(lab.answered[:n]))
    yield lab.best_first("newest 20 + 200 most answered", graph, lab.starts(lab.answered[:200], 20))
    for n in (5, 10, 20):
        for name, weights in (("attended", lab.attention()), ("best scored", lab.own_scores())):
            starts = lab.weighted_starts(weights, n, lab.answered[:200])
            yield lab.best_first(f"{n} most {name} of the history + 200 most answered", graph, starts)


def stops(lab: Lab) -> Iterator[Sweep]:
    """Beam width, and other ends of the walk than `ef` below the size of the answer."""
    graph, starts = lab.learned(), lab.starts(lab.answered[:200])
    for beam in (4, 8, 16, 32, 64, 128):
        yield lab.best_first(f"beam {beam}", graph, starts, beam=beam)
    yield lab.best_first("beam 8, growing by 1.5", graph, starts, beam=8, growth=1.5)
    for name, options in (
        ("answer unchanged for 1 … 6 steps", [{"patience": n} for n in (1, 2, 3, 4, 6)]),
        (
            "newcomers ≤ 2, 5, 10 % for 2 steps",
            [{"patience": 2, "least_share": s} for s in (0.02, 0.05, 0.1)],
        ),
        ("score margin to the 200th", [{"margin": m} for m in (-0.2, -0.1, 0.0, 0.05, 0.1)]),
        ("2 … 14 steps of beam 32", [{"most": n, "beam": 32} for n in (2, 3, 4, 6, 8, 10, 14)]),
    ):
        points = [lab.best_first("", graph, starts, efs=(800,), **o).points[0] for o in options]
        yield Sweep(name, points)


def gating_by_votes(lab: Lab) -> Iterator[Sweep]:
    """Score a neighbour only when two expanded nodes lead to it, or one of the best few does."""
    graph, starts = lab.learned(), lab.starts(lab.answered[:200])
    for trusted in (0, 16, 32, 64, 100, 200):

        def point(ef: int, trusted: int = trusted) -> Point:
            def search(user: int, scores: Any, scratch: Scratch) -> Any:
                return walks.voted(
                    scores,
                    graph,
                    starts[user],
                    scratch.visited,
                    scratch.stamp,
                    scratch.votes,
                    ef,
                    16,
                    2,
                    trusted,
                )

            return replay(f"ef {ef}", lab.users, search)

        yield Sweep(f"2 votes, or 1 of the best {trusted}", [point(ef) for ef in _EFS])


def gating_by_gradient(lab: Lab) -> Iterator[Sweep]:
    """GUITAR: neighbours judged by the gradient at the item that leads to them, at several prices of one."""
    from nann.offline.benchmark.replay.gradients import Gradients, Rule, guided

    model = Gradients(lab.run, lab.embeddings)
    learned, hnsw = lab.learned(), np.load(lab.index_arrays / "neighbors_level_0.npy")
    starts = {"learned": lab.starts(lab.answered[:200]), "HNSW": lab.starts(lab.clicked[:200])}
    rules: dict[Rule, tuple[float, ...]] = {"angle": (0.25, 0.5, 0.75), "estimate": (0.0, 0.2, 0.5, 1.0)}
    for graph_name, graph in (("learned", learned), ("HNSW", hnsw)):
        first = starts[graph_name]
        yield lab.best_first(f"{graph_name}, every neighbour scored", graph, first)

        def point(
            rule: Rule, keep: float, price: float, ef: int, graph: Any = graph, first: Any = first
        ) -> Point:
            options: dict[str, Any] = {"ef": ef, "rule": rule, "keep": keep, "price": price}

            def search(user: int, scores: Any, _scratch: Scratch) -> Any:
                history = lab.users.history[user]
                return guided(scores, graph, first[user], lab.embeddings, model, history, **options)

            return replay(f"{keep:g}, ef {ef}", lab.users, search)

        for rule, keeps in rules.items():
            for price in (0.0, 2.0):
                points = [point(rule, keep, price, ef) for keep in keeps for ef in (80, 180, 380)]
                yield Sweep(f"{graph_name}, {rule}, a gradient for {price:g} scores", points)


def both(first: Int32[np.ndarray, "N a"], second: Int32[np.ndarray, "N b"]) -> Int32[np.ndarray, "N a+b"]:
    """All of both tables, the first's neighbours first."""
    degree = first.shape[1] + second.shape[1]
    table: Int32[np.ndarray, "N a+b"] = join(
        np.ascontiguousarray(first), np.ascontiguousarray(second), degree
    )
    return table


EXPERIMENTS = {
    "reference": reference,
    "graphs": graph_kinds,
    "metrics": metrics,
    "starts": start_sets,
    "stops": stops,
    "votes": gating_by_votes,
    "gradient": gating_by_gradient,
}


def markdown(sweep: Sweep) -> str:
    """One row: items scored at each of `RECALLS`."""
    costs = [at_recall(sweep.points, recall) for recall in RECALLS]
    cells = ["—" if np.isnan(cost) else f"{cost:,.0f}" for cost in costs]
    return f"| {sweep.name} | {' | '.join(cells)} |"
