"""NANN's served search as one graph of stock TensorFlow ops, as a contender beside our own `level`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.offline.benchmark.compare.contender import Found, Setting, Skipped, UserSet
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.engine_contenders import EngineContender
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.benchmark.compare.worker import Worker, WorkerError

if TYPE_CHECKING:
    from jaxtyping import Float16, Float64

__all__ = ["Embed", "TfPortContender", "embedder", "tf_port_contenders"]

_MODULE = "nann.offline.benchmark.compare.tf_port_process"
_COMPARED_USERS = 20
Embed = Any  # (histories [users, length]) -> comm_seq float16 [users, width]


class TfPortContender:
    """The port over one graph. Each figure is the better of TensorFlow's own threads and one thread a client.

    It answers what the engine's `level` answers at the same setting, so recall and items scored are taken
    from there (scoring by one engine what another walked); `agreement` says how equal their answers are.
    """

    def __init__(
        self, corpus: Corpus, level: EngineContender, artifact: Path, name: str, embed: Embed
    ) -> None:
        self._corpus = corpus
        self._level = level
        self._embed = embed
        self.name = name
        self.settings = [Setting(name, setting.params, level.name) for setting in level.settings]
        self.fingerprint = level.fingerprint
        logs = corpus.work / "logs"
        self._workers = {
            threads: Worker(
                sys.executable,
                _MODULE,
                [str(artifact), str(threads)],
                log=logs / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{threads}.log",
            )
            for threads in (0, 1)
        }
        self._agreement: dict[str, float] = {}

    @property
    def note(self) -> str:
        words = (
            "one graph of stock TensorFlow ops, batch 1, history embedded by the client; recall and items "
        )
        words += "scored are those of the engine's level"
        if not self._agreement:
            return words
        share = 100 * min(self._agreement.values())
        return (
            f"{words}, of whose answers it gave at least {share:.2f} % itself, over {_COMPARED_USERS} users"
        )

    def answers(self, setting: Setting, users: UserSet, k: int) -> list[Found]:
        return self._level.answers(Setting(self._level.name, setting.params), users, k)

    def latencies_s(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> Float64[np.ndarray, " requests"]:
        if setting.key not in self._agreement:
            self._agreement[setting.key] = self._compare(setting, users, k, rows[:_COMPARED_USERS])
        measured = [
            np.array(
                self._ask(threads, "latencies", setting, users, rows=list(rows), budget=asdict(budget))[
                    "latencies_s"
                ]
            )
            for threads in self._workers
        ]
        return min(measured, key=lambda latencies: float(np.median(latencies)))

    def saturated_qps(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> float:
        cores = len(os.sched_getaffinity(0))
        return max(
            float(
                self._ask(
                    threads, "load", setting, users, rows=list(rows), budget=asdict(budget), clients=cores
                )["qps"]
            )
            for threads in self._workers
        )

    def close(self) -> None:
        """End its processes."""
        for worker in self._workers.values():
            worker.close()

    def _ask(self, threads: int, do: str, setting: Setting, users: UserSet, **more: Any) -> dict[str, Any]:
        path = self._corpus.work / f"comm-seq-{self._corpus.content}-{users.split}-{len(users)}.npy"
        if not path.is_file():
            np.save(path, self._embed(users.histories))
        topn = setting.params["level_topn"]
        return self._workers[threads].ask(do=do, users=str(path), level_topn=topn, **more)

    def _compare(self, setting: Setting, users: UserSet, k: int, rows: Sequence[int]) -> float:
        """The share of the engine's answers that the port gives too, over a few users."""
        theirs = self._ask(0, "search", setting, users, rows=list(rows))["item_ids"]
        some = UserSet(
            users.split,
            [users.history_ids[row] for row in rows],
            users.histories[list(rows)],
            users.targets[list(rows)],
        )
        ours = self.answers(setting, some, k)
        ids = np.asarray(self._corpus.item_ids)
        shares = [
            len(set(ids[found.item_index].tolist()) & set(items)) / max(len(found.item_index), 1)
            for found, items in zip(ours, theirs, strict=True)
        ]
        return float(np.mean(shares))


def embedder(run_dir: Path) -> Embed:
    """Embeds histories as NANN's clients do: the model's own inputs, flattened, in half precision.

    Raises `WorkerError` when called for a run without its model. TensorFlow is loaded only then, after the
    engine has told it how many threads it may have.
    """

    def embed(histories: np.ndarray) -> Float16[np.ndarray, "users width"]:
        import tensorflow as tf

        from nann.offline.checkpoints import ModelNotTrainedError, load_model
        from nann.offline.data.dataset import Dataset

        try:
            model, _ = load_model(run_dir / "model")
        except ModelNotTrainedError as error:
            raise WorkerError(str(error)) from error
        serving = model.fold(np.asarray(Dataset.load(run_dir / "data").item_categories))
        inputs = serving.inputs_of(tf.constant(histories)).numpy()
        return inputs.reshape(len(histories), -1).astype(np.float16)  # type: ignore[no-any-return]

    return embed


def tf_port_contenders(
    corpus: Corpus, levels: Sequence[tuple[EngineContender, Path, str]], embed: Embed
) -> Iterator[TfPortContender | Skipped]:
    """The port over each graph, or why it cannot take part."""
    for level, artifact, name in levels:
        contender = TfPortContender(corpus, level, artifact, name, embed)
        budget = TimingBudget(requests=1, latency_s=0.0, warm_up_requests=0)
        try:
            contender.latencies_s(contender.settings[0], corpus.tune, corpus.k, [0], budget)
        except WorkerError as error:
            contender.close()
            yield Skipped(name, str(error))
            continue
        contender.close()  # its memory is wanted when it is timed, not before
        yield contender
