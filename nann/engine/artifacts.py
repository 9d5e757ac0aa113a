"""The published form of a model: a directory that is a SavedModel, a manifest and arrays.

A version is immutable. Readers verify it and map it; nothing here ever writes into one. The names
under ``arrays/`` are NANN's where NANN has one (interchange), see the contract in ``docs/artifact.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nann.engine.errors import ArtifactError
from nann.engine.gate import GateTables
from nann.engine.input_rows import InputRows
from nann.engine.string_ids import StringIds

if TYPE_CHECKING:
    import polars as pl
    from jaxtyping import Float16, Float32, Int, Int32, Int64

__all__ = [
    "FORMAT_VERSION",
    "GATE_KEYS",
    "GATE_QUERIES",
    "WEIGHT_PREFIX",
    "Artifact",
    "FileEntry",
    "GateSpec",
    "Manifest",
    "ProgramSet",
    "Programs",
    "TensorSpec",
    "Verify",
    "WeightSpec",
    "hash_files",
    "read_manifest",
    "verify_files",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
GATE_KEYS, GATE_QUERIES = "gate_keys.npy", "gate_queries.npy"  # under arrays/
WEIGHT_PREFIX = "weight/"  # of the names of programs' arguments that are weights
Verify = Literal["full", "fast"]
IdType = Literal["int", "str"]
_HASH_BLOCK_BYTES = 1 << 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Frozen):
    """Size and content hash of one file of the version."""

    sha256: str
    bytes: int


class TensorSpec(_Frozen):
    """Shape without its leading batch axis, and dtype, of a tensor that crosses the model's seam."""

    shape: tuple[int, ...]
    dtype: Literal["float16", "float32"]


class WeightSpec(_Frozen):
    """Where a weight's values lie, row-major and little-endian, from byte ``offset`` of ``file`` on."""

    file: str
    offset: int = Field(ge=0)
    dtype: str
    shape: tuple[int, ...]


class ProgramSet(_Frozen):
    """One set of exported programs: the file, the shapes that are in it, and the arguments' names in order.

    `arguments` has an entry for each function; `scoring/programs.py` says what the functions are.
    """

    file: str
    max_batch: int = Field(ge=1)
    max_rows: int = Field(ge=1)
    tile_rows: int = Field(ge=1)
    wide: bool
    crossed_rows: int | None = None
    programs: tuple[str, ...]
    arguments: dict[str, tuple[str, ...]]


class Programs(_Frozen):
    """The model as XLA programs, for scorers that do without TensorFlow; weights are stored once."""

    sets: dict[Literal["cpu", "gpu"], ProgramSet]
    weights: dict[str, WeightSpec]


class GateSpec(_Frozen):
    """How to read ``gate_keys`` and ``gate_queries``: what a user's score of an item is about.

    A row is a bias, `dim` and `context_dim` numbers. `rmse` is the estimate's error on users it was not
    trained on, in units of the score; `residual_weight` is what a walk keeps of the error it sees at the
    item it comes from. `training` says how the tables came about.
    """

    dim: int = Field(ge=1)
    context_dim: int = Field(ge=0)
    residual_weight: float = Field(ge=0, allow_inf_nan=False)
    rmse: float = Field(ge=0, allow_inf_nan=False)
    training: dict[str, Any] = Field(default_factory=dict)


class Manifest(_Frozen):
    """Everything a reader must know before it touches an array.

    ``version`` is 0 until the artifact is published. ``profiles`` maps a profile name to the
    `SearchParams` fields it sets; ``quality`` holds what ``nann evaluate`` measured.
    """

    format_version: int
    model_name: str
    version: int = 0
    model_type: str
    num_items: int = Field(ge=0)
    embedding_dim: int = Field(ge=1)
    history_length: int = Field(ge=1)
    input_dim: int = Field(ge=1)
    item_id_type: IdType
    user_id_type: IdType
    user_tensors: dict[str, TensorSpec]
    item_tensors: dict[str, TensorSpec]
    files: dict[str, FileEntry] = Field(default_factory=dict)
    graph: dict[str, Any] = Field(default_factory=dict)
    builder: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    data_hash: str = ""
    code_version: str = ""
    seeds: dict[str, int] = Field(default_factory=dict)
    quality: dict[str, Any] = Field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = Field(default_factory=dict)
    programs: Programs | None = None
    gate: GateSpec | None = None


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_HASH_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(block):
            digest.update(block[:n_bytes])
    return digest.hexdigest()


def _sha256_of_all(paths: Sequence[Path]) -> list[str]:
    """The hash of each file, on as many threads as there are processors: hashlib lets go of Python's lock."""
    largest_first = sorted(range(len(paths)), key=lambda i: -paths[i].stat().st_size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="nann-verify") as pool:
        hashed = dict(zip(largest_first, pool.map(lambda i: _sha256(paths[i]), largest_first), strict=True))
    return [hashed[i] for i in range(len(paths))]


def hash_files(directory: Path, *, under: str = ".") -> dict[str, FileEntry]:
    """Size and sha256 of every file of a version but the manifest, by relative POSIX path.

    ``under`` a folder of the version: of the files there only.
    """
    named = {
        path.relative_to(directory).as_posix(): path
        for path in sorted((directory / under).rglob("*"))
        if path.is_file() and path.relative_to(directory).as_posix() != MANIFEST_NAME
    }
    paths = list(named.values())
    return {
        name: FileEntry(sha256=digest, bytes=path.stat().st_size)
        for name, path, digest in zip(named, paths, _sha256_of_all(paths), strict=True)
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` whole (temporary file, fsync, rename)."""
    temporary = directory / (MANIFEST_NAME + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / MANIFEST_NAME)


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        ArtifactError: it is missing, not valid JSON, of another format version, or lacks a field.
    """
    path = directory / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(str(path), expected="a published version's manifest", found="no file") from None
    # RecursionError: nested deeper than Python's parser goes.
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(str(path), expected="valid JSON", found=str(error)) from error
    if not isinstance(raw, dict):
        raise ArtifactError(str(path), expected="a JSON object", found=type(raw).__name__)
    found = raw.get("format_version")
    if found != FORMAT_VERSION:
        raise ArtifactError(str(path), expected=f"format_version {FORMAT_VERSION}", found=repr(found))
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(str(path), expected=f"a valid field {where}", found=first["msg"]) from error


def verify_files(directory: Path, manifest: Manifest, mode: Verify) -> None:
    """Check the version's files against the manifest: sizes (``fast``), and hashes too (``full``).

    Raises:
        ArtifactError: names the first file that is missing, of another size or of another content.
    """
    for name, entry in manifest.files.items():
        path = directory / name
        if not _is_inside(path, directory):
            raise ArtifactError(name, expected="a path inside the version", found="one outside it")
        if not path.is_file():
            raise ArtifactError(str(path), expected=f"a file of {entry.bytes} bytes", found="no file")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(str(path), expected=f"{entry.bytes} bytes", found=f"{size} bytes")
    if mode == "full":
        paths = [directory / name for name in manifest.files]
        for path, entry, digest in zip(paths, manifest.files.values(), _sha256_of_all(paths), strict=True):
            if digest != entry.sha256:
                raise ArtifactError(str(path), expected=f"sha256 {entry.sha256}", found=digest)
    if manifest.programs is not None:
        _verify_programs(directory, manifest, manifest.programs)


def _is_inside(path: Path, directory: Path) -> bool:
    try:
        return path.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError):  # a link to itself; which of the two depends on the version of Python
        return False


def _verify_programs(directory: Path, manifest: Manifest, programs: Programs) -> None:
    """What the programs refer to is there: files, known to the manifest, and weights inside of them."""
    here = str(directory / MANIFEST_NAME)
    for name, spec in programs.weights.items():
        size = manifest.files[spec.file].bytes if spec.file in manifest.files else None
        try:
            end = spec.offset + math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        except TypeError:
            raise ArtifactError(
                here, expected=f"a dtype of NumPy's for weight {name}", found=repr(spec.dtype)
            ) from None
        if size is None or end > size:
            raise ArtifactError(
                here,
                expected=f"weight {name} inside a file of the version",
                found=f"bytes {spec.offset} to {end} of {spec.file}"
                + (", which is not listed" if size is None else f", which has {size}"),
            )
    for name, found in programs.sets.items():
        if found.file not in manifest.files:
            raise ArtifactError(here, expected=f"programs.sets.{name} in a listed file", found=found.file)
        for function, arguments in found.arguments.items():
            if unknown := [a for a in arguments if a.startswith(WEIGHT_PREFIX) and a not in programs.weights]:
                raise ArtifactError(
                    here, expected=f"a weight for each argument of {function}", found=f"none for {unknown[0]}"
                )


def _verify_profiles(directory: Path, manifest: Manifest) -> None:
    """A profile with a gate is of a version with a gate: of another index it could not be served."""
    for name, fields in manifest.profiles.items():
        if manifest.gate is None and fields.get("gate_width"):
            raise ArtifactError(
                str(directory / MANIFEST_NAME),
                expected=f"a gate, which profile {name} asks for",
                found="none",
            )


@dataclass(frozen=True, slots=True)
class Artifact:
    """One opened version: the manifest and its arrays, mapped read-only.

    Axes: N items, D embedding_dim (`item_vectors` are the embeddings that the graph was built on), U users;
    ``neighbors[level]`` is [N, degree] padded with -1 at the end of a row. ``item_ids`` and
    ``history_ids`` are int64 arrays or `StringIds`. After ``verify="fast"`` the values of `neighbors` and
    `history_items` are as the file has them: unchecked.
    ``entry_points`` is NANN's own set (the policy `level` starts there), ``walk_entry_points`` the
    same or, in a small corpus, that set filled up to 64 from the next lower level.
    ``input_rows`` recognises the items of a `comm_seq`; None where the version cannot.
    ``gate_keys`` and ``gate_queries`` are read as ``manifest.gate`` says, both None where it is; G is
    1 + dim + context_dim.
    """

    directory: Path
    manifest: Manifest
    item_ids: Int64[np.ndarray, " N"] | StringIds
    item_weights: Float32[np.ndarray, " N"]
    entry_points: Int32[np.ndarray, " E"]
    walk_entry_points: Int32[np.ndarray, " W"]
    start_points: Int32[np.ndarray, " S"]
    neighbors: tuple[Int32[np.ndarray, "N degree"], ...]
    item_state: Mapping[str, np.ndarray]
    item_vectors: Float32[np.ndarray, "N D"] | None
    history_ids: Int64[np.ndarray, " U"] | StringIds
    history_row_splits: Int64[np.ndarray, " U+1"]
    history_items: Int32[np.ndarray, " events"]
    input_rows: InputRows | None
    gate_keys: Float16[np.ndarray, "N G"] | None = None
    gate_queries: Float16[np.ndarray, "N G"] | None = None

    @property
    def gate(self) -> GateTables | None:
        """What gates are made from; None where the version has none."""
        spec = self.manifest.gate
        if spec is None or self.gate_keys is None or self.gate_queries is None:
            return None
        keys = np.asarray(self.gate_keys)  # a plain view: indexing a mapped array costs more
        return GateTables(keys, self.gate_queries, spec.dim, spec.residual_weight, spec.rmse)

    @property
    def num_items(self) -> int:
        return self.manifest.num_items

    @property
    def items_parquet(self) -> Path | None:
        path = self.directory / "arrays" / "items.parquet"
        return path if path.is_file() else None

    @classmethod
    def open(cls, directory: Path, *, verify: Verify = "full") -> Artifact:
        """Verify and map a version.

        Raises:
            ArtifactError: a file is missing, damaged, truncated, or disagrees with the manifest.
        """
        manifest = read_manifest(directory)
        verify_files(directory, manifest, verify)
        _verify_profiles(directory, manifest)
        read = _ArrayReader(directory / "arrays", manifest.num_items, full=verify == "full")
        n = manifest.num_items
        item_ids = read.ids("item_ids.npy", "item_id_strings.parquet", "item_id", manifest.item_id_type, n)
        entry_points = read.indices("enter_points.npy")
        extended = read.path("walk_entry_points.npy").is_file()
        history_ids = read.ids(
            "history_ids.npy", "history_id_strings.parquet", "user_id", manifest.user_id_type, None
        )
        splits = read.array("history_row_splits.npy", np.int64, (len(history_ids) + 1,))
        history_items = read.indices("history_items.npy", checked=verify == "full")
        if (splits[0], splits[-1]) != (0, len(history_items)) or bool(np.any(np.diff(splits) < 0)):
            raise ArtifactError(
                str(read.path("history_row_splits.npy")),
                expected=f"non-decreasing offsets from 0 to {len(history_items)}",
                found=f"{splits[0]} to {splits[-1]}",
            )
        return cls(
            directory=directory,
            manifest=manifest,
            item_ids=item_ids,
            item_weights=read.array("item_weights.npy", np.float32, (n,)),
            entry_points=entry_points,
            walk_entry_points=read.indices("walk_entry_points.npy") if extended else entry_points,
            start_points=read.indices("start_points.npy"),
            neighbors=tuple(read.neighbors(f"neighbors_level_{level}.npy") for level in (0, 1)),
            item_state={
                name: read.array(f"item_state_{name}.npy", np.dtype(spec.dtype), (n, *spec.shape))
                for name, spec in manifest.item_tensors.items()
            },
            item_vectors=read.array("item_embs.npy", np.float32, (n, None))
            if read.path("item_embs.npy").is_file()
            else None,
            history_ids=history_ids,
            history_row_splits=splits,
            history_items=history_items,
            input_rows=read.input_rows() if read.path("input_row_hashes.npy").is_file() else None,
            gate_keys=None if manifest.gate is None else read.gate(GATE_KEYS, manifest.gate),
            gate_queries=None if manifest.gate is None else read.gate(GATE_QUERIES, manifest.gate),
        )


class _ArrayReader:
    """Maps the arrays of one version and checks each against what the manifest promises."""

    def __init__(self, directory: Path, num_items: int, *, full: bool) -> None:
        self._directory = directory
        self._num_items = num_items
        self._full = full

    def path(self, name: str) -> Path:
        return self._directory / name

    def array(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> Any:
        path = self.path(name)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise ArtifactError(str(path), expected="an array", found="no file") from None
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(str(path), expected="a NumPy array file", found=str(error)) from error
        wanted = " × ".join("any" if axis is None else str(axis) for axis in shape)
        if array.dtype != np.dtype(dtype) or not _fits(array.shape, shape):
            order = "" if array.dtype.isnative else "byte-swapped "
            raise ArtifactError(
                str(path),
                expected=f"{np.dtype(dtype).name} [{wanted}]",
                found=f"{order}{array.dtype.name} {list(array.shape)}",
            )
        return array

    def indices(self, name: str, *, checked: bool = True) -> Int32[np.ndarray, " n"]:
        """Item indices of either integer width (NANN writes int64), as int32; `checked`: every one a row."""
        path = self.path(name)
        try:
            dtype = np.load(path, mmap_mode="r", allow_pickle=False).dtype
        except (OSError, ValueError, EOFError):
            dtype = np.dtype(np.int64)  # `array` reports what is wrong with the file
        array = self.array(name, dtype if dtype in (np.int32, np.int64) else np.int64, (None,))
        if checked and array.size and not (array.min() >= 0 and array.max() < self._num_items):
            self._out_of_range(path, array, lowest=0)
        return np.ascontiguousarray(array, dtype=np.int32)

    def input_rows(self) -> InputRows:
        items = self.indices("input_row_items.npy")
        hashes = self.array("input_row_hashes.npy", np.uint64, items.shape)
        if not bool(np.all(hashes[1:] > hashes[:-1])):
            path = self.path("input_row_hashes.npy")
            raise ArtifactError(str(path), expected="unique hashes in ascending order", found="another order")
        return InputRows(np.asarray(hashes), items)  # a plain view: indexing a mapped array costs more

    def gate(self, name: str, spec: GateSpec) -> Float16[np.ndarray, "N G"]:
        array = self.array(name, np.float16, (self._num_items, 1 + spec.dim + spec.context_dim))
        if self._full and not np.isfinite(array).all():
            found = f"{np.count_nonzero(~np.isfinite(array))} that are not"
            raise ArtifactError(str(self.path(name)), expected="finite numbers", found=found)
        return array  # type: ignore[no-any-return]

    def neighbors(self, name: str) -> Int32[np.ndarray, "N degree"]:
        array = self.array(name, np.int32, (self._num_items, None))
        # Walking an out-of-range neighbour would read foreign memory, so this scan is worth its time;
        # "fast" trusts the sizes, as it says.
        if self._full and array.size and not (array.min() >= -1 and array.max() < self._num_items):
            self._out_of_range(self.path(name), array, lowest=-1)
        return array  # type: ignore[no-any-return]

    def ids(self, ints: str, strings: str, column: str, id_type: IdType, count: int | None) -> Any:
        """Ids of either type, unique and in ascending order."""
        path = self.path(ints if id_type == "int" else strings)
        if id_type == "int":
            array = self.array(ints, np.int64, (count,))
            if bool(np.all(array[1:] > array[:-1])):
                return array
        else:
            series = self._strings(path, column, count)
            try:
                return StringIds(series)
            except ValueError:
                pass
        raise ArtifactError(str(path), expected="unique ids in ascending order", found="another order")

    def _strings(self, path: Path, column: str, count: int | None) -> pl.Series:
        import polars as pl

        try:
            series = pl.read_parquet(path, columns=[column])[column]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(str(path), expected=f"a Parquet column {column}", found=str(error)) from error
        if series.dtype != pl.String or series.null_count():
            found = f"{series.dtype} with {series.null_count()} nulls"
            raise ArtifactError(str(path), expected=f"{column}: strings without nulls", found=found)
        if count is not None and series.len() != count:
            raise ArtifactError(str(path), expected=f"{count} ids", found=f"{series.len()} ids")
        return series

    def _out_of_range(self, path: Path, array: Int[np.ndarray, "..."], *, lowest: int) -> None:
        raise ArtifactError(
            str(path),
            expected=f"item indices from {lowest} to {self._num_items - 1}",
            found=f"{array.min()} to {array.max()}",
        )


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(w is None or f == w for f, w in zip(found, wanted, strict=True))
