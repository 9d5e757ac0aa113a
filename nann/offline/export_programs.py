"""The published model as XLA programs: what a server runs without TensorFlow.

A program has a fixed shape, and its weights are arguments: they stay where the SavedModel has them, and
the programs refer to them by file and offset. `engine/scoring/programs.py` describes the form.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nann.engine.artifacts import WEIGHT_PREFIX, Manifest, Programs, ProgramSet, WeightSpec
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.scoring.programs import (
    ENCODE_COMM_SEQ,
    ENCODE_HISTORY,
    SCORE,
    SCORE_CROSSED,
    encoder_batches,
    program_name,
    write_program_file,
)
from nann.offline.progress import Progress

__all__ = ["PROGRAM_SETS", "GridOptions", "export_programs"]

_VARIABLES = Path("variables") / "variables.data-00000-of-00001"


@dataclass(frozen=True, slots=True)
class GridOptions:
    """The shapes of one set of programs; see `BucketGrid`. `crossed` where the model's score allows it."""

    max_batch: int
    max_rows: int
    tile_rows: int
    wide: bool
    crossed: bool

    def grid(self, *, crossed: bool) -> BucketGrid:
        return BucketGrid(
            max_batch=self.max_batch,
            max_rows=self.max_rows,
            tile_rows=self.tile_rows,
            wide=self.wide,
            # About as many pairs as the largest tiled shape, so about as much memory between the layers.
            crossed_rows=max(1, self.max_rows // self.max_batch // self.tile_rows) * self.tile_rows
            if crossed
            else None,
        )


PROGRAM_SETS: Mapping[Literal["cpu", "gpu"], GridOptions] = {
    "cpu": GridOptions(max_batch=16, max_rows=4096, tile_rows=32, wide=True, crossed=False),
    "gpu": GridOptions(max_batch=64, max_rows=131072, tile_rows=64, wide=False, crossed=True),
}


def export_programs(
    version_dir: Path,
    manifest: Manifest,
    sets: Mapping[Literal["cpu", "gpu"], GridOptions],
    *,
    progress: Progress | None = None,
) -> Programs:
    """Write ``programs/`` of the SavedModel in `version_dir` and return what the manifest says of it.

    Raises:
        ValueError: the SavedModel cannot be compiled by XLA, or disagrees with the manifest.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    try:
        model = tf.saved_model.load(str(version_dir))
    except (OSError, ValueError, IndexError, tf.errors.OpError) as error:
        raise ValueError(f"{version_dir} holds no SavedModel: {str(error).splitlines()[0]}") from error
    directory = version_dir / "programs"
    directory.mkdir()
    weights = _Weights(tf)
    written = {}
    with progress if progress is not None else Progress() as shown:
        for name, options in sets.items():
            lowering = _Lowering(tf, model, manifest, options, weights)
            path = directory / f"{name}.zip"
            with shown.stage(f"{name} programs", total=len(lowering.programs), unit="programs") as stage:
                try:
                    write_program_file(path, lowering.lower_all(lambda: stage.advance(1)))
                except (KeyError, TypeError, ValueError, tf.errors.OpError) as error:
                    reason = str(error).strip().splitlines()[-1]
                    raise ValueError(f"the SavedModel gives no {name} programs: {reason}") from error
            written[name] = lowering.described(path.relative_to(version_dir).as_posix())
    return Programs(sets=written, weights=weights.store(version_dir))


class _Weights:
    """The variables that programs read, by the names of their arguments."""

    def __init__(self, tf: Any) -> None:
        self._tf = tf
        self._named: dict[str, Any] = {}

    def of(
        self, captured: Sequence[Any], signature: Any
    ) -> tuple[tuple[str, ...], list[tuple[tuple[int, ...], str]]]:
        """Names and types of what a function captures, in its order."""
        by_handle = {id(variable.handle): variable for variable in signature.variables}
        values = [by_handle.get(id(tensor), tensor) for tensor in captured]
        if unknown := [value for value in values if value.dtype == self._tf.resource]:
            raise ValueError(f"the model reads what is no variable of it: {unknown[0]}")
        types = [(tuple(value.shape), value.dtype.name) for value in values]
        return tuple(self._name(value) for value in values), types

    def _name(self, value: Any) -> str:
        for name, known in self._named.items():
            if known is value:
                return name
        plain = re.sub(r"[^A-Za-z0-9_./-]", "_", getattr(value, "name", "constant").split(":")[0])
        base = WEIGHT_PREFIX + plain
        name, n = base, 1
        while name in self._named:
            n += 1
            name = f"{base}_{n}"
        self._named[name] = value
        return name

    def store(self, version_dir: Path) -> dict[str, WeightSpec]:
        """Where each weight's values lie: in the SavedModel's own file, else in one written here."""
        found = {}
        with _Bytes(version_dir / _VARIABLES) as stored:
            for number, (name, variable) in enumerate(self._named.items()):
                value = np.ascontiguousarray(variable.numpy())
                if value.dtype.kind not in "fiub" or not value.dtype.isbuiltin:
                    raise ValueError(f"{name} is of dtype {value.dtype}, which programs cannot take")
                value = value.astype(value.dtype.newbyteorder("<"), copy=False)
                file, offset = _VARIABLES, stored.find(value)
                if offset < 0:
                    file, offset = Path("programs") / f"weight-{number}.bin", 0
                    (version_dir / file).write_bytes(value.tobytes())
                found[name] = WeightSpec(
                    file=file.as_posix(), offset=offset, dtype=value.dtype.name, shape=value.shape
                )
        return found


class _Bytes:
    """A file in which values are looked for: TensorFlow stores a tensor as its bytes, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None

    def __enter__(self) -> _Bytes:
        if self._path.is_file() and self._path.stat().st_size:
            with self._path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self

    def __exit__(self, *_: object) -> None:
        if self._map is not None:
            self._map.close()

    def find(self, value: np.ndarray) -> int:
        """The offset of the value's bytes, -1 when they are not there."""
        return -1 if self._map is None else self._map.find(value.tobytes())


class _Lowering:
    """One set of programs of one model."""

    def __init__(
        self, tf: Any, model: Any, manifest: Manifest, options: GridOptions, weights: _Weights
    ) -> None:
        self._tf = tf
        self._model = model
        self._manifest = manifest
        self._options = options
        self._user_names = sorted(manifest.user_tensors)
        self._item_names = sorted(manifest.item_tensors)
        self._weights = weights
        self._arguments: dict[str, tuple[str, ...]] = {}
        self._grid = options.grid(crossed=options.crossed and self._scores_crossed())
        self.programs = list(self._listed())

    def lower_all(self, advance: Callable[[], None]) -> Iterator[tuple[str, bytes]]:
        """(name, serialised HLO module) of every program, one after the other."""
        functions = {function: self._function(function) for function in {name for name, _ in self.programs}}
        for function, sizes in self.programs:
            yield program_name(function, *sizes), self._lower(function, sizes, functions[function])
            advance()

    def described(self, file: str) -> ProgramSet:
        """What the manifest says, once the programs are written."""
        options = self._options
        return ProgramSet(
            file=file,
            max_batch=options.max_batch,
            max_rows=options.max_rows,
            tile_rows=options.tile_rows,
            wide=options.wide,
            crossed_rows=self._grid.crossed_rows,
            programs=tuple(program_name(function, *sizes) for function, sizes in self.programs),
            arguments=self._arguments,
        )

    def _listed(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for function in (ENCODE_HISTORY, ENCODE_COMM_SEQ):
            if function in self._model.signatures:
                for batch in encoder_batches(self._options.max_batch):
                    yield function, (batch,)
        for shape in self._grid.shapes():
            yield SCORE, (shape.tiles, shape.rows)
        if self._grid.crossed_rows is not None:
            yield SCORE_CROSSED, (self._grid.crossed_rows,)

    def _scores_crossed(self) -> bool:
        """Whether the model scores one list of items for several users: items [1, C, …], users [B, …]."""
        users = self._specs_of(self._manifest.user_tensors, self._user_names, (2,), "float32")
        items = self._specs_of(self._manifest.item_tensors, self._item_names, (1, 3), "float32")
        lower = self._function(SCORE_CROSSED).experimental_get_compiler_ir
        try:
            hlo = lower(*users, *items)(stage="hlo", platform_name="CPU")
        except (ValueError, self._tf.errors.OpError):  # shapes that do not fit: the tracer's or XLA's error
            return False
        return _layout(hlo)[1] == "f32[2,3]"

    def _lower(self, function: str, sizes: tuple[int, ...], compiled: Any) -> bytes:
        names, specs = self._leading(function, sizes)
        lower = compiled.experimental_get_compiler_ir(*specs)
        if function not in self._arguments:
            # A program takes its arguments and then what it captures, in this order (compiler_ir.py).
            captured = compiled.get_concrete_function(*specs).captured_inputs
            signature = self._model.signatures[SCORE if function == SCORE_CROSSED else function]
            weights, types = self._weights.of(captured, signature)
            self._arguments[function] = (*names, *weights)
            types = [*((tuple(spec.shape), spec.dtype.name) for spec in specs), *types]
            wanted = [_hlo_type(shape, dtype) for shape, dtype in types]
            found, _ = _layout(lower(stage="hlo", platform_name="CPU"))
            if found != wanted:
                raise ValueError(f"{function} lowers to a program of {found}, not of {wanted}")
        return bytes(lower(stage="hlo_serialized", platform_name="CPU"))

    def _leading(self, function: str, sizes: tuple[int, ...]) -> tuple[tuple[str, ...], list[Any]]:
        """Names and specifications of the arguments before the weights."""
        tf, manifest = self._tf, self._manifest
        if function in (ENCODE_HISTORY, ENCODE_COMM_SEQ):
            length = manifest.history_length
            if function == ENCODE_HISTORY:
                return ("history",), [tf.TensorSpec([*sizes, length], tf.int32)]
            return ("comm_seq",), [tf.TensorSpec([*sizes, length * manifest.input_dim], tf.float32)]
        users = self._specs_of(manifest.user_tensors, self._user_names, (self._options.max_batch,), "float32")
        if function == SCORE:
            items = self._specs_of(manifest.item_tensors, self._item_names, sizes, None)
            tile_query = tf.TensorSpec(sizes[:1], tf.int32)
            return (*self._user_names, "tile_query", *self._item_names), [*users, tile_query, *items]
        items = self._specs_of(manifest.item_tensors, self._item_names, (1, *sizes), None)
        return (*self._user_names, *self._item_names), [*users, *items]

    def _specs_of(
        self, tensors: Mapping[str, Any], names: Sequence[str], lead: tuple[int, ...], dtype: str | None
    ) -> list[Any]:
        return [
            self._tf.TensorSpec([*lead, *tensors[name].shape], dtype or tensors[name].dtype) for name in names
        ]

    def _function(self, function: str) -> Any:
        """The XLA function of a program, for any sizes."""
        python = {SCORE: self._tiled, SCORE_CROSSED: self._crossed}.get(function) or self._encoder(function)
        return self._tf.function(python, jit_compile=True, autograph=False)

    def _encoder(self, function: str) -> Any:
        tf = self._tf
        encode = self._model.signatures[function]
        (argument,) = encode.structured_input_signature[1]

        def padded(rows: Any) -> Any:
            tensors = encode(**{argument: rows})
            padding = self._options.max_batch - rows.shape[0]
            return [
                tf.pad(tensors[name], [[0, padding], *([[0, 0]] * (len(tensors[name].shape) - 1))])
                for name in self._user_names
            ]

        return padded

    def _tiled(self, *arguments: Any) -> Any:
        n_users = len(self._user_names)
        users = [self._tf.gather(user, arguments[n_users]) for user in arguments[:n_users]]
        return self._crossed(*users, *arguments[n_users + 1 :])

    def _crossed(self, *arguments: Any) -> Any:
        names = (*self._user_names, *self._item_names)
        tensors = {
            name: self._tf.cast(value, self._tf.float32) for name, value in zip(names, arguments, strict=True)
        }
        return self._model.signatures["score"](**tensors)["score"]


def _layout(hlo: str) -> tuple[list[str], str]:
    """The types of a program's arguments and of its result, as HLO's text has them: ``f32[2,3]``."""
    found = re.search(r"entry_computation_layout=\{\((.*?)\)->(.*?)\}\n", hlo)
    if found is None:
        raise ValueError("XLA's text of a program has no layout of its entry")
    arguments, result = (re.findall(r"[a-z]+[0-9]*\[[0-9,]*\]", part) for part in found.groups())
    return arguments, " ".join(result)


def _hlo_type(shape: Iterable[int | None], dtype: str) -> str:
    kind = {"int": "s", "uint": "u", "float": "f"}
    name = "pred" if dtype == "bool" else re.sub(r"^[a-z]+", lambda m: kind[m[0]], dtype)
    return f"{name}[{','.join(map(str, shape))}]"
