"""What a setting finds and what it scores, user by user: counts, so that a busy machine does not matter.

The exhaustive answers are kept by what decides them (the version's content, the users, k), the sweep's
rows also by the code that searches, so that a rerun measures only what is new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nann
from nann.engine.recall import recall_at_k
from nann.offline.benchmark.compare.contender import Contender, Found, Setting, UserSet
from nann.offline.benchmark.compare.corpus import Corpus
from nann.offline.benchmark.compare.engine_contenders import EngineContender
from nann.offline.benchmark.compare.rerank import Reranker

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Float64, Int32, Int64

__all__ = ["Measured", "Truth", "exhaustive_truth", "measure", "measured_truth"]

_RESCORED_AT_ONCE = 16
_COUNTING = (
    "engine_contenders",
    "indexes",
    "quality",
    "rerank",
    "rivals",
    "scann",
    "scann_process",
    "vectors",
)


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """The exhaustive answers of a user set, best first."""

    item_index: Int32[np.ndarray, "users k"]
    score: Float32[np.ndarray, "users k"]

    def first(self, count: int) -> Truth:
        """Those of the first `count` users."""
        return Truth(self.item_index[:count], self.score[:count])


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One setting over one user set. `hit`: the held-out item was answered."""

    setting: Setting
    recall: Float64[np.ndarray, " users"]
    hit: Bool[np.ndarray, " users"]
    n_scored: Int64[np.ndarray, " users"]
    multiply_adds: Float64[np.ndarray, " users"]

    def cost(self, multiply_adds_of_a_score: float) -> Float64[np.ndarray, " users"]:
        """Items scored, and all other multiply-adds of the query as so many more."""
        return self.n_scored + self.multiply_adds / multiply_adds_of_a_score


def exhaustive_truth(corpus: Corpus, exhaustive: EngineContender, users: UserSet) -> Truth:
    """Every item scored for every user; from the work directory where it was done before."""

    def scan() -> dict[str, np.ndarray]:
        found = exhaustive.answers(exhaustive.settings[0], users, corpus.k)
        scores = [_scores(answer) for answer in found]
        return {"item_index": np.stack([answer.item_index for answer in found]), "score": np.stack(scores)}

    key = _hash([corpus.content, str(corpus.k), _users_key(users)])
    return Truth(**_kept(corpus.work / "truth" / f"{users.split}-{key}.npz", scan))


def measure(corpus: Corpus, contender: Contender, setting: Setting, users: UserSet, truth: Truth) -> Measured:
    """Recall, hits and counts of one setting, from the work directory where they were measured before.

    Raises:
        RuntimeError: an answer names an item twice.
    """

    def search() -> dict[str, np.ndarray]:
        found = contender.answers(setting, users, corpus.k)
        unique = [len(np.unique(answer.item_index)) == len(answer.item_index) for answer in found]
        if not all(unique):
            raise RuntimeError(f"{setting.contender}, {setting.words}: an item is twice in an answer")
        if any(answer.score is None for answer in found):
            found = _rescored(corpus.rerankers[0], users, found, corpus.k)
        scores = np.full((len(users), corpus.k), -np.inf)
        for row, answer in enumerate(found):
            scores[row, : len(answer.item_index)] = _scores(answer)
        hits = [target in answer.item_index for target, answer in zip(users.targets, found, strict=True)]
        return {
            "recall": recall_at_k(scores, truth.score, corpus.k),
            "hit": np.array(hits, dtype=np.bool_),
            "n_scored": np.array([answer.n_scored for answer in found], dtype=np.int64),
            "multiply_adds": np.array([answer.multiply_adds for answer in found], dtype=np.float64),
        }

    key = _hash(
        [corpus.content, str(corpus.k), _users_key(users), setting.key, contender.fingerprint, _code_key()]
    )
    return Measured(setting=setting, **_kept(corpus.work / "sweep" / f"{users.split}-{key}.npz", search))


def measured_truth(corpus: Corpus, setting: Setting, users: UserSet, truth: Truth) -> Measured:
    """The exhaustive search as one more setting, from the answers it has given already."""
    return Measured(
        setting=setting,
        recall=np.ones(len(users)),
        hit=(truth.item_index == users.targets[:, None]).any(axis=1),
        n_scored=np.full(len(users), corpus.num_items, dtype=np.int64),
        multiply_adds=np.full(len(users), corpus.multiply_adds.encode),
    )


def _rescored(reranker: Reranker, users: UserSet, found: Sequence[Found], k: int) -> list[Found]:
    """The answers with the deep model's scores, as they would rank: the contender's own work is unchanged."""
    rescored = []
    for start in range(0, len(users), _RESCORED_AT_ONCE):
        chosen = slice(start, start + _RESCORED_AT_ONCE)
        best = reranker.best(users.histories[chosen], [f.item_index for f in found[chosen]], k)
        rescored += [
            Found(index, score, f.n_scored, f.multiply_adds)
            for f, (index, score) in zip(found[chosen], best, strict=True)
        ]
    return rescored


def _scores(answer: Found) -> Float32[np.ndarray, " n"]:
    assert answer.score is not None
    return answer.score


def _users_key(users: UserSet) -> str:
    return _hash([users.split, repr(users.history_ids), users.targets.tobytes().hex()])


@cache
def _code_key() -> str:
    """Of the code that searches: what was counted by other code is counted again."""
    package = Path(nann.__file__).parent
    own = [package / "offline" / "benchmark" / "compare" / f"{name}.py" for name in _COUNTING]
    files = [*sorted((package / "engine").rglob("*.py")), *own]
    return _hash([path.read_text(encoding="utf-8") for path in files])


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:20]


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **make())
        partial.replace(path)
    with np.load(path, allow_pickle=False) as kept:
        return dict(kept)
