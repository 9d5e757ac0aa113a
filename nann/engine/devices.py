"""Where a version is searched: which devices, and the backend and the scorer of every lane on them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from nann.engine.errors import Unsupported

if TYPE_CHECKING:
    from nann.engine.artifacts import Artifact, Manifest
    from nann.engine.backend import Backend
    from nann.engine.cuda.inventory import CudaDevice
    from nann.engine.scoring.scorer import Scorer

__all__ = [
    "CPU",
    "Device",
    "DeviceMemory",
    "Precision",
    "ScorerName",
    "choose_devices",
    "choose_scorer",
    "cpu_lanes",
    "default_max_batch",
    "open_lanes",
    "parse_devices",
    "parse_memory_limit",
    "threads_per_lane",
]

ScorerName: TypeAlias = Literal["auto", "tensorflow", "pjrt"]
Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]

_CUDA = re.compile(r"cuda(?::(\d{1,3}))?")
# The lowest the kernels are compiled for by the tests; a GPU below it may work when it is named.
_LOWEST_COMPUTE_CAPABILITY = (7, 5)
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, slots=True)
class Device:
    """The CPU, or one GPU by its CUDA number; prints as it is written, ``cpu`` or ``cuda:1``."""

    kind: Literal["cpu", "cuda"]
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")


def parse_devices(text: str) -> tuple[Device, ...]:
    """``cpu``, ``cuda:1``, ``cuda`` (the first GPU), or several GPUs as ``cuda:0,cuda:1``.

    Raises:
        ValueError: the text is none of these; says what may be written.
    """
    if text.strip() == "cpu":
        return (CPU,)
    devices = []
    for part in text.split(","):
        matched = _CUDA.fullmatch(part.strip())
        if matched is None:
            raise ValueError(f"{text!r} names no devices: write auto, cpu, cuda:0, or cuda:0,cuda:1")
        devices.append(Device("cuda", int(matched[1] or 0)))
    if len(set(devices)) != len(devices):
        raise ValueError(f"{text!r} names a device twice")
    return tuple(devices)


def choose_devices(text: str, *, scorer: ScorerName = "auto") -> tuple[tuple[Device, ...], str]:
    """The devices that `text` means on this machine, and why: one line for the log.

    ``auto`` takes the first GPU it can use, else the CPU; it never fails because of a GPU.

    Raises:
        ValueError: `text` names no devices.
        Unsupported: a GPU is named that is not there.
    """
    if text.strip() == "auto":
        return _choose(scorer)
    devices = parse_devices(text)
    if devices == (CPU,):
        return devices, "cpu: as told"
    try:
        found = _gpus()
    except Unsupported as error:
        raise Unsupported(f"{text}: {error}; use --device cpu or auto") from error
    for device in devices:
        if device.index >= len(found):
            there = "; ".join(f"cuda:{gpu.index} is {gpu}" for gpu in found)
            raise Unsupported(f"there is no {device}: {there}")
    return devices, "; ".join(f"{device}: {found[device.index]}, as told" for device in devices)


def _choose(scorer: ScorerName) -> tuple[tuple[Device, ...], str]:
    try:
        found = _gpus()
    except Exception as error:  # whatever a half-installed CUDA may raise
        return (CPU,), f"cpu: {error}"
    refusals = []
    for gpu in found:
        refusal = _refusal(gpu) or _missing_scorer(scorer)
        if refusal is None:
            more = f" (the first of {len(found)}; name several to use them)" if len(found) > 1 else ""
            return (Device("cuda", gpu.index),), f"cuda:{gpu.index}: {gpu}{more}"
        refusals.append(f"cuda:{gpu.index} ({gpu}) is not used: {refusal}")
    return (CPU,), f"cpu: {'; '.join(refusals)}"


def _gpus() -> tuple[CudaDevice, ...]:
    from nann.engine.cuda.inventory import cuda_devices

    return cuda_devices()


def _refusal(gpu: CudaDevice) -> str | None:
    if gpu.compute_capability < _LOWEST_COMPUTE_CAPABILITY:
        return "its compute capability is below {}.{}".format(*_LOWEST_COMPUTE_CAPABILITY)
    return None


def _missing_scorer(scorer: ScorerName) -> str | None:
    """Why the scorer that `scorer` means on a GPU cannot run there; None when it can."""
    if scorer == "tensorflow":
        return None if _installed("tensorflow") else "tensorflow is not installed"
    if not _installed("jax"):
        return "jax is not installed"
    # JAX finds its GPU support as a package beside it, one for each major version of CUDA.
    if not any(_installed(f"jax_plugins.xla_{cuda}") for cuda in ("cuda12", "cuda13")):
        return "jax is installed without its CUDA plugin"
    return None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def default_max_batch(devices: Sequence[Device]) -> int:
    """Queries of one search when nobody says how many (docs/adr/0009-gpu-lanes.md)."""
    return 16 if devices[0].kind == "cpu" else 64


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """How much of a GPU this process may take.

    `limit` bounds the graph, the item tables and the lanes' scratch: bytes (int), a share of the whole
    (float), or None for what is free. `xla_fraction` is the share of the whole that XLA may take for
    weights and intermediate values; it takes what it needs when it needs it.
    """

    limit: int | float | None = None
    xla_fraction: float = 0.5

    def limit_bytes(self, total_bytes: int) -> int | None:
        """`limit` in bytes, on a GPU of `total_bytes`."""
        return int(self.limit * total_bytes) if isinstance(self.limit, float) else self.limit


def parse_memory_limit(text: str) -> int | float:
    """Bytes from ``20GiB`` or ``21474836480``, a share from ``60%``.

    Raises:
        ValueError: the text is neither.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]iB|B|)", text.strip())
    if matched is None or not float(matched[1]) or (matched[2] == "%" and float(matched[1]) > 100):
        raise ValueError(f"{text!r} is no amount of memory: write bytes (20GiB) or a share (60%)")
    number, unit = float(matched[1]), matched[2]
    return number / 100 if unit == "%" else int(number * _UNITS[unit])


@dataclass(frozen=True, slots=True)
class OpenedLanes:
    """What `open_lanes` opened: backend, scorer and device of each lane, device by device."""

    pairs: list[tuple[Backend[Any, Any], Scorer]]
    devices: tuple[str, ...]
    scorer: str


def open_lanes(
    artifact: Artifact,
    devices: Sequence[Device],
    *,
    lanes: int,
    max_batch: int,
    scorer: ScorerName = "auto",
    xla_cache_dir: Path | None = None,
    kernel_cache_dir: Path | None = None,
    intra_op_threads: int | None = None,
    memory: DeviceMemory | None = None,
    precision: Precision = "float32",
) -> OpenedLanes:
    """`lanes` lanes on each of the devices (all of one kind); nothing of a model is compiled yet.

    `intra_op_threads` is `threads_per_lane` when not given, and bounds the CPU alone. `precision` is that
    of what goes into the model's matrix products; sums are float32 always.

    Raises:
        Unsupported: the scorer is not one this machine or version has, or it has no other precision.
        BackendError: something does not fit into a device's memory; says what, and how much it needs.
    """
    chosen = choose_scorer(scorer, devices, artifact.manifest, max_batch)
    if chosen == "tensorflow" and precision != "float32":
        raise Unsupported(f"the tensorflow scorer has no {precision} products; use --scorer pjrt")
    names = tuple(str(device) for device in devices for _ in range(lanes))
    if devices[0].kind == "cuda":
        from nann.engine.gpu_lanes import gpu_lanes

        pairs = gpu_lanes(
            artifact,
            [device.index for device in devices],
            scorer=chosen,
            lanes=lanes,
            max_batch=max_batch,
            memory=memory or DeviceMemory(),
            xla_cache_dir=xla_cache_dir,
            kernel_cache_dir=kernel_cache_dir,
            precision=precision,
        )
        return OpenedLanes(pairs, names, chosen)
    threads = threads_per_lane(lanes) if intra_op_threads is None else intra_op_threads
    scorers = _cpu_scorers(
        artifact,
        chosen,
        lanes=lanes,
        max_batch=max_batch,
        precision=precision,
        xla_cache_dir=xla_cache_dir,
        threads=threads,
    )
    return OpenedLanes(cpu_lanes(artifact, scorers, max_batch=max_batch), names, chosen)


def choose_scorer(
    scorer: ScorerName, devices: Sequence[Device], manifest: Manifest, max_batch: int
) -> Literal["tensorflow", "pjrt"]:
    """What ``auto`` means: PJRT on a GPU, and on the CPU where version and machine are made for it.

    Raises:
        Unsupported: the scorer is not one this machine has.
    """
    if scorer == "auto":
        if devices[0].kind == "cuda":
            return "pjrt"
        programs = None if manifest.programs is None else manifest.programs.sets.get("cpu")
        fits = programs is not None and max_batch <= programs.max_batch
        scorer = "pjrt" if fits and _installed("jax") else "tensorflow"
    if scorer == "tensorflow" and not _installed("tensorflow"):
        raise Unsupported(
            "tensorflow is not installed: pip install 'nann[tensorflow]', or 'nann[pjrt]' and a version "
            "that was published with programs"
        )
    return scorer


def _cpu_scorers(
    artifact: Artifact,
    scorer: Literal["tensorflow", "pjrt"],
    *,
    lanes: int,
    max_batch: int,
    precision: Precision,
    xla_cache_dir: Path | None,
    threads: int,
) -> Sequence[Scorer]:
    """One a lane: PJRT's keep views of their lane's memory, TensorFlow's is one for all."""
    if scorer == "pjrt":
        from nann.engine.scoring.pjrt_programs import open_programs
        from nann.engine.scoring.pjrt_scorer import HostHandover, PjrtScorer

        programs = open_programs(
            artifact.directory,
            artifact.manifest,
            platform="cpu",
            max_batch=max_batch,
            intra_op_threads=threads,
            cache_dir=xla_cache_dir,
            half_products=None if precision == "float32" else precision,
        )
        return [PjrtScorer(programs, HostHandover(programs.device)) for _ in range(lanes)]
    from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer

    model = TensorFlowScorer(
        artifact.directory,
        artifact.manifest,
        max_batch=max_batch,
        xla_cache_dir=xla_cache_dir,
        intra_op_threads=threads,
    )
    return [model] * lanes


def cpu_lanes(
    artifact: Artifact, scorers: Sequence[Scorer], *, max_batch: int
) -> list[tuple[Backend[Any, Any], Scorer]]:
    """A lane that searches on the CPU for each of `scorers` (of one grid), over shared tables."""
    import numpy as np  # here, because the command line reads settings and those name devices

    from nann.engine.cpu.backend import CpuBackend

    # Rows are read in random order, where the 4 KiB pages of a mapped file cost a TLB miss each; NumPy
    # asks for huge pages for arrays of its own.
    neighbors = [np.array(table) for table in artifact.neighbors]
    item_state = {name: np.array(table) for name, table in artifact.item_state.items()}
    gate = artifact.gate
    gate_queries = None if gate is None else np.array(gate.queries, dtype=np.float32)
    return [
        (
            CpuBackend(
                num_items=artifact.num_items,
                neighbors=neighbors,
                item_state=item_state,
                max_batch=max_batch,
                max_pairs=scorer.grid.max_rows,
                item_vectors=artifact.item_vectors,
                gate_queries=gate_queries,
            ),
            scorer,
        )
        for scorer in scorers
    ]


def threads_per_lane(lanes: int) -> int:
    """The processors shared out between the lanes, at least one each.

    On two cores two lanes of one thread answer 14 to 25 % more queries than two lanes of two threads,
    and one query alone is no slower (docs/results.md, "Time").
    """
    return max(1, len(os.sched_getaffinity(0)) // lanes)
