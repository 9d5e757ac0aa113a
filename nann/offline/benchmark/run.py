"""Several loads on one target, interleaved in rounds, so that a slow minute of the machine hits them all."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

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
from nann.offline.benchmark.percentiles import LatencyBlock
from nann.offline.progress import Progress

__all__ = ["LoadResult", "Round", "Summary", "run_loads"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a set of requests came to. Blocks and means are over the requests that were answered.

    `service` is the time on a lane alone, `queue` the wait for a lane, `latency` everything from the
    (scheduled) arrival to the answer. `send_delay` is how late the generator itself sent, which is
    part of `latency`: when it is not small beside it, the generator is what was measured.
    Means and blocks are None where the target does not tell.
    """

    requests: int
    failures: int
    errors: dict[str, int]
    service: LatencyBlock | None
    queue: LatencyBlock | None
    latency: LatencyBlock | None
    send_delay: LatencyBlock | None
    mean_items_scored: float | None
    mean_batch_size: float | None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Summary:
        answered = [sample for sample in samples if sample.outcome.code == OK]
        outcomes = [sample.outcome for sample in answered]
        codes = Counter(sample.outcome.code for sample in samples)
        del codes[OK]
        return cls(
            requests=len(samples),
            failures=len(samples) - len(answered),
            errors=dict(sorted(codes.items())),
            service=LatencyBlock.of([o.service_s for o in outcomes if o.service_s is not None]),
            queue=LatencyBlock.of([o.queue_s for o in outcomes if o.queue_s is not None]),
            latency=LatencyBlock.of([sample.latency_s for sample in answered]),
            send_delay=LatencyBlock.of([sample.sent_s - sample.scheduled_s for sample in samples]),
            mean_items_scored=_mean([o.n_scored for o in outcomes if o.n_scored is not None]),
            mean_batch_size=_mean([o.batch_size for o in outcomes if o.batch_size is not None]),
        )


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one load."""

    throughput_qps: float
    summary: Summary

    @classmethod
    def of(cls, load: Load, samples: Sequence[Sample]) -> Round:
        return cls(throughput_qps(load, samples), Summary.of(samples))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One load over all rounds: everything pooled, and each round by itself."""

    load: Load
    pooled: Summary
    rounds: tuple[Round, ...]

    def median(self, figure: Callable[[Round], float | None]) -> float | None:
        """Median over the rounds of a figure; None when a round has none."""
        return _median([figure(one) for one in self.rounds])

    def ratio(self, base: LoadResult, figure: Callable[[Round], float | None]) -> float | None:
        """Median over the rounds of this load's figure by `base`'s in the same round."""
        pairs = [(figure(a), figure(b)) for a, b in zip(self.rounds, base.rounds, strict=True)]
        return _median([None if a is None or not b else a / b for a, b in pairs])


async def run_loads(
    target: Target, loads: Sequence[Load], *, rounds: int, seed: int, progress: Progress | None = None
) -> list[LoadResult]:
    """Put each load on the target once a round; results in the order of `loads`.

    Raises:
        ValueError: no load, or no round.
    """
    if not loads or rounds < 1:
        raise ValueError("give at least one load and one round")
    progress = progress or Progress(silent=True)
    samples: list[list[list[Sample]]] = [[] for _ in loads]
    with (
        progress.stage("benchmark", total=len(loads) * rounds, unit="runs") as stage,
        precise_timer() as wait_until,
    ):
        for number in range(rounds):
            for load, collected in zip(loads, samples, strict=True):
                stage.note(f"{load.name}, round {number + 1} of {rounds}")
                if load.in_flight is not None:
                    collected.append(await closed_loop(target, load))
                else:
                    collected.append(await open_loop(target, load, seed=seed + number, wait_until=wait_until))
                stage.advance()
    return [
        LoadResult(load, Summary.of(list(chain(*collected))), tuple(Round.of(load, one) for one in collected))
        for load, collected in zip(loads, samples, strict=True)
    ]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None
