"""The scorer that runs exported programs through PJRT (JAX's runtime), without TensorFlow.

`PjrtPrograms` holds what all lanes of one device share; a `PjrtScorer` is one lane's way to it, whose
`Handover` carries tiles into XLA and scores out of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nann.engine.backend import Tiles
from nann.engine.errors import Unsupported
from nann.engine.scoring.buckets import BucketGrid, Shape
from nann.engine.scoring.pjrt_client import PjrtDevice, Program
from nann.engine.scoring.pjrt_programs import PjrtPrograms
from nann.engine.scoring.programs import ENCODE_COMM_SEQ, ENCODE_HISTORY, SCORE, SCORE_CROSSED
from nann.engine.scoring.shape_probe import (
    made_up_comm_seqs,
    made_up_histories,
    scores_by_shape,
    users_by_shape,
)

if TYPE_CHECKING:
    import jax
    from jaxtyping import Float32, Int32

__all__ = ["Handover", "HostHandover", "PjrtScorer"]

_ALIGNMENT_BYTES = 64
# A lane lends three arrays in each of 46 shapes. Arrays that come only once are not to fill the memory.
_MOST_VIEWS = 1024


# Whether programs, by the keys of all of them, score a pair alike in every shape.
_BIT_EQUAL: dict[tuple[str, ...], bool] = {}


class Handover(Protocol):
    """Carries arrays between a lane's backend and XLA, without a copy, each side seeing the other's work.

    Made for one lane, used by one thread at a time: `lend` all that a program reads, run it, `take` its
    scores.
    """

    def lend(self, first: Any, *others: Any) -> Sequence[jax.Array]:
        """The backend's arrays for XLA to read; they must not change until `take` has returned.

        ``first``, the smallest, is what tells XLA that all of them were written.
        """
        ...

    def take(self, scores: jax.Array) -> Any:
        """XLA's result as an array of the backend's, which keeps its memory alive."""
        ...


class HostHandover:
    """NumPy arrays to and from a CPU device, whose programs have run when their call returns.

    A lane's tiles are views of the same memory call after call, so what XLA needs to know of each view is
    made once: 14 of the 80 microseconds of the smallest program.
    """

    def __init__(self, device: PjrtDevice) -> None:
        self._device = device
        self._views: dict[tuple[int, tuple[int, ...], np.dtype], jax.Array] = {}

    def lend(self, first: np.ndarray, *others: np.ndarray) -> list[jax.Array]:
        return [self._view(array) for array in (first, *others)]

    def take(self, scores: jax.Array) -> np.ndarray:
        return np.asarray(memoryview(scores))

    def _view(self, array: np.ndarray) -> jax.Array:
        address = array.ctypes.data
        view = self._views.get((address, array.shape, array.dtype))
        if view is None:
            # XLA's programs load aligned vectors from their arguments, so memory that starts elsewhere is
            # copied. A view keeps its memory: as long as it exists, the address is that memory's.
            if address % _ALIGNMENT_BYTES or not array.flags.c_contiguous:
                return self._device.put(np.ascontiguousarray(array))
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._views[address, array.shape, array.dtype] = self._device.borrow(array)
        return view


class PjrtScorer:
    """A lane's scorer over shared programs."""

    def __init__(self, programs: PjrtPrograms, handover: Handover) -> None:
        self._programs = programs
        self._handover = handover
        self._item_names = sorted(programs.interface.item_tensors)
        self._n_compilations = 0
        self._lock = threading.Lock()

    @property
    def grid(self) -> BucketGrid:
        return self._programs.grid

    @property
    def takes_comm_seq(self) -> bool:
        return self._programs.interface.comm_seq_width is not None

    @property
    def n_compilations(self) -> int:
        """Programs that came into being through this scorer: lanes that share programs count each once."""
        return self._n_compilations

    def encode_history(self, history: Int32[np.ndarray, "batch length"]) -> list[jax.Array]:
        return self._encode(ENCODE_HISTORY, history)

    def encode_comm_seq(self, comm_seq: Float32[np.ndarray, "batch width"]) -> list[jax.Array]:
        if not self.takes_comm_seq:
            raise Unsupported("this model cannot be queried by comm_seq")
        return self._encode(ENCODE_COMM_SEQ, comm_seq)

    def score(self, users: Sequence[jax.Array], tiles: Tiles) -> Any:
        read = [tiles.items[name] for name in self._item_names]
        if tiles.tile_query is None:
            program = self._program(SCORE_CROSSED, (tiles.shape.rows,))
            weights = self._programs.weights[SCORE_CROSSED]
        else:
            program = self._program(SCORE, (tiles.shape.tiles, tiles.shape.rows))
            weights = self._programs.weights[SCORE]
            read.insert(0, tiles.tile_query)
        (scores,) = program([*users, *self._handover.lend(*read), *weights])
        return self._handover.take(scores)

    def warm_up(self) -> bool:
        programs = self._programs
        # Compiling leaves Python alone, so threads share the processors; they are gone on return.
        with ThreadPoolExecutor(max_workers=_processors()) as pool:
            for made in pool.map(lambda key: programs.compile(*key)[1], programs.all_programs()):
                self._n_compilations += made
        interface = programs.interface
        histories = made_up_histories(interface.num_items, interface.history_length)
        users = self.encode_history(histories[: programs.batches[-1]])

        def host_scores(
            shape: Shape, tile_query: np.ndarray | None, items: Mapping[str, np.ndarray]
        ) -> np.ndarray:
            put = programs.device.put
            on_device = [put(items[name]) for name in self._item_names]
            if tile_query is None:
                arguments = [*users, *on_device, *programs.weights[SCORE_CROSSED]]
                found = self._program(SCORE_CROSSED, (shape.rows,))(arguments)
            else:
                arguments = [*users, put(tile_query), *on_device, *programs.weights[SCORE]]
                found = self._program(SCORE, (shape.tiles, shape.rows))(arguments)
            return np.asarray(found[0])

        # The same machine code rounds alike whatever the weights: of what has been seen to, only finite
        # scores are left to see.
        code = tuple(self._program(*key).key for key in programs.all_programs())
        agreed = _BIT_EQUAL.get(code)
        found = scores_by_shape(host_scores, self.grid, interface.item_tensors, all_shapes=agreed is None)
        if agreed is not None:
            return agreed
        found &= users_by_shape(self.encode_history, histories, programs.batches)
        if interface.comm_seq_width is not None:
            comm_seqs = made_up_comm_seqs(interface.comm_seq_width)
            found &= users_by_shape(self.encode_comm_seq, comm_seqs, programs.batches)
        return _BIT_EQUAL.setdefault(code, found)

    def _program(self, function: str, sizes: tuple[int, ...]) -> Program:
        found = self._programs.find(function, sizes)
        if found is None:
            found, made = self._programs.compile(function, sizes)
            with self._lock:
                self._n_compilations += made
        return found

    def _encode(self, function: str, rows: np.ndarray) -> list[jax.Array]:
        size = next(size for size in self._programs.batches if size >= len(rows))
        padded = np.zeros((size, rows.shape[1]), dtype=rows.dtype)
        padded[: len(rows)] = rows
        arguments = [self._programs.device.put(padded), *self._programs.weights[function]]
        return self._program(function, (size,))(arguments)


def _processors() -> int:
    return len(os.sched_getaffinity(0))
