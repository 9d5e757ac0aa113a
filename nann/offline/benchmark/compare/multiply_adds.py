"""Multiply-adds of the deep model's parts, counted in the SavedModel's own graph.

``python -m nann.offline.benchmark.compare.multiply_adds DIRECTORY`` prints them as JSON: a process of its
own, because it needs TensorFlow and what is timed beside it must not share one.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nann.engine.artifacts import Manifest, TensorSpec, read_manifest

__all__ = ["MultiplyAdds", "count_multiply_adds"]

_ITEMS = 256  # enough that a product shared by the items would show as a fraction


@dataclass(frozen=True, slots=True)
class MultiplyAdds:
    """Of one (user, item) score, and of making the user tensors once a query."""

    score: float
    encode: float


def count_multiply_adds(directory: Path) -> MultiplyAdds:
    """Counts of the version in `directory`, by a process that loads TensorFlow.

    Matrix products count, everything else (softmax, activations, sums) does not.

    Raises:
        RuntimeError: the SavedModel could not be read; has that process' last words.
    """
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(directory)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{directory}: {done.stderr.strip().splitlines()[-1]}")
    return MultiplyAdds(**json.loads(done.stdout.strip().splitlines()[-1]))


def _count(directory: Path) -> MultiplyAdds:
    import tensorflow as tf

    manifest = read_manifest(directory)
    model = tf.saved_model.load(str(directory))
    history = tf.TensorSpec((1, manifest.history_length), tf.int32, name="history")
    return MultiplyAdds(
        score=_of(model.signatures["score"], _pairs(manifest, tf)) / _ITEMS,
        encode=_of(model.signatures["encode_user"], {"history": history}),
    )


def _pairs(manifest: Manifest, tf: Any) -> dict[str, Any]:
    """What `score` takes, for one user and `_ITEMS` items; it computes in float32 whatever is stored."""

    def spec(name: str, lead: tuple[int, ...], tensor: TensorSpec) -> Any:
        return tf.TensorSpec((*lead, *tensor.shape), tf.float32, name=name)

    users = {name: spec(name, (1,), tensor) for name, tensor in manifest.user_tensors.items()}
    items = {name: spec(name, (1, _ITEMS), tensor) for name, tensor in manifest.item_tensors.items()}
    return {**users, **items}


def _of(signature: Any, specs: dict[str, Any]) -> float:
    """Multiply-adds of one call of a signature with these shapes, all functions it calls inlined."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    called = tf.function(signature).get_concrete_function(**specs)
    frozen = convert_variables_to_constants_v2(called)
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(frozen.graph.as_graph_def(add_shapes=True), name="")
    return float(sum(_products(node) for node in graph.get_operations()))


def _products(node: Any) -> int:
    """Multiply-adds of one matrix product; 0 for any other operation."""
    if node.type not in ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        if node.type in ("Einsum", "Conv2D"):
            raise RuntimeError(f"a {node.type} is not counted yet")
        return 0
    output = node.outputs[0].shape
    first = node.inputs[0].shape
    transposed = node.get_attr("transpose_a" if node.type == "MatMul" else "adj_x")
    inner = first[-2 if transposed else -1]
    if inner is None or not output.is_fully_defined():
        raise RuntimeError(f"the shape of {node.name} is not known: {first} to {output}")
    return int(math.prod(output.as_list()) * inner)


if __name__ == "__main__":
    found = _count(Path(sys.argv[1]))
    print(json.dumps({"score": found.score, "encode": found.encode}))
