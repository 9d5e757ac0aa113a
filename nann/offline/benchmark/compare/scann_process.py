"""ScaNN in an environment of its own: ``python -m … ITEMS.npy LEAVES THREADS`` (see `worker_process`).

Needs numpy and scann, nothing else of the project's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import scann

from nann.offline.benchmark.compare.loops import TimingBudget, keep_busy, one_at_a_time
from nann.offline.benchmark.compare.worker_process import serve

# ScaNN's own guide (docs/algorithms.md): two dimensions a block, threshold 0.2 for inner products.
_DIMENSIONS_PER_BLOCK, _ANISOTROPIC_THRESHOLD = 2, 0.2
_BATCH = 16


class _Searcher:
    def __init__(self, items: np.ndarray, leaves: int, threads: int) -> None:
        self._items = items
        self._threads = threads
        builder = (
            scann.scann_ops_pybind.builder(items, 10, "dot_product")
            .tree(num_leaves=leaves, num_leaves_to_search=leaves, training_sample_size=len(items))
            .score_ah(_DIMENSIONS_PER_BLOCK, anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD)
            .reorder(10)
        )
        builder.set_n_training_threads(threads)
        self._index = builder.build()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        users = np.load(request["users"])
        effort = {
            "final_num_neighbors": request["count"],
            "pre_reorder_num_neighbors": request["reorder"],
            "leaves_to_search": request["leaves_to_search"],
        }
        if request["do"] == "search":
            found = np.full((len(users), request["count"]), -1, dtype=np.int32)
            for row, user in enumerate(users):
                items = self._index.search(user, **effort)[0]
                found[row, : len(items)] = items[: request["count"]]
            np.save(request["output"], found)
            return {}
        budget, rows = TimingBudget(**request["budget"]), request["rows"]
        if request["do"] == "latencies":
            one = one_at_a_time(lambda chosen: self._index.search(users[chosen[0]], **effort), rows, budget)
            return {"latencies_s": one.tolist()}

        def batch(chosen: Sequence[int], lane: int) -> object:
            return self._index.search_batched(users[list(chosen)], **effort)

        return {"qps": keep_busy(batch, rows, budget, lanes=self._threads, batch=_BATCH)}


def _main() -> None:
    items, leaves, threads = sys.argv[1:]
    searcher = _Searcher(np.load(items), int(leaves), int(threads))
    serve(searcher.answer)


if __name__ == "__main__":
    _main()
