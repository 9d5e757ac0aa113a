"""An engine without a model, and searches and clocks that tests drive by hand: nothing here sleeps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from nann.engine.errors import BackendError, InvalidQuery
from nann.engine.types import Hits, ItemId, Note, Query, SearchParams, UserId

PATIENCE_S = 10.0  # how long a test waits for something that must happen; never reached when it does


class ManualTime:
    """A clock that stands still until `advance`, with the timers that hang on it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.timers: list[_Timer] = []

    def clock(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> _Timer:
        timer = _Timer(self, self.now_s + delay_s, callback)
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for timer in sorted(self.timers, key=lambda timer: timer.due_s):
            if timer in self.timers and timer.due_s <= self.now_s:
                self.timers.remove(timer)
                timer.callback()


@dataclass(eq=False)
class _Timer:
    time: ManualTime
    due_s: float
    callback: Callable[[], None]

    def cancel(self) -> None:
        if self in self.time.timers:
            self.time.timers.remove(self)


@dataclass(frozen=True)
class FakeQuery:
    """What a batcher needs to know of a query."""

    name: str
    compat: Hashable = "same"
    cost: int = 10


@dataclass(eq=False)
class SearchCall:
    """One call of `GatedSearch`, held on its lane until `finish`."""

    batch: list[Any]
    lane: int
    _gate: threading.Event = field(default_factory=threading.Event)
    _results: list[Any] | None = None
    _error: BaseException | None = None

    def finish(self, *, results: list[Any] | None = None, error: BaseException | None = None) -> None:
        self._results, self._error = results, error
        self._gate.set()

    def wait(self) -> list[Any]:
        if not self._gate.wait(PATIENCE_S):
            raise TimeoutError("the test never finished this call")
        if self._error is not None:
            raise self._error
        return [f"hits of {query.name}" for query in self.batch] if self._results is None else self._results


class GatedSearch:
    """A search that stays on its lane until the test lets it go."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Queue[SearchCall] = asyncio.Queue()

    def __call__(self, batch: Sequence[Any], lane: int) -> list[Any]:
        call = SearchCall(list(batch), lane)
        self._loop.call_soon_threadsafe(self._started.put_nowait, call)
        return call.wait()

    async def next_call(self) -> SearchCall:
        return await asyncio.wait_for(self._started.get(), PATIENCE_S)


async def settle() -> None:
    """Let everything run that is ready to: tasks up to their next wait, and a dispatch after them."""
    for _ in range(10):
        await asyncio.sleep(0)


@dataclass(frozen=True)
class FakePrepared:
    query: Query
    known_history: int | None
    notes: tuple[Note, ...]
    cost: int = 100

    @property
    def compat(self) -> Hashable:
        return (self.query.params, self.query.comm_seq is None)


class FakeEngine:
    """Items 0 … num_items-1 (or ``"item0"`` …), always ranked by their number; users 1 and 2 have histories.

    `search_error` is raised by every search while it is set, a `BackendError` by every search on one of
    the `broken_devices`; `gate` holds searches while it is clear;
    `searching` is set once a lane has one.
    """

    def __init__(
        self,
        *,
        model: str = "nann",
        version: int = 1,
        num_items: int = 1000,
        item_id_type: str = "int",
        user_id_type: str = "int",
        lanes: int = 2,
        max_batch: int = 4,
        max_k: int = 1000,
        profiles: Mapping[str, Mapping[str, Any]] | None = None,
        lane_devices: Sequence[str] | None = None,
    ) -> None:
        self.manifest = SimpleNamespace(
            model_name=model,
            version=version,
            num_items=num_items,
            history_length=50,
            input_dim=64,
            item_id_type=item_id_type,
            user_id_type=user_id_type,
            quality={},
        )
        self.profiles = (
            {
                "fast": {"policy": "best_first", "ef": 100, "beam_width": 32},
                "balanced": {"policy": "best_first", "ef": 300, "beam_width": 64},
                "exact": {"policy": "exhaustive"},
            }
            if profiles is None
            else profiles
        )
        self.n_lanes, self.max_batch, self.max_k = lanes, max_batch, max_k
        self.lane_depth = 1
        self.lane_devices = tuple(lane_devices) if lane_devices is not None else ("cpu",) * lanes
        self.broken_devices: set[str] = set()
        self.n_compilations = 7
        self.lane_process = None
        self.memory_bytes = 0
        self.search_error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.searching = threading.Event()
        self.checked: list[Query] = []
        self.batches: list[list[FakePrepared]] = []
        self.closed = False
        as_user = (lambda n: n) if user_id_type == "int" else str
        self.base: dict[UserId, tuple[ItemId, ...]] = {
            as_user(1): tuple(self._id(n) for n in (10, 11, 12)),
            as_user(2): tuple(self._id(n) for n in (20, 21)),
        }

    def _id(self, number: int) -> ItemId:
        return number if self.manifest.item_id_type == "int" else f"item{number}"

    def _ids(self) -> list[ItemId]:
        return [self._id(number) for number in range(self.manifest.num_items)]

    def check(self, query: Query) -> FakePrepared:
        self.checked.append(query)
        if query.comm_seq is not None:
            width = self.manifest.history_length * self.manifest.input_dim
            if query.comm_seq.shape != (width,) or not np.isfinite(query.comm_seq).all():
                raise InvalidQuery(f"comm_seq must hold {width} finite numbers")
            return FakePrepared(query, None, ())
        known = set(self._ids())
        history = query.history or ()
        n_known = sum(item in known for item in history)
        unknown = len(history) - n_known
        if unknown and query.strict:
            raise InvalidQuery("history: unknown item ids")
        notes = (Note("unknown_history_items", "skipped", unknown),) if unknown else ()
        return FakePrepared(query, n_known, notes)

    def search(
        self,
        batch: Sequence[FakePrepared],
        lane: int,
        probe: Callable[[str], None] | None = None,
    ) -> list[Hits]:
        self.searching.set()
        if not self.gate.wait(PATIENCE_S):
            raise TimeoutError("the test never opened the gate")
        self.batches.append(list(batch))
        if self.search_error is not None:
            raise self.search_error
        if (device := self.lane_devices[lane]) in self.broken_devices:
            raise BackendError(f"{device} is lost")
        return [self._hits(prepared.query, prepared.notes, n_scored=100, steps=3) for prepared in batch]

    def popular(self, query: Query) -> Hits:
        return self._hits(query, (Note("popular_fallback", "popular items"),), n_scored=0, steps=0)

    def user_history(self, user_id: UserId) -> tuple[ItemId, ...] | None:
        return self.base.get(user_id)

    def item_attributes(self, item_id: ItemId) -> Mapping[str, Any] | None:
        return {"title": f"title of {item_id}"} if item_id in self._ids() else None

    def close(self) -> None:
        self.closed = True

    def _hits(self, query: Query, notes: tuple[Note, ...], *, n_scored: int, steps: int) -> Hits:
        allowed = (
            self._ids() if query.include is None else [i for i in self._ids() if i in set(query.include)]
        )
        removed = {*query.seen, *query.exclude}
        item_ids = [item for item in allowed if item not in removed][: query.k]
        return Hits(
            item_ids=item_ids,
            scores=[-float(rank) for rank in range(len(item_ids))],
            n_scored=n_scored,
            steps=steps,
            notes=notes,
            attributes=[{"title": f"title of {i}"} for i in item_ids] if query.with_attributes else None,
            explain={"policy": query.params.policy},
        )


DEFAULT_PARAMS = SearchParams(policy="best_first", ef=300, beam_width=64)
