"""A process of its own that loads an engine, warms it up, asks random queries and reports what was compiled.

    python compilation_probe.py VERSION_DIR CACHE_DIR DUMP_DIR N_QUERIES

The parent sets XLA_FLAGS=--xla_dump_to=DUMP_DIR; the answer is one line of JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams

if TYPE_CHECKING:
    from nann.engine.search_engine import PreparedQuery

HEAVY = ("tensorflow", "keras", "faiss", "nann.offline")
MAX_BATCH, MAX_K = 4, 300


def modules_dumped(directory: Path) -> int:
    """How many modules XLA compiled: it names each file it dumps ``module_NNNN.…``."""
    return len({path.name.split(".")[0] for path in directory.glob("module_*")})


def kernel_signatures() -> dict[str, list[str]]:
    """What numba compiled each kernel for."""
    from numba.core.registry import CPUDispatcher

    from nann.engine.cpu import gate_kernels, kernels

    both = {**vars(kernels), **vars(gate_kernels)}
    found = {n: k for n, k in both.items() if isinstance(k, CPUDispatcher)}
    return {name: sorted(map(str, kernel.signatures)) for name, kernel in found.items()}


def imported(prefixes: tuple[str, ...] = HEAVY) -> list[str]:
    return [p for p in prefixes if any(m == p or m.startswith(p + ".") for m in sys.modules)]


def random_params(rng: np.random.Generator) -> SearchParams:
    policy = rng.choice(["best_first", "best_first", "level", "exhaustive"])
    if policy == "level":
        topn = rng.integers(1, 200, 6)
        return SearchParams(policy="level", level_topn=(*map(int, topn[:5]), MAX_K))
    if policy == "exhaustive":
        return SearchParams(policy="exhaustive")
    ef, width, steps = int(rng.integers(1, 900)), int(rng.integers(1, 130)), int(rng.integers(1, 70))
    if rng.random() < 0.5:
        return SearchParams(ef=ef, beam_width=width, max_steps=steps)
    gate, margin = int(rng.integers(1, 400)), float(rng.normal())
    return SearchParams(ef=ef, beam_width=width, max_steps=steps, gate_width=gate, gate_margin=margin)


def random_query(rng: np.random.Generator, ids: list[int], width: int, params: SearchParams) -> Query:
    def some(n: int) -> list[int]:
        return rng.choice([*ids, -1], int(rng.integers(0, n))).tolist()

    fields: dict[str, Any] = {"exclude": some(40), "seen": some(40)} if rng.random() < 0.4 else {}
    if rng.random() < 0.2:
        fields["filter"] = {"category": {"in": rng.integers(0, 6, 3).tolist()}}
    if rng.random() < 0.1:
        fields["filter"] = {"year": {"gte": int(rng.integers(1980, 2010))}}
    if rng.random() < 0.1:
        fields["include"] = some(4000)
    if rng.random() < 0.2:
        fields["comm_seq"] = rng.normal(size=width).astype(rng.choice([np.float16, np.float32, np.float64]))
    else:
        fields["history"] = some(12)
    return Query(
        k=int(rng.integers(1, MAX_K + 1)), params=params, with_attributes=bool(rng.random() < 0.1), **fields
    )


def ask_random_queries(engine: SearchEngine, ids: list[int], n_queries: int) -> dict[str, Any]:
    rng = np.random.default_rng(12)
    manifest = engine.manifest
    done = 0
    gated = 0
    sizes: dict[int, int] = {}
    policies: dict[str, int] = {}
    waiting: dict[Any, list[PreparedQuery]] = {}
    params: list[SearchParams] = []
    while done < n_queries:
        if not params or rng.random() < 0.3:
            params = [random_params(rng) for _ in range(2)]
        chosen = params[int(rng.integers(2))]
        width = manifest.history_length * manifest.input_dim
        prepared = engine.check(random_query(rng, ids, width, chosen))
        group = waiting.setdefault(prepared.compat, [])
        group.append(prepared)
        if len(group) >= int(rng.integers(1, MAX_BATCH + 1)):
            answers = engine.search(waiting.pop(prepared.compat), int(rng.integers(engine.n_lanes)))
            gated += sum(hits.explain["estimated"] > 0 for hits in answers)
            done += len(group)
            sizes[len(group)] = sizes.get(len(group), 0) + 1
            policies[chosen.policy] = policies.get(chosen.policy, 0) + len(group)
    return {"n_queries": done, "n_gated": gated, "batch_sizes": sizes, "policies": policies}


def main() -> None:
    version, cache, dump = map(Path, sys.argv[1:4])
    report: dict[str, Any] = {"imported_by_engine": imported()}
    from nann.engine.scoring.tensorflow_scorer import configure_tensorflow

    configure_tensorflow(xla_cache_dir=cache, intra_op_threads=None)
    report["imported_by_tensorflow"] = imported()
    engine = SearchEngine.load(version, lanes=2, max_batch=MAX_BATCH, max_k=MAX_K, xla_cache_dir=cache)
    report["imported_by_model"] = imported()
    warm = engine.warm_up()
    report["warm_up_s"], report["n_programs"] = warm.seconds, warm.n_programs
    report["modules_after_warm_up"] = modules_dumped(dump)
    signatures = kernel_signatures()
    ids = np.load(version / "arrays" / "item_ids.npy").tolist()
    report["asked"] = ask_random_queries(engine, ids, int(sys.argv[4]))
    report["modules_after_queries"] = modules_dumped(dump)
    report["n_compilations"] = engine.n_compilations
    report["signatures_after_warm_up"], report["signatures_after_queries"] = signatures, kernel_signatures()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
