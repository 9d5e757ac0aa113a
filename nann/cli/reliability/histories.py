"""Killing the server, and killing Redis, under load: what becomes of live histories."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import orjson
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.benchmark_http import HttpClient
from nann.cli.server_process import RunningServer, ServerError, running_server
from nann.engine.artifacts import Artifact
from nann.engine.types import ItemId
from nann.offline.benchmark.load import OK, Load, Outcome, Sample, open_loop, precise_timer
from nann.offline.benchmark.percentiles import LatencyBlock
from nann.offline.benchmark.users import User, sample_users
from nann.offline.progress import Progress

__all__ = ["KillResult", "OutageResult", "measure_kills", "measure_outage"]

_REQUEST_TIMEOUT_S = 30.0
_RECOVERY_TIMEOUT_S = 30.0
_USERS = 200
# Every event of a run must still be there at its end.
_ALL_EVENTS = "10000000"
_MISSING = "live_history_missing"


@dataclass(frozen=True, slots=True)
class KillResult:
    """Events that the servers acknowledged before they were killed, and what was found afterwards."""

    kills: int
    acknowledged: int
    lost: int
    wrong_order: int
    unacknowledged: int

    @property
    def kept(self) -> bool:
        return self.acknowledged > 0 and not self.lost and not self.wrong_order

    def words(self) -> str:
        """The result in one sentence."""
        return (
            f"{self.acknowledged:,} events acknowledged before {self.kills} kills, {self.lost} lost, "
            f"{self.wrong_order} out of order; {self.unacknowledged} more were stored, not yet acknowledged"
        )


def measure_kills(repository: Path, *, store: str, kills: int, writers: int, seconds: float) -> KillResult:
    """Record events from `writers` clients, kill the server, start it again, and look; `kills` times.

    Raises:
        ServerError: a server did not start, or redis-server is not installed.
    """
    version_dir = find_version(repository, None)
    as_text = Artifact.open(version_dir, verify="fast").manifest.item_id_type == "str"
    acknowledged = lost = wrong_order = unacknowledged = 0
    written = [0] * writers  # events of each writer that are, or must be, in its history
    with (
        tempfile.TemporaryDirectory(prefix="nann-reliability-") as place,
        _location(store, Path(place)) as location,
        Progress() as progress,
        progress.stage("kills", total=kills) as stage,
    ):
        flags = ["--user-store", location, "--user-history-limit", _ALL_EVENTS, "--max-ids", _ALL_EVENTS]
        log_path = Path(place, "server.log")
        for _ in range(kills):
            before = sum(written)
            with running_server(repository, log_path=log_path, flags=flags) as server:
                uvloop.run(_write_until_killed(server, written, seconds, as_text=as_text))
            acknowledged += sum(written) - before
            with running_server(repository, log_path=log_path, flags=flags) as server:
                found = uvloop.run(_histories(server.rest_url, writers))
            for writer, history in enumerate(found):
                lost += max(0, written[writer] - len(history))
                unacknowledged += max(0, len(history) - written[writer])
                wrong_order += history != [_item(n, as_text=as_text) for n in range(len(history))]
                written[writer] = len(history)
            stage.advance()
    return KillResult(kills, acknowledged, lost, wrong_order, unacknowledged)


async def _write_until_killed(
    server: RunningServer, written: list[int], seconds: float, *, as_text: bool
) -> None:
    client = HttpClient(server.rest_url, timeout_s=_REQUEST_TIMEOUT_S)

    async def write(writer: int) -> None:
        with suppress(OSError):  # the server is dead
            while True:
                body = orjson.dumps({"item_ids": [_item(written[writer], as_text=as_text)]})
                status, content = await client.post(f"/users/{_user(writer)}/events", body)
                if status != 200:
                    raise RuntimeError(f"an event was refused: {content.decode()}")
                written[writer] += 1

    writing = asyncio.gather(*(write(writer) for writer in range(len(written))))
    await asyncio.sleep(seconds)
    os.kill(server.pid, signal.SIGKILL)
    await writing
    await client.close()


async def _histories(url: str, writers: int) -> list[list[ItemId]]:
    client = HttpClient(url, timeout_s=_REQUEST_TIMEOUT_S)
    found = []
    for writer in range(writers):
        status, content = await client.get(f"/users/{_user(writer)}")
        found.append(orjson.loads(content)["history"] if status == 200 else [])
    await client.close()
    return found


def _user(writer: int) -> int:
    # No data set has such users, so all of their history is live.
    return 9_000_000_000_000_000_000 + writer


def _item(number: int, *, as_text: bool) -> ItemId:
    return str(number) if as_text else number


@dataclass(frozen=True, slots=True)
class OutageResult:
    """What callers noticed: `by_history` and `by_user` are the codes of answers during the outage."""

    by_history: Counter[str]
    by_user: Counter[str]
    expected: str
    failed_outside: int
    before: LatencyBlock
    during: LatencyBlock
    recovery_s: float
    events_kept: bool

    @property
    def kept(self) -> bool:
        return (
            set(self.by_history) == {OK}
            and set(self.by_user) == {self.expected}
            and not self.failed_outside
            and self.recovery_s < _RECOVERY_TIMEOUT_S
            and self.events_kept
        )

    def words(self) -> str:
        """The result in one sentence."""
        return (
            f"during the outage {_words(self.by_history)} of `history` queries and {_words(self.by_user)} of "
            f"`user_id` ones; `history` p50 {_ms(self.before.median_us)}, p99 {_ms(self.before.p99_us)} ms "
            f"before, {_ms(self.during.median_us)} and {_ms(self.during.p99_us)} ms during; "
            f"{self.failed_outside} failed before and after; live events were back {self.recovery_s:.1f} s "
            f"after Redis, {'all' if self.events_kept else 'NOT all'} of those acknowledged"
        )


def measure_outage(
    repository: Path, *, rate_qps: float, seconds: float, failure: str, seed: int
) -> OutageResult:
    """Ask by history and by user, kill Redis, and start it again after a while.

    Raises:
        ServerError: a server did not start, or redis-server is not installed.
    """
    users = sample_users(find_version(repository, None), limit=_USERS, seed=seed)
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Redis(Path(place)) as redis:
        flags = ["--user-store", redis.url, "--user-store-failure", failure]
        with running_server(repository, log_path=Path(place, "server.log"), flags=flags) as server:
            return uvloop.run(_outage(server.rest_url, redis, users, rate_qps, seconds, failure, seed))


class _Asked:
    """Sends /retrieve by history or by user; an answer without live events has a code of its own."""

    def __init__(self, client: HttpClient, subjects: Sequence[dict[str, object]]) -> None:
        self._client = client
        self._bodies = [orjson.dumps({**subject, "k": 100, "with_attributes": False}) for subject in subjects]

    async def send(self, i: int) -> Outcome:
        try:
            status, content = await self._client.post("/retrieve", self._bodies[i % len(self._bodies)])
        except (OSError, ValueError) as error:
            return Outcome(type(error).__name__)
        if status != 200:
            return Outcome(f"http_{status}")
        notes = {note["code"] for note in orjson.loads(content)["notes"]}
        return Outcome(_MISSING if _MISSING in notes else OK)


async def _outage(
    url: str, redis: Redis, users: Sequence[User], rate_qps: float, seconds: float, failure: str, seed: int
) -> OutageResult:
    client = HttpClient(url, timeout_s=_REQUEST_TIMEOUT_S)
    for user in users:
        assert user.history is not None
        await client.post(
            f"/users/{user.user_id}/events", orjson.dumps({"item_ids": list(user.history[-1:])})
        )
    by_history = _Asked(client, [{"history": user.history} for user in users])
    by_user = _Asked(client, [{"user_id": user.user_id} for user in users])
    load = Load(rate_qps=rate_qps / 2, warm_up_s=0.0, duration_s=3 * seconds)
    with precise_timer() as wait_until:
        loads = asyncio.gather(
            open_loop(by_history, load, seed=seed, wait_until=wait_until),
            open_loop(by_user, load, seed=seed + 1, wait_until=wait_until),
        )
        await asyncio.sleep(seconds)
        killed_s = time.perf_counter()
        redis.kill()
        gone_s = time.perf_counter()
        await asyncio.sleep(seconds)
        returning_s = time.perf_counter()
        await asyncio.to_thread(redis.start)
        back_s = time.perf_counter()
        histories, of_users = await loads
    kept = [
        orjson.loads((await client.get(f"/users/{user.user_id}"))[1]).get("n_live") == 1 for user in users
    ]
    await client.close()
    # Those that were under way at the kill or at the return may have either answer.
    behind = [s.done_s - back_s for s in of_users if s.done_s > back_s and s.outcome.code != OK]
    recovered_s = back_s + max(behind, default=0.0)
    calm = [s for s in of_users if s.done_s < killed_s or s.scheduled_s > recovered_s]
    calm += [s for s in histories if s.done_s < killed_s or s.scheduled_s > returning_s]
    during = [s for s in histories if gone_s < s.scheduled_s and s.done_s < returning_s]
    blocks = [
        LatencyBlock.of([s.latency_s for s in some if s.outcome.code == OK])
        for some in ([s for s in histories if s.done_s < killed_s], during)
    ]
    before_block, during_block = blocks
    assert before_block is not None and during_block is not None
    return OutageResult(
        by_history=_codes(during),
        by_user=_codes([s for s in of_users if gone_s < s.scheduled_s and s.done_s < returning_s]),
        expected=_MISSING if failure == "base" else "http_503",
        failed_outside=sum(s.outcome.code != OK for s in calm),
        before=before_block,
        during=during_block,
        recovery_s=recovered_s - back_s,
        events_kept=all(kept),
    )


def _codes(samples: Sequence[Sample]) -> Counter[str]:
    return Counter(sample.outcome.code for sample in samples)


def _words(codes: Counter[str]) -> str:
    return ", ".join(f"{n} `{code}`" for code, n in codes.most_common())


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.1f}"


@contextmanager
def _location(store: str, place: Path) -> Iterator[str]:
    """Where a store of this kind keeps events, for as long as it is open."""
    if store == "sqlite":
        yield str(place / "users.sqlite3")
        return
    with Redis(place) as redis:
        yield redis.url


class Redis:
    """A Redis on a free port that keeps what it acknowledged through `kill`."""

    def __init__(self, place: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise ServerError("there is no redis-server here: apt install redis-server")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port: int = listener.getsockname()[1]
        self._command = [
            *(program, "--bind", "127.0.0.1", "--port", str(self._port), "--dir", str(place)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "everysec"),
        ]
        self._process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return once it takes commands; raises ServerError when it ends instead."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        if not any("Ready to accept connections" in line for line in self._process.stdout):
            self.kill()
            raise ServerError("redis-server did not start")

    def kill(self) -> None:
        """kill -9; returns once it is dead."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Redis:
        self.start()
        return self

    def __exit__(self, *_failure: object) -> None:
        self.kill()
