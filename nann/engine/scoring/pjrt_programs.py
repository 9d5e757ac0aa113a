"""A model's XLA programs and weights on one device: from a published version, or from JAX functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nann.engine.errors import ArtifactError, Unsupported
from nann.engine.scoring.buckets import BucketGrid
from nann.engine.scoring.pjrt_client import (
    CompilerOptions,
    ModuleSource,
    PjrtDevice,
    Program,
    lower,
    stablehlo_of,
    with_half_products,
)
from nann.engine.scoring.programs import (
    ENCODE_COMM_SEQ,
    ENCODE_HISTORY,
    SCORE,
    SCORE_CROSSED,
    ProgramFile,
    encoder_batches,
    program_name,
    read_weights,
)

if TYPE_CHECKING:
    import jax

    from nann.engine.artifacts import Manifest, ProgramSet

__all__ = ["Interface", "PjrtPrograms", "Platform", "open_programs"]

Platform = Literal["cpu", "cuda"]
Half = Literal["float16", "bfloat16"]
_SETS: Mapping[Platform, Literal["cpu", "gpu"]] = {"cpu": "cpu", "cuda": "gpu"}
# XLA's CPU backend hands some matrix products to YNN, others to Eigen, by the size of the whole product,
# and the two round differently (docs/adr/0004-scoring-shapes.md).
_CPU_OPTIONS: CompilerOptions = {"xla_cpu_experimental_ynn_fusion_type": ""}


@dataclass(frozen=True, slots=True)
class Interface:
    """The tensors that cross the model's seam: shapes without their leading axes, and dtypes."""

    user_tensors: Mapping[str, tuple[tuple[int, ...], str]]
    item_tensors: Mapping[str, tuple[tuple[int, ...], str]]
    num_items: int
    history_length: int
    comm_seq_width: int | None

    @classmethod
    def of(cls, manifest: Manifest, *, comm_seq: bool) -> Interface:
        def plain(specs: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
            return {name: (tuple(specs[name].shape), specs[name].dtype) for name in sorted(specs)}

        return cls(
            user_tensors={
                name: (shape, "float32") for name, (shape, _) in plain(manifest.user_tensors).items()
            },
            item_tensors=plain(manifest.item_tensors),
            num_items=manifest.num_items,
            history_length=manifest.history_length,
            comm_seq_width=manifest.history_length * manifest.input_dim if comm_seq else None,
        )


Modules = Callable[[str, tuple[int, ...]], ModuleSource]
"""(function, sizes) -> where the StableHLO module of that program comes from."""


class PjrtPrograms:
    """One model on one device: its weights, and its programs, each compiled once. Thread-safe."""

    def __init__(
        self,
        device: PjrtDevice,
        modules: Modules,
        weights: Mapping[str, Sequence[jax.Array]],
        interface: Interface,
        grid: BucketGrid,
        *,
        max_batch: int,
        cache_dir: Path | None = None,
    ) -> None:
        """`weights[function]` in the order of the program's arguments.

        The programs' user tensors have `max_batch` rows, at least as many as the grid's batches; the
        crossed program scores for every one of them.
        """
        self.device = device
        self.weights = {name: list(arrays) for name, arrays in weights.items()}
        self.interface = interface
        self.grid = grid
        self.max_batch = max_batch
        sizes = encoder_batches(max_batch)
        self.batches = [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < grid.max_batch]
        self._modules = modules
        self._cache_dir = cache_dir
        self._programs: dict[tuple[str, tuple[int, ...]], Program] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_functions(
        cls,
        device: PjrtDevice,
        *,
        encode_user: Callable[[Mapping[str, Any], Any], Mapping[str, Any]],
        score: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Any],
        weights: Mapping[str, np.ndarray],
        interface: Interface,
        grid: BucketGrid,
        cache_dir: Path | None = None,
    ) -> PjrtPrograms:
        """Programs of two JAX functions: no exported file is needed.

        ``encode_user(weights, history int32 [b, L])`` gives the user tensors [b, …];
        ``score(weights, users, items)`` gives float32 [T, R] of user tensors [T, …] and item tensors
        [T, R, …], and, for a grid with `crossed_rows`, [B, C] of users [B, …] and items [1, C, …].
        """
        names = sorted(weights)
        modules = _modules_of_functions(device, encode_user, score, weights, interface, grid.max_batch)
        on_device = [device.put(np.asarray(weights[name])) for name in names]
        return cls(
            device,
            modules,
            dict.fromkeys((ENCODE_HISTORY, SCORE, SCORE_CROSSED), on_device),
            interface,
            grid,
            max_batch=grid.max_batch,
            cache_dir=cache_dir,
        )

    def all_programs(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every program a request may need."""
        encoders = [ENCODE_HISTORY]
        if self.interface.comm_seq_width is not None:
            encoders.append(ENCODE_COMM_SEQ)
        found: list[tuple[str, tuple[int, ...]]] = [
            (name, (size,)) for name in encoders for size in self.batches
        ]
        found += [(SCORE, (shape.tiles, shape.rows)) for shape in self.grid.shapes()]
        if self.grid.crossed_rows is not None:
            found.append((SCORE_CROSSED, (self.grid.crossed_rows,)))
        return found

    def find(self, function: str, sizes: tuple[int, ...]) -> Program | None:
        """The program, if it has been compiled."""
        return self._programs.get((function, sizes))

    def compile(self, function: str, sizes: tuple[int, ...]) -> tuple[Program, bool]:
        """The program, and whether this call made it (compiled it, or loaded it from the cache).

        Raises:
            ArtifactError: the version carries no such program.
            BackendError: the compiler refused it.
        """
        if (found := self.find(function, sizes)) is not None:
            return found, False
        made = self.device.compile(self._modules(function, sizes), self._cache_dir)
        with self._lock:
            kept = self._programs.setdefault((function, sizes), made)
        return kept, kept is made


def open_programs(
    version_dir: Path,
    manifest: Manifest,
    *,
    platform: Platform,
    device_index: int = 0,
    max_batch: int,
    intra_op_threads: int | None = None,
    cache_dir: Path | None = None,
    half_products: Half | None = None,
    options: CompilerOptions | None = None,
    memory_fraction: float | None = None,
) -> PjrtPrograms:
    """The programs of a published version on one device; nothing is compiled yet.

    `intra_op_threads` bounds one operation on the CPU. `cache_dir` keeps compiled programs over restarts.
    `half_products` rounds what goes into `score`'s matrix products, sums stay float32. `options` are
    XLA's own, by name, over the platform's defaults. `memory_fraction` bounds XLA's share of a GPU's memory.

    Raises:
        Unsupported: JAX, the device, or the version's programs for it are missing, or made for fewer
            queries a batch.
        ArtifactError: the version's programs are damaged.
    """
    chosen = _program_set(manifest, platform, max_batch)
    if platform == "cpu":
        device = PjrtDevice.cpu(threads=intra_op_threads, options={**_CPU_OPTIONS, **(options or {})})
    else:
        device = PjrtDevice.cuda(device_index, options=options or {}, memory_fraction=memory_fraction)
    assert manifest.programs is not None
    file = ProgramFile(version_dir / chosen.file)
    interface = Interface.of(manifest, comm_seq=ENCODE_COMM_SEQ in chosen.arguments)
    for function, names in chosen.arguments.items():
        if names[: len(expected := _leading_arguments(function, interface))] != expected:
            raise ArtifactError(
                str(version_dir / "manifest.json"),
                expected=f"arguments of {function} to begin with {', '.join(expected)}",
                found=", ".join(names),
            )
    on_device = {
        name: device.put(array)
        for name, array in read_weights(version_dir, manifest.programs.weights).items()
    }
    weights = {
        function: [on_device[name] for name in names[len(_leading_arguments(function, interface)) :]]
        for function, names in chosen.arguments.items()
    }

    def module(function: str, sizes: tuple[int, ...]) -> ModuleSource:
        hlo = file.module(program_name(function, *sizes))
        half = half_products if function in (SCORE, SCORE_CROSSED) else None

        def converted() -> bytes:
            stablehlo = stablehlo_of(hlo)
            return stablehlo if half is None else with_half_products(stablehlo, half)

        return ModuleSource(f"{half}\n".encode() + hlo, converted)

    grid = BucketGrid(
        max_batch=max_batch,
        max_rows=chosen.max_rows,
        tile_rows=chosen.tile_rows,
        wide=chosen.wide,
        crossed_rows=chosen.crossed_rows,
    )
    programs = PjrtPrograms(
        device, module, weights, interface, grid, max_batch=chosen.max_batch, cache_dir=cache_dir
    )
    wanted = [program_name(function, *sizes) for function, sizes in programs.all_programs()]
    if missing := [name for name in wanted if name not in file]:
        raise Unsupported(
            f"{file.path} has no program {missing[0]}: it was exported for other shapes than this server "
            "runs; publish the version again"
        )
    return programs


def _program_set(manifest: Manifest, platform: Platform, max_batch: int) -> ProgramSet:
    name = _SETS[platform]
    found = None if manifest.programs is None else manifest.programs.sets.get(name)
    which = f"version {manifest.version} of {manifest.model_name}"
    if found is None:
        raise Unsupported(
            f"{which} carries no programs for {platform}: publish it again with "
            f"nann export --programs {name}, or serve it through TensorFlow (pip install 'nann[tensorflow]')"
        )
    if max_batch > found.max_batch:
        raise Unsupported(
            f"the programs of {which} take up to {found.max_batch} queries a batch, not {max_batch}: "
            f"serve it with --max-batch-size {found.max_batch}, or publish it with "
            f"--programs-max-batch {max_batch}"
        )
    return found


def _leading_arguments(function: str, interface: Interface) -> tuple[str, ...]:
    """The names of a program's arguments before its weights."""
    users, items = tuple(sorted(interface.user_tensors)), tuple(sorted(interface.item_tensors))
    return {
        ENCODE_HISTORY: ("history",),
        ENCODE_COMM_SEQ: ("comm_seq",),
        SCORE: (*users, "tile_query", *items),
        SCORE_CROSSED: (*users, *items),
    }[function]


def _modules_of_functions(
    device: PjrtDevice,
    encode_user: Callable[[Mapping[str, Any], Any], Mapping[str, Any]],
    score: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Any],
    weights: Mapping[str, np.ndarray],
    interface: Interface,
    max_batch: int,
) -> Modules:
    weight_names = sorted(weights)
    user_names, item_names = sorted(interface.user_tensors), sorted(interface.item_tensors)
    n_users, n_items = len(user_names), len(item_names)

    def encode(history: Any, *flat: Any) -> Any:
        import jax.numpy as jnp

        tensors = encode_user(dict(zip(weight_names, flat, strict=True)), history)
        padding = max_batch - history.shape[0]
        return [
            jnp.pad(tensors[name], [(0, padding), *([(0, 0)] * (tensors[name].ndim - 1))])
            for name in user_names
        ]

    def scored(users: Sequence[Any], items: Sequence[Any], flat: Sequence[Any]) -> Any:
        return score(
            dict(zip(weight_names, flat, strict=True)),
            dict(zip(user_names, users, strict=True)),
            dict(zip(item_names, items, strict=True)),
        )

    def tiled(*arguments: Any) -> Any:
        users, tile_query = arguments[:n_users], arguments[n_users]
        items, flat = arguments[n_users + 1 : n_users + 1 + n_items], arguments[n_users + 1 + n_items :]
        return scored([user[tile_query] for user in users], items, flat)

    def crossed(*arguments: Any) -> Any:
        items, flat = arguments[n_users : n_users + n_items], arguments[n_users + n_items :]
        return scored(arguments[:n_users], items, flat)

    def specs(
        tensors: Mapping[str, tuple[tuple[int, ...], str]], lead: tuple[int, ...]
    ) -> list[tuple[tuple[int, ...], str]]:
        return [((*lead, *tensors[name][0]), tensors[name][1]) for name in sorted(tensors)]

    weight_specs = [(weights[name].shape, str(weights[name].dtype)) for name in weight_names]

    def lowered(function: str, sizes: tuple[int, ...]) -> bytes:
        users = specs(interface.user_tensors, (max_batch,))
        if function == ENCODE_HISTORY:
            history = ((sizes[0], interface.history_length), "int32")
            return lower(encode, device.platform, [history, *weight_specs])
        if function == SCORE:
            arguments = [*users, (sizes[:1], "int32"), *specs(interface.item_tensors, sizes), *weight_specs]
            return lower(tiled, device.platform, arguments)
        items = specs(interface.item_tensors, (1, *sizes))
        return lower(crossed, device.platform, [*users, *items, *weight_specs])

    def module(function: str, sizes: tuple[int, ...]) -> ModuleSource:
        made = lowered(function, sizes)
        return ModuleSource(made, lambda: made)

    return module
