"""What crosses the border to the search process, in pickles of few and large arrays.

Both ends are this program, over a pair of sockets that nobody else has. Of a prepared query only what a
search needs is sent; ids, notes and attributes stay with the engine that asks.
"""

from __future__ import annotations

import itertools
import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from nann.engine import errors
from nann.engine.backend import Admission
from nann.engine.errors import RetrievalError
from nann.engine.gate import GateTables
from nann.engine.retrievers.retriever import Answer, PreparedQuery
from nann.service.errors import InternalError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32

    from nann.engine.artifacts import Verify
    from nann.engine.devices import Precision

__all__ = [
    "OpenLanes",
    "Opened",
    "SearchProcessError",
    "dump",
    "failure",
    "load",
    "pack_answers",
    "pack_batch",
    "raise_failure",
    "unpack_answers",
    "unpack_batch",
]


@dataclass(frozen=True, slots=True)
class OpenLanes:
    """What a search process is to open: the arguments of `Artifact.open` and `devices.open_lanes` on the CPU.

    `gives_way`: its start, opening and warming up take only what searches leave.
    """

    version_dir: Path
    verify: Verify
    scorer: Literal["tensorflow", "pjrt"]
    lanes: int
    max_batch: int
    xla_cache_dir: Path | None
    intra_op_threads: int
    precision: Precision
    gives_way: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """What it has opened."""

    takes_comm_seq: bool


class SearchProcessError(Exception):
    """What went wrong in the search process, as it was written there; the cause of the error raised here."""


def dump(message: Any) -> bytes:
    """The bytes of a message."""
    return pickle.dumps(message, protocol=5)


def load(data: bytes) -> Any:
    """The message of `dump`'s bytes."""
    return pickle.loads(data)


# Batches


def pack_batch(batch: Sequence[PreparedQuery]) -> tuple[Any, ...]:
    """The queries of one batch."""
    first = batch[0]
    users = [query.history if query.comm_seq is None else query.comm_seq for query in batch]
    return (
        first.retriever,
        first.params,
        first.history is None,
        np.stack(users),  # type: ignore[arg-type]  # one of the two is there
        [query.k for query in batch],
        _joined([query.starts for query in batch]),
        _pack_masks([None if query.admission is None else query.admission.mask for query in batch]),
        [None if query.admission is None else query.admission.count for query in batch],
        _joined([_NONE if query.admission is None else query.admission.excluded for query in batch]),
        [None if query.gate is None else (query.gate.rank, query.gate.margin) for query in batch],
        _joined([_NONE if query.gate is None else query.gate.history for query in batch]),
    )


def unpack_batch(packed: tuple[Any, ...], tables: GateTables | None) -> list[PreparedQuery]:
    """The queries again; `tables` are this process's gate."""
    retriever, params, embedded, users, ks, starts, masks, counts, excluded, gates, gate_rows = packed
    batch = []
    for user, k, own_starts, mask, count, own_excluded, gate, rows in zip(
        users,
        ks,
        _split(starts),
        _unpack_masks(masks),
        counts,
        _split(excluded),
        gates,
        _split(gate_rows),
        strict=True,
    ):
        request = None
        if gate is not None and tables is not None:
            rank, margin = gate
            request = tables.request(rows, rank=rank, margin=margin)
        batch.append(
            PreparedQuery(
                k=k,
                params=params,
                retriever=retriever,
                history=None if embedded else user,
                comm_seq=user if embedded else None,
                known_history=None,
                starts=own_starts,
                admission=None if count is None else Admission(mask, own_excluded, count),
                gate=request,
                cost=0,
                notes=(),
                with_attributes=False,
            )
        )
    return batch


def _pack_masks(masks: Sequence[Bool[np.ndarray, " N"] | None]) -> tuple[list[Any], list[int]]:
    """Each mask once, an item a bit (of four million: half a megabyte), and which of them each query has."""
    found: dict[int, int] = {}
    packed: list[Any] = []
    places = []
    for mask in masks:
        if mask is None:
            places.append(-1)
            continue
        if id(mask) not in found:
            found[id(mask)] = len(packed)
            packed.append((mask.size, np.packbits(mask)))
        places.append(found[id(mask)])
    return packed, places


def _unpack_masks(packed: tuple[list[Any], list[int]]) -> list[Bool[np.ndarray, " N"] | None]:
    masks = [np.unpackbits(bits, count=size).view(np.bool_) for size, bits in packed[0]]
    return [None if place < 0 else masks[place] for place in packed[1]]


# Answers


def pack_answers(answers: Sequence[Answer]) -> tuple[Any, ...]:
    """The answers to one batch."""
    return (
        _joined([answer.item_index for answer in answers]),
        np.concatenate([answer.score for answer in answers]),
        [
            (answer.scored_per_step, answer.remainder_scored, answer.nonfinite, answer.estimated)
            for answer in answers
        ],
    )


def unpack_answers(packed: tuple[Any, ...]) -> list[Answer]:
    """The answers again."""
    items, scores, counts = packed
    pairs = zip(_split(items), _split((scores, items[1])), counts, strict=True)
    return [Answer(item_index, score, *numbers) for item_index, score, numbers in pairs]


_NONE = np.empty(0, dtype=np.int32)


def _joined(rows: Sequence[Int32[np.ndarray, " n"]]) -> tuple[Any, list[int]]:
    return np.concatenate(rows), [row.size for row in rows]


def _split(joined: tuple[Any, list[int]]) -> list[Any]:
    rows, sizes = joined
    splits = [0, *itertools.accumulate(sizes)]
    return [rows[start:stop] for start, stop in itertools.pairwise(splits)]


# Failures


def failure(error: BaseException) -> tuple[str, tuple[Any, ...], str]:
    """What `raise_failure` raises again on the other side."""
    written = "".join(traceback.format_exception(error))
    if isinstance(error, errors.ArtifactError):
        return type(error).__name__, (error.file, error.expected, error.found), written
    return type(error).__name__, (str(error),), written


def raise_failure(kind: str, arguments: tuple[Any, ...], written: str) -> NoReturn:
    """Raise an error of the tree as it was, any other as the server's own fault.

    Raises:
        RetrievalError, ValueError, InternalError: always one of them.
    """
    found = ValueError if kind == "ValueError" else getattr(errors, kind, None)
    cause = SearchProcessError(f"in the search process:\n{written}")
    if found is errors.ArtifactError:
        file, expected, actual = arguments
        raise errors.ArtifactError(file, expected=expected, found=actual) from cause
    if found is ValueError or (isinstance(found, type) and issubclass(found, RetrievalError)):
        raise found(*arguments) from cause
    raise InternalError(f"{kind} in the search process") from cause
