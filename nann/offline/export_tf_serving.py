"""NANN's served search (the policy `level`) as one TensorFlow graph of stock ops.

Any TensorFlow Serving loads and serves it, without an op or a compiler of ours. A step is a gather of
neighbours, one `Unique`, gathers of item tensors, the model's own `score` signature, and one `TopK`.

Candidates travel as 64-bit keys whose signed order is the total order of the design: the score's bits made
monotone in the high half, the complement of the item index in the low half. So `TopK` over keys ranks and
breaks ties at once, in whatever order the candidates came, and nothing is sorted beside it.
`Unique` keeps the first of equal elements, in order: behind ``[-1, visited…]`` it leaves the neighbours
that are new, once each, without padding. Its time does not depend on the number of items
(docs/adr/0017-search-as-a-tensorflow-graph.md has the alternatives).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from nann.engine.artifacts import Artifact, Manifest, Verify, hash_files

__all__ = ["SIGNATURES", "ServedSearch", "add_search_signatures", "build_search_module"]

# Signature -> its outputs: those that our own server answers on TensorFlow Serving's protocol.
SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "serving_default": ("top_k",),
    "retrieve": ("scores", "top_k"),
}
LEVEL_TOPN_LENGTH = 6  # t0 … t5: reference/nann.md, "Served"
_SAVED_MODEL_FILES = ("saved_model.pb", "fingerprint.pb", "variables")
_LOW = 0xFFFFFFFF
_MINUS_ZERO = np.iinfo(np.int32).min  # its bits
_NOTHING = np.iinfo(np.int64).min  # below the key of any finite score


class ServedSearch(tf.Module):  # type: ignore[misc]
    """The whole search over one artifact's graph and item tensors, which are variables of the module."""

    def __init__(self, artifact: Artifact, model: Any) -> None:
        """`model` is the artifact's loaded SavedModel; it becomes part of the module.

        Raises:
            ValueError: the model cannot be queried by comm_seq, which is this search's only input.
        """
        super().__init__(name="served_search")
        if "encode_user_comm_seq" not in model.signatures:
            raise ValueError(
                "the model has no signature encode_user_comm_seq, which NANN's search starts from"
            )
        self.model = model
        self.width = artifact.manifest.history_length * artifact.manifest.input_dim
        # Tables stay in the artifact's half precision: half the memory, and gathers that bring half the
        # bytes pay for the casts.
        self.neighbors = [_table(table, f"neighbors_level_{n}") for n, table in enumerate(artifact.neighbors)]
        self.item_state = {
            name: _table(table, f"item_state_{name}") for name, table in artifact.item_state.items()
        }
        self.entry_points = _table(artifact.entry_points, "enter_points")
        texts = artifact.manifest.item_id_type == "str"
        self.item_ids = _table(list(artifact.item_ids) if texts else artifact.item_ids, "item_ids")
        self.padding = "" if texts else np.int64(-1)
        self._encode = model.signatures["encode_user_comm_seq"]
        self._model_score = model.signatures["score"]
        self.search = tf.function(
            self._search,
            input_signature=[
                tf.TensorSpec([None, self.width], tf.float16, name="comm_seq"),
                tf.TensorSpec([LEVEL_TOPN_LENGTH], tf.int32, name="level_topn"),
            ],
            autograph=False,
        )

    def _search(self, comm_seq: Any, level_topn: Any) -> dict[str, Any]:
        """comm_seq [B, L·D] and t0 … t5 -> `top_k` item ids and `scores` float32, best first.

        One query gets the true number of its answers, [1, n]; several get [B, t5], padded with -1 ("" for
        strings) and -inf.
        """
        users = self._encode(comm_seq=tf.cast(comm_seq, tf.float32))
        n_wanted = level_topn[-1]

        def one(user: dict[str, Any]) -> Any:
            keys = self._walk({name: tensor[None] for name, tensor in user.items()}, tf.unstack(level_topn))
            n_missing = n_wanted - tf.size(keys)
            item_ids = tf.gather(self.item_ids, _item_index(keys))
            return (
                tf.pad(item_ids, [[0, n_missing]], constant_values=self.padding),
                tf.pad(_score(keys), [[0, n_missing]], constant_values=-np.inf),
                tf.size(keys),
            )

        types = (
            tf.TensorSpec([None], self.item_ids.dtype),
            tf.TensorSpec([None], tf.float32),
            tf.TensorSpec([], tf.int32),
        )
        item_ids, scores, found = tf.map_fn(one, users, fn_output_signature=types)
        n_shown = tf.where(tf.size(found) == 1, tf.reduce_sum(found), n_wanted)
        return {"top_k": item_ids[:, :n_shown], "scores": scores[:, :n_shown]}

    def _walk(self, user: Mapping[str, Any], level_topn: list[Any]) -> Any:
        """The keys of one user's answer, best first (reference/nann.md, "Served")."""
        t0, t1, *ground, t5 = level_topn
        kept = _best(self._score(user, self.entry_points.read_value()), t0)
        frontier = _item_index(kept)
        new, _ = self._expand(1, frontier, _visited(frontier))
        pool = _best(tf.concat([kept, self._score(user, new)], 0), t1)
        result, frontier = [pool], _item_index(pool)
        visited = _visited(frontier)
        for t in ground:
            new, visited = self._expand(0, frontier, visited)
            kept = _best(self._score(user, new), t)
            frontier = _item_index(kept)
            result.append(kept)
        return _best(tf.concat(result, 0), t5)

    def _expand(self, level: int, frontier: Any, visited: Any) -> tuple[Any, Any]:
        """The frontier's neighbours not visited before, once each; and what is visited now."""
        around = tf.reshape(tf.gather(self.neighbors[level], frontier), [-1])
        now = tf.unique(tf.concat([visited, around], 0)).y
        return now[tf.size(visited) :], now

    def _score(self, user: Mapping[str, Any], items: Any) -> Any:
        """Keys of the scored items."""
        state = {
            name: tf.cast(tf.gather(table, items), tf.float32)[None]
            for name, table in self.item_state.items()
        }
        return _keys(self._model_score(**user, **state)["score"][0], items)


def build_search_module(artifact_dir: Path, *, verify: Verify = "full") -> ServedSearch:
    """The search over an artifact: ``module.search(comm_seq, level_topn)``, a `tf.function`.

    Raises:
        ArtifactError: the artifact is damaged.
        ValueError: it holds no SavedModel, or one that cannot be queried by comm_seq.
    """
    artifact = Artifact.open(artifact_dir, verify=verify)
    try:
        model = tf.saved_model.load(str(artifact_dir))
    except (OSError, ValueError, IndexError, tf.errors.OpError) as error:
        raise ValueError(f"{artifact_dir} holds no SavedModel: {str(error).splitlines()[0]}") from error
    return ServedSearch(artifact, model)


def add_search_signatures(directory: Path, manifest: Manifest) -> Manifest:
    """Put the search into the SavedModel of an unpublished version, beside the signatures it has.

    Returns the manifest with the new files' hashes; ``manifest.json`` in `directory` still says the old.

    Raises:
        ArtifactError, ValueError: as `build_search_module`.
    """
    module = build_search_module(directory)
    rewritten = directory / ".searchable"
    signatures = {name: _signature(module, name).get_concrete_function() for name in SIGNATURES}
    tf.saved_model.save(module, str(rewritten), signatures={**module.model.signatures, **signatures})
    for name in _SAVED_MODEL_FILES:
        old, new = directory / name, rewritten / name
        if old.is_dir():
            shutil.rmtree(old)
        if new.exists():
            new.replace(old)
        else:
            old.unlink(missing_ok=True)
    shutil.rmtree(rewritten)
    return manifest.model_copy(
        update={
            "files": {
                name: entry
                for name, entry in hash_files(directory).items()
                if name in manifest.files or Path(name).parts[0] in _SAVED_MODEL_FILES
            }
        }
    )


def _signature(module: ServedSearch, name: str) -> Any:
    def search(comm_seq: Any, level_topn: Any) -> dict[str, Any]:
        found = module.search(comm_seq, level_topn)
        return {output: found[output] for output in SIGNATURES[name]}

    search.__name__ = name
    return tf.function(search, input_signature=module.search.input_signature, autograph=False)


def _table(values: Any, name: str) -> Any:
    """A variable: a constant would lie in the graph, whose protobuf cannot exceed 2 GB."""
    return tf.Variable(values, trainable=False, name=name)


def _visited(items: Any) -> Any:
    """What `_expand` takes for visited. The padding of neighbour tables counts as visited."""
    return tf.concat([tf.constant([-1]), items], 0)


def _keys(scores: Any, items: Any) -> Any:
    """Scores float32 [n] of item indices [n] -> keys int64 [n]; -0.0 ranks as 0.0."""
    bits = tf.bitcast(scores, tf.int32)
    # Compared as bits: TensorFlow's threads take numbers next to zero for zero.
    bits = tf.where(tf.equal(bits, _MINUS_ZERO), 0, bits)
    keys = tf.bitwise.left_shift(tf.cast(_monotone(bits), tf.int64), np.int64(32)) + (
        _LOW - tf.cast(items, tf.int64)
    )
    return tf.where(tf.math.is_finite(scores), keys, _NOTHING)


def _monotone(bits: Any) -> Any:
    """A float's bits as an integer of the same order; the inverse is the same."""
    return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, 31) & 0x7FFFFFFF)


def _best(keys: Any, n: Any) -> Any:
    """The largest n keys, fewer where there are fewer, none of a score that is not finite."""
    best = tf.math.top_k(keys, tf.minimum(n, tf.size(keys))).values
    return tf.boolean_mask(best, best > _NOTHING)


def _item_index(keys: Any) -> Any:
    return tf.cast(_LOW - (keys & _LOW), tf.int32)


def _score(keys: Any) -> Any:
    return tf.bitcast(_monotone(tf.cast(tf.bitwise.right_shift(keys, np.int64(32)), tf.int32)), tf.float32)
