"""What the service adds to a request: over a handler of the same framework that does nothing.

Each series is one target asked by one request at a time; the series alternate in blocks, and an overhead is
the median over the rounds of the difference between a block's median and that of the no-op in the same round.

    no-op    the framework alone: reads the body, answers with bytes as long as the service's
    waiting  the same, asleep for as long as a search takes before it answers, less the time it slept
    free     the service before an engine that costs nothing; the way to a lane's thread and back is in it
    engine   the service before the real engine, less the time on the lane; the check of the query is in it

The verdict is over `no-op`. `waiting` only explains it: after the length of a search without work the same
instructions take two or three times as long, in the server and in the caller, whatever the server is made of.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import orjson
import typer
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.output import JsonOption
from nann.cli.reliability.free_engine import free_server
from nann.cli.reliability.raw import (
    RETRIEVE,
    Exchange,
    grpc_exchange,
    query_fields,
    query_message,
    rest_exchange,
)
from nann.cli.reliability.row import print_row
from nann.cli.server_process import RunningServer, running_server
from nann.offline.benchmark.users import User, sample_users
from nann.offline.progress import Progress
from nann.service.pb import retrieval_pb2 as pb

__all__ = ["OverheadResult", "Series", "measure_overheads", "overhead_command"]

Transport = Literal["rest", "grpc"]

_USERS = 200
_K = 100
_BLOCK = 50
_TIMEOUT_S = 30.0
_MOST_MS = {"rest": 0.5, "grpc": 0.3}

# Programs as their frameworks' own introductions have them. `wait` answers after so many milliseconds, and
# its answer ends with how many they were.
_NOOP = {
    "rest": """
import asyncio, socket, struct, sys, time, uvicorn
from fastapi import FastAPI, Request, Response

answer, wait_s = sys.stdin.buffer.read(), float(sys.argv[1]) / 1e3
app = FastAPI()

@app.post("/retrieve")
async def noop(request: Request) -> Response:
    await request.body()
    return Response(answer, media_type="application/json")

@app.post("/wait")
async def wait(request: Request) -> Response:
    await request.body()
    started_s = time.perf_counter()
    await asyncio.sleep(wait_s)
    slept_ms = struct.pack("<d", (time.perf_counter() - started_s) * 1e3)
    return Response(answer + slept_ms, media_type="application/json")

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
uvicorn.Server(config).run(sockets=[listener])
""",
    "grpc": """
import asyncio, struct, sys, time, grpc, uvloop

answer, wait_s = sys.stdin.buffer.read(), float(sys.argv[1]) / 1e3

async def noop(message, context):
    return answer

async def wait(message, context):
    started_s = time.perf_counter()
    await asyncio.sleep(wait_s)
    return answer + struct.pack("<d", (time.perf_counter() - started_s) * 1e3)

async def serve():
    server = grpc.aio.server()
    handlers = {"Retrieve": noop, "Wait": wait}
    methods = {name: grpc.unary_unary_rpc_method_handler(answer) for name, answer in handlers.items()}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("nann.retrieval.v1.RetrievalService", methods),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()

uvloop.run(serve())
""",
}
_WAIT = {"rest": "/wait", "grpc": "/nann.retrieval.v1.RetrievalService/Wait"}


@dataclass(frozen=True, slots=True)
class Series:
    """Milliseconds of one target: the median of all requests, and what is over the no-op's."""

    transport: Transport
    name: str
    median_ms: float
    overhead_ms: float


@dataclass(frozen=True, slots=True)
class OverheadResult:
    """Every series; `engine` ones are without the time on the lane."""

    requests: int
    series: tuple[Series, ...]

    @property
    def kept(self) -> bool:
        return all(one.overhead_ms <= _MOST_MS[one.transport] for one in self.series if one.name in _TITLES)

    def words(self) -> str:
        """The result in one sentence."""
        parts = []
        for transport, title in (("rest", "REST"), ("grpc", "gRPC")):
            own = {one.name: one for one in self.series if one.transport == transport}
            texts = [
                f"{_TITLES[name]} {one.median_ms:.3f} ms (+{one.overhead_ms:.3f})"
                for name, one in own.items()
                if name in _TITLES
            ]
            noops = f"no-op {own['no-op'].median_ms:.3f} ms"
            if "waiting" in own:
                waiting = own["waiting"]
                noops += f", as long a wait as a search {waiting.median_ms:.3f} (+{waiting.overhead_ms:.3f})"
            parts.append(f"{title}: {noops}, {', '.join(texts)}")
        return f"{'; '.join(parts)}; medians of {self.requests:,} requests each"


_TITLES = {"free": "free engine", "engine": "real engine without its time on the lane"}


def overhead_command(
    repository: Annotated[Path, typer.Option(help="A model repository; nothing is written into it.")],
    model: Annotated[str | None, typer.Option(help="Its model, where it has several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the series alternate in each.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of users.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Overhead at one request in flight, REST and gRPC."""
    users = sample_users(find_version(repository, model), limit=_USERS, seed=seed)
    named = [] if model is None else ["--model", model]
    with (
        tempfile.TemporaryDirectory(prefix="nann-reliability-") as place,
        running_server(repository, log_path=Path(place, "server.log"), flags=named) as server,
    ):
        result = measure_overheads(users, Path(place), engine=server, rounds=rounds)
    print_row(
        "Overhead at one request in flight, median, over a no-op handler of the same framework with the same "
        "payload, interleaved: ≤ 0.5 ms REST, ≤ 0.3 ms gRPC",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


def measure_overheads(
    users: Sequence[User], place: Path, *, engine: RunningServer | None, rounds: int, block: int = _BLOCK
) -> OverheadResult:
    """Ask all series for `users` in turn. `engine` serves a real one; without it, that series is left out.

    Raises:
        ServerError: the server of the free engine did not start.
    """
    queries = [query_fields(user, _K) for user in users]
    requests = {
        "rest": [orjson.dumps(fields) for fields in queries],
        "grpc": [query_message(fields).SerializeToString() for fields in queries],
    }
    with free_server(place) as free:
        return uvloop.run(_measure(requests, free, engine, rounds, block))


async def _measure(
    requests: dict[str, list[bytes]],
    free: RunningServer,
    engine: RunningServer | None,
    rounds: int,
    block: int,
) -> OverheadResult:
    transports: tuple[Transport, ...] = ("rest", "grpc")
    servers = {"free": free} | ({} if engine is None else {"engine": engine})
    async with AsyncExitStack() as stack:
        exchanges: dict[tuple[Transport, str], Exchange] = {}
        for transport in transports:
            for name, server in servers.items():
                exchanges[transport, name] = await stack.enter_async_context(_exchange(transport, server))
            # The no-op answers with what the service answered, byte for byte.
            asked = exchanges[transport, list(servers)[-1]]
            answers = [await asked(requests[transport][i % len(requests[transport])]) for i in range(block)]
            wait_ms = statistics.median(map(_SEARCH_MS[transport], answers))
            noop = stack.enter_context(_noop_server(transport, answers[0], wait_ms))
            exchanges[transport, "no-op"] = await stack.enter_async_context(_exchange(transport, noop))
            if engine is not None:
                waiting = _exchange(transport, noop, _WAIT[transport])
                exchanges[transport, "waiting"] = await stack.enter_async_context(waiting)
        blocks: dict[tuple[Transport, str], list[list[float]]] = {key: [] for key in exchanges}
        progress = stack.enter_context(Progress())
        with progress.stage("one in flight", total=rounds, unit="rounds") as stage:
            for number in range(rounds + 1):
                for (transport, name), exchange in exchanges.items():
                    read_ms = {"engine": _SEARCH_MS[transport], "waiting": _slept_ms}.get(name)
                    times = await _block(exchange, requests[transport], number * block, block, read_ms)
                    if number:  # the first round warms caches
                        blocks[transport, name].append(times)
                stage.advance()
    medians = {key: [statistics.median(times) for times in some] for key, some in blocks.items()}
    return OverheadResult(
        rounds * block,
        tuple(
            Series(
                transport,
                name,
                statistics.median(time_ms for times in some for time_ms in times),
                statistics.median(
                    own - noop
                    for own, noop in zip(medians[transport, name], medians[transport, "no-op"], strict=True)
                ),
            )
            for (transport, name), some in blocks.items()
        ),
    )


async def _block(
    exchange: Exchange,
    requests: Sequence[bytes],
    first: int,
    count: int,
    read_ms: Callable[[bytes], float] | None,
) -> list[float]:
    """Milliseconds of `count` requests, one after the other, less what `read_ms` reads in each answer."""
    times = []
    for i in range(first, first + count):
        started_s = time.perf_counter()
        answer = await exchange(requests[i % len(requests)])
        took_ms = (time.perf_counter() - started_s) * 1e3
        times.append(took_ms if read_ms is None else took_ms - read_ms(answer))
    return times


_SEARCH_MS: dict[str, Callable[[bytes], float]] = {
    "rest": lambda answer: float(orjson.loads(answer)["timings_ms"]["search"]),
    "grpc": lambda answer: float(pb.RetrieveResponse.FromString(answer).timings_ms["search"]),
}


def _slept_ms(answer: bytes) -> float:
    (slept_ms,) = struct.unpack("<d", answer[-8:])
    return float(slept_ms)


def _exchange(
    transport: Transport, server: RunningServer, path: str | None = None
) -> AbstractAsyncContextManager[Exchange]:
    if transport == "rest":
        return rest_exchange(server.rest_url, path or "/retrieve", timeout_s=_TIMEOUT_S)
    return grpc_exchange(server.grpc_url, path or RETRIEVE, timeout_s=_TIMEOUT_S)


@contextmanager
def _noop_server(transport: Transport, answer: bytes, wait_ms: float) -> Iterator[RunningServer]:
    """A process that answers everything with `answer`, at once or after a wait."""
    started_s = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", _NOOP[transport], str(wait_ms)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(answer)
            process.stdin.close()
            address = f"127.0.0.1:{int(process.stdout.readline())}"
            yield RunningServer(
                f"http://{address}", f"grpc://{address}", time.monotonic() - started_s, process.pid
            )
        finally:
            process.kill()
