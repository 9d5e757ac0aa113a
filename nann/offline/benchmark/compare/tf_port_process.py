"""NANN's served search as one TensorFlow graph, in a process of its own as TensorFlow Serving would run it.

``python -m … ARTIFACT THREADS``: THREADS 0 leaves TensorFlow its defaults (see `worker_process`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nann.offline.benchmark.compare.loops import TimingBudget, keep_busy, one_at_a_time
from nann.offline.benchmark.compare.worker_process import serve


class _Port:
    def __init__(self, artifact: Path, threads: int) -> None:
        import tensorflow as tf

        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
        from nann.offline.export_tf_serving import build_search_module

        self._tf = tf
        self._module = build_search_module(artifact, verify="fast")

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        users = np.load(request["users"], mmap_mode="r")
        widths = self._tf.constant(request["level_topn"], self._tf.int32)

        def ask(chosen: Sequence[int], lane: int = 0) -> Any:
            query = self._tf.constant(users[chosen[0]][None], self._tf.float16)
            return self._module.search(query, widths)["top_k"].numpy()

        if request["do"] == "search":
            return {"item_ids": [ask([row])[0].tolist() for row in request["rows"]]}
        budget, rows = TimingBudget(**request["budget"]), request["rows"]
        if request["do"] == "latencies":
            return {"latencies_s": one_at_a_time(ask, rows, budget).tolist()}
        return {"qps": keep_busy(ask, rows, budget, lanes=request["clients"], batch=1)}


def _main() -> None:
    artifact, threads = sys.argv[1:]
    serve(_Port(Path(artifact), int(threads)).answer)


if __name__ == "__main__":
    _main()
