"""`nann index`: the embeddings of a model to a complete, unpublished artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nann.engine.artifacts import FORMAT_VERSION, Manifest, TensorSpec, hash_files, write_manifest
from nann.offline.builders.hnsw import DEFAULT_SEED, HnswGraph, Space, build_hnsw, prepare_vectors, to_ragged
from nann.offline.builders.reachability import repair, unreachable_from
from nann.offline.progress import Progress
from nann.offline.staging import link_or_copy, staged_directory

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = [
    "GRAPH_FILE",
    "LEAST_CONNECTED",
    "PRESETS",
    "GraphOptions",
    "IndexReport",
    "build_index",
    "in_reach",
    "write_level",
]

GRAPH_FILE = "graph.json"  # what was built and how; every output of `nann index` has it
_MODEL_FILE = "model.json"
_SAVED_MODEL = "saved_model.pb"


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """How the graph is built. `m` and `ef_construction`: more finds more, costs memory and build time.

    `nearest`: level 0 links each item to so many nearest ones and to those that have it among theirs; 0
    keeps HNSW's own links. The defaults were measured on Brunch (docs/research/search.md, "Graphs").
    """

    m: int = 16
    ef_construction: int = 100
    space: Space = "cosine"
    nearest: int = 12
    repair: bool = True
    seed: int = DEFAULT_SEED


Preset = Literal["default", "nann"]
# NANN's graph as published (reference/nann.md, "Index"): never repaired, faiss' default seed.
PRESETS: Mapping[Preset, GraphOptions] = {
    "default": GraphOptions(),
    "nann": GraphOptions(m=32, ef_construction=40, space="l2", nearest=0, repair=False),
}


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What was built. `complete`: the output is an artifact, not only the arrays of a graph."""

    output: Path
    num_items: int
    complete: bool
    graph: Mapping[str, Any]
    build_s: float


def build_index(
    embeddings_dir: Path,
    output_dir: Path,
    *,
    options: GraphOptions = PRESETS["default"],
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> IndexReport:
    """Build the graph over ``item_embs.npy`` [N, D] of `embeddings_dir` and write `output_dir`.

    With a SavedModel in `embeddings_dir` (the output of ``nann extract``) the output is a version
    directory of the contract that only `export` has yet to publish; without one it holds the ids, the
    embeddings and NANN's graph arrays alone. It appears whole or not at all.

    Raises:
        FileNotFoundError: there is no ``item_embs.npy``, or a SavedModel without its ``model.json``.
        FileExistsError: `output_dir` holds something that is no index.
        ValueError: the options or the embeddings are not usable.
    """
    progress = progress if progress is not None else Progress(silent=True)
    embeddings = _load_embeddings(embeddings_dir)
    complete = (embeddings_dir / _SAVED_MODEL).is_file()
    model = _load_model(embeddings_dir) if complete else {}
    started_s = time.monotonic()
    with progress.stage(f"build graph of {len(embeddings):,} items"):
        graph = build_hnsw(
            embeddings,
            m=options.m,
            ef_construction=options.ef_construction,
            space=options.space,
            seed=options.seed,
            nearest=options.nearest,
            num_threads=num_threads,
        )
    with progress.stage("check reachability"):
        graph = _connected(graph)
        level_0, described = _reachable(graph, embeddings, _start_points(embeddings_dir), options)
    build_s = time.monotonic() - started_s
    with progress.stage(f"write {output_dir}"), staged_directory(output_dir, mark=GRAPH_FILE) as staging:
        _lay_out(embeddings_dir, staging)
        _write_graph(staging / "arrays", graph, level_0)
        (staging / GRAPH_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if complete:
            write_manifest(staging, _manifest(staging, model, embeddings, options, described))
    return IndexReport(output_dir, len(embeddings), complete, described, build_s)


def _load_embeddings(directory: Path) -> Float32[np.ndarray, "N D"]:
    path = directory / "item_embs.npy"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it with: nann extract --output {directory}")
    embeddings: Float32[np.ndarray, "N D"] = np.load(path, allow_pickle=False)
    return embeddings


def _load_model(directory: Path) -> dict[str, Any]:
    path = directory / _MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist beside the SavedModel; run nann extract again")
    model: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return model


def _start_points(embeddings_dir: Path) -> Int32[np.ndarray, " S"] | None:
    path = embeddings_dir / "arrays" / "start_points.npy"
    return np.load(path, allow_pickle=False) if path.is_file() else None


# Links between near items alone leave 0.0 to 0.1 % of Brunch and MovieLens out of reach of the entry points,
# and 1.6 % of a catalogue of separate topics, whose walks then end inside a topic (docs/adr/0019).
LEAST_CONNECTED = 0.99


def _connected(graph: HnswGraph) -> HnswGraph:
    """The graph, with HNSW's own links on level 0 where links between near items do not hold it together."""
    out_of_reach = len(unreachable_from(graph.neighbors[0], graph.walk_entry_points))
    if not graph.nearest or out_of_reach <= (1 - LEAST_CONNECTED) * graph.num_items:
        return graph
    return replace(graph, neighbors=(graph.own_level_0, graph.neighbors[1]), nearest=0)


def _reachable(
    graph: HnswGraph,
    embeddings: Float32[np.ndarray, "N D"],
    start_points: Int32[np.ndarray, " S"] | None,
    options: GraphOptions,
) -> tuple[Int32[np.ndarray, "N degree"], dict[str, Any]]:
    """Level 0 with every item in reach of the entry points and of the start points, and the account."""
    roots: dict[str, Any] = {"entry_points": graph.walk_entry_points}
    if start_points is not None and len(start_points):
        roots["start_points"] = start_points
    level_0, account = in_reach(graph.neighbors[0], embeddings, graph.space, roots, repairs=options.repair)
    return level_0, {
        "levels": len(graph.neighbors),
        "degree": [table.shape[1] for table in graph.neighbors],
        "space": graph.space,
        "nearest": graph.nearest,
        "n_entry_points": len(graph.entry_points),
        "n_walk_entry_points": len(graph.walk_entry_points),
        "n_edges": [int(np.count_nonzero(table >= 0)) for table in (level_0, graph.neighbors[1])],
        **account,
    }


def in_reach(
    level_0: Int32[np.ndarray, "N degree"],
    embeddings: Float32[np.ndarray, "N D"],
    space: Space,
    roots: Mapping[str, Any],
    *,
    repairs: bool = True,
) -> tuple[Int32[np.ndarray, "N degree"], dict[str, Any]]:
    """The table with every item in reach of each set of roots, if it `repairs`, and the account of it."""
    before = {name: len(unreachable_from(level_0, points)) for name, points in roots.items()}
    added = replaced = 0
    if repairs:
        fixed = repair(level_0, prepare_vectors(embeddings, space), list(roots.values()), space)
        level_0, added, replaced = fixed.neighbors, fixed.edges_added, fixed.edges_replaced
    return level_0, {
        "unreachable_before_repair": before,
        "unreachable": {name: len(unreachable_from(level_0, points)) for name, points in roots.items()},
        "edges_added": added,
        "edges_replaced": replaced,
    }


def _lay_out(embeddings_dir: Path, staging: Path) -> None:
    """The files of `nann extract` where the contract wants them. Extract replaces files, never edits."""
    for path in sorted(path for path in embeddings_dir.rglob("*") if path.is_file()):
        relative = path.relative_to(embeddings_dir)
        in_model = relative.parts[0] in ("arrays", "variables", "assets")
        if in_model or relative.name in (_SAVED_MODEL, "fingerprint.pb"):
            link_or_copy(path, staging / relative)
    for name, target in (
        ("item_embs.npy", "item_embs.npy"),
        ("item_ids.npy", "item_ids.npy"),
        ("item_ids.parquet", "item_id_strings.parquet"),
    ):
        if (embeddings_dir / name).is_file():
            link_or_copy(embeddings_dir / name, staging / "arrays" / target)


def write_level(arrays: Path, level: int, table: Int32[np.ndarray, "N degree"]) -> None:
    """The neighbours of one level, of fixed degree and as NANN's ragged rows."""
    values, row_splits = to_ragged(table)
    np.save(arrays / f"neighbors_level_{level}.npy", table)
    np.save(arrays / f"neighbors_level_{level}_values.npy", values)
    np.save(arrays / f"neighbors_level_{level}_row_splits.npy", row_splits)


def _write_graph(arrays: Path, graph: HnswGraph, level_0: Int32[np.ndarray, "N degree"]) -> None:
    for level, table in enumerate((level_0, graph.neighbors[1])):
        write_level(arrays, level, table)
    own, walk = graph.entry_points, graph.walk_entry_points
    np.save(arrays / "enter_points.npy", own if len(own) else walk)
    if 0 < len(own) < len(walk):
        np.save(arrays / "walk_entry_points.npy", walk)


def _manifest(
    staging: Path,
    model: Mapping[str, Any],
    embeddings: Float32[np.ndarray, "N D"],
    options: GraphOptions,
    described: Mapping[str, Any],
) -> Manifest:
    arrays = staging / "arrays"
    return Manifest(
        format_version=FORMAT_VERSION,
        model_name="unpublished",
        model_type=model["model"],
        num_items=len(embeddings),
        embedding_dim=embeddings.shape[1],
        history_length=model["history_length"],
        input_dim=model["input_dim"],
        item_id_type="int" if (arrays / "item_ids.npy").is_file() else "str",
        user_id_type="int" if (arrays / "history_ids.npy").is_file() else "str",
        user_tensors={name: TensorSpec(**spec) for name, spec in model["user_tensors"].items()},
        item_tensors={
            name: TensorSpec.model_validate({**spec, "dtype": _stored_dtype(arrays, name)})
            for name, spec in model["item_tensors"].items()
        },
        files=hash_files(staging),
        graph=dict(described),
        builder={
            "name": "hnsw",
            "library": f"faiss-cpu {metadata.version('faiss-cpu')}",
            "m": options.m,
            "ef_construction": options.ef_construction,
            "nearest": options.nearest,
            "repair": options.repair,
        },
        training=model.get("training", {}),
        data_hash=model.get("data_hash", ""),
        code_version=metadata.version("nann"),
        seeds={**model.get("seeds", {}), "graph": options.seed},
    )


def _stored_dtype(arrays: Path, tensor: str) -> str:
    """The dtype of an item tensor as it lies in the artifact; the model itself takes float32."""
    return str(np.load(arrays / f"item_state_{tensor}.npy", mmap_mode="r", allow_pickle=False).dtype)
