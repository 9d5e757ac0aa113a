"""What all lanes of one GPU share: the graph, the item tensors and the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.cuda.errors import device_errors
from nann.engine.cuda.modules import BlockSizes, Modules
from nann.engine.errors import BackendError

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Int32

__all__ = ["DeviceTables", "MemoryPlan"]

# Tables are uploaded in pieces, so that a mapped file needs no more than that of the host's memory at a time.
_UPLOAD_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a GPU is to hold, by name, in bytes; ``reserve_bytes`` of it for XLA's own use."""

    parts: Mapping[str, int]
    reserve_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All parts, without the reserve."""
        return sum(self.parts.values())

    def check(self, *, free_bytes: int, limit_bytes: int | None, device: int) -> None:
        """Refuse a plan that cannot be carried out.

        Raises:
            BackendError: names each part with its size, what is needed and what there is.
        """
        needed = self.total_bytes
        if limit_bytes is not None and needed > limit_bytes:
            raise BackendError(f"{self} on cuda:{device}, over the limit of {_size(limit_bytes)}")
        if needed + self.reserve_bytes > free_bytes:
            raise BackendError(f"{self} on cuda:{device}, where {_size(free_bytes)} are free")

    def __str__(self) -> str:
        parts = [f"{name} {_size(n_bytes)}" for name, n_bytes in self.parts.items()]
        if self.reserve_bytes:
            parts.append(f"reserved for XLA {_size(self.reserve_bytes)}")
        return f"{_size(self.total_bytes + self.reserve_bytes)} are needed ({', '.join(parts)})"


class DeviceTables:
    """Tables in the memory of one GPU. Lanes read them; nothing writes them after `load`.

    ``neighbors[level]`` is int32 [N, degree]; every item tensor is [N + padding, …], zero past row N, so
    that a scan's last chunk is as whole as the others. `item_vectors` float32 [N, dim] and their `norms` [N]
    are None unless given, and so are the `gate_queries` float16 [N, columns] of a gate (`GateTables`).
    """

    def __init__(
        self,
        *,
        device: int,
        modules: Modules,
        num_items: int,
        neighbors: Sequence[Any],
        item_state: Mapping[str, Any],
        item_vectors: Any | None,
        norms: Any | None,
        gate_queries: Any | None,
        plan: MemoryPlan,
    ) -> None:
        self.device = device
        self.modules = modules
        self.num_items = num_items
        self.neighbors = tuple(neighbors)
        self.item_state = dict(item_state)
        self.item_vectors = item_vectors
        self.norms = norms
        self.gate_queries = gate_queries
        self.plan = plan

    @classmethod
    def load(
        cls,
        *,
        neighbors: Sequence[Int32[np.ndarray, "N degree"]],
        item_state: Mapping[str, np.ndarray],
        item_vectors: Float[np.ndarray, "N dim"] | None = None,
        gate_queries: Float16[np.ndarray, "N columns"] | None = None,
        device: int = 0,
        padding_rows: int = 0,
        lane_bytes: Mapping[str, int] | None = None,
        lanes: int = 1,
        reserve_bytes: int = 0,
        limit_bytes: int | None = None,
        sizes: BlockSizes | None = None,
    ) -> DeviceTables:
        """Put the tables on a GPU, after checking that they, the lanes and XLA fit there together.

        ``lane_bytes`` are the parts of one lane's scratch (`LaneLimits.plan`), ``padding_rows`` the rows that
        a scan takes at a time, ``limit_bytes`` the most that tables and lanes may take.

        Raises:
            BackendError: they do not fit, before anything is allocated; or the device failed.
        """
        import cupy

        plan = MemoryPlan(
            {
                **{f"graph level {level}": table.nbytes for level, table in enumerate(neighbors)},
                **{
                    f"item tensor {name}": table.nbytes + padding_rows * table[0].nbytes
                    for name, table in item_state.items()
                },
                **(
                    {}
                    if item_vectors is None
                    else {"item vectors": 4 * (item_vectors.size + len(item_vectors))}
                ),
                **({} if gate_queries is None else {"gate": gate_queries.nbytes}),
                **{
                    f"{lanes} x {name}" if lanes > 1 else name: lanes * n_bytes
                    for name, n_bytes in (lane_bytes or {}).items()
                },
            },
            reserve_bytes,
        )
        with device_errors(f"loading the tables onto cuda:{device}"), cupy.cuda.Device(device) as on_device:
            cupy.get_default_memory_pool().free_all_blocks()
            plan.check(free_bytes=on_device.mem_info[0], limit_bytes=limit_bytes, device=device)
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                tables = cls(
                    device=device,
                    modules=Modules(sizes),
                    num_items=len(neighbors[0] if neighbors else next(iter(item_state.values()))),
                    neighbors=[_upload(table, stream) for table in neighbors],
                    item_state={
                        name: _upload(table, stream, padding_rows) for name, table in item_state.items()
                    },
                    item_vectors=None
                    if item_vectors is None
                    else _upload(item_vectors, stream, dtype=np.float32),
                    norms=None if item_vectors is None else _upload(_norms(item_vectors), stream),
                    gate_queries=None if gate_queries is None else _upload(gate_queries, stream),
                    plan=plan,
                )
            stream.synchronize()
        return tables

    @property
    def nbytes(self) -> int:
        """Bytes of the tables on the device."""
        optional = (self.item_vectors, self.norms, self.gate_queries)
        tables = [*self.neighbors, *self.item_state.values(), *optional]
        return sum(int(table.nbytes) for table in tables if table is not None)


def _upload(table: np.ndarray, stream: Any, padding_rows: int = 0, dtype: Any = None) -> Any:
    import cupy

    on_device = cupy.empty((len(table) + padding_rows, *table.shape[1:]), dtype=dtype or table.dtype)
    for start, stop in _pieces(table):
        # Pageable memory has been read when the call returns (CUDA, "API synchronization behavior").
        on_device[start:stop].set(np.ascontiguousarray(table[start:stop], dtype=dtype), stream=stream)
    if padding_rows:
        padding = on_device[len(table) :]
        cupy.cuda.runtime.memsetAsync(padding.data.ptr, 0, padding.nbytes, stream.ptr)
    return on_device


def _pieces(table: np.ndarray) -> Iterator[tuple[int, int]]:
    rows = max(1, _UPLOAD_BYTES // max(1, math.prod(table.shape[1:]) * table.itemsize))
    for start in range(0, len(table), rows):
        yield start, min(start + rows, len(table))


def _norms(vectors: np.ndarray) -> np.ndarray:
    norms = np.empty(len(vectors), dtype=np.float32)
    for start, stop in _pieces(vectors):
        norms[start:stop] = np.linalg.norm(vectors[start:stop].astype(np.float32), axis=1)
    return norms


def _vectors_bytes(vectors: np.ndarray) -> int:
    return int(np.dtype(np.float32).itemsize * (vectors.size + len(vectors)))  # with their norms


def _size(n_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.2f} {name}"
    return f"{n_bytes} bytes"
