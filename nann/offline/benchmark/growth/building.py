"""One made-up corpus to one published version, by the commands that publish real ones, and what each took."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

from nann.offline.benchmark.growth.corpus import write_embeddings
from nann.offline.benchmark.growth.timing import measured
from nann.offline.build_index import GraphOptions, build_index
from nann.offline.export import export

__all__ = ["MODEL_NAME", "build_version"]

MODEL_NAME = "growth"


def build_version(
    work: Path, *, num_items: int, users: int, seed: int, ef_construction: int
) -> dict[str, Any]:
    """Publish ``work/repository/growth/1``; times, peak memory and sizes of its files.

    What lies in `work` is replaced; only the repository is left there.
    """
    shutil.rmtree(work, ignore_errors=True)
    embeddings, run = work / "embeddings", work / "run"
    embeddings.mkdir(parents=True)
    figures: dict[str, Any] = {"ef_construction": ef_construction}
    with measured(figures, "corpus"):
        write_embeddings(embeddings, num_items=num_items, users=users, seed=seed)
    figures["corpus_peak_bytes"] = _peak_bytes()
    with measured(figures, "index"):
        report = build_index(embeddings, run / "index", options=GraphOptions(ef_construction=ef_construction))
    figures["graph_s"] = report.build_s
    figures["graph"] = dict(report.graph)
    with measured(figures, "export"):
        version = export(run, work / "repository", MODEL_NAME, programs=("cpu",))
    figures["peak_bytes"] = _peak_bytes()
    shutil.rmtree(embeddings)
    shutil.rmtree(run)
    figures["bytes"] = _bytes_by_kind(version)
    return figures


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bytes_by_kind(version: Path) -> dict[str, int]:
    """Sizes of the version's files, by what they hold; together all of it."""
    kinds = {
        "item_state": "item tensors",
        "item_embs": "embeddings",
        "neighbors": "graph",
        "history": "histories",
        "variables": "SavedModel",
        "saved_model": "SavedModel",
    }
    sizes: dict[str, int] = {}
    for directory, _, names in os.walk(version):
        for name in names:
            path = Path(directory) / name
            kind = next((kind for start, kind in kinds.items() if name.startswith(start)), "the rest")
            sizes[kind] = sizes.get(kind, 0) + path.stat().st_size
    return sizes
