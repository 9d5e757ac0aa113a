"""How much a server answers when it has as much to do as it can: against its engine, and without one."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import orjson
import typer
import uvloop

from nann.cli.benchmark_engine import engine_queries, find_version, serve_version
from nann.cli.benchmark_targets import Ask
from nann.cli.output import JsonOption
from nann.cli.reliability.few_lanes import LanesOption, lanes_flags, lanes_settings, lanes_words
from nann.cli.reliability.free_engine import free_server
from nann.cli.reliability.process import BusyClock
from nann.cli.reliability.raw import (
    BATCH_RETRIEVE,
    RawTarget,
    batch_failures,
    batch_message,
    grpc_exchange,
    query_fields,
    query_message,
    rest_exchange,
)
from nann.cli.reliability.row import print_row
from nann.cli.server_process import RunningServer, running_server
from nann.engine.search_engine import PreparedQuery, SearchEngine
from nann.offline.benchmark.load import Load, Target, closed_loop, throughput_qps
from nann.offline.benchmark.users import User, sample_users
from nann.offline.progress import Progress
from nann.service.settings import Settings, load_settings

__all__ = [
    "CeilingResult",
    "ThroughputResult",
    "ceiling_command",
    "engine_qps",
    "measure_ceiling",
    "measure_throughput",
    "throughput_command",
]

_USERS = 200
_K = 100
_TIMEOUT_S = 30.0
# Two full batches for each of two lanes: both always find one that waits.
_IN_FLIGHT = 64
_BATCH: int = Settings.model_fields["max_queries_per_call"].default
# Batch calls may fill half of the queue, which is 256 by default.
_BATCHES_IN_FLIGHT = 2
# Dear searches would be refused, of which there are never more than the queue has places.
_NEVER_FULL = ("--queue-work-limit", str(10**12))
_WARM_UP_S = 1.0
_LEAST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Rate:
    """Queries a second of one target, and the processors that the server and the generator took for them."""

    qps: float
    server: float
    generator: float

    @classmethod
    def median(cls, rates: Sequence[Rate]) -> Rate:
        return cls(
            *(statistics.median(getattr(rate, name) for rate in rates) for name in cls.__dataclass_fields__)
        )


async def _saturated(target: Target, server: RunningServer, in_flight: int, seconds: float, per: int) -> Rate:
    clock = BusyClock(server.pid)
    load = Load(in_flight=in_flight, warm_up_s=_WARM_UP_S, duration_s=seconds)
    samples = await closed_loop(target, load)
    busy = clock.read()
    return Rate(per * throughput_qps(load, samples), *busy)


# Service against engine


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """Medians of the rounds; `shares` are those of the ratios within rounds."""

    engine_qps: float
    rates: dict[str, Rate]
    shares: dict[str, float]

    @property
    def kept(self) -> bool:
        return min(self.shares.values()) >= _LEAST_SHARE

    def words(self) -> str:
        """The result in one sentence."""
        served = ", ".join(
            f"{name} {rate.qps:.1f}/s = {self.shares[name]:.1%} (server {rate.server:.2f}, generator "
            f"{rate.generator:.2f} processors)"
            for name, rate in self.rates.items()
        )
        return f"engine alone {self.engine_qps:.1f} queries/s; {served}"


def throughput_command(
    repository: Annotated[Path, typer.Option(help="A model repository; nothing is written into it.")],
    model: Annotated[str | None, typer.Option(help="Its model, where it has several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; engine and service alternate in each.")] = 5,
    seconds: Annotated[float, typer.Option(min=1.0, help="Seconds of each in a round.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Seed of users.")] = 0,
    lanes: LanesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Service throughput against the engine's, at saturation."""
    result = measure_throughput(repository, model, rounds=rounds, seconds=seconds, seed=seed, lanes=lanes)
    print_row(
        "Service throughput ≥ 90 % of the engine's at saturation" + lanes_words(lanes),
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


def measure_throughput(
    repository: Path,
    model: str | None,
    *,
    rounds: int,
    seconds: float,
    seed: int,
    lanes: int | None = None,
) -> ThroughputResult:
    """Full batches on every lane of an engine in this process, and a server of the same settings.

    Raises:
        ServerError: the server did not start.
    """
    from nann.service.registry import engine_loader

    version_dir = find_version(repository, model)
    settings = load_settings(repository=repository, **lanes_settings(lanes))
    users = sample_users(version_dir, limit=_USERS, seed=seed)
    named = [*([] if model is None else ["--model", model]), *lanes_flags(lanes), *_NEVER_FULL]
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Progress() as progress:
        with progress.stage("load and compile"):
            # In this process: nothing of the service stands between it and its lanes.
            engine = engine_loader(settings.model_copy(update={"search_process": False}))(version_dir)
        with running_server(repository, log_path=Path(place, "server.log"), flags=named) as server:
            return uvloop.run(_compare(engine, settings, users, server, rounds, seconds, progress))


async def _compare(
    engine: SearchEngine,
    settings: Settings,
    users: Sequence[User],
    server: RunningServer,
    rounds: int,
    seconds: float,
    progress: Progress,
) -> ThroughputResult:
    served = serve_version(engine, settings)
    queries = engine_queries(served, settings, Ask(k=_K, with_attributes=False), users)
    await served.batcher.close()
    prepared = [engine.check(query) for query in queries]
    engine_rates: list[float] = []
    async with AsyncExitStack() as stack:
        loads = await _loads(stack, server, users)
        rates: dict[str, list[Rate]] = {name: [] for name in loads}
        with progress.stage("saturation", total=rounds, unit="rounds") as stage:
            for _ in range(rounds):
                engine_rates.append(await asyncio.to_thread(engine_qps, engine, prepared, seconds))
                for name, (target, in_flight, per) in loads.items():
                    rates[name].append(await _saturated(target, server, in_flight, seconds, per))
                stage.advance()
    return ThroughputResult(
        statistics.median(engine_rates),
        {name: Rate.median(some) for name, some in rates.items()},
        {
            name: statistics.median(rate.qps / alone for rate, alone in zip(some, engine_rates, strict=True))
            for name, some in rates.items()
        },
    )


def engine_qps(engine: SearchEngine, prepared: Sequence[PreparedQuery], seconds: float) -> float:
    """Queries a second of full batches on every lane, with nothing else to do."""
    size = min(engine.max_batch, len(prepared))
    # Only queries of one compat share a batch: a long history of seen items asks for a larger pool.
    kinds: dict[Hashable, list[PreparedQuery]] = {}
    for query in prepared:
        kinds.setdefault(query.compat, []).append(query)
    batches = [
        queries[start : start + size]
        for queries in kinds.values()
        for start in range(0, len(queries) - size + 1, size)
    ] or [[query] for query in prepared]
    rates = [0.0] * engine.n_lanes
    ready = threading.Barrier(engine.n_lanes)

    def run(lane: int) -> None:
        ready.wait()
        started_s, done, round_ = time.perf_counter(), 0, 0
        warm_s = started_s + min(_WARM_UP_S, seconds)
        while (now_s := time.perf_counter()) < warm_s + seconds:
            if started_s < warm_s <= now_s:
                started_s, done = now_s, 0
            batch = batches[(lane + round_) % len(batches)]
            engine.search(batch, lane)
            round_, done = round_ + 1, done + len(batch)
        rates[lane] = done / (time.perf_counter() - started_s)

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(engine.n_lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


async def _loads(
    stack: AsyncExitStack, server: RunningServer, users: Sequence[User]
) -> dict[str, tuple[Target, int, int]]:
    """Each way to ask: its target, the calls kept in flight, and the queries of a call."""
    queries = [query_fields(user, _K) for user in users]
    bodies = [orjson.dumps(fields) for fields in queries]
    messages = [query_message(fields).SerializeToString() for fields in queries]
    rest = await stack.enter_async_context(rest_exchange(server.rest_url, timeout_s=_TIMEOUT_S))
    grpc = await stack.enter_async_context(grpc_exchange(server.grpc_url, timeout_s=_TIMEOUT_S))
    batched = await stack.enter_async_context(
        grpc_exchange(server.grpc_url, BATCH_RETRIEVE, timeout_s=_TIMEOUT_S)
    )
    rest_batched = await stack.enter_async_context(rest_exchange(server.rest_url, timeout_s=_TIMEOUT_S))
    some = [
        [queries[(start + i) % len(queries)] for i in range(_BATCH)] for start in range(0, _USERS, _BATCH)
    ]
    batch_messages = [batch_message(one).SerializeToString() for one in some]
    batch_bodies = [orjson.dumps({"queries": one}) for one in some]
    return {
        "REST": (RawTarget(rest, bodies), _IN_FLIGHT, 1),
        "gRPC": (RawTarget(grpc, messages), _IN_FLIGHT, 1),
        "BatchRetrieve": (RawTarget(batched, batch_messages, batch_failures), _BATCHES_IN_FLIGHT, _BATCH),
        "REST batch": (
            RawTarget(rest_batched, batch_bodies, lambda answer: answer.count(b'"error":')),
            _BATCHES_IN_FLIGHT,
            _BATCH,
        ),
    }


# The ceiling of the service itself


@dataclass(frozen=True, slots=True)
class CeilingResult:
    """Queries a second that the service carries when searching costs nothing."""

    rates: dict[str, Rate]

    def words(self) -> str:
        """The result in one sentence."""
        return "; ".join(
            f"{name} {rate.qps:,.0f} queries/s ({rate.server / rate.qps * 1e6:,.0f} µs of processor time "
            f"each; server {rate.server:.2f}, generator {rate.generator:.2f} processors)"
            for name, rate in self.rates.items()
        )


def ceiling_command(
    repository: Annotated[Path, typer.Option(help="Whose users are asked for; nothing of it is searched.")],
    model: Annotated[str | None, typer.Option(help="Its model, where it has several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the calls alternate in each.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of each in a round.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of users.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The ceiling of single-query RPCs and of BatchRetrieve, with an engine that costs nothing."""
    users = sample_users(find_version(repository, model), limit=_USERS, seed=seed)
    result = measure_ceiling(users, rounds=rounds, seconds=seconds)
    print_row(
        f"The ceiling of the service with a free engine, one process (k {_K}, {_IN_FLIGHT} in flight; "
        f"batches of {_BATCH}, {_BATCHES_IN_FLIGHT} in flight): measured, no promise",
        result.words(),
        kept=True,
        as_json=as_json,
    )


def measure_ceiling(users: Sequence[User], *, rounds: int, seconds: float) -> CeilingResult:
    """Saturate a server whose engine is free; raises ServerError when it does not start."""
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, free_server(Path(place)) as server:
        return uvloop.run(_ceiling(server, users, rounds, seconds))


async def _ceiling(
    server: RunningServer, users: Sequence[User], rounds: int, seconds: float
) -> CeilingResult:
    async with AsyncExitStack() as stack:
        loads = await _loads(stack, server, users)
        rates: dict[str, list[Rate]] = {name: [] for name in loads}
        progress = stack.enter_context(Progress())
        with progress.stage("ceiling", total=rounds, unit="rounds") as stage:
            for _ in range(rounds):
                for name, (target, in_flight, per) in loads.items():
                    rates[name].append(await _saturated(target, server, in_flight, seconds, per))
                stage.advance()
    return CeilingResult({name: Rate.median(measured) for name, measured in rates.items()})
