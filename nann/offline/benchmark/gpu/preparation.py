"""What comes before any measurement of a search: ceilings, corpus, graph, and an engine that is warm."""

from __future__ import annotations

import gc
import threading
from dataclasses import asdict, dataclass
from typing import Any

from nann.engine.devices import Device
from nann.engine.scoring.pjrt_programs import PjrtPrograms
from nann.offline.benchmark.gpu import rig
from nann.offline.benchmark.gpu.ceilings import measure_ceilings
from nann.offline.benchmark.gpu.corpus import Corpus, make_corpus
from nann.offline.benchmark.gpu.graph import NearItems, build_graph, find_near_items
from nann.offline.benchmark.gpu.measure import Bench
from nann.offline.benchmark.gpu.model import MULTIPLY_ADDS_A_PAIR, Weights, make_weights
from nann.offline.benchmark.gpu.plan import Deadline, Step
from nann.offline.benchmark.gpu.programs import Precision
from nann.offline.benchmark.gpu.world import World

__all__ = ["Options", "Preparation", "jax_device"]

# Bytes copied and the size of the matrices multiplied: far above the caches of the device.
_GPU_CEILINGS, _CPU_CEILINGS = (2**30, 8192), (2**26, 512)
# Blocks that a block is compared with, and blocks a call: 128 blocks of distances are 200 MiB each.
_GPU_NEAR, _CPU_NEAR = (128, 8), (16, 1)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure on: `users` distinct users, at most `lanes` lanes, at most `batch` queries a search;
    `load_s` seconds for one load."""

    device: Device
    items: int
    users: int
    seed: int
    precision: Precision
    lanes: int
    batch: int
    load_s: float

    @property
    def on_gpu(self) -> bool:
        return self.device.kind == "cuda"


class Preparation:
    """The report's first steps, and what they leave behind: all of it is there once "warm-up" is done."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._near: NearItems
        self._compiling: threading.Thread
        self._compile_error: list[BaseException] = []
        self.corpus: Corpus
        self.weights: Weights
        self.programs: PjrtPrograms
        self.world: World
        self.bench: Bench

    def steps(self) -> list[Step]:
        """Seconds are meant for 1.3 million items; none of these can be cut."""
        return [
            Step("ceilings", 20, self._measure_ceilings),
            Step("corpus", 40, self._make_corpus),
            Step("near items", 90, self._find_near, needs=("corpus",)),
            Step("graph", 120, self._build_graph, needs=("near items",)),
            Step("warm-up", 150, self._warm_up, needs=("graph",)),
        ]

    def open_programs(self, tile_rows: int | None = None) -> PjrtPrograms:
        """The model's programs; not compiled yet."""
        return rig.open_programs(
            self._options.device,
            self.weights,
            self.corpus.embeddings,
            precision=self._options.precision,
            batch=self._options.batch,
            lanes=self._options.lanes,
            tile_rows=tile_rows,
        )

    def _measure_ceilings(self, deadline: Deadline) -> dict[str, Any]:
        on_gpu = self._options.on_gpu
        copy_bytes, matmul_size = _GPU_CEILINGS if on_gpu else _CPU_CEILINGS
        ceilings = measure_ceilings(
            copy_bytes=copy_bytes,
            matmul_size=matmul_size,
            matmul_dtype="float16" if on_gpu else "float32",
            device=jax_device(self._options.device),
        )
        return asdict(ceilings)

    def _make_corpus(self, deadline: Deadline) -> dict[str, Any]:
        options = self._options
        self.corpus = make_corpus(options.items, options.users, seed=options.seed)
        self.weights = make_weights()
        lengths = (self.corpus.history >= 0).sum(axis=1)
        return {
            "items": options.items,
            "users": options.users,
            "mean_history": float(lengths.mean()),
            "multiply_adds_a_pair": MULTIPLY_ADDS_A_PAIR,
        }

    def _find_near(self, deadline: Deadline) -> dict[str, Any]:
        near_blocks, blocks_a_call = _GPU_NEAR if self._options.on_gpu else _CPU_NEAR
        self._near = find_near_items(
            self.corpus.embeddings,
            seed=self._options.seed,
            near_blocks=near_blocks,
            blocks_a_call=blocks_a_call,
            device=jax_device(self._options.device),
        )
        return {"near_blocks": near_blocks}

    def _build_graph(self, deadline: Deadline) -> dict[str, Any]:
        options = self._options
        self.programs = self.open_programs()
        # The compiler and the graph's loops both leave Python's lock alone.
        self._compiling = threading.Thread(target=self._compile, name="nann-report-compile", daemon=True)
        self._compiling.start()
        graph = build_graph(self.corpus.embeddings, self._near, seed=options.seed)
        self.world = World.of(self.corpus, self.weights, graph)
        degrees = (graph.neighbors[0] >= 0).sum(axis=1)
        return {
            "mean_degree": float(degrees.mean()),
            "unreachable": graph.unreachable,
            "entry_points": len(graph.entry_points),
        }

    def _compile(self) -> None:
        try:
            rig.compile_all(self.programs)
        except BaseException as error:
            self._compile_error.append(error)

    def _warm_up(self, deadline: Deadline) -> dict[str, Any]:
        self._compiling.join()
        if self._compile_error:
            raise self._compile_error[0]
        options = self._options
        self.bench = rig.open_bench(options.device, self.world, self.programs, lanes=options.lanes)
        warm = self.bench.engine.warm_up()
        gc.collect()
        gc.freeze()  # as the server does when it is ready: no collection then walks through the tables
        return {
            "programs": len(self.programs.all_programs()),
            "bit_equal": warm.bit_equal,
            "table_bytes": self.bench.engine.memory_bytes,
        }


def jax_device(device: Device) -> Any:
    """The device as JAX knows it."""
    import jax

    return jax.local_devices(backend=device.kind)[device.index]
