"""One suite for every user store: a newcomer adds a line to STORES. Redis is a real one."""

from __future__ import annotations

import asyncio
import functools
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from fake_engine import PATIENCE_S
from redis_server import RedisServer

from nann.service.user_store import (
    LiveHistory,
    MemoryUserStore,
    SqliteUserStore,
    UserStore,
    open_user_store,
)

LIMIT = 5


async def _sqlite(directory: Path) -> UserStore:
    return await SqliteUserStore.open(directory / "users.sqlite3", history_limit=LIMIT)


@contextmanager
def _redis(directory: Path) -> Iterator[str]:
    server = RedisServer(directory)
    try:
        yield server.url
    finally:
        server.stop()


# Name -> what makes a place to keep events in a directory, for as long as it is open.
STORES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "memory": lambda _directory: nullcontext("memory"),
    "sqlite": lambda directory: nullcontext(str(directory / "users.sqlite3")),
    "redis": _redis,
}


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[UserStore]:
    with STORES[request.param](tmp_path) as location:
        opened = await open_user_store(location, history_limit=LIMIT, timeout_s=PATIENCE_S)
        yield opened
        await opened.close()


async def test_a_user_never_heard_of_is_empty(store: UserStore) -> None:
    assert await store.get_many(["nobody"]) == [LiveHistory()]
    assert await store.get_many([]) == []


async def test_events_come_back_oldest_first_over_several_calls(store: UserStore) -> None:
    await store.append("u", [3, 1])
    await store.append("u", [2])
    assert await store.get_many(["u"]) == [LiveHistory((3, 1, 2))]


async def test_many_users_come_back_in_the_order_asked_and_may_repeat(store: UserStore) -> None:
    await store.append("a", [1])
    await store.append("b", [2])
    found = await store.get_many(["b", "nobody", "a", "b"])
    assert [live.item_ids for live in found] == [(2,), (), (1,), (2,)]


@pytest.mark.parametrize("item_id", [0, -1, 2**63 - 1, -(2**63), "7", "007", "1e3", "Zürich 🎬", " x "])
async def test_item_ids_keep_their_type_and_value(store: UserStore, item_id: int | str) -> None:
    await store.append("u", [item_id])
    (live,) = await store.get_many(["u"])
    assert live.item_ids == (item_id,)
    assert type(live.item_ids[0]) is type(item_id)


@pytest.mark.parametrize("user_id", ["42", "042", "4.2e1", "Ωμέγα", "a'b\"c; DROP TABLE events", "%"])
async def test_user_names_are_text_and_nothing_else(store: UserStore, user_id: str) -> None:
    await store.append(user_id, [1])
    assert [live.item_ids for live in await store.get_many([user_id, "42x"])] == [(1,), ()]


async def test_only_the_newest_are_kept(store: UserStore) -> None:
    await store.append("u", [1, 2, 3])
    await store.append("u", [4, 5, 6, 7])
    await store.append("v", list(range(100)))
    assert [live.item_ids for live in await store.get_many(["u", "v"])] == [
        (3, 4, 5, 6, 7),
        (95, 96, 97, 98, 99),
    ]


async def test_repeats_are_events_too(store: UserStore) -> None:
    await store.append("u", [9, 9])
    await store.append("u", [9])
    assert (await store.get_many(["u"]))[0].item_ids == (9, 9, 9)


async def test_no_events_change_nothing(store: UserStore) -> None:
    await store.append("u", [])
    assert await store.get_many(["u"]) == [LiveHistory()]


async def test_deletion_forgets_the_events_and_hides_the_base_for_good(store: UserStore) -> None:
    await store.append("u", [1, 2])
    await store.append("other", [8])
    await store.delete("u")
    assert await store.get_many(["u", "other"]) == [LiveHistory((), True), LiveHistory((8,))]
    await store.append("u", [3])
    assert await store.get_many(["u"]) == [LiveHistory((3,), base_hidden=True)]
    await store.delete("u")
    await store.delete("never seen")
    assert await store.get_many(["u", "never seen"]) == [LiveHistory((), True)] * 2


async def test_the_oldest_goes_first_whatever_is_in_it(store: UserStore) -> None:
    await store.append("u", ["a", 2])
    await store.append("u", [3, 4, 5])
    assert (await store.get_many(["u"]))[0].item_ids == ("a", 2, 3, 4, 5)
    await store.append("u", ["line\nfeed, comma"])
    assert (await store.get_many(["u"]))[0].item_ids == (2, 3, 4, 5, "line\nfeed, comma")


async def test_concurrent_writers_lose_nothing(store: UserStore) -> None:
    await asyncio.gather(*(store.append(f"u{n % 20}", [n]) for n in range(100)))
    found = await store.get_many([f"u{n}" for n in range(20)])
    # Nobody waited for anybody, so no order among the calls is promised.
    assert [sorted(live.item_ids) for live in found] == [list(range(n, 100, 20)) for n in range(20)]


# What only a store on a disk can promise.


async def test_sqlite_events_survive_a_restart(tmp_path: Path) -> None:
    first = await _sqlite(tmp_path)
    await first.append("u", [1, "x"])
    await first.delete("gone")
    await first.close()
    second = await _sqlite(tmp_path)
    assert await second.get_many(["u", "gone"]) == [LiveHistory((1, "x")), LiveHistory((), True)]
    await second.close()


WRITER = """
import asyncio, sys
from nann.service.user_store import SqliteUserStore

async def main():
    store = await SqliteUserStore.open(sys.argv[1], history_limit=10**6)
    n = 0
    while True:
        await store.append("u", [n])
        print(n, flush=True)
        n += 1

asyncio.run(main())
"""


def _acknowledged_before_kill(path: Path) -> int:
    """Write one event after another in a process killed in the act; the last it acknowledged."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    with process.stdout as acknowledgements:  # type: ignore[union-attr]
        for line in acknowledgements:
            if int(line) >= 20:
                break
        process.kill()
        rest = [int(line) for line in acknowledgements]
    assert process.wait() == -signal.SIGKILL
    return rest[-1] if rest else 20


async def test_sqlite_acknowledged_events_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "users.sqlite3"
    acknowledged = _acknowledged_before_kill(path)
    store = await SqliteUserStore.open(path, history_limit=10**6)
    (live,) = await store.get_many(["u"])
    await store.close()
    assert live.item_ids == tuple(range(len(live.item_ids)))
    assert len(live.item_ids) > acknowledged


async def test_sqlite_is_shared_by_two_connections(tmp_path: Path) -> None:
    one, two = await _sqlite(tmp_path), await _sqlite(tmp_path)
    await asyncio.gather(*(s.append("u", [n]) for n, s in enumerate([one, two])))
    assert sorted((await one.get_many(["u"]))[0].item_ids) == [0, 1]
    assert await one.get_many(["u"]) == await two.get_many(["u"])
    await one.close()
    await two.close()


async def test_sqlite_writes_that_wait_share_a_commit(tmp_path: Path) -> None:
    store = await SqliteUserStore.open(tmp_path / "users.sqlite3", history_limit=1000)
    commits: list[str] = []
    await store._writer.run(lambda connection: connection.set_trace_callback(commits.append))
    await asyncio.gather(*(store.append("u", [n]) for n in range(50)))
    assert (await store.get_many(["u"]))[0].item_ids == tuple(range(50))
    assert 1 <= commits.count("COMMIT") <= 2
    await store.close()


async def test_sqlite_a_failed_read_harms_no_later_one(tmp_path: Path) -> None:
    store = await SqliteUserStore.open(tmp_path / "users.sqlite3", history_limit=LIMIT)
    await store.append("u", [1])
    await store._writer.run(lambda connection: connection.execute("ALTER TABLE deleted_users RENAME TO d"))
    with pytest.raises(OSError, match="deleted_users"):
        await store.get_many(["u"])
    await store._writer.run(lambda connection: connection.execute("ALTER TABLE d RENAME TO deleted_users"))
    assert await store.get_many(["u"]) == [LiveHistory((1,))]
    await store.close()


async def test_sqlite_reads_wait_for_no_writer(tmp_path: Path) -> None:
    store = await SqliteUserStore.open(tmp_path / "users.sqlite3", history_limit=LIMIT)
    await store.append("u", [1])
    busy, done = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        busy.set()
        assert done.wait(PATIENCE_S)
        connection.rollback()

    holding = asyncio.create_task(store._writer.run(hold))
    assert await asyncio.to_thread(busy.wait, PATIENCE_S)
    assert await store.get_many(["u"]) == [LiveHistory((1,))]
    done.set()
    await holding
    await store.close()


async def test_sqlite_failed_write_is_told_to_every_waiter_and_stores_nothing(tmp_path: Path) -> None:
    store = await _sqlite(tmp_path)
    await store.append("u", [1])
    too_large: list[int | str] = [2**64]
    outcomes = await asyncio.gather(
        store.append("u", [2]),
        store.append("u", too_large),
        store.append("u", [3]),
        return_exceptions=True,
    )
    failed = [outcome for outcome in outcomes if outcome is not None]
    assert failed and all(isinstance(outcome, OSError) for outcome in failed)
    assert len({id(outcome) for outcome in failed}) == len(failed)
    await store.append("u", [4])
    (live,) = await store.get_many(["u"])
    acknowledged = {n for n, outcome in zip((2, None, 3), outcomes, strict=True) if outcome is None}
    assert set(live.item_ids) == {1, 4} | acknowledged
    await store.close()


async def test_sqlite_refuses_a_file_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite3"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE things (x)")
    connection.commit()
    connection.close()
    with pytest.raises(OSError, match="another program"):
        await SqliteUserStore.open(path, history_limit=LIMIT)


async def test_sqlite_refuses_a_newer_format(tmp_path: Path) -> None:
    await (await _sqlite(tmp_path)).close()
    connection = sqlite3.connect(tmp_path / "users.sqlite3")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(OSError, match="expected format 1, found 99"):
        await _sqlite(tmp_path)


async def test_sqlite_refuses_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "users.sqlite3").write_text("not a database " * 100)
    with pytest.raises(OSError, match="'memory'"):
        await _sqlite(tmp_path)


async def test_the_location_chooses_the_store(tmp_path: Path) -> None:
    opened = functools.partial(open_user_store, history_limit=LIMIT, timeout_s=PATIENCE_S)
    memory = await opened("memory")
    disk = await opened(str(tmp_path / "x.sqlite3"))
    assert (type(memory), type(disk)) == (MemoryUserStore, SqliteUserStore)
    await memory.close()
    await disk.close()
    with pytest.raises(OSError, match="unable to open"):
        await opened(str(tmp_path / "absent" / "x.sqlite3"))
    with pytest.raises(OSError, match="no store at postgres://"):
        await opened("postgres://me:hunter2@host/db")
