from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import DEFAULT_PARAMS, FakeEngine, settle

from nann.engine.errors import (
    BackendError,
    DeadlineExceeded,
    InvalidQuery,
    NotReady,
    RetrievalError,
    Unavailable,
    UnknownModel,
    UnknownUser,
    UnknownVersion,
)
from nann.engine.types import SearchParams
from nann.service.errors import InternalError
from nann.service.health import Health
from nann.service.metrics import Metrics
from nann.service.registry import Registry
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings
from nann.service.types import ParamOverrides, RetrieveReply, RetrieveRequest, UserProfile
from nann.service.user_store import LiveHistory, MemoryUserStore


class CountingStore(MemoryUserStore):
    def __init__(self) -> None:
        super().__init__(history_limit=100)
        self.reads: list[list[str]] = []
        self.broken = False

    async def get_many(self, user_ids: Sequence[str]) -> list[LiveHistory]:
        self.reads.append(list(user_ids))
        if self.broken:
            raise OSError("disk on fire")
        return await super().get_many(user_ids)

    async def append(self, user_id: str, item_ids: Sequence[int | str]) -> None:
        if self.broken:
            raise OSError("disk on fire")
        await super().append(user_id, item_ids)


class World:
    def __init__(self, directory: Path, engine: FakeEngine, **settings: Any) -> None:
        (directory / "nann" / "3").mkdir(parents=True, exist_ok=True)
        self.engine = engine
        self.settings = Settings(repository=directory, **settings)
        self.store = CountingStore()
        self.health = Health()
        self.metrics = Metrics()
        self.registry = Registry(self.settings, self.metrics, lambda _path: engine)  # type: ignore[arg-type,return-value]
        self.service = RetrievalService(
            self.registry, self.store, self.settings, health=self.health, metrics=self.metrics
        )

    async def retrieve(self, **request: Any) -> RetrieveReply:
        return await self.service.retrieve(RetrieveRequest(**request))

    @property
    def asked(self) -> Any:
        """The engine's last query."""
        return self.engine.checked[-1]


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[World] = []

    async def make(engine: FakeEngine | None = None, **settings: Any) -> World:
        world = World(tmp_path, engine or FakeEngine(version=3), **settings)
        made.append(world)
        await world.registry.load()
        world.health.loaded()
        return world

    yield make
    for world in made:
        world.engine.gate.set()
        await world.registry.close()


def codes(reply: RetrieveReply) -> list[str]:
    return [note.code for note in reply.notes]


# Who asks


async def test_a_known_user_is_asked_for_with_base_then_live_history(worlds: Any) -> None:
    world = await worlds()
    await world.service.record_events(1, [13, 14])
    reply = await world.retrieve(user_id=1, k=5)
    assert world.asked.history == (10, 11, 12, 13, 14)
    assert world.asked.seen == (10, 11, 12, 13, 14)
    assert list(reply.hits.item_ids) == [0, 1, 2, 3, 4]
    assert (reply.model, reply.version) == ("nann", 3)
    assert set(reply.timings_ms) == {"queue", "search", "total"}
    assert reply.timings_ms["total"] >= reply.timings_ms["search"] >= 0


async def test_a_user_of_the_live_store_alone_is_known(worlds: Any) -> None:
    world = await worlds()
    await world.service.record_events(77, [5])
    await world.retrieve(user_id=77)
    assert world.asked.history == (5,)


@pytest.mark.parametrize("user_id", [99, "99", "nobody", "01", 2**80])
async def test_an_unknown_user_is_an_error(worlds: Any, user_id: int | str) -> None:
    world = await worlds()
    with pytest.raises(UnknownUser):
        await world.retrieve(user_id=user_id)
    with pytest.raises(UnknownUser):
        await world.service.user(user_id)
    with pytest.raises(UnknownUser):
        await world.service.delete_user(user_id)


@pytest.mark.parametrize(("kind", "same"), [("int", [1, "1"]), ("str", [1, "1"])])
async def test_a_number_and_its_text_name_the_same_user(worlds: Any, kind: str, same: list[Any]) -> None:
    world = await worlds(FakeEngine(version=3, user_id_type=kind))
    await world.service.record_events(same[0], [7])
    for user_id in same:
        profile = await world.service.user(user_id)
        assert profile == UserProfile(user_id, (10, 11, 12, 7), 3, 1)


@pytest.mark.parametrize("user_id", ["", "x" * 513, "a\0b", "\ud800"])
async def test_a_malformed_user_id_is_refused(worlds: Any, user_id: str) -> None:
    world = await worlds()
    for call in (
        world.retrieve(user_id=user_id),
        world.service.user(user_id),
        world.service.delete_user(user_id),
        world.service.record_events(user_id, [1]),
    ):
        with pytest.raises(InvalidQuery, match="user_id"):
            await call


async def test_a_history_is_taken_as_given(worlds: Any) -> None:
    world = await worlds()
    reply = await world.retrieve(history=[0, 2, 5000], k=3)
    assert world.asked.history == [0, 2, 5000]
    assert list(reply.hits.item_ids) == [1, 3, 4]
    assert codes(reply) == ["unknown_history_items"]
    assert world.store.reads == []


async def test_a_comm_seq_has_no_seen_items(worlds: Any) -> None:
    world = await worlds()
    comm_seq = np.zeros(3200, np.float16)
    reply = await world.retrieve(comm_seq=comm_seq, k=3)
    assert world.asked.comm_seq is comm_seq
    assert (world.asked.seen, world.asked.history, codes(reply)) == ((), None, [])
    reply = await world.retrieve(comm_seq=comm_seq, k=3, exclude_seen=True)
    assert (world.asked.seen, codes(reply)) == ((), ["seen_unknown"])


@pytest.mark.parametrize(
    "who",
    [
        {},
        {"user_id": 1, "history": [1]},
        {"history": [1], "comm_seq": np.zeros(3200)},
        {"user_id": 1, "history": [1], "comm_seq": np.zeros(3200)},
    ],
)
async def test_exactly_one_way_to_say_who(worlds: Any, who: dict[str, Any]) -> None:
    world = await worlds()
    with pytest.raises(InvalidQuery, match="exactly one of user_id, history and comm_seq"):
        await world.retrieve(**who)


# Seen items and empty histories


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("asked", [None, True, False])
async def test_whether_seen_items_are_left_out(worlds: Any, default: bool, asked: bool | None) -> None:
    world = await worlds(exclude_seen_default=default)
    await world.retrieve(user_id=1, exclude_seen=asked)
    assert bool(world.asked.seen) is (default if asked is None else asked)


@pytest.mark.parametrize("history", [[], [5000, 6000]])
async def test_a_history_without_a_known_item_gets_popular_items_marked(
    worlds: Any, history: list[int]
) -> None:
    world = await worlds()
    reply = await world.retrieve(history=history, k=2, exclude_ids=[0])
    assert list(reply.hits.item_ids) == [1, 2]
    assert codes(reply) == ["popular_fallback", "empty_history"]
    assert world.engine.batches == []


async def test_or_an_error_when_so_set(worlds: Any) -> None:
    world = await worlds(empty_history="error")
    with pytest.raises(InvalidQuery, match="no item that this model knows"):
        await world.retrieve(history=[])


# Rules of the query


async def test_the_query_carries_what_was_asked(worlds: Any) -> None:
    world = await worlds()
    reply = await world.retrieve(
        history=[1],
        k=2,
        profile="fast",
        params=ParamOverrides(max_steps=9),
        include_ids=[4, 5, 6],
        exclude_ids=[5],
        filter={"category": 3},
        strict=True,
        with_attributes=True,
    )
    query = world.asked
    assert query.params == SearchParams(ef=100, beam_width=32, max_steps=9)
    assert (query.include, query.exclude, query.filter, query.strict) == (
        [4, 5, 6],
        [5],
        {"category": 3},
        True,
    )
    assert list(reply.hits.item_ids) == [4, 6]
    assert reply.hits.attributes == [{"title": "title of 4"}, {"title": "title of 6"}]


async def test_what_nothing_was_said_of_has_its_default(worlds: Any) -> None:
    world = await worlds()
    await world.retrieve(history=[1])
    assert (world.asked.k, world.asked.params) == (200, DEFAULT_PARAMS)
    await world.retrieve(history=[1], params=ParamOverrides(level_topn=(1, 2, 3, 4, 5, 6)))
    assert world.asked.k == 6


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 1001}, "k must be"),
        ({"k": 7, "params": ParamOverrides(level_topn=(1, 2, 3, 4, 5, 6))}, "more than the last"),
        ({"profile": "warp"}, "unknown profile"),
        ({"history": list(range(21))}, "history holds 21 ids, more than 20"),
        ({"include_ids": list(range(21))}, "include_ids holds 21"),
        ({"exclude_ids": list(range(21))}, "exclude_ids holds 21"),
        ({"timeout_ms": 0.0}, "timeout_ms"),
        ({"timeout_ms": float("nan")}, "timeout_ms"),
        ({"history": [5000], "strict": True}, "unknown item ids"),
    ],
)
async def test_a_bad_query_is_refused_before_batching(
    worlds: Any, request_fields: dict[str, Any], message: str
) -> None:
    world = await worlds(max_ids=20)
    with pytest.raises(InvalidQuery, match=message):
        await world.retrieve(**{"history": [1], **request_fields})
    assert world.engine.batches == []


async def test_models_and_versions_are_resolved(worlds: Any) -> None:
    world = await worlds()
    assert (await world.retrieve(history=[1], model="nann", version=3)).version == 3
    with pytest.raises(UnknownModel):
        await world.retrieve(history=[1], model="none")
    with pytest.raises(UnknownVersion):
        await world.retrieve(history=[1], version=4)
    assert (world.service.default_model, world.service.models()) == ("nann", ("nann",))
    assert world.service.version_status("nann")[0].state == "AVAILABLE"
    metadata = world.service.metadata()
    assert (metadata.model, metadata.version, metadata.history_length, metadata.input_dim) == (
        "nann",
        3,
        50,
        64,
    )
    assert metadata.profiles == ("balanced", "exact", "fast")


async def test_nothing_answers_before_a_model_is_loaded(tmp_path: Path) -> None:
    service = World(tmp_path, FakeEngine()).service
    for call in (
        service.retrieve(RetrieveRequest(history=[1])),
        service.user(1),
        service.delete_user(1),
        service.record_events(1, [1]),
    ):
        with pytest.raises(NotReady):
            await call


# Deadlines


async def test_the_earliest_deadline_holds(worlds: Any) -> None:
    world = await worlds(default_timeout_ms=5_000)
    deadline_s = world.service._deadline_s
    at = 100.0
    assert deadline_s(RetrieveRequest(), at, None) == 105.0
    assert deadline_s(RetrieveRequest(), at, 120.0) == 120.0
    assert deadline_s(RetrieveRequest(timeout_ms=50), at, None) == pytest.approx(100.05)
    assert deadline_s(RetrieveRequest(timeout_ms=60_000), at, None) == 160.0
    assert deadline_s(RetrieveRequest(timeout_ms=60_000), at, 101.0) == 101.0


async def test_a_deadline_that_has_passed_is_an_error(worlds: Any) -> None:
    world = await worlds()
    with pytest.raises(DeadlineExceeded):
        await world.service.retrieve(RetrieveRequest(history=[1]), deadline_s=time.monotonic() - 1)
    assert world.engine.batches == []


# Several queries in one call


async def test_each_query_of_a_call_fails_alone_and_users_are_read_in_one_round_trip(worlds: Any) -> None:
    world = await worlds()
    results = await world.service.retrieve_many(
        [
            RetrieveRequest(user_id=1, k=1),
            RetrieveRequest(user_id=99),
            RetrieveRequest(history=[1], k=0),
            RetrieveRequest(user_id=2, k=2),
            RetrieveRequest(user_id=""),
            RetrieveRequest(user_id=1, k=3),
        ]
    )
    kinds = [type(result) for result in results]
    assert kinds == [RetrieveReply, UnknownUser, InvalidQuery, RetrieveReply, InvalidQuery, RetrieveReply]
    assert [len(r.hits.item_ids) for r in results if isinstance(r, RetrieveReply)] == [1, 2, 3]
    assert world.store.reads == [["1", "2", "99"]]
    assert [len(batch) for batch in world.engine.batches] == [3]


async def test_a_bug_in_one_query_is_that_querys_alone(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = await worlds()
    check = world.engine.check

    def buggy(query: Any) -> Any:
        if query.k == 13:
            raise ZeroDivisionError("oops")
        return check(query)

    monkeypatch.setattr(world.engine, "check", buggy)
    bad, good = await world.service.retrieve_many(
        [RetrieveRequest(history=[1], k=13), RetrieveRequest(history=[1], k=2)]
    )
    assert isinstance(bad, InternalError) and isinstance(bad.__cause__, ZeroDivisionError)
    assert isinstance(good, RetrieveReply)


@pytest.mark.parametrize("n", [0, 4])
async def test_a_call_holds_some_queries_and_not_too_many(worlds: Any, n: int) -> None:
    world = await worlds(max_queries_per_call=3)
    with pytest.raises(InvalidQuery, match=f"1 to 3 queries, not {n}"):
        await world.service.retrieve_many([RetrieveRequest(history=[1])] * n)


# The life of a user


async def test_events_are_recorded_shown_and_forgotten(worlds: Any) -> None:
    world = await worlds()
    assert await world.service.record_events("1", [13, 14]) == 2
    assert await world.service.user(1) == UserProfile(1, (10, 11, 12, 13, 14), 3, 2)
    await world.service.delete_user(1)
    for call in (world.service.user(1), world.retrieve(user_id=1), world.service.delete_user(1)):
        with pytest.raises(UnknownUser):
            await call
    await world.service.record_events(1, [50])
    assert await world.service.user(1) == UserProfile(1, (50,), 0, 1)  # the base stays hidden


@pytest.mark.parametrize(
    ("kind", "events", "message"),
    [
        ("int", [], "1 to 20 events"),
        ("int", list(range(21)), "1 to 20 events"),
        ("int", [1, "2"], "of type int"),
        ("str", ["a", 2], "of type str"),
        ("int", [2**63], "64 bits"),
        ("str", [""], "item_id"),
        ("str", ["\ud800"], "Unicode"),
    ],
)
async def test_bad_events_are_refused_whole(worlds: Any, kind: str, events: list[Any], message: str) -> None:
    world = await worlds(FakeEngine(version=3, item_id_type=kind), max_ids=20)
    with pytest.raises(InvalidQuery, match=message):
        await world.service.record_events(77, events)
    with pytest.raises(UnknownUser):
        await world.service.user(77)


async def test_a_name_that_the_model_could_never_know_is_no_user(worlds: Any) -> None:
    world = await worlds()
    with pytest.raises(InvalidQuery, match="integers"):
        await world.service.record_events("alice", [1])


async def test_without_the_store_a_user_is_answered_from_the_base_history_and_told(worlds: Any) -> None:
    world = await worlds()
    await world.service.record_events(1, [5])
    await world.service.record_events(77, [5])
    world.store.broken = True
    reply, no_base, by_history = await world.service.retrieve_many(
        [RetrieveRequest(user_id=1), RetrieveRequest(user_id=77), RetrieveRequest(history=[1])]
    )
    assert [note.code for note in reply.notes] == ["live_history_missing"]
    assert type(no_base) is Unavailable  # the store may know them: this is no 404
    assert by_history.notes == ()
    for call in (
        world.service.record_events(1, [1]),
        world.service.user(1),
        world.service.delete_user(1),
    ):
        with pytest.raises(Unavailable, match="user store"):
            await call
    sample = world.metrics.registry.get_sample_value
    name = "nann_user_store_failures_total"
    assert [sample(name, {"operation": o}) for o in ("read", "append")] == [3, 1]
    world.store.broken = False
    assert (await world.retrieve(user_id=1)).notes == ()
    assert world.asked.history == (10, 11, 12, 5)
    assert sample("nann_user_store_duration_seconds_count", {"operation": "append"}) == 2


async def test_an_outage_of_the_store_is_logged_once_and_so_is_its_end(
    worlds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    world = await worlds()
    for broken in (True, True, True, False, False, True):
        world.store.broken = broken
        await world.retrieve(user_id=1)
    told = [line for line in capsys.readouterr().out.splitlines() if "user store" in line]
    assert ["fails" in line for line in told] == [True, False, True]


async def test_a_broken_store_is_unavailable_and_harms_only_those_who_need_it(worlds: Any) -> None:
    world = await worlds(user_store_failure="error")
    world.store.broken = True
    for call in (
        world.retrieve(user_id=1),
        world.service.record_events(1, [1]),
        world.service.user(1),
    ):
        with pytest.raises(Unavailable):
            await call
    by_user, by_history = await world.service.retrieve_many(
        [RetrieveRequest(user_id=1), RetrieveRequest(history=[1])]
    )
    assert isinstance(by_user, Unavailable)
    assert isinstance(by_history, RetrieveReply)


# Failing engines


@pytest.mark.parametrize(
    ("error", "seen"), [(BackendError("lost"), BackendError), (KeyError("x"), InternalError)]
)
async def test_a_failed_search_takes_readiness_away_until_a_real_search_succeeds(
    worlds: Any, error: Exception, seen: type[RetrievalError]
) -> None:
    world = await worlds()
    world.engine.search_error = error
    with pytest.raises(seen):
        await world.retrieve(history=[1])
    assert not world.health.ready
    with pytest.raises(seen):
        await world.service.probe("nann", 3)
    assert not world.health.ready
    world.engine.search_error = None
    await world.service.probe("nann", 3)
    assert world.health.ready
    assert world.asked.history == [0]  # a walk from a real item, through the batcher


async def test_a_lost_device_takes_neither_readiness_nor_more_than_its_batches(worlds: Any) -> None:
    devices = ("cuda:0", "cuda:0", "cuda:1", "cuda:1")
    world = await worlds(FakeEngine(version=3, lanes=4, lane_devices=devices))
    world.engine.broken_devices = {"cuda:0"}

    async def sixteen() -> list[Any]:
        calls = (world.retrieve(history=[n]) for n in range(16))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second = await sixteen(), await sixteen()
    lost = [error for error in first if isinstance(error, BaseException)]
    assert 1 <= len(lost) <= 8  # what was on its two lanes
    assert {str(error) for error in lost} == {"cuda:0 is lost"}
    assert all(isinstance(reply, RetrieveReply) for reply in second)
    assert (world.health.ready, world.health.doubted) == (True, [("nann", 3)])
    sample = world.metrics.registry.get_sample_value
    assert sample("nann_lanes_doubted", {"model": "nann", "version": "3"}) == 2
    with pytest.raises(BackendError, match="cuda:0 is lost"):
        await world.service.probe("nann", 3)
    assert world.health.ready
    world.engine.broken_devices = set()
    await world.service.probe("nann", 3)
    assert (world.health.doubted, sample("nann_lanes_doubted", {"model": "nann", "version": "3"})) == ([], 0)


async def test_readiness_goes_with_the_last_device_and_comes_back_with_the_first(worlds: Any) -> None:
    world = await worlds(FakeEngine(version=3, lanes=2, lane_devices=("cuda:0", "cuda:1")))
    world.engine.broken_devices = {"cuda:0", "cuda:1"}
    for _ in range(3):
        with pytest.raises(BackendError):  # at once, and not at the deadline
            await world.retrieve(history=[1])
    assert (world.health.ready, world.health.impaired_models) == (False, {"nann"})
    world.engine.broken_devices = {"cuda:0"}
    with pytest.raises(BackendError, match="cuda:0"):
        await world.service.probe("nann", 3)
    assert world.health.ready
    assert len((await world.retrieve(history=[1])).hits.item_ids) == 200


async def test_a_bad_query_takes_no_readiness(worlds: Any) -> None:
    world = await worlds()
    with pytest.raises(InvalidQuery):
        await world.retrieve(comm_seq=np.full(3200, np.nan))
    assert world.health.ready


async def test_searches_are_measured_and_popular_answers_are_not(worlds: Any) -> None:
    world = await worlds()
    await world.retrieve(history=[1])
    await world.retrieve(history=[])
    sample = world.metrics.registry.get_sample_value
    assert (sample("nann_items_scored_count", {}), sample("nann_items_scored_sum", {})) == (1, 100)
    assert sample("nann_search_duration_seconds_count", {"model": "nann"}) == 1


async def test_an_abandoned_request_gives_its_lease_back(worlds: Any) -> None:
    world = await worlds(FakeEngine(version=3, lanes=1))
    world.engine.gate.clear()
    task = asyncio.create_task(world.retrieve(history=[1]))
    await settle()
    assert world.registry.served()._leases == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.registry.served()._leases == 0
