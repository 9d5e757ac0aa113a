"""Where the golden artifacts lie, and how their queries are spelled in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nann.engine.artifacts import Artifact
from nann.engine.devices import cpu_lanes
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams

__all__ = ["GOLDEN", "load_engine", "query_of"]

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"


def load_engine(directory: Path, *, max_batch: int = 1) -> SearchEngine:
    """A warm engine over few shapes, which is all that a corpus of a hundred items needs."""
    from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

    artifact = Artifact.open(directory)
    grid = BucketGrid(max_batch=max_batch, max_rows=128)
    scorer = TensorFlowScorer(directory, artifact.manifest, max_batch=max_batch, grid=grid)
    engine = SearchEngine(artifact, cpu_lanes(artifact, [scorer], max_batch=max_batch), max_batch=max_batch)
    engine.warm_up()
    return engine


def query_of(fields: Mapping[str, Any]) -> Query:
    """A `Query` from its JSON."""
    params = dict(fields["params"])
    if "level_topn" in params:
        params["level_topn"] = tuple(params["level_topn"])
    rest = {name: value for name, value in fields.items() if name != "params"}
    if "comm_seq" in rest:
        rest["comm_seq"] = np.array(rest["comm_seq"], np.float32)
    return Query(params=SearchParams(**params), **rest)
