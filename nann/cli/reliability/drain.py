"""SIGTERM while requests come in: who still gets an answer, and how the others are told."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.benchmark_targets import Ask, grpc_target, rest_target
from nann.cli.output import JsonOption
from nann.cli.reliability.row import print_row
from nann.cli.server_process import RunningServer, running_server
from nann.offline.benchmark.load import (
    OK,
    Load,
    Sample,
    Target,
    closed_loop,
    open_loop,
    precise_timer,
    throughput_qps,
)
from nann.offline.benchmark.users import User, sample_users
from nann.offline.progress import Progress
from nann.service.settings import Settings

__all__ = ["DrainResult", "Pressure", "drain_command", "drain_once", "measure_drains", "taken_up"]

_USERS = 200
_K = 100
_IN_FLIGHT = 64
_REQUEST_TIMEOUT_S = 30.0
_GRACE_S: float = Settings.model_fields["drain_grace_s"].default
# What is sent this long before the signal has been taken up by the server when it comes.
_MARGIN_S = 0.25
# So soon before the signal comes a burst, so that many wait for a lane when it comes.
_BURST_LEAD_S = 0.5
# A full queue is a refusal as clean as any, HTTP/2's own (`refused_stream`: too many calls were open) too.
_ANSWERED = {OK, "overloaded", "resource_exhausted", "refused_stream"}
# The server's word; a closed door; a kept-alive connection that was closed before the server read from it.
_CLEAN = {*_ANSWERED, "not_ready", "unavailable", "connection_failed"}


@dataclass(frozen=True, slots=True)
class Pressure:
    """Load on both transports together, for so long before the signal and after it, and a burst on each."""

    share: float = 1.5
    before_s: float = 3.0
    after_s: float = 3.0
    burst: int = 64
    capacity_s: float = 6.0


@dataclass(slots=True)
class DrainResult:
    """What callers and the server's log say of some terminations.

    `accepted` requests have a line of an answer in the server's log; `lost` ones have one and their caller
    no answer, or were sent well before the signal and got neither answer nor refusal. `unheard` were sent
    then over gRPC, which had not handed them over when the server went: its log has no line of them, and
    they ended `unavailable`. `unclean` are ends of any request that are neither answer nor refusal.
    """

    terminations: int = 0
    in_flight: int = 0
    accepted: int = 0
    lost: int = 0
    after: Counter[str] | None = None
    unclean: int = 0
    exit_codes: Counter[int] | None = None
    longest_s: float = 0.0
    capacity_qps: float = 0.0
    unheard: int = 0

    def add(self, other: DrainResult) -> None:
        self.terminations += other.terminations
        self.in_flight += other.in_flight
        self.accepted += other.accepted
        self.lost += other.lost
        self.unheard += other.unheard
        self.after = (self.after or Counter()) + (other.after or Counter())
        self.unclean += other.unclean
        self.exit_codes = (self.exit_codes or Counter()) + (other.exit_codes or Counter())
        self.longest_s = max(self.longest_s, other.longest_s)

    @property
    def kept(self) -> bool:
        return (
            self.in_flight > 0
            and not self.lost
            and not self.unclean
            and set(self.exit_codes or ()) == {0}
            and self.longest_s <= _GRACE_S
        )

    def words(self) -> str:
        """The result in one sentence."""
        after = ", ".join(f"{n:,} `{code}`" for code, n in (self.after or Counter()).most_common())
        codes = ", ".join(f"{code} ({n} ×)" for code, n in (self.exit_codes or Counter()).items())
        return (
            f"{self.terminations} terminations (capacity {self.capacity_qps:.0f} requests/s): "
            f"{self.in_flight:,} requests under way at the signal; of {self.accepted:,} accepted "
            f"{self.lost} without their answer; {self.unheard:,} gRPC calls sent before it had not been "
            f"taken up and ended `unavailable`; sent after the signal: {after}; in all {self.unclean} ends "
            f"unclean; exit code {codes} after at most {self.longest_s:.1f} s"
        )


def drain_command(
    repository: Annotated[Path, typer.Option(help="A model repository; nothing is written into it.")],
    model: Annotated[str | None, typer.Option(help="Its model, where it has several.")] = None,
    terminations: Annotated[int, typer.Option(min=1, help="Servers started and terminated.")] = 3,
    share: Annotated[float, typer.Option(min=0.01, help="Load, as a share of the capacity.")] = 1.5,
    seed: Annotated[int, typer.Option(help="Seed of users and arrivals.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """SIGTERM under load over REST and gRPC."""
    result = measure_drains(repository, model, Pressure(share=share), terminations=terminations, seed=seed)
    print_row(
        f"SIGTERM at {share:.0%} of capacity, REST and gRPC: every accepted request is answered, new ones "
        "get a clean refusal, exit 0 within the grace time",
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


def measure_drains(
    repository: Path, model: str | None, pressure: Pressure, *, terminations: int, seed: int
) -> DrainResult:
    """Start servers on `repository` and terminate them; raises ServerError when one does not start."""
    users = sample_users(find_version(repository, model), limit=_USERS, seed=seed)
    named = [] if model is None else ["--model", model]
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Progress() as progress:
        log_path = Path(place, "server.log")
        flags = [*named, "--access-log", "--log-format", "json"]

        def serve() -> AbstractContextManager[RunningServer]:
            return running_server(repository, log_path=log_path, flags=flags)

        with progress.stage("terminations", total=terminations + 1) as stage:
            with serve() as server:
                capacity_qps = uvloop.run(_capacity(server, users, pressure.capacity_s))
            stage.advance()
            result = DrainResult(capacity_qps=capacity_qps)
            for number in range(terminations):
                rate_qps = pressure.share * capacity_qps
                result.add(drain_once(serve, log_path, users, pressure, rate_qps, seed=seed + 2 * number))
                stage.advance()
        return result


async def _capacity(server: RunningServer, users: Sequence[User], seconds: float) -> float:
    ask = Ask(k=_K, with_attributes=False)
    load = Load(in_flight=_IN_FLIGHT, warm_up_s=min(2.0, seconds), duration_s=seconds)
    async with rest_target(server.rest_url, ask, users, timeout_s=_REQUEST_TIMEOUT_S) as target:
        return throughput_qps(load, await closed_loop(target, load))


def drain_once(
    serve: Callable[[], AbstractContextManager[RunningServer]],
    log_path: Path,
    users: Sequence[User],
    pressure: Pressure,
    rate_qps: float,
    *,
    seed: int,
) -> DrainResult:
    """Terminate one server that `serve` starts and that logs its requests as JSON to `log_path`."""
    with serve() as server:
        rest, grpc, signal_s, exit_code, took_s = uvloop.run(
            _terminate(server, users, pressure, rate_qps, seed)
        )
    log = taken_up(log_path.read_bytes())
    samples = [*rest, *grpc]
    lost = sum(
        abs(log[api, OK] - sum(s.outcome.code == OK for s in of_api))
        for api, of_api in (("rest", rest), ("grpc", grpc))
    )
    lost += sum(n for (_, code), n in log.items() if code not in {*_ANSWERED, "not_ready"})
    unheard = sum(s.outcome.code == "unavailable" for s in grpc if s.sent_s < signal_s - _MARGIN_S)
    # One that the log calls answered is counted twice, which is no harm: none is the promise.
    early = [s.outcome.code for s in samples if s.sent_s < signal_s - _MARGIN_S]
    lost += sum(code not in {*_ANSWERED, "not_ready"} for code in early) - unheard
    after = Counter(s.outcome.code for s in samples if s.sent_s > signal_s)
    return DrainResult(
        terminations=1,
        in_flight=sum(s.sent_s < signal_s < s.done_s for s in samples),
        accepted=sum(n for (_, code), n in log.items() if code == OK),
        lost=lost,
        unheard=unheard,
        after=after,
        unclean=sum(s.outcome.code not in _CLEAN for s in samples),
        exit_codes=Counter([exit_code]),
        longest_s=took_s,
    )


async def _terminate(
    server: RunningServer, users: Sequence[User], pressure: Pressure, rate_qps: float, seed: int
) -> tuple[list[Sample], list[Sample], float, int, float]:
    ask = Ask(k=_K, with_attributes=False)
    load = Load(rate_qps=rate_qps / 2, warm_up_s=0.0, duration_s=pressure.before_s + pressure.after_s)
    async with AsyncExitStack() as stack:
        targets: list[Target] = [
            await stack.enter_async_context(opened)
            for opened in (
                rest_target(server.rest_url, ask, users, timeout_s=_REQUEST_TIMEOUT_S),
                grpc_target(server.grpc_url, ask, users, timeout_s=_REQUEST_TIMEOUT_S),
            )
        ]
        timers = [stack.enter_context(precise_timer()) for _ in targets]
        loads = asyncio.gather(
            *(
                open_loop(target, load, seed=seed + number, wait_until=timer)
                for number, (target, timer) in enumerate(zip(targets, timers, strict=True))
            )
        )
        await asyncio.sleep(pressure.before_s - _BURST_LEAD_S)
        bursts = asyncio.gather(*(_burst(target, pressure.burst) for target in targets))
        await asyncio.sleep(_BURST_LEAD_S)
        signal_s = time.perf_counter()
        os.kill(server.pid, signal.SIGTERM)
        # WNOWAIT: whoever started it still has to be told how it ended.
        ended: Any = await asyncio.to_thread(os.waitid, os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        took_s = time.perf_counter() - signal_s
        rest, grpc = ([*load, *burst] for load, burst in zip(await loads, await bursts, strict=True))
    exit_code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    return rest, grpc, signal_s, exit_code, took_s


async def _burst(target: Target, count: int) -> list[Sample]:
    """Send `count` requests at once."""

    async def request(i: int) -> Sample:
        sent_s = time.perf_counter()
        outcome = await target.send(i)
        return Sample(sent_s, sent_s, time.perf_counter(), outcome)

    return await asyncio.gather(*(request(i) for i in range(count)))


def taken_up(log: bytes) -> Counter[tuple[str, str]]:
    """How many requests a server's JSON log names, by API and code."""
    found: Counter[tuple[str, str]] = Counter()
    for line in log.splitlines():
        if b'"request"' not in line:
            continue
        fields = orjson.loads(line)
        if fields.get("event") == "request":
            found[fields["api"], fields["code"]] += 1
    return found
