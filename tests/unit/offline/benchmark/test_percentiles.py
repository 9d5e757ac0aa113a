"""NANN's block of latency figures."""

from __future__ import annotations

import pytest

from nann.offline.benchmark.percentiles import LatencyBlock


def test_figures_of_a_thousand_known_times() -> None:
    milliseconds = [i / 1e3 for i in range(1000, 0, -1)]
    block = LatencyBlock.of(milliseconds)
    assert block is not None
    assert block.count == 1000
    assert block.min_us == pytest.approx(1e3)
    assert block.max_us == pytest.approx(1000e3)
    assert block.mean_us == pytest.approx(500.5e3)
    assert block.stddev_us == pytest.approx(288_674.99, abs=0.1)
    percentiles = [block.median_us, block.p75_us, block.p95_us, block.p98_us, block.p99_us, block.p99_9_us]
    assert percentiles == pytest.approx([500e3, 750e3, 950e3, 980e3, 990e3, 999e3])


def test_a_percentile_is_a_time_that_was_measured() -> None:
    block = LatencyBlock.of([0.001, 1.0])
    assert block is not None
    assert (block.median_us, block.p75_us) == (1e3, 1e6)


def test_no_times_give_no_block() -> None:
    assert LatencyBlock.of([]) is None
