"""A soak of seconds on a free engine, and the arithmetic of growth."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from nann.cli.reliability.free_engine import free_server
from nann.cli.reliability.process import ProcessFigures
from nann.cli.reliability.soak import Slice, SoakResult, soak_server
from nann.offline.benchmark.load import OK
from nann.offline.benchmark.percentiles import LatencyBlock
from nann.offline.benchmark.users import User
from nann.offline.progress import Progress

_USERS = [User(user_id=n, history=[n + 1, n + 2]) for n in range(5)]


async def test_every_kind_of_call_is_answered_as_expected(tmp_path: Path) -> None:
    with free_server(tmp_path) as server:
        result = await soak_server(
            server,
            _USERS,
            rate_qps=200.0,
            seconds=0.6,
            seed=0,
            progress=Progress(silent=True),
            slice_s=0.3,
        )
    assert set(result.codes) == {OK}
    assert len(result.slices) == 2
    assert result.compilations == 0
    assert "compilations after ready" in result.words()


def test_each_kind_of_growth_breaks_the_promise() -> None:
    latency = LatencyBlock.of([0.01])
    assert latency is not None
    flat = [Slice(ProcessFigures(1000, 1.0, 20, 10), 5)] * 20
    # The first tenth warms up and may grow.
    slices = (Slice(ProcessFigures(500, 1.0, 5, 10), 5), *flat[1:])
    good = SoakResult(3600.0, 50.0, Counter({OK: 10}), latency, slices)
    assert good.kept
    assert (good.growth, good.new_files) == (0.0, 0)
    end = Slice(ProcessFigures(1011, 1.0, 20, 10), 5)
    more_files = Slice(ProcessFigures(1000, 1.0, 21, 10), 5)
    compiled = Slice(ProcessFigures(1000, 1.0, 20, 10), 6)
    for last in (end, more_files, compiled):
        assert not replace(good, slices=(*slices[:18], last, last)).kept
    assert not replace(good, codes=Counter({OK: 10, "http_500": 1})).kept
