"""More load than a server can do: how much of it is still done in time, and how soon the rest is told no."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import orjson
import typer
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.benchmark_http import HttpClient
from nann.cli.benchmark_targets import Ask, grpc_target
from nann.cli.output import JsonOption
from nann.cli.reliability.few_lanes import LanesOption, lanes_flags, lanes_words
from nann.cli.reliability.process import BusyClock, process_figures
from nann.cli.reliability.row import print_row
from nann.cli.server_process import RunningServer, running_server
from nann.offline.benchmark.load import (
    OK,
    Load,
    Outcome,
    Sample,
    Target,
    closed_loop,
    open_loop,
    throughput_qps,
    wait_on_loop,
)
from nann.offline.benchmark.percentiles import LatencyBlock
from nann.offline.benchmark.users import User, sample_users
from nann.offline.progress import Progress

__all__ = ["Offer", "OverloadResult", "measure_overload", "offer_overload", "overload_command", "recovery_s"]

# Two full batches for each of two lanes: both always find one that waits.
_IN_FLIGHT = 64
_USERS = 200
_K = 100
# The load before and after the overload, as a share of the capacity: queues are short, batches small.
_CALM_SHARE = 0.5
_WINDOW_S = 0.25
_REFUSED = ("overloaded", "http_429", "resource_exhausted", "refused_stream")

_LEAST_GOODPUT = 0.9
_MOST_REFUSAL_MS = 5.0
_MOST_RECOVERY_S = 2.0
_MOST_GROWTH = 1.01


@dataclass(frozen=True, slots=True)
class Offer:
    """What is offered: `factor` times the capacity for `duration_s`, each query due in `deadline_ms`."""

    factor: float = 5.0
    deadline_ms: float = 1000.0
    transport: Literal["rest", "grpc"] = "rest"
    duration_s: float = 15.0
    warm_up_s: float = 5.0
    capacity_s: float = 8.0
    calm_s: float = 5.0


@dataclass(frozen=True, slots=True)
class OverloadResult:
    """What came of it. Rates are requests a second, `busy` processors (of the server, of the generator)."""

    cores: int
    capacity_qps: tuple[float, float]
    offered_qps: float
    goodput_qps: float
    codes: Counter[str]
    late: int
    refusals: LatencyBlock | None
    answers: LatencyBlock | None
    send_delay: LatencyBlock
    memory_mib: tuple[float, float, float]
    recovery_s: float
    busy: tuple[float, float]
    refusal_ms: float

    @property
    def goodput(self) -> float:
        """As a share of the capacity, the mean of that before and that after."""
        return self.goodput_qps / (sum(self.capacity_qps) / 2)

    @property
    def growth(self) -> float:
        """Memory at the end of the overload over that after its first seconds."""
        _, early, end = self.memory_mib
        return end / early

    @property
    def kept(self) -> bool:
        return (
            self.goodput >= _LEAST_GOODPUT
            and self.refusals is not None
            and self.refusal_ms <= _MOST_REFUSAL_MS
            and self.growth <= _MOST_GROWTH
            and self.recovery_s <= _MOST_RECOVERY_S
        )

    def words(self) -> str:
        """The result in one sentence."""
        before, after = self.capacity_qps
        calm_mib, early_mib, end_mib = self.memory_mib
        codes = ", ".join(f"{n:,} `{code}`" for code, n in self.codes.most_common())
        refused = self.refusals
        answered = self.answers
        server, generator = self.busy
        return (
            f"capacity {before:.0f} (before) and {after:.0f} (after) requests/s; offered "
            f"{self.offered_qps:.0f}/s: {codes}, {self.late} of the answers late; goodput "
            f"{self.goodput_qps:.0f}/s = {self.goodput:.0%} of capacity"
            + (
                ""
                if refused is None
                else f"; refusals p50 {self.refusal_ms:.1f}, p99 {_ms(refused.p99_us)} ms"
            )
            + (
                ""
                if answered is None
                else f"; answers p50 {_ms(answered.median_us)}, p99 {_ms(answered.p99_us)} ms"
            )
            + f"; memory {calm_mib:,.0f} MiB before, {early_mib:,.0f} early, {end_mib:,.0f} at the end; "
            f"recovered after {self.recovery_s:.2f} s; of {self.cores} cores the server took {server:.2f}, "
            f"the generator {generator:.2f} (sent {_ms(self.send_delay.median_us)} ms late at the median)"
        )


def overload_command(
    repository: Annotated[Path, typer.Option(help="A model repository; nothing is written into it.")],
    model: Annotated[str | None, typer.Option(help="Its model, where it has several.")] = None,
    factor: Annotated[float, typer.Option(min=1.0, help="Load, as a multiple of the capacity.")] = 5.0,
    deadline_ms: Annotated[float, typer.Option(min=1.0, help="Deadline of each query.")] = 1000.0,
    transport: Annotated[Literal["rest", "grpc"], typer.Option(help="Which surface.")] = "rest",
    duration: Annotated[float, typer.Option(min=1.0, help="Seconds of overload.")] = 15.0,
    seed: Annotated[int, typer.Option(help="Seed of users and arrivals.")] = 0,
    lanes: LanesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Overload: goodput, the speed of refusals, memory, and recovery."""
    offer = Offer(factor=factor, deadline_ms=deadline_ms, transport=transport, duration_s=duration)
    result = measure_overload(repository, model, offer, seed=seed, flags=lanes_flags(lanes))
    print_row(
        f"Overload at {factor:g} × capacity, open loop ({transport}, deadline {deadline_ms:g} ms): "
        "goodput ≥ 90 % of capacity within deadline; refusals' median latency ≤ 5 ms; memory flat; "
        "recovery within 2 s" + lanes_words(lanes),
        result.words(),
        kept=result.kept,
        as_json=as_json,
    )


def measure_overload(
    repository: Path, model: str | None, offer: Offer, *, seed: int = 0, flags: Sequence[str] = ()
) -> OverloadResult:
    """Offer a server of its own on `repository` too much; raises ServerError when it does not start."""
    users = sample_users(find_version(repository, model), limit=_USERS, seed=seed)
    own = list(flags) if model is None else ["--model", model, *flags]
    with (
        tempfile.TemporaryDirectory(prefix="nann-reliability-") as place,
        Progress() as progress,
        running_server(repository, log_path=Path(place, "server.log"), flags=own) as server,
    ):
        return uvloop.run(offer_overload(server, users, offer, seed=seed, progress=progress))


async def offer_overload(
    server: RunningServer, users: Sequence[User], offer: Offer, *, seed: int, progress: Progress
) -> OverloadResult:
    """Offer a server that runs more than it can do."""
    return await _Overload(server, users, offer, seed, progress).measure()


class _RestTarget:
    """POST /retrieve with a deadline. Of an answer it reads the status only, to leave the server its time."""

    def __init__(self, client: HttpClient, users: Sequence[User], deadline_ms: float) -> None:
        self._client = client
        asks = ({"history": user.history, "k": _K, "with_attributes": False} for user in users)
        self._bodies = [orjson.dumps({**ask, "timeout_ms": deadline_ms}) for ask in asks]

    async def send(self, i: int) -> Outcome:
        try:
            status, content = await self._client.post("/retrieve", self._bodies[i % len(self._bodies)])
        except (TimeoutError, OSError, ValueError) as error:
            return Outcome(type(error).__name__)
        if status == 200:
            return Outcome()
        return Outcome("overloaded" if status == 429 else str(orjson.loads(content)["error"]["code"]))


class _Overload:
    def __init__(
        self, server: RunningServer, users: Sequence[User], offer: Offer, seed: int, progress: Progress
    ) -> None:
        self._server = server
        self._users = users
        self._offer = offer
        self._seed = seed
        self._progress = progress

    async def measure(self) -> OverloadResult:
        offer = self._offer
        async with AsyncExitStack() as stack:
            # Late answers are waited for, so that they are seen to be late.
            client = HttpClient(self._server.rest_url, timeout_s=30.0)
            stack.push_async_callback(client.close)
            target: Target = _RestTarget(client, self._users, offer.deadline_ms)
            patient: Target = _RestTarget(client, self._users, 30_000.0)
            if offer.transport == "grpc":
                ask = Ask(k=_K, with_attributes=False)
                url, deadline_s = self._server.grpc_url, offer.deadline_ms / 1e3
                target, patient = [
                    await stack.enter_async_context(grpc_target(url, ask, self._users, timeout_s=timeout_s))
                    for timeout_s in (deadline_s, 30.0)
                ]
            before_qps = await self._capacity(patient)
            steady = await self._calm(target, before_qps)
            calm_mib = self._resident_mib()
            with self._progress.stage("overload"):
                clock = BusyClock(self._server.pid)
                load = Load(
                    rate_qps=offer.factor * before_qps,
                    warm_up_s=offer.warm_up_s,
                    duration_s=offer.duration_s,
                )
                overload = asyncio.create_task(
                    open_loop(target, load, seed=self._seed, wait_until=wait_on_loop)
                )
                await asyncio.sleep(offer.warm_up_s)
                early_mib = self._resident_mib()
                await asyncio.sleep(offer.duration_s)
                end_mib, busy = self._resident_mib(), clock.read()
                ended_s = time.perf_counter()
            calm = await self._calm(target, before_qps)
            samples = await overload
            after_qps = await self._capacity(patient)
        deadline_s = offer.deadline_ms / 1e3
        in_time = [s for s in samples if s.outcome.code == OK and s.latency_s <= deadline_s]
        refused = [s.latency_s for s in samples if s.outcome.code in _REFUSED]
        refusals = LatencyBlock.of(refused)
        send_delay = LatencyBlock.of([s.sent_s - s.scheduled_s for s in samples])
        answers = LatencyBlock.of([s.latency_s for s in samples if s.outcome.code == OK])
        codes = Counter(s.outcome.code for s in samples)
        assert send_delay is not None
        return OverloadResult(
            cores=_cores(),
            capacity_qps=(before_qps, after_qps),
            offered_qps=len(samples) / offer.duration_s,
            goodput_qps=len(in_time) / offer.duration_s,
            codes=codes,
            late=codes[OK] - len(in_time),
            refusals=refusals,
            answers=answers,
            send_delay=send_delay,
            memory_mib=(calm_mib, early_mib, end_mib),
            recovery_s=recovery_s(calm, steady, ended_s),
            busy=busy,
            refusal_ms=0.0 if refusals is None else refusals.median_us / 1e3,
        )

    async def _capacity(self, target: Target) -> float:
        with self._progress.stage("capacity"):
            seconds = self._offer.capacity_s
            load = Load(in_flight=_IN_FLIGHT, warm_up_s=min(2.0, seconds), duration_s=seconds)
            samples = await closed_loop(target, load)
        if failed := [s.outcome.code for s in samples if s.outcome.code != OK]:
            raise RuntimeError(f"{len(failed)} requests failed without overload, the first by {failed[0]}")
        return throughput_qps(load, samples)

    async def _calm(self, target: Target, capacity_qps: float) -> list[Sample]:
        with self._progress.stage("calm"):
            load = Load(rate_qps=_CALM_SHARE * capacity_qps, warm_up_s=0.0, duration_s=self._offer.calm_s)
            return await open_loop(target, load, seed=self._seed + 1, wait_until=wait_on_loop)

    def _resident_mib(self) -> float:
        return process_figures(self._server.pid).resident_mib


def recovery_s(calm: Sequence[Sample], steady: Sequence[Sample], ended_s: float) -> float:
    """How long after `ended_s` the `calm` load was again served as the `steady` one was before.

    That is the end of the last quarter of a second that had a failure, or a median above the p99 of `steady`.
    """
    block = LatencyBlock.of([s.latency_s for s in steady if s.outcome.code == OK])
    assert block is not None
    windows: dict[int, list[Sample]] = {}
    for sample in calm:
        windows.setdefault(int((sample.scheduled_s - ended_s) / _WINDOW_S), []).append(sample)
    recovered_s = 0.0
    for number, samples in windows.items():
        own = LatencyBlock.of([s.latency_s for s in samples])
        assert own is not None
        if own.median_us > block.p99_us or any(s.outcome.code != OK for s in samples):
            recovered_s = max(recovered_s, (number + 1) * _WINDOW_S)
    return recovered_s


def _cores() -> int:
    from nann.offline.benchmark.machine import Machine

    return Machine.here().cores


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.1f}"
