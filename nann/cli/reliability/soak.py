"""A long time under a mixture of everything: what grows that should not."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import orjson
import typer
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.benchmark_http import HttpClient
from nann.cli.benchmark_targets import Ask, rest_target
from nann.cli.output import JsonOption
from nann.cli.reliability.process import ProcessFigures, process_figures
from nann.cli.reliability.raw import Exchange, grpc_exchange, query_fields, query_message
from nann.cli.reliability.row import print_row
from nann.cli.server_process import RunningServer, running_server
from nann.offline.benchmark.load import (
    OK,
    Load,
    Outcome,
    Sample,
    closed_loop,
    open_loop,
    precise_timer,
    throughput_qps,
)
from nann.offline.benchmark.percentiles import LatencyBlock
from nann.offline.benchmark.users import User, sample_users
from nann.offline.progress import Progress

__all__ = ["Slice", "SoakResult", "measure_soak", "soak_command", "soak_server"]

_USERS = 200
_K = 100
_BATCH = 4
_IN_FLIGHT = 64
_CAPACITY_S = 6.0
_TIMEOUT_S = 30.0
# Each slice has connections of its own, so that whatever a closed connection leaves behind adds up.
_SLICE_S = 20.0
_CLOSING_S = 0.5
_MOST_GROWTH = 0.01


@dataclass(frozen=True, slots=True)
class Slice:
    """The server after some seconds of load, when its callers had closed their connections."""

    figures: ProcessFigures
    compilations: int


@dataclass(frozen=True, slots=True)
class SoakResult:
    """The first tenth of the time warms up; the second is compared with the last."""

    seconds: float
    rate_qps: float
    codes: Counter[str]
    latency: LatencyBlock
    slices: tuple[Slice, ...]

    @property
    def compared(self) -> tuple[Sequence[Slice], Sequence[Slice]]:
        """The slices of the second tenth, and of the last."""
        tenth = max(1, len(self.slices) // 10)
        return self.slices[tenth : 2 * tenth] or self.slices[:1], self.slices[-tenth:]

    @property
    def growth(self) -> float:
        """Memory gained, as a share."""
        first, last = (_median_bytes(some) for some in self.compared)
        return last / first - 1

    @property
    def new_files(self) -> int:
        """File descriptors gained."""
        first, last = ([one.figures.open_files for one in some] for some in self.compared)
        return min(last) - max(first)

    @property
    def compilations(self) -> int:
        """Since the server was ready."""
        return self.slices[-1].compilations - self.slices[0].compilations

    @property
    def kept(self) -> bool:
        return (
            set(self.codes) == {OK}
            and self.growth <= _MOST_GROWTH
            and not self.compilations
            and self.new_files <= 0
        )

    def words(self) -> str:
        """The result in one sentence."""
        first, last = self.compared
        codes = ", ".join(f"{n:,} `{code}`" for code, n in self.codes.most_common())
        return (
            f"{self.seconds / 60:.1f} minutes at {self.rate_qps:.0f} calls/s: {codes}; memory "
            f"{_median_bytes(first) / 2**20:,.1f} MiB in the second tenth, "
            f"{_median_bytes(last) / 2**20:,.1f} in the last ({self.growth:+.2%}); "
            f"{self.compilations} compilations after ready; "
            f"{first[-1].figures.open_files} open files then, {last[-1].figures.open_files} at the end; "
            f"{first[-1].figures.threads} threads, {last[-1].figures.threads} at the end; "
            f"p50 {self.latency.median_us / 1e3:.1f}, p99 {self.latency.p99_us / 1e3:.1f} ms"
        )


def soak_command(
    repository: Annotated[Path, typer.Option(help="A model repository; nothing is written into it.")],
    model: Annotated[str | None, typer.Option(help="Its model, where it has several.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, max=24 * 60, help="How long.")] = 60.0,
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Load, as a share of the capacity.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of users and arrivals.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """A soak: memory, compilations and file descriptors under a mixture of calls."""
    result = measure_soak(repository, model, seconds=60 * minutes, share=share, seed=seed)
    print_row(
        f"A soak of {minutes:g} minutes at {share:.0%} of capacity (REST, gRPC, batches, live events, "
        "refused queries, new connections): memory growth ≤ 1 %, no compilation after ready, no "
        "file-descriptor growth",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


def measure_soak(
    repository: Path, model: str | None, *, seconds: float, share: float, seed: int
) -> SoakResult:
    """Soak a server of its own on `repository`; raises ServerError when it does not start."""
    users = sample_users(find_version(repository, model), limit=_USERS, seed=seed)
    named = [] if model is None else ["--model", model]
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Progress() as progress:
        flags = [*named, "--user-store", str(Path(place, "users.sqlite3"))]
        with running_server(repository, log_path=Path(place, "server.log"), flags=flags) as server:
            with progress.stage("capacity"):
                rate_qps = share * uvloop.run(_capacity(server, users))
            return uvloop.run(
                soak_server(server, users, rate_qps=rate_qps, seconds=seconds, seed=seed, progress=progress)
            )


async def _capacity(server: RunningServer, users: Sequence[User]) -> float:
    load = Load(in_flight=_IN_FLIGHT, warm_up_s=2.0, duration_s=_CAPACITY_S)
    ask = Ask(k=_K, with_attributes=False)
    async with rest_target(server.rest_url, ask, users, timeout_s=_TIMEOUT_S) as target:
        return throughput_qps(load, await closed_loop(target, load))


async def soak_server(
    server: RunningServer,
    users: Sequence[User],
    *,
    rate_qps: float,
    seconds: float,
    seed: int,
    progress: Progress,
    slice_s: float = _SLICE_S,
) -> SoakResult:
    """Offer calls of every kind for so long, in slices that each have their own connections."""
    n_slices = max(1, round(seconds / slice_s))
    slices: list[Slice] = []
    codes: Counter[str] = Counter()
    latencies: list[float] = []
    with progress.stage("soak", total=n_slices, unit="slices") as stage, precise_timer() as wait_until:
        for number in range(n_slices):
            load = Load(rate_qps=rate_qps, warm_up_s=0.0, duration_s=min(slice_s, seconds))
            async with AsyncExitStack() as stack:
                client = HttpClient(server.rest_url, timeout_s=_TIMEOUT_S)
                stack.push_async_callback(client.close)
                call = await stack.enter_async_context(grpc_exchange(server.grpc_url, timeout_s=_TIMEOUT_S))
                mixture = _Mixture(client, call, users)
                samples = await open_loop(mixture, load, seed=seed + number, wait_until=wait_until)
            codes += Counter(sample.outcome.code for sample in samples)
            latencies += _answered_s(samples)
            slices.append(await _look(server))
            stage.advance()
    latency = LatencyBlock.of(latencies)
    if latency is None:
        raise RuntimeError(f"nothing was answered: {dict(codes)}")
    return SoakResult(n_slices * min(slice_s, seconds), rate_qps, codes, latency, tuple(slices))


class _Mixture:
    """Calls of every kind, in turn; the expected refusal of a bad one counts as an answer."""

    def __init__(self, client: HttpClient, call: Exchange, users: Sequence[User]) -> None:
        self._client = client
        self._call = call
        self._users = users
        queries = [query_fields(user, _K) for user in users]
        self._queries = [orjson.dumps(fields) for fields in queries]
        self._messages = [query_message(fields).SerializeToString() for fields in queries]
        self._by_user = [orjson.dumps({"user_id": user.user_id, "k": _K}) for user in users]
        self._batches = [
            orjson.dumps({"queries": [queries[(i + n) % len(queries)] for n in range(_BATCH)]})
            for i in range(len(queries))
        ]
        self._events = [orjson.dumps({"item_ids": list(user.history or ())[-1:]}) for user in users]

    async def send(self, i: int) -> Outcome:
        who, kind = (i // 10) % len(self._users), i % 10
        try:
            if kind < 4:
                await self._call(self._messages[who])
                return Outcome()
            if kind == 4:
                return await self._post(f"/users/{self._users[who].user_id}/events", self._events[who])
            if kind == 5:
                return await self._post("/retrieve", b'{"history": [1], "k": 0}', expected=422)
            bodies = {6: self._batches, 7: self._by_user}.get(kind, self._queries)
            return await self._post("/retrieve", bodies[who])
        except grpc.aio.AioRpcError as error:
            return Outcome(error.code().name.lower())
        except (TimeoutError, OSError, ValueError) as error:
            return Outcome(type(error).__name__)

    async def _post(self, path: str, body: bytes, expected: int = 200) -> Outcome:
        status, _content = await self._client.post(path, body)
        return Outcome() if status == expected else Outcome(f"http_{status}")


async def _look(server: RunningServer) -> Slice:
    await asyncio.sleep(_CLOSING_S)
    client = HttpClient(server.rest_url, timeout_s=_TIMEOUT_S)
    try:
        text = (await client.get("/metrics"))[1].decode()
    finally:
        await client.close()
    await asyncio.sleep(_CLOSING_S)
    line = next(line for line in text.splitlines() if line.startswith("nann_xla_compilations_total "))
    return Slice(process_figures(server.pid), round(float(line.split()[1])))


def _answered_s(samples: Sequence[Sample]) -> list[float]:
    return [sample.latency_s for sample in samples if sample.outcome.code == OK]


def _median_bytes(slices: Sequence[Slice]) -> float:
    return statistics.median(one.figures.resident_bytes for one in slices)
