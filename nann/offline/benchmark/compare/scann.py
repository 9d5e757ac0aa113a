"""ScaNN as a contender: an environment and a process of its own, vectors and answers as .npy files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.offline.benchmark.compare.contender import Found, Setting, Skipped, UserSet
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.indexes import vectors_key
from nann.offline.benchmark.compare.loops import TimingBudget, keep_busy, one_at_a_time
from nann.offline.benchmark.compare.rivals import rerank_settings
from nann.offline.benchmark.compare.vectors import VectorSource
from nann.offline.benchmark.compare.worker import Worker, WorkerError

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int32

__all__ = ["SCANN", "ScannContender", "ScannProcess", "scann_contenders"]

# ScaNN's TensorFlow op is built for TensorFlow 2.20 and this project needs 2.21, so it is not in our
# environment; its own interface needs NumPy alone. The last releases for Python 3.10 are named apart.
SCANN = "scann==1.4.2"
_REQUIREMENTS = (
    SCANN,
    'numpy==2.4.6; python_version >= "3.11"',
    'numpy==2.2.6; python_version < "3.11"',
    "protobuf==7.36.2",
)
_MODULE = "nann.offline.benchmark.compare.scann_process"
_BATCH = 16
_REORDERED = 1.5  # times the candidates: exact products after the quantised ones


class ScannProcess:
    """One index over item vectors, answered by another process.

    Raises:
        WorkerError: the environment could not be made; says why.
    """

    def __init__(
        self, items: Float32[np.ndarray, "N d"], directory: Path, environment: Path, *, threads: int
    ) -> None:
        self.items = items
        self._directory = directory / "scann"
        self._directory.mkdir(parents=True, exist_ok=True)
        # ScaNN's guide: about the square root of N.
        self.leaves = max(2, round(len(items) ** 0.5))
        path = self._directory / "items.npy"
        if not path.is_file():
            np.save(path, items)
        self._worker = Worker(
            _python_of(environment),
            _MODULE,
            [str(path), str(self.leaves), str(threads)],
            log=self._directory / "process.log",
        )
        self._users: dict[int, Path] = {}

    def ask(
        self, do: str, users: Float32[np.ndarray, "users d"], count: int, effort: dict[str, int], **more: Any
    ) -> dict[str, Any]:
        """One request about these users' vectors."""
        path = self._directory / f"users-{vectors_key(users)}.npy"
        if not path.is_file():
            np.save(path, users)
        return self._worker.ask(do=do, users=str(path), count=count, **effort, **more)

    def search(
        self, users: Float32[np.ndarray, "users d"], count: int, effort: dict[str, int]
    ) -> Int32[np.ndarray, "users count"]:
        """Items by inner product, best first, -1 where there are fewer."""
        output = self._directory / "found.npy"
        self.ask("search", users, count, effort, output=str(output))
        found: Int32[np.ndarray, "users count"] = np.load(output)
        return found

    def multiply_adds(self, effort: dict[str, int]) -> float:
        """Of one search, from its parameters: leaves, quantised products (a look-up counts as one) of the
        lists that are searched, and exact products of what is reordered."""
        n_items, width = map(int, self.items.shape)
        searched = n_items * effort["leaves_to_search"] / self.leaves
        return float(self.leaves * width + searched * width / 2 + effort["reorder"] * width)

    def close(self) -> None:
        """End the process."""
        self._worker.close()


class ScannContender:
    """ScaNN's candidates; with `rerank` the deep model orders them, in this process.

    The time of a request is the sum of both halves, each measured alone and without what lies between.
    """

    def __init__(self, corpus: Corpus, source: VectorSource, process: ScannProcess, *, rerank: bool) -> None:
        self._corpus = corpus
        self._source = source
        self._process = process
        self._rerank = rerank
        self.name = "ScaNN + rerank" if rerank else "ScaNN alone"
        self.note = (
            f"{SCANN.replace('==', ' ')}, {process.leaves:,} leaves, asymmetric hashing, reordered; "
            f"vectors: {source.name}; products computed from its parameters"
        )
        self.fingerprint = f"{self.note} {vectors_key(source.items)}"
        counts = rerank_settings(corpus.k, corpus.num_items) if rerank else [corpus.k]
        self.settings: Sequence[Setting] = [
            Setting(self.name, {"candidates": count, **effort} if rerank else effort)
            for count in counts
            for effort in self._efforts(count)
        ]

    def answers(self, setting: Setting, users: UserSet, k: int) -> list[Found]:
        count, effort = self._parts(setting, k)
        candidates = self._candidates(users, count, effort)
        other = self._source.multiply_adds + self._process.multiply_adds(effort)
        if not self._rerank:
            return [Found(row, None, 0, other) for row in candidates]
        other += self._corpus.multiply_adds.encode
        answers = [
            best
            for start in range(0, len(users), _BATCH)
            for best in self._best(candidates, users, k, range(start, min(start + _BATCH, len(users))), 0)
        ]
        return [
            Found(index, score, len(row), other)
            for (index, score), row in zip(answers, candidates, strict=True)
        ]

    def latencies_s(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> Float64[np.ndarray, " requests"]:
        count, effort = self._parts(setting, k)
        vectors = self._source.of_users(users.histories)
        reply = self._process.ask("latencies", vectors, count, effort, rows=list(rows), budget=asdict(budget))
        found = np.array(reply["latencies_s"])
        if not self._rerank:
            return found
        candidates = self._candidates(users, count, effort)
        ordered = one_at_a_time(lambda chosen: self._best(candidates, users, k, chosen, 0), rows, budget)
        both = min(len(found), len(ordered))
        return found[:both] + ordered[:both]  # type: ignore[no-any-return]

    def saturated_qps(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> float:
        count, effort = self._parts(setting, k)
        vectors = self._source.of_users(users.histories)
        reply = self._process.ask("load", vectors, count, effort, rows=list(rows), budget=asdict(budget))
        if not self._rerank:
            return float(reply["qps"])
        candidates = self._candidates(users, count, effort)
        ordered = keep_busy(
            lambda chosen, lane: self._best(candidates, users, k, chosen, lane),
            rows,
            budget,
            lanes=len(self._corpus.rerankers),
            batch=_BATCH,
        )
        # Both halves want every core, one after the other.
        return 1 / (1 / float(reply["qps"]) + 1 / ordered)

    def _efforts(self, count: int) -> list[dict[str, int]]:
        n_items, leaves = len(self._process.items), self._process.leaves
        least = max(1, round(count * leaves / n_items))
        reorder = min(n_items, round(_REORDERED * count))
        found = dict.fromkeys(min(leaves, factor * least) for factor in (2, 4, 8))
        return [{"leaves_to_search": searched, "reorder": reorder} for searched in found]

    def _parts(self, setting: Setting, k: int) -> tuple[int, dict[str, int]]:
        effort = dict(setting.params)
        return effort.pop("candidates", k), effort

    def _candidates(
        self, users: UserSet, count: int, effort: dict[str, int]
    ) -> list[Int32[np.ndarray, " n"]]:
        found = self._process.search(self._source.of_users(users.histories), count, effort)
        return [row[row >= 0] for row in found]

    def _best(
        self, candidates: Sequence[Any], users: UserSet, k: int, rows: Sequence[int], lane: int
    ) -> list[Any]:
        histories = users.histories[list(rows)]
        return self._corpus.rerankers[lane].best(histories, [candidates[row] for row in rows], k)


def scann_contenders(
    corpus: Corpus, source: VectorSource | None, environment: Path
) -> Iterator[ScannContender | Skipped]:
    """ScaNN alone and with rerank, or why it cannot take part; its `environment` is made where it is not."""
    if source is None:
        yield Skipped("ScaNN", "this version has no vectors whose inner product means anything")
        return
    directory = corpus.work / "indexes" / vectors_key(source.items)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        process = ScannProcess(source.items, directory, environment, threads=corpus.options.lanes)
        alone = ScannContender(corpus, source, process, rerank=False)
        process.search(source.of_users(corpus.tune.histories[:1]), corpus.k, dict(alone.settings[0].params))
    except WorkerError as error:
        yield Skipped("ScaNN", str(error))
        return
    yield alone
    if rerank_settings(corpus.k, corpus.num_items):
        yield ScannContender(corpus, source, process, rerank=True)
    else:
        yield Skipped("ScaNN + rerank", "the corpus is too small to rerank a part of it")


def _python_of(directory: Path) -> str:
    """The Python of an environment that has ScaNN, made at the first call. Raises `WorkerError`."""
    python = directory / "bin" / "python"
    complete = directory / "installed"
    if not complete.is_file() or complete.read_text(encoding="utf-8") != "\n".join(_REQUIREMENTS):
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in ([sys.executable, "-m", "venv", str(directory)], [*install, *_REQUIREMENTS]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                words = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
                raise WorkerError(f"{SCANN} could not be installed: {words[-1]}")
        complete.write_text("\n".join(_REQUIREMENTS), encoding="utf-8")
    return str(python)
