"""Live histories in one SQLite file, through a connection for reading and one for writing.

Write-ahead log with ``synchronous=FULL``: every commit is synced before it is acknowledged, so an
acknowledged event outlives ``kill -9`` and the loss of power (``NORMAL`` would lose it with the
power, sqlite.org/pragma.html#pragma_synchronous). The price, one sync a call, is shared: the calls
that wait while one commit runs are committed together by the next; reads wait for no commit.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nann.service.user_store.base import LiveHistory

if TYPE_CHECKING:
    from nann.engine.types import ItemId

__all__ = ["SqliteUserStore"]

# "NANN" in ASCII, as SQLite's application_id: tells our files from anybody else's.
_APPLICATION_ID = 0x4E414E4E
_FORMAT = 1
_BUSY_TIMEOUT_S = 5.0

# `item_id` has no declared type on purpose: a column without affinity keeps 7 and '7' apart.
_SCHEMA = f"""
CREATE TABLE events (user_id TEXT NOT NULL, event INTEGER PRIMARY KEY, item_id NOT NULL);
CREATE INDEX events_by_user ON events (user_id, event);
CREATE TABLE deleted_users (user_id TEXT PRIMARY KEY) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_FORMAT};
"""

_T = TypeVar("_T")
_Write = Callable[[sqlite3.Connection], None]


@dataclass(eq=False, slots=True)
class _PendingWrite:
    write: _Write
    done: asyncio.Future[None]


class _Worker:
    """A connection, and the one thread that may use it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"nann-user-store-{name}")
        self._connection: sqlite3.Connection

    async def open(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._connection = await loop.run_in_executor(self._thread, _connect, path)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    async def run(self, call: Callable[[sqlite3.Connection], _T]) -> _T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, call, self._connection)
        except sqlite3.Error as error:
            raise OSError(f"user store: {error}") from error

    async def close(self) -> None:
        await self.run(lambda connection: connection.close())
        self._thread.shutdown()


class SqliteUserStore:
    """A `UserStore` in a file; several processes of one machine may share it."""

    def __init__(self, reader: _Worker, writer: _Worker, history_limit: int) -> None:
        self._reader = reader
        self._writer = writer
        self._history_limit = history_limit
        self._pending: list[_PendingWrite] = []
        self._writing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, path: str | Path, *, history_limit: int) -> SqliteUserStore:
        """Open `path`, making it if it is not there.

        Raises:
            OSError: it cannot be opened or written, or holds something else.
        """
        writer, reader = _Worker("writer"), _Worker("reader")
        await writer.open(Path(path))
        try:
            await reader.open(Path(path))
        except BaseException:
            await writer.close()
            raise
        return cls(reader, writer, history_limit)

    async def get_many(self, user_ids: Sequence[str]) -> list[LiveHistory]:
        return await self._reader.run(functools.partial(self._read, user_ids))

    async def append(self, user_id: str, item_ids: Sequence[ItemId]) -> None:
        newest = list(item_ids)[-self._history_limit :]
        if newest:
            await self._commit(lambda connection: self._insert(connection, user_id, newest))

    async def delete(self, user_id: str) -> None:
        await self._commit(lambda connection: _forget(connection, user_id))

    async def close(self) -> None:
        if self._writing is not None:
            await self._writing
        await self._reader.close()
        await self._writer.close()

    # Writes: those that arrive while a commit runs share the next one.

    async def _commit(self, write: _Write) -> None:
        pending = _PendingWrite(write, asyncio.get_running_loop().create_future())
        self._pending.append(pending)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_pending())
        await pending.done

    async def _write_pending(self) -> None:
        while self._pending:
            group, self._pending = self._pending, []
            error: Exception | None = None
            try:
                await self._writer.run(functools.partial(_write, group))
            except Exception as failure:  # told to every waiter below, or they would wait for ever
                error = failure
            for pending in group:
                if pending.done.done():  # its caller went away; the write stands or falls with the others
                    continue
                if error is None:
                    pending.done.set_result(None)
                else:
                    fresh = OSError(f"nothing was stored: {error}")
                    fresh.__cause__ = error
                    pending.done.set_exception(fresh)

    def _insert(self, connection: sqlite3.Connection, user_id: str, item_ids: Sequence[ItemId]) -> None:
        connection.executemany(
            "INSERT INTO events (user_id, item_id) VALUES (?, ?)",
            [(user_id, item_id) for item_id in item_ids],
        )
        connection.execute(
            "DELETE FROM events WHERE user_id = ?1 AND event <= "
            "(SELECT event FROM events WHERE user_id = ?1 ORDER BY event DESC LIMIT 1 OFFSET ?2)",
            (user_id, self._history_limit),
        )

    def _read(self, user_ids: Sequence[str], connection: sqlite3.Connection) -> list[LiveHistory]:
        among = f"user_id IN ({','.join('?' * len(user_ids))})"
        events: dict[str, list[ItemId]] = {user_id: [] for user_id in user_ids}
        # One transaction, so that a deletion is seen in both tables or in neither.
        connection.execute("BEGIN")
        try:
            for user_id, item_id in connection.execute(
                f"SELECT user_id, item_id FROM events WHERE {among} ORDER BY event", user_ids
            ):
                events[user_id].append(item_id)
            hidden = {
                user_id
                for (user_id,) in connection.execute(
                    f"SELECT user_id FROM deleted_users WHERE {among}", user_ids
                )
            }
        finally:
            connection.rollback()
        return [
            LiveHistory(tuple(events[user_id][-self._history_limit :]), user_id in hidden)
            for user_id in user_ids
        ]


def _write(group: Sequence[_PendingWrite], connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for pending in group:
            pending.write(connection)
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


def _forget(connection: sqlite3.Connection, user_id: str) -> None:
    connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,))
    connection.execute("INSERT OR IGNORE INTO deleted_users (user_id) VALUES (?)", (user_id,))


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            _prepare(connection)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise OSError(f"user store {path}: {error}; name a writable SQLite file or 'memory'") from error
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # a deleted user's events leave the file, too
    connection.execute("BEGIN IMMEDIATE")  # two processes may start on a new file at the same time
    try:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (file_format,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not tables and not application_id:
            for statement in _SCHEMA.strip().split(";\n"):
                connection.execute(statement)
        elif application_id != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it belongs to another program")
        elif file_format != _FORMAT:
            raise sqlite3.DatabaseError(f"expected format {_FORMAT}, found {file_format}")
    except BaseException:
        connection.rollback()
        raise
    connection.commit()
