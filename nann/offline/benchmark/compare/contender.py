"""What a contender of the comparison is: something with settings, asked for users, that counts its work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nann.engine.types import ItemId
from nann.offline.benchmark.compare.loops import TimingBudget
from nann.offline.data.dataset import EvalSplit

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int32, Int64

    from nann.engine.search_engine import SearchEngine
    from nann.offline.search_quality import EvalUsers

__all__ = ["Contender", "Found", "Setting", "Skipped", "UserSet"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a contender's sweep: `params` are plain values.

    `answers_of` names another contender that gives the same answers at the same parameters, where there
    is one: then they are measured once.
    """

    contender: str
    params: Mapping[str, Any]
    answers_of: str = ""

    @property
    def words(self) -> str:
        """The parameters in one line, as a reader would type them."""
        return ", ".join(f"{name} {_word(value)}" for name, value in self.params.items()) or "–"

    @property
    def key(self) -> str:
        """The same text for settings with equal answers."""
        return json.dumps([self.answers_of or self.contender, dict(self.params)], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A contender that could not take part, and why: the report says so in its place."""

    contender: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """One answer, best first, and what it took.

    `score` is the deep model's, None where the contender does not know it (then the answer is scored
    afterwards, at nobody's cost). `n_scored` counts (user, item) pairs that the model scored,
    `multiply_adds` all other products of the query.
    """

    item_index: Int32[np.ndarray, " n"]
    score: Float32[np.ndarray, " n"] | None
    n_scored: int
    multiply_adds: float


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: it holds arrays
class UserSet:
    """Users of one split: `histories` as item rows, oldest first, -1 padded, and their held-out items."""

    split: EvalSplit
    history_ids: Sequence[Sequence[ItemId]]
    histories: Int32[np.ndarray, "users length"]
    targets: Int64[np.ndarray, " users"]

    @classmethod
    def of(cls, users: EvalUsers, engine: SearchEngine, item_ids: Sequence[ItemId] | np.ndarray) -> UserSet:
        """The users as an engine sees them: what it does not know of a history is left out."""
        from nann.engine.types import Query, SearchParams

        params = SearchParams(policy="exhaustive")
        rows = [engine.check(Query(k=1, params=params, history=h)).history for h in users.histories]
        index = {item: row for row, item in enumerate(_plain(item_ids))}
        targets = np.array([index.get(target, -1) for target in users.targets], dtype=np.int64)
        return cls(users.split, users.histories, np.stack([row for row in rows if row is not None]), targets)

    def first(self, count: int) -> UserSet:
        """The first `count` of them."""
        return UserSet(self.split, self.history_ids[:count], self.histories[:count], self.targets[:count])

    def __len__(self) -> int:
        return len(self.targets)


class Contender(Protocol):
    """One line of the comparison. Answers are for one user set at a time, by rows of it."""

    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str:
        """What a reader should know of it: versions, how its cost is counted."""
        ...

    @property
    def fingerprint(self) -> str:
        """All that decides its answers, besides setting, version, users and code: libraries, vectors."""
        ...

    @property
    def settings(self) -> Sequence[Setting]:
        """The whole sweep."""
        ...

    def answers(self, setting: Setting, users: UserSet, k: int) -> list[Found]:
        """The best k for every user, with exact counts; not to be timed."""
        ...

    def latencies_s(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> Float64[np.ndarray, " requests"]:
        """Seconds of each of some requests for these users, one in flight, after a warm-up."""
        ...

    def saturated_qps(
        self, setting: Setting, users: UserSet, k: int, rows: Sequence[int], budget: TimingBudget
    ) -> float:
        """Answers a second in a closed loop that keeps every core busy, after a warm-up."""
        ...


def _word(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def _plain(item_ids: Sequence[ItemId] | np.ndarray) -> list[ItemId]:
    return item_ids.tolist() if isinstance(item_ids, np.ndarray) else list(item_ids)
