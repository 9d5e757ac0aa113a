"""Searches in a process of their own answer as those of this one, and what goes wrong there is told here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from golden import GOLDEN, load_engine, query_of
from tiny_models import publish_programs

from nann.cli.server_process import running_server
from nann.engine.artifacts import Artifact
from nann.engine.errors import ArtifactError, BackendError, Unsupported
from nann.engine.retrievers.retriever import silent
from nann.engine.search_engine import SearchEngine
from nann.engine.types import Query, SearchParams
from nann.service.errors import InternalError
from nann.service.search_process.lanes import ProcessLanes, Starter
from nann.service.search_process.messages import OpenLanes, SearchProcessError

ARTIFACT = GOLDEN / "artifact"
MAX_BATCH = 2
_PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> OpenLanes:
    return OpenLanes(
        version_dir=ARTIFACT,
        verify="full",
        scorer="tensorflow",
        lanes=2,
        max_batch=MAX_BATCH,
        xla_cache_dir=tmp_path_factory.mktemp("xla"),
        intra_op_threads=1,
        precision="float32",
        gives_way=False,
    )


@pytest.fixture(scope="module")
def starter() -> Starter:
    return Starter()


def _engine(lanes: ProcessLanes) -> SearchEngine:
    return SearchEngine(Artifact.open(ARTIFACT), lanes, max_batch=MAX_BATCH)


@pytest.fixture(scope="module")
def apart(ask: OpenLanes, starter: Starter) -> Iterator[SearchEngine]:
    engine = _engine(ProcessLanes(ask, starter))
    yield engine
    engine.close()


def _queries() -> list[Query]:
    golden = json.loads((GOLDEN / "hits.json").read_text(encoding="utf-8"))
    return [query_of(one["query"]) for one in golden.values()]


def _until(happened: Any) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _is_gone(pid: int) -> bool:
    try:
        state = Path("/proc", str(pid), "stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"  # nobody has asked how it ended


@pytest.fixture(scope="module")
def here() -> SearchEngine:
    return load_engine(ARTIFACT, max_batch=MAX_BATCH)


def test_answers_are_those_of_this_process(apart: SearchEngine, here: SearchEngine) -> None:
    queries = _queries()
    assert {query.params.policy for query in queries} >= {"best_first", "level", "exhaustive"}
    for query in queries:
        hits = [engine.search([engine.check(query)], 0)[0] for engine in (apart, here)]
        assert hits[0] == hits[1]
        assert hits[0].item_ids


def test_a_batch_keeps_its_queries_apart(apart: SearchEngine) -> None:
    """Of two users, one who excludes items and one who does not, on the second lane."""
    ids = apart.popular(Query(k=20, params=SearchParams())).item_ids
    params = SearchParams(policy="exhaustive")
    two = [
        Query(k=3, params=params, history=ids[:5], exclude=ids[5:15]),
        Query(k=7, params=params, history=ids[8:10], include=ids[:12]),
    ]
    alone = [apart.search([apart.check(query)], 1)[0] for query in two]
    together = apart.search([apart.check(query) for query in two], 1)
    assert [hits.item_ids for hits in together] == [hits.item_ids for hits in alone]
    assert [len(hits.item_ids) for hits in together] == [3, 7]
    assert not set(together[0].item_ids) & set(ids[5:15])
    assert set(together[1].item_ids) <= set(ids[:12])


def test_two_threads_may_search_on_one_lane_at_a_time(apart: SearchEngine) -> None:
    """The second has its batch there before the first one's has ended; each gets its own answers."""
    assert apart.lane_depth == 2
    queries = [apart.check(query) for query in _queries()]
    alone = [apart.search([query], 0) for query in queries]
    with ThreadPoolExecutor(3) as pool:  # a third one waits for a connection
        rounds = [query for _ in range(20) for query in range(len(queries))]
        together = list(pool.map(lambda query: apart.search([queries[query]], 0), rounds))
    assert together == [alone[query] for query in rounds]


def test_the_phases_of_a_search_cannot_be_watched(apart: SearchEngine) -> None:
    query = apart.check(_queries()[0])
    with pytest.raises(ValueError, match="phases"):
        apart.search([query], 0, probe=lambda _phase: None)


def test_a_version_that_is_no_version_is_refused_as_here(
    ask: OpenLanes, starter: Starter, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError) as error:
        ProcessLanes(replace(ask, version_dir=tmp_path), starter)
    assert error.value.file == str(tmp_path / "manifest.json")
    assert isinstance(error.value.__cause__, SearchProcessError)
    assert "read_manifest" in str(error.value.__cause__), "where it was raised"


def test_a_precision_that_the_scorer_lacks_is_refused_as_here(ask: OpenLanes, starter: Starter) -> None:
    with pytest.raises(Unsupported, match="float16"):
        ProcessLanes(replace(ask, precision="float16"), starter)


def test_a_bug_over_there_is_an_internal_error_here(apart: SearchEngine) -> None:
    query = apart.check(Query(k=3, params=SearchParams(policy="exhaustive"), history=()))
    broken = replace(query, retriever="astrology")  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="KeyError") as error:
        apart.search([broken], 0)
    assert isinstance(error.value.__cause__, SearchProcessError)
    assert apart.search([query], 0)[0].item_ids, "the lane goes on"


def test_a_process_that_dies_fails_one_search_and_is_started_again(ask: OpenLanes, starter: Starter) -> None:
    lanes = ProcessLanes(ask, starter)
    engine = _engine(lanes)
    try:
        lanes.warm_up()
        compiled = engine.n_compilations
        query = _queries()[0]
        before = engine.search([engine.check(query)], 0)
        first = lanes.process
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="signal 9"):
            engine.search([engine.check(query)], 0)
        assert engine.search([engine.check(query)], 1) == before
        assert engine.search([engine.check(query)], 0) == before
        assert lanes.process.n_starts == 2
        assert lanes.process.pid != first.pid
        assert engine.n_compilations >= 2 * compiled > 0, "a counter does not fall"
    finally:
        engine.close()
    with pytest.raises(BackendError):
        engine.search([engine.check(query)], 0)
    assert _is_gone(lanes.process.pid)
    assert lanes.process.n_starts == 2, "nobody starts it again once it is closed"


@pytest.mark.parametrize("n_queries", [1, 20_000], ids=["while it searches", "while it is asked"])
def test_a_process_that_hangs_is_ended_and_started_again(
    ask: OpenLanes, starter: Starter, n_queries: int
) -> None:
    """As one that a debugger, or the system, has stopped."""
    lanes = ProcessLanes(ask, starter, search_timeout_s=3.0)
    engine = _engine(lanes)
    try:
        query = engine.check(_queries()[0])
        lanes.warm_up()
        before = engine.search([query], 0)
        hung = lanes.process.pid
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(BackendError, match="did not answer in time"):
            lanes.search([query] * n_queries, 0, silent)
        assert _is_gone(hung)
        assert engine.search([query], 0) == before
        assert engine.search([query], 1) == before
        assert lanes.process.n_starts == 2
    finally:
        engine.close()


def test_it_does_not_outlive_a_server_that_is_killed(ask: OpenLanes) -> None:
    program = f"""
import sys
from pathlib import Path
from nann.service.search_process.lanes import ProcessLanes, Starter
from nann.service.search_process.messages import OpenLanes
opened = OpenLanes(Path({str(ARTIFACT)!r}), "full", "tensorflow", 1, 1, None, 1, "float32", False)
lanes = ProcessLanes(opened, Starter())
print(lanes.process.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert not _is_gone(pid)
        server.kill()
    _until(lambda: _is_gone(pid))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="priorities of threads are Linux's")
def test_what_opens_a_version_gives_way_and_what_searches_does_not(ask: OpenLanes, starter: Starter) -> None:
    idle: dict[str, int] = {}
    for name, gives_way in (("usual", False), ("gentle", True)):
        lanes = ProcessLanes(replace(ask, gives_way=gives_way), starter)
        try:
            tasks = [int(task.name) for task in Path("/proc", str(lanes.process.pid), "task").iterdir()]
            policies = [os.sched_getscheduler(task) for task in tasks]
            assert policies.count(os.SCHED_OTHER) >= 1 + ask.lanes, "the one that listens, and one a lane"
            idle[name] = policies.count(os.SCHED_IDLE)
        finally:
            lanes.close()
    # TensorFlow's pool, which the thread that opens has made.
    assert idle["usual"] == 0 < idle["gentle"]


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="priorities of threads are Linux's")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned JAX needs Python 3.11")
def test_xla_compiles_where_processors_are_idle_and_searches_where_they_are_not(
    ask: OpenLanes, starter: Starter, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    shutil.copytree(ARTIFACT, version)
    publish_programs(version, max_batch=MAX_BATCH, max_rows=256)
    opened = replace(ask, version_dir=version, scorer="pjrt", gives_way=True, xla_cache_dir=tmp_path / "xla")
    lanes = ProcessLanes(opened, starter)
    engine = SearchEngine(Artifact.open(version), lanes, max_batch=MAX_BATCH)
    try:

        def ticks() -> Counter[int]:
            """Processor time of the process's threads, by their policy."""
            found: Counter[int] = Counter()
            for task in Path("/proc", str(lanes.process.pid), "task").iterdir():
                fields = (task / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
                found[os.sched_getscheduler(int(task.name))] += int(fields[11]) + int(fields[12])
            return found

        lanes.warm_up()
        opening = ticks()
        assert opening[os.SCHED_IDLE] > 10 * opening[os.SCHED_OTHER], "imports, programs, compilation"
        query = engine.check(_queries()[0])
        while ticks()[os.SCHED_OTHER] < opening[os.SCHED_OTHER] + 20:
            engine.search([query], 0)
        assert ticks()[os.SCHED_IDLE] <= opening[os.SCHED_IDLE] + 1
    finally:
        engine.close()


def test_a_server_recovers_and_says_how_often(tmp_path: Path) -> None:
    (tmp_path / "repository" / "nann").mkdir(parents=True)
    (tmp_path / "repository" / "nann" / "1").symlink_to(ARTIFACT, target_is_directory=True)
    known = int(np.load(ARTIFACT / "arrays" / "item_ids.npy")[0])
    flags = ["--scorer", "tensorflow", "--max-batch-size", "1", "--lanes", "1", "--log-format", "json"]
    flags += ["--xla-cache-dir", str(tmp_path / "xla")]
    log = tmp_path / "server.log"
    with running_server(tmp_path / "repository", log_path=log, flags=flags) as server:

        def starts() -> dict[str, float]:
            lines = httpx.get(f"{server.rest_url}/metrics").text.splitlines()
            return {
                line.split("{")[0]: float(line.split()[-1])
                for line in lines
                if line.startswith("nann_search_process_")
            }

        def ask_once() -> int:
            body = {"history": [known], "k": 3, "timeout_ms": 30_000}
            return httpx.post(f"{server.rest_url}/retrieve", json=body, timeout=60).status_code

        assert ask_once() == 200
        found = starts()
        assert found["nann_search_process_starts_total"] == 1
        assert found["nann_search_process_resident_memory_bytes"] > 50e6
        assert found["nann_search_process_cpu_seconds_total"] > 0.1
        (pid,) = [
            int(child)
            for path in Path("/proc", str(server.pid), "task").glob("*/children")
            for child in path.read_text().split()
        ]
        os.kill(pid, signal.SIGKILL)
        assert ask_once() == 503
        _until(lambda: ask_once() == 200)
        assert starts()["nann_search_process_starts_total"] == 2
        assert httpx.get(f"{server.rest_url}/readyz").status_code == 200
    assert "starting the search process again" in log.read_text(encoding="utf-8")
    assert '"code": 0' in log.read_text(encoding="utf-8").splitlines()[-1]
