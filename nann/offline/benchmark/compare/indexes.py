"""Approximate nearest-neighbour indexes over inner products that run in this process: faiss and hnswlib.

Built once and kept as files. Products are counted by the library where it counts them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32

__all__ = ["INDEXES", "FaissHnsw", "FaissIvf", "HnswlibHnsw", "Index", "vectors_key"]

# A graph that is not what limits recall: the reranked candidates are (efSearch and nprobe are swept).
_M, _EF_CONSTRUCTION = 32, 200
_SEED = 12345
_LARGE_ANSWER = 10_000


class Index(Protocol):
    """``search`` may be called by several threads, ``count_products`` by one alone."""

    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str: ...

    def efforts(self, count: int) -> list[dict[str, int]]:
        """Settings to try where `count` candidates are wanted."""
        ...

    def search(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> Int32[np.ndarray, "batch count"]:
        """Items by inner product, best first, -1 where there are fewer."""
        ...

    def count_products(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> float:
        """Inner products that one of these searches takes, the mean over them."""
        ...


class FaissHnsw:
    """faiss' HNSW over flat vectors."""

    name = "faiss HNSW"

    def __init__(self, items: Float32[np.ndarray, "N d"], directory: Path) -> None:
        import faiss

        self._faiss: Any = faiss
        self.note = f"faiss {faiss.__version__}, M {_M}, efConstruction {_EF_CONSTRUCTION}, inner product"

        def build() -> Any:
            index = faiss.IndexHNSWFlat(items.shape[1], _M, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = _EF_CONSTRUCTION
            index.add(items)
            return index

        self._index = _kept_faiss(faiss, directory / "faiss-hnsw.index", build)

    def efforts(self, count: int) -> list[dict[str, int]]:
        return _hnsw_efforts(count)

    def search(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> Int32[np.ndarray, "batch count"]:
        found = self._index.search(
            vectors, count, params=self._faiss.SearchParametersHNSW(efSearch=effort["ef_search"])
        )[1]
        return found.astype(np.int32)  # type: ignore[no-any-return]

    def count_products(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> float:
        statistics = self._faiss.cvar.hnsw_stats
        statistics.reset()
        self.search(vectors, count, effort)
        return float(statistics.ndis) / len(vectors)


class FaissIvf:
    """faiss' inverted file over flat vectors: the lists nearest to the user are scanned."""

    name = "faiss IVF"

    def __init__(self, items: Float32[np.ndarray, "N d"], directory: Path) -> None:
        import faiss

        self._faiss: Any = faiss
        # faiss' guidelines for indexes of up to a million vectors: 4 to 16 times the square root of N.
        self._lists = max(4, round(4 * len(items) ** 0.5))
        self.note = f"faiss {faiss.__version__}, {self._lists:,} lists, flat, inner product"

        def build() -> Any:
            quantizer = faiss.IndexFlatIP(items.shape[1])
            index = faiss.IndexIVFFlat(quantizer, items.shape[1], self._lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # a small corpus is no reason to warn
            index.train(items)
            index.add(items)
            return index

        self._index = _kept_faiss(faiss, directory / "faiss-ivf.index", build)

    def efforts(self, count: int) -> list[dict[str, int]]:
        # As many lists as hold `count` items if all were equal, and more: each half again of the rest.
        least = max(1, round(count * self._lists / max(self._index.ntotal, 1)))
        return [{"nprobe": min(self._lists, factor * least)} for factor in (2, 4, 8)]

    def search(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> Int32[np.ndarray, "batch count"]:
        parameters = self._faiss.SearchParametersIVF(nprobe=effort["nprobe"])
        return self._index.search(vectors, count, params=parameters)[1].astype(np.int32)  # type: ignore[no-any-return]

    def count_products(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> float:
        statistics = self._faiss.cvar.indexIVF_stats
        statistics.reset()
        self.search(vectors, count, effort)
        return float(self._lists + statistics.ndis / len(vectors))


class HnswlibHnsw:
    """hnswlib's HNSW. It does not count its products; faiss' count at the same M and ef stands for them."""

    name = "hnswlib"

    def __init__(self, items: Float32[np.ndarray, "N d"], directory: Path) -> None:
        from importlib import metadata

        import hnswlib

        self.note = (
            f"hnswlib {metadata.version('hnswlib')}, M {_M}, efConstruction {_EF_CONSTRUCTION}, inner "
            "product; its products are taken to be as many as faiss' HNSW counts at the same M and ef"
        )
        self._same = FaissHnsw(items, directory)
        self._index = hnswlib.Index(space="ip", dim=items.shape[1])
        path = directory / "hnswlib.index"
        if path.is_file():
            self._index.load_index(str(path), max_elements=len(items))
        else:
            self._index.init_index(
                max_elements=len(items), M=_M, ef_construction=_EF_CONSTRUCTION, random_seed=_SEED
            )
            self._index.add_items(items, num_threads=-1)
            self._index.save_index(str(path))
        self._index.set_num_threads(1)
        self._size = len(items)

    def efforts(self, count: int) -> list[dict[str, int]]:
        return _hnsw_efforts(count)

    def search(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> Int32[np.ndarray, "batch count"]:
        self._index.set_ef(effort["ef_search"])
        wanted = min(count, self._size)
        while True:
            try:
                found = self._index.knn_query(vectors, k=wanted, num_threads=1)[0]
            except RuntimeError:
                # It answers nobody when it finds fewer for one of them, as where parts of the graph are not
                # reached: then all get as many as it has for everyone, to a tenth.
                if wanted == 1:
                    raise
                wanted = wanted * 9 // 10
                continue
            rows = np.full((len(vectors), count), -1, dtype=np.int32)
            rows[:, :wanted] = found
            return rows

    def count_products(
        self, vectors: Float32[np.ndarray, "batch d"], count: int, effort: dict[str, int]
    ) -> float:
        return self._same.count_products(vectors, count, effort)


INDEXES: Sequence[Callable[[Any, Path], Index]] = (FaissHnsw, FaissIvf, HnswlibHnsw)


def _hnsw_efforts(count: int) -> list[dict[str, int]]:
    """An ef as large as the answer, and for smaller answers twice that: a pool of 20,000 finds what there is
    to find, and a larger one takes a tenth of a second."""
    return [{"ef_search": count}, *([{"ef_search": 2 * count}] if count < _LARGE_ANSWER else [])]


def vectors_key(items: Float32[np.ndarray, "N d"]) -> str:
    """A name for a set of vectors, for what is built on them."""
    return hashlib.sha256(np.ascontiguousarray(items).tobytes()).hexdigest()[:16]


def _kept_faiss(faiss: Any, path: Path, build: Callable[[], Any]) -> Any:
    if not path.is_file():
        faiss.write_index(build(), str(path))
    return faiss.read_index(str(path))
