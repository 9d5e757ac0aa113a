"""Contenders in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nann
from nann.offline.benchmark.compare.worker import Worker, WorkerError

MODULE = """
import os
import sys
from nann.offline.benchmark.compare.worker_process import serve

# What is printed before `serve` would break the first reply, so nothing is.

def answer(request):
    print("and again")
    os.write(1, b"past Python too")
    if request["do"] == "fail":
        raise ValueError("planted")
    if request["do"] == "die":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    return {"twice": 2 * request["number"], "argument": sys.argv[1]}

serve(answer)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "planted_worker.py").write_text(MODULE)
    path = f"{tmp_path}:{Path(nann.__file__).parents[1]}"
    worker = Worker(
        sys.executable,
        "planted_worker",
        ["given"],
        log=tmp_path / "logs" / "worker.log",
        environment={"PYTHONPATH": path},
    )
    yield worker
    worker.close()


def test_requests_are_answered_whatever_libraries_print(worker: Worker) -> None:
    assert worker.ask(do="double", number=4) == {"twice": 8, "argument": "given"}
    assert worker.ask(do="double", number=5)["twice"] == 10


def test_a_failure_is_told_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="ValueError: planted"):
        worker.ask(do="fail")
    assert worker.ask(do="double", number=1)["twice"] == 2


def test_a_worker_that_ends_has_the_last_word(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="last words"):
        worker.ask(do="die")


def test_a_closed_worker_starts_again(worker: Worker) -> None:
    worker.ask(do="double", number=1)
    worker.close()
    assert worker.ask(do="double", number=3)["twice"] == 6
