"""Loads interleaved in rounds, and what is summed up of them."""

from __future__ import annotations

import pytest

from nann.offline.benchmark.load import Load, Outcome, Sample
from nann.offline.benchmark.machine import Machine
from nann.offline.benchmark.report import load_json, load_text
from nann.offline.benchmark.run import LoadResult, Round, Summary, run_loads


def sample(at_s: float, took_s: float, outcome: Outcome | None = None, late_s: float = 0.0) -> Sample:
    return Sample(at_s, at_s + late_s, at_s + took_s, outcome or Outcome(service_s=took_s / 2))


def test_summary_counts_failures_by_code_and_keeps_them_out_of_the_blocks() -> None:
    samples = [
        sample(0.0, 0.010, Outcome(service_s=0.004, queue_s=0.001, n_scored=100, batch_size=2)),
        sample(0.1, 0.030, Outcome(service_s=0.006, queue_s=0.003, n_scored=300, batch_size=4), late_s=0.002),
        sample(0.2, 9.0, Outcome("overloaded")),
        sample(0.3, 9.0, Outcome("deadline_exceeded")),
        sample(0.4, 9.0, Outcome("overloaded")),
    ]
    summary = Summary.of(samples)
    assert (summary.requests, summary.failures) == (5, 3)
    assert summary.errors == {"deadline_exceeded": 1, "overloaded": 2}
    assert summary.latency is not None
    assert summary.service is not None
    assert summary.queue is not None
    assert summary.send_delay is not None
    assert (summary.latency.count, summary.latency.max_us) == (2, pytest.approx(30_000))
    assert summary.service.mean_us == pytest.approx(5_000)
    assert summary.queue.mean_us == pytest.approx(2_000)
    assert summary.send_delay.max_us == pytest.approx(2_000)
    assert (summary.mean_items_scored, summary.mean_batch_size) == (200, 3)


def test_what_a_target_does_not_tell_is_none() -> None:
    summary = Summary.of([sample(0, 1, Outcome())])
    assert (summary.service, summary.queue, summary.mean_items_scored, summary.mean_batch_size) == (None,) * 4
    assert summary.latency is not None


def test_a_round_has_the_throughput_of_its_load() -> None:
    samples = [sample(i / 10, 0.5) for i in range(10)] + [sample(0.95, 0.05, Outcome("overloaded"))]
    assert Round.of(Load(rate_qps=10, duration_s=1), samples).throughput_qps == pytest.approx(10 / 1.4)
    assert Round.of(Load(in_flight=5, duration_s=1), samples).throughput_qps == pytest.approx(50 / 5.06)
    assert Round.of(Load(in_flight=5), []).throughput_qps == 0


def result(in_flight: int, rounds_s: list[float]) -> LoadResult:
    rounds = [[sample(0, took_s)] for took_s in rounds_s]
    pooled = Summary.of([one for samples in rounds for one in samples])
    load = Load(in_flight=in_flight)
    return LoadResult(load, pooled, tuple(Round.of(load, samples) for samples in rounds))


def median_us(one: Round) -> float | None:
    return None if one.summary.latency is None else one.summary.latency.median_us


def test_ratios_are_taken_within_a_round() -> None:
    base, other = result(1, [0.1, 0.4, 0.2]), result(4, [0.2, 0.9, 0.4])
    assert base.median(median_us) == pytest.approx(200_000)
    assert other.ratio(base, median_us) == pytest.approx(2.0)


def test_a_round_without_answers_has_no_median() -> None:
    failed = Round.of(Load(in_flight=1), [sample(0, 1, Outcome("overloaded"))])
    fine = result(1, [0.1, 0.1])
    mixed = LoadResult(Load(in_flight=1), fine.pooled, (fine.rounds[0], failed))
    assert mixed.median(median_us) is None
    assert mixed.ratio(fine, median_us) is None


class Counting:
    def __init__(self) -> None:
        self.sent: list[int] = []

    async def send(self, i: int) -> Outcome:
        self.sent.append(i)
        return Outcome(service_s=0.001, queue_s=0.0, n_scored=7, batch_size=1)


async def test_loads_alternate_in_rounds() -> None:
    target = Counting()
    loads = [Load(in_flight=1, warm_up_s=0, requests=2), Load(rate_qps=10_000, warm_up_s=0, requests=3)]
    results = await run_loads(target, loads, rounds=2, seed=0)
    assert target.sent == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2]
    assert [one.load for one in results] == loads
    assert [[r.summary.requests for r in one.rounds] for one in results] == [[2, 2], [3, 3]]
    assert [one.pooled.requests for one in results] == [4, 6]


async def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        await run_loads(Counting(), [], rounds=1, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        await run_loads(Counting(), [Load(in_flight=1)], rounds=0, seed=0)


def test_report_has_the_blocks_and_says_what_was_not_told() -> None:
    machine = Machine.here()
    results = [result(1, [0.1, 0.1, 0.1]), result(4, [0.2, 0.2, 0.2])]
    text = load_text(results, machine, {"model": "nann", "profile": None})
    for words in (
        "99.9 %",
        "search alone",
        "latency, queue in it",
        "batch size not told",
        "2.00",
        "failures 0",
    ):
        assert words in text, words
    assert "queue wait" not in text  # no request told of one
    assert "sent late by" not in text  # a closed loop has no schedule
    assert machine.line() in text
    assert "profile" not in text
    data = load_json(results, machine, {"model": "nann"})
    assert data["loads"][1]["pooled"]["latency"]["median_us"] == pytest.approx(200_000)
    assert data["machine"]["cores"] >= 1


def test_report_of_a_load_that_only_failed() -> None:
    failed = (Round.of(Load(rate_qps=5), [sample(0, 1, Outcome("overloaded"))]),)
    pooled = failed[0].summary
    text = load_text([LoadResult(Load(rate_qps=5), pooled, failed)], Machine.here(), {})
    assert "failures 1 of 1 (overloaded 1)" in text
    assert "sent late by" in text


def test_machine_names_itself() -> None:
    machine = Machine.here()
    assert machine.processor
    assert machine.versions["numpy"]
    assert machine.measured_at.endswith("+00:00")
