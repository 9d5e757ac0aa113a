"""What is learnt for the walk from the model's own answers: links between items, and where to start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.artifacts import Artifact
from nann.engine.catalog import Catalog
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams
from nann.offline.build_index import LEAST_CONNECTED, in_reach, write_level
from nann.offline.builders.nearest import join
from nann.offline.builders.reachability import unreachable_from
from nann.offline.co_answers import co_answered, most_answered
from nann.offline.search_quality import on_all_lanes

if TYPE_CHECKING:
    from jaxtyping import Int32

__all__ = ["LEARNT", "LearntGraph", "ask_for_answers", "learn_graph"]

LEARNT = "answers"  # the key of the graph's account that says how many answers its links were learnt from
N_LINKS = (
    16  # half of a row of the default graph; 8 and 24 were no better (docs/research/search.md, "Graphs")
)
N_STARTS = 200
_K = 200
# On Brunch it finds 98 of 100 of the best 200 before anything is learnt, which is enough to learn from.
_PARAMS = SearchParams(ef=300, beam_width=64)


@dataclass(frozen=True, slots=True)
class LearntGraph:
    """Level 0 and the start points that replace an artifact's, and the account of them."""

    level_0: Int32[np.ndarray, "N degree"]
    start_points: Int32[np.ndarray, " S"]
    account: dict[str, Any]

    def write(self, arrays: Path) -> None:
        """Save what changes into an artifact's ``arrays``."""
        write_level(arrays, 0, self.level_0)
        np.save(arrays / "start_points.npy", self.start_points)


def ask_for_answers(
    engine: SearchEngine,
    artifact: Artifact,
    histories: Int32[np.ndarray, "users length"],
    advance: Callable[[], Any],
) -> Int32[np.ndarray, "users 200"]:
    """The best 200 items of each user, as a usual walk finds them; item indices, -1 where there are fewer."""
    catalog = Catalog(artifact)
    k = min(_K, artifact.num_items)
    answers = np.full((len(histories), k), -1, dtype=np.int32)

    def ask(lane: int, row: int) -> Int32[np.ndarray, " n"]:
        history = histories[row]
        query = Query(k=k, params=_PARAMS, history=catalog.item_ids(history[history >= 0]))
        return catalog.item_index(engine.search([engine.check(query)], lane)[0].item_ids)

    for row, found in enumerate(on_all_lanes(engine, ask, range(len(histories)))):
        answers[row, : found.size] = found
        advance()
    return answers


def learn_graph(artifact: Artifact, answers: Int32[np.ndarray, "users k"]) -> LearntGraph | None:
    """Join links between items answered together to the artifact's level 0, nearest items last, and start
    from what is answered most.

    Rows keep their width: learnt links take the places of the farthest neighbours. Items that the new
    start points do not reach are linked as `nann index` does.

    None where the learnt links would take the places of those that hold the graph together.

    Raises:
        ValueError: the artifact has no item embeddings.
    """
    if artifact.item_vectors is None:
        raise ValueError(f"{artifact.directory} has no item embeddings; make it again with nann index")
    degree = artifact.neighbors[0].shape[1]
    links = co_answered(answers, artifact.num_items, min(N_LINKS, degree // 2))
    starts = most_answered(answers, artifact.num_items, N_STARTS)
    popular = artifact.start_points[~np.isin(artifact.start_points, starts)]
    start_points = np.concatenate([starts, popular])[:N_STARTS].astype(np.int32)
    roots = {"entry_points": artifact.walk_entry_points, "start_points": start_points}
    joined = join(links, np.array(artifact.neighbors[0]), degree)
    if len(unreachable_from(joined, start_points)) > (1 - LEAST_CONNECTED) * artifact.num_items:
        return None
    level_0, account = in_reach(
        joined,
        np.asarray(artifact.item_vectors),
        artifact.manifest.graph["space"],
        {name: points for name, points in roots.items() if len(points)},
    )
    n_edges = [int(np.count_nonzero(level_0 >= 0)), *artifact.manifest.graph["n_edges"][1:]]
    learnt = {LEARNT: len(answers), "learnt_links": int(np.count_nonzero(links >= 0)), "n_edges": n_edges}
    return LearntGraph(level_0, start_points, {**artifact.manifest.graph, **account, **learnt})
