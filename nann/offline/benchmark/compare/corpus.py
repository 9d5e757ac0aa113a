"""One model, its corpus and its users, opened once for all contenders of the comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.artifacts import Artifact, Manifest
from nann.engine.devices import CPU, cpu_lanes, open_lanes
from nann.engine.search_engine import SearchEngine
from nann.offline.benchmark.compare.contender import UserSet
from nann.offline.benchmark.compare.multiply_adds import MultiplyAdds, count_multiply_adds
from nann.offline.benchmark.compare.rerank import Reranker
from nann.offline.build_index import GRAPH_FILE, PRESETS, build_index
from nann.offline.data.dataset import Dataset
from nann.offline.progress import Progress
from nann.offline.search_quality import EvalUsers

if TYPE_CHECKING:
    from nann.engine.types import ItemId

__all__ = ["NANN_GRAPH", "OWN_GRAPH", "Corpus", "CorpusOptions", "open_corpus"]

OWN_GRAPH, NANN_GRAPH = "own", "nann"


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What is asked: `k` items, settings chosen on `n_tune` validation users, reported on `n_report` test
    users (fewer where the data has fewer). `lanes` threads search, batches have up to `max_batch` queries.
    """

    k: int = 200
    n_tune: int = 300
    n_report: int = 1000
    lanes: int = 2
    max_batch: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """What every contender gets. `engines`: by graph, over the same model, item state and lanes' scorers.

    `nann_artifact` is the version with NANN's graph; `work` is where what is made of this corpus is kept.
    """

    name: str
    work: Path
    options: CorpusOptions
    k: int
    artifact: Artifact
    nann_artifact: Artifact
    engines: Mapping[str, SearchEngine]
    rerankers: tuple[Reranker, ...]
    tune: UserSet
    test: UserSet
    multiply_adds: MultiplyAdds
    content: str

    @property
    def num_items(self) -> int:
        return self.artifact.num_items

    @property
    def item_ids(self) -> np.ndarray | list[ItemId]:
        ids: Any = self.artifact.item_ids
        return ids  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the lanes' memory back."""
        for engine in self.engines.values():
            engine.close()


def open_corpus(
    name: str,
    run_dir: Path,
    version_dir: Path,
    work: Path,
    *,
    options: CorpusOptions,
    progress: Progress,
) -> Corpus:
    """Open a run's data and the version made of it; build NANN's graph over its embeddings if need be.

    Raises:
        ArtifactError, NotPreparedError, FileNotFoundError: the run lacks something, or it is damaged.
        ValueError: the data has no user to ask for.
    """
    work.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.load(run_dir / "data")
    artifact = Artifact.open(version_dir, verify="fast")
    nann = _nann_graph(run_dir, work, artifact, progress)
    with progress.stage(f"{name}: load and compile"):
        opened = open_lanes(
            artifact,
            (CPU,),
            lanes=options.lanes,
            max_batch=options.max_batch,
            xla_cache_dir=work / "xla-cache",
        )
        scorers = [scorer for _, scorer in opened.pairs]
        pairs = {
            OWN_GRAPH: opened.pairs,
            NANN_GRAPH: cpu_lanes(nann, scorers, max_batch=options.max_batch),
        }
        engines = {
            graph: SearchEngine(
                {OWN_GRAPH: artifact, NANN_GRAPH: nann}[graph],
                lanes,
                max_batch=options.max_batch,
                max_k=max(options.k, 1000),
                placement=f"cpu; scorer {opened.scorer}",
            )
            for graph, lanes in pairs.items()
        }
        for engine in engines.values():
            engine.warm_up()
    own = engines[OWN_GRAPH]

    def users(split: Any, limit: int) -> UserSet:
        found = EvalUsers.of(dataset, split, limit=limit, seed=options.seed)
        return UserSet.of(found, own, artifact.item_ids)

    return Corpus(
        name=name,
        work=work,
        options=options,
        k=min(options.k, artifact.num_items),
        artifact=artifact,
        nann_artifact=nann,
        engines=engines,
        rerankers=tuple(Reranker(backend, scorer) for backend, scorer in opened.pairs),
        tune=users("validation", options.n_tune),
        test=users("test", options.n_report),
        multiply_adds=count_multiply_adds(version_dir),
        content=_content(artifact.manifest, opened.scorer),
    )


def _nann_graph(run_dir: Path, work: Path, artifact: Artifact, progress: Progress) -> Artifact:
    """The same version over the graph that NANN publishes, from `work` or built there."""
    directory = work / "index-nann"
    embeddings = "arrays/item_embs.npy"
    if (directory / GRAPH_FILE).is_file():
        built = Artifact.open(directory, verify="fast")
        if built.manifest.files[embeddings] == artifact.manifest.files.get(embeddings):
            return built
    build_index(run_dir / "embeddings", directory, options=PRESETS["nann"], progress=progress)
    built = Artifact.open(directory, verify="fast")
    if built.manifest.files[embeddings] != artifact.manifest.files.get(embeddings):
        raise ValueError(f"{run_dir / 'embeddings'} and {artifact.directory} are of different models")
    return built


def _content(manifest: Manifest, scorer: str) -> str:
    """A hash of all that decides scores and graph of a version, and of which program computes them."""
    parts = [f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items())]
    return hashlib.sha256("\n".join([scorer, *parts]).encode()).hexdigest()[:20]
