"""Swapping versions of a server under load, and what its callers notice."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import uvloop

from nann.cli.benchmark_engine import find_version
from nann.cli.benchmark_http import HttpClient
from nann.cli.reliability.process import process_figures
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

__all__ = ["SwapResult", "measure_swaps"]

# Enough in flight to keep the lanes of a small machine busy, so that what comes back is the capacity.
_IN_FLIGHT = 32
_CAPACITY_S = 8.0
_CHUNK_S = 5.0
# After each swap the server finishes it, which counts neither as steady nor as the swap, and then has no
# other for a while. So both are of the same minutes: a machine does not do as much in every hour.
_PAUSE_S = 1.0
_STEADY_S = 4.0
_USERS = 200
_RESCAN_TIMEOUT_S = 600.0
_REQUEST_TIMEOUT_S = 30.0
# Every tenth call asks for several users at once: such an answer could mix versions.
_BATCH_EVERY = 10
_BATCH_SIZE = 4
_WORST_RATIO = 2.0


@dataclass(frozen=True, slots=True)
class SwapResult:
    """What the callers of one server noticed of its swaps.

    `cold` are the requests during a last swap, to a version of another architecture, which compiles.
    """

    swaps: int
    rate_qps: float
    requests: int
    failed: Counter[str]
    mixed: int
    steady: LatencyBlock
    during: LatencyBlock
    mean_swap_s: float
    memory_mib: tuple[int, int]
    cold: LatencyBlock | None
    cold_swap_s: float

    @property
    def ratio(self) -> float:
        """p99 during swaps over p99 without."""
        return self.during.p99_us / self.steady.p99_us

    @property
    def kept(self) -> bool:
        return not self.failed and not self.mixed and self.ratio <= _WORST_RATIO

    def _codes(self) -> str:
        return (
            f" ({', '.join(f'{n} `{code}`' for code, n in self.failed.most_common())})" if self.failed else ""
        )

    def words(self) -> str:
        """The result in one sentence."""
        before_mib, after_mib = self.memory_mib
        words = (
            f"{self.swaps} swaps of {self.mean_swap_s:.1f} s at {self.rate_qps:.0f} requests/s: "
            f"{self.failed.total()} of {self.requests:,} failed{self._codes()}, {self.mixed} mixed; "
            f"p99 {_ms(self.steady.p99_us)} ms steady, {_ms(self.during.p99_us)} ms during swaps "
            f"({self.ratio:.2f} ×), p50 {_ms(self.steady.median_us)} and {_ms(self.during.median_us)} ms; "
            f"memory {before_mib:,} MiB before, {after_mib:,} MiB after"
        )
        if self.cold is None:
            return words
        return words + (
            f"; a swap of {self.cold_swap_s:.1f} s that compiles everything: p99 {_ms(self.cold.p99_us)} ms "
            f"({self.cold.p99_us / self.steady.p99_us:.2f} ×)"
        )


def measure_swaps(
    repository: Path,
    model: str | None,
    *,
    other: Path | None,
    swaps: int,
    share: float,
    flags: Sequence[str],
    seed: int,
) -> SwapResult:
    """Swap versions of a server under load: `swaps` of one and the same, then the version `other`.

    The versions are links, so that answers to `swaps` of them stay what they were.

    Raises:
        ServerError: the server did not start.
    """
    version_dir = find_version(repository, model).resolve()
    users = sample_users(version_dir, limit=_USERS, seed=seed)
    with tempfile.TemporaryDirectory(prefix="nann-reliability-") as place, Progress() as progress:
        models = Path(place, "models")
        versions = models / "nann"
        versions.mkdir(parents=True)
        world = _World(version_dir, other, versions, users, swaps, share, seed, progress)
        own = [*flags, "--xla-cache-dir", str(Path(place, "cache")), "--poll-interval-s", "0"]
        world.publish(version_dir)
        with running_server(models, log_path=Path(place, "server.log"), flags=own) as server:
            return uvloop.run(world.measure(server))


class _Asked:
    """Sends /retrieve, and counts answers that hold more than one version."""

    def __init__(self, client: HttpClient, users: Sequence[User]) -> None:
        self._client = client
        queries = [{"history": user.history, "k": 100, "with_attributes": False} for user in users]
        self._bodies = [orjson.dumps(query) for query in queries]
        self._batches = [
            orjson.dumps({"queries": queries[start : start + _BATCH_SIZE]})
            for start in range(0, len(queries) - _BATCH_SIZE + 1)
        ]
        self.mixed = 0
        self.versions: set[int] = set()

    async def send(self, i: int) -> Outcome:
        is_batch = i % _BATCH_EVERY == 0
        bodies = self._batches if is_batch else self._bodies
        try:
            status, content = await self._client.post("/retrieve", bodies[i % len(bodies)])
        except (TimeoutError, OSError, ValueError) as error:
            return Outcome(type(error).__name__)
        if status != 200:
            return Outcome(f"http_{status}")
        reply = orjson.loads(content)
        results = reply["results"] if is_batch else [reply]
        if any("error" in result for result in results):
            return Outcome("error_in_batch")
        versions = {result["version"] for result in results}
        self.mixed += len(versions) > 1
        self.versions |= versions
        return Outcome(OK)


@dataclass(frozen=True, slots=True)
class _Window:
    """The time of one swap, or of one stretch without any, on the clock of the samples."""

    start_s: float
    end_s: float

    def holds(self, sample: Sample) -> bool:
        return sample.scheduled_s <= self.end_s and sample.done_s >= self.start_s


class _World:
    """A repository of links to versions, and a server to measure on it."""

    def __init__(
        self,
        version_dir: Path,
        other: Path | None,
        versions: Path,
        users: Sequence[User],
        swaps: int,
        share: float,
        seed: int,
        progress: Progress,
    ) -> None:
        self._version_dir = version_dir
        self._other = other
        self._versions = versions
        self._numbers = count(1)
        self._users = users
        self._swaps = swaps
        self._share = share
        self._seed = seed
        self._progress = progress

    def publish(self, version_dir: Path) -> int:
        """Make the next version appear, whole, under its number."""
        number = next(self._numbers)
        (self._versions / str(number)).symlink_to(version_dir.resolve(), target_is_directory=True)
        return number

    async def measure(self, server: RunningServer) -> SwapResult:
        client = HttpClient(server.rest_url, timeout_s=_REQUEST_TIMEOUT_S)
        operator = HttpClient(server.rest_url, timeout_s=_RESCAN_TIMEOUT_S)
        asked = _Asked(client, self._users)
        swaps: list[_Window] = []
        between: list[_Window] = []
        cold: list[_Window] = []
        try:
            with self._progress.stage("capacity"):
                load = Load(in_flight=_IN_FLIGHT, warm_up_s=2.0, duration_s=_CAPACITY_S)
                rate_qps = self._share * throughput_qps(load, await closed_loop(asked, load))
            with precise_timer() as wait_until:
                seeds = count(self._seed)

                async def offer(seconds: float) -> list[Sample]:
                    load = Load(rate_qps=rate_qps, warm_up_s=0.0, duration_s=seconds)
                    return await open_loop(asked, load, seed=next(seeds), wait_until=wait_until)

                async def offer_during(work: Coroutine[Any, Any, None]) -> list[Sample]:
                    samples: list[Sample] = []
                    task = asyncio.create_task(work)
                    while not task.done():
                        samples += await offer(_CHUNK_S)
                    await task
                    return samples

                await offer(_CHUNK_S)
                before_mib = _resident_mib(server)
                with self._progress.stage("swaps"):
                    samples = await offer_during(self._swap_all(operator, asked, swaps, between))
                after_mib = _resident_mib(server)
                cold_samples: list[Sample] = []
                if self._other is not None:
                    with self._progress.stage("a swap that compiles"):
                        cold_samples = await offer_during(self._swap(operator, self._other, cold))
        finally:
            await client.close()
            await operator.close()
        everything = [*samples, *cold_samples]
        during = [sample for sample in samples if _any_holds(swaps, sample)]
        steady = [
            sample for sample in samples if _any_holds(between, sample) and not _any_holds(swaps, sample)
        ]
        steady_block, during_block = _latency(steady), _latency(during)
        assert steady_block is not None and during_block is not None
        return SwapResult(
            swaps=self._swaps,
            rate_qps=rate_qps,
            requests=len(everything),
            failed=Counter(sample.outcome.code for sample in everything if sample.outcome.code != OK),
            mixed=asked.mixed,
            steady=steady_block,
            during=during_block,
            mean_swap_s=sum(window.end_s - window.start_s for window in swaps) / self._swaps,
            memory_mib=(before_mib, after_mib),
            cold=_latency([sample for sample in cold_samples if _any_holds(cold, sample)]),
            cold_swap_s=sum(window.end_s - window.start_s for window in cold),
        )

    async def _swap_all(
        self, operator: HttpClient, asked: _Asked, swaps: list[_Window], between: list[_Window]
    ) -> None:
        for _ in range(self._swaps):
            await self._swap(operator, self._version_dir, swaps)
            await asyncio.sleep(_PAUSE_S)
            started_s = time.perf_counter()
            await asyncio.sleep(_STEADY_S)
            between.append(_Window(started_s, time.perf_counter()))
        newest = next(self._numbers) - 1
        if newest not in asked.versions:
            raise RuntimeError(f"no answer came from version {newest}")

    async def _swap(self, operator: HttpClient, version_dir: Path, windows: list[_Window]) -> None:
        number = self.publish(version_dir)
        started_s = time.perf_counter()
        status, content = await operator.post("/models/rescan", b"{}")
        windows.append(_Window(started_s, time.perf_counter()))
        newest: Any = orjson.loads(content)["models"]["nann"][0] if status == 200 else content.decode()
        if status != 200 or (newest["version"], newest["state"]) != (number, "AVAILABLE"):
            raise RuntimeError(f"version {number} was not swapped in: {newest}")


def _any_holds(windows: Sequence[_Window], sample: Sample) -> bool:
    return any(window.holds(sample) for window in windows)


def _latency(samples: Sequence[Sample]) -> LatencyBlock | None:
    return LatencyBlock.of([sample.latency_s for sample in samples if sample.outcome.code == OK])


def _resident_mib(server: RunningServer) -> int:
    return round(process_figures(server.pid).resident_mib)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.1f}"
