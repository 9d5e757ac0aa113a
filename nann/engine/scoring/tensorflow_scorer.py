"""The scorer that runs a SavedModel through TensorFlow and XLA; no other engine file imports it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.artifacts import Manifest
from nann.engine.backend import Tiles
from nann.engine.errors import ArtifactError, BackendError, Unsupported
from nann.engine.scoring.buckets import BucketGrid, Shape
from nann.engine.scoring.shape_probe import (
    made_up_comm_seqs,
    made_up_histories,
    scores_by_shape,
    users_by_shape,
)
from nann.engine.scoring.tensorflow_memory import HostMemory, Memory
from nann.engine.scoring.tensorflow_sharing import program_of

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["TensorFlowScorer", "configure_tensorflow"]

# XLA's CPU backend hands some matrix products to YNN, others to Eigen, by the size of the whole product,
# and the two round differently. With Eigen alone a pair's score is bit-equal in every shape of the grid,
# at 3 to 5 % more time (docs/adr/0004-scoring-shapes.md).
_BIT_EQUAL_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
_REQUIRED = ("encode_user", "encode_items", "score")


def configure_tensorflow(*, xla_cache_dir: Path | None, intra_op_threads: int | None) -> Any:
    """Import TensorFlow with the flags the scorer relies on, and return the module.

    XLA reads its flags once, at its first compilation, so a process that compiled something before
    this call keeps what it started with; `warm_up` then tells that scores depend on their shape.
    """
    _add_flag("XLA_FLAGS", _BIT_EQUAL_FLAG)
    if xla_cache_dir is not None:
        xla_cache_dir.mkdir(parents=True, exist_ok=True)
        _add_flag("TF_XLA_FLAGS", f"--tf_xla_persistent_cache_directory={xla_cache_dir}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    started = "tensorflow" in sys.modules
    import tensorflow as tf

    if intra_op_threads is not None and not started:
        tf.config.threading.set_intra_op_parallelism_threads(intra_op_threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf


def _add_flag(variable: str, flag: str) -> None:
    flags = os.environ.get(variable, "")
    name = flag.split("=", maxsplit=1)[0]
    if name not in flags:
        os.environ[variable] = f"{flags} {flag}".strip()


class TensorFlowScorer:
    """Runs ``encode_user``, ``encode_user_comm_seq`` and ``score`` of one SavedModel, XLA-jitted.

    On the CPU one is shared by all lanes: TensorFlow functions are thread-safe and hold no scratch of ours.
    On a GPU each lane has its own, in its own ``memory``.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        max_batch: int,
        xla_cache_dir: Path | None = None,
        intra_op_threads: int | None = None,
        grid: BucketGrid | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._tf = configure_tensorflow(xla_cache_dir=xla_cache_dir, intra_op_threads=intra_op_threads)
        self._memory: Memory = HostMemory(self._tf) if memory is None else memory
        self._manifest = manifest
        self._max_batch = max_batch
        self._grid = grid or BucketGrid(max_batch=max_batch)
        self._shapes: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()
        with self._memory.scope():
            self._load(directory)

    def _load(self, directory: Path) -> None:
        manifest = self._manifest
        try:
            self._model = self._tf.saved_model.load(str(directory))
        except (OSError, ValueError, IndexError, self._tf.errors.OpError) as error:
            raise ArtifactError(
                str(directory / "saved_model.pb"), expected="a SavedModel", found=str(error).splitlines()[0]
            ) from error
        missing = [name for name in _REQUIRED if name not in self._model.signatures]
        if missing:
            raise ArtifactError(
                str(directory / "saved_model.pb"),
                expected="signatures " + ", ".join(_REQUIRED),
                found=f"no {', '.join(missing)}",
            )
        self._user_names = sorted(manifest.user_tensors)
        self._item_names = sorted(manifest.item_tensors)
        try:
            self._weights = [
                variable for signature in self._model.signatures.values() for variable in signature.variables
            ]
            history = self._encoder("encode_user", "history", "int32", manifest.history_length)
            self._encode_history = self._shared(history)
            width = manifest.history_length * manifest.input_dim
            self._encode_comm_seq = (
                self._shared(self._encoder("encode_user_comm_seq", "comm_seq", "float32", width))
                if "encode_user_comm_seq" in self._model.signatures
                else None
            )
            self._score = self._shared(self._scorer())
        except (KeyError, TypeError, ValueError, self._tf.errors.OpError) as error:
            raise ArtifactError(
                str(directory / "saved_model.pb"),
                expected="signatures with the tensors and shapes that the manifest names",
                found=str(error).strip().splitlines()[-1],
            ) from error

    @property
    def grid(self) -> BucketGrid:
        return self._grid

    @property
    def takes_comm_seq(self) -> bool:
        return self._encode_comm_seq is not None

    @property
    def n_compilations(self) -> int:
        return len(self._shapes)

    def close(self) -> None:
        """Empty the weights, now: cycles and shared programs refer to them long after the scorer is gone."""
        for variable in self._weights:
            empty = self._tf.zeros([0], variable.dtype.base_dtype)
            self._tf.raw_ops.AssignVariableOp(resource=variable.handle, value=empty)
        self._weights = []

    def encode_history(self, history: Int32[np.ndarray, "batch length"]) -> Any:
        return self._encode(self._encode_history, "history", history)

    def encode_comm_seq(self, comm_seq: Float32[np.ndarray, "batch width"]) -> Any:
        if self._encode_comm_seq is None:
            raise Unsupported("this model cannot be queried by comm_seq")
        return self._encode(self._encode_comm_seq, "comm_seq", comm_seq)

    def score(self, users: Any, tiles: Tiles) -> Any:
        if tiles.tile_query is None:
            raise Unsupported("the TensorFlow scorer has no program for tiles without a tile_query")
        with self._memory.scope(), _errors_of(self._tf):
            return self._memory.take(self._scores(users, tiles))

    def _scores(self, users: Any, tiles: Tiles) -> Any:
        items = [tiles.items[name] for name in self._item_names]
        self._count("score", tiles.shape.tiles, tiles.shape.rows)
        tile_query, *tensors = self._memory.lend(tiles.tile_query, *items)
        return self._score(*users, tile_query, *tensors)

    def warm_up(self) -> bool:
        manifest, sizes = self._manifest, self._batches()
        histories = made_up_histories(manifest.num_items, manifest.history_length)
        bit_equal = users_by_shape(self.encode_history, histories, sizes)
        if self.takes_comm_seq:
            comm_seqs = made_up_comm_seqs(manifest.history_length * manifest.input_dim)
            bit_equal &= users_by_shape(self.encode_comm_seq, comm_seqs, sizes)
        users = self.encode_history(histories[: sizes[-1]])

        def scores(
            shape: Shape, tile_query: np.ndarray | None, items: Mapping[str, np.ndarray]
        ) -> Float32[np.ndarray, "tiles rows"]:
            with self._memory.scope(), _errors_of(self._tf):
                return self._scores(users, Tiles(shape, tile_query, items)).numpy()  # type: ignore[no-any-return]

        tensors = {name: (spec.shape, spec.dtype) for name, spec in manifest.item_tensors.items()}
        return bit_equal & scores_by_shape(scores, self._grid, tensors)

    def _batches(self) -> list[int]:
        """Powers of two up to the largest batch: the users of one call of an encoder, padded up."""
        sizes = [1]
        while sizes[-1] < self._max_batch:
            sizes.append(min(2 * sizes[-1], self._max_batch))
        return sizes

    def _encode(self, function: Any, name: str, rows: np.ndarray) -> Any:
        size = next(size for size in self._batches() if size >= len(rows))
        padded = np.zeros((size, rows.shape[1]), dtype=rows.dtype)
        padded[: len(rows)] = rows
        self._count(name, size)
        with self._memory.scope(), _errors_of(self._tf):
            return function(self._tf.constant(padded))

    def _count(self, *shape: Any) -> None:
        if shape not in self._shapes:
            with self._lock:
                self._shapes.add(shape)

    def _shared(self, own: Any) -> Callable[..., Any]:
        """The function in the form that other versions of the architecture have compiled already.

        Not on a GPU, where weights and programs belong to a lane's logical device.
        """
        if not isinstance(self._memory, HostMemory):
            return own  # type: ignore[no-any-return]
        return partial(program_of(own).call, list(own.captured_inputs))

    def _encoder(self, signature: str, argument: str, dtype: str, width: int) -> Any:
        """[b, width] -> user tensors, zero-padded to max_batch rows so that `score` has one shape of them."""
        tf, names, max_batch = self._tf, self._user_names, self._max_batch
        encode = self._model.signatures[signature]

        def nann_encode(rows: Any) -> Any:
            tensors = encode(**{argument: rows})
            padding = max_batch - tf.shape(rows)[0]
            return [
                tf.pad(tensors[name], [[0, padding], *([[0, 0]] * (len(tensors[name].shape) - 1))])
                for name in names
            ]

        # XLA's persistent cache is keyed by function name, so the name must not vary by process.
        nann_encode.__name__ = f"nann_{signature}"
        function = tf.function(nann_encode, jit_compile=True, autograph=False)
        return function.get_concrete_function(tf.TensorSpec([None, width], dtype))

    def _scorer(self) -> Any:
        tf = self._tf
        score = self._model.signatures["score"]
        user_names, item_names = self._user_names, self._item_names
        n_users = len(user_names)

        def nann_score(*arguments: Any) -> Any:
            users = arguments[:n_users]
            tile_query = tf.cast(arguments[n_users], tf.int32)
            items = arguments[n_users + 1 :]
            feed = {name: tf.gather(value, tile_query) for name, value in zip(user_names, users, strict=True)}
            feed |= {name: tf.cast(value, tf.float32) for name, value in zip(item_names, items, strict=True)}
            return score(**feed)["score"]

        specs = [
            *self._specs(self._manifest.user_tensors, user_names, (self._max_batch,), tf.float32),
            tf.TensorSpec([None], self._memory.index_dtype),
            *self._specs(self._manifest.item_tensors, item_names, (None, None), None),
        ]
        return tf.function(nann_score, jit_compile=True, autograph=False).get_concrete_function(*specs)

    def _specs(self, tensors: Mapping[str, Any], names: list[str], lead: tuple[Any, ...], dtype: Any) -> Any:
        return [
            self._tf.TensorSpec([*lead, *tensors[name].shape], dtype or tensors[name].dtype) for name in names
        ]


class _errors_of:  # noqa: N801 (reads as a phrase at its use)
    """Turns any TensorFlow error inside the block into a `BackendError`."""

    def __init__(self, tf: Any) -> None:
        self._op_error = tf.errors.OpError

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, self._op_error):
            raise BackendError(f"the model failed: {error.message.splitlines()[0]}") from error
