"""``python -m nann.cli.gpu_report``: one command that measures the engine on a GPU and writes what it found.

Needs numpy, numba, jax and, for a GPU, cupy: none of the packages that the service or the pipeline need.
It makes its own corpus, graph and weights (`nann.offline.benchmark.gpu`), and stays under eight minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nann.engine.devices import Device, choose_devices
from nann.engine.errors import RetrievalError
from nann.engine.search_engine import PreparedQuery
from nann.engine.types import Hits, Query
from nann.offline.benchmark.gpu.loads import Served
from nann.offline.benchmark.gpu.measure import Bench
from nann.offline.benchmark.gpu.plan import StepResult, run_plan, watchdog
from nann.offline.benchmark.gpu.preparation import Options
from nann.offline.benchmark.gpu.report import NO_FIGURE, report_text
from nann.offline.benchmark.gpu.session import Session
from nann.offline.benchmark.machine import Machine
from nann.service.batcher import Answer, Batcher, BatcherLimits, BatchObserver, DispatchReason

__all__ = ["main"]

_ITEMS = 1_300_000  # NANN's corpus (reference/nann.md, "Published results")
_SECONDS = 450.0
_GRACE_S = 20.0  # until a step that hangs is given up
_DEADLINE_S = 10.0
_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; 0 when it was written, 1 when even that failed."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except RetrievalError as error:
        print(f"nann gpu-report: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    # JAX would take three quarters of the GPU's memory at once; the engine's tables live there too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from nann.offline.benchmark.gpu.rig import accept_installed_jax

    device, why = _device(options.device)
    on_gpu = device.kind == "cuda"
    chosen = Options(
        device=device,
        items=options.items,
        users=options.users or (512 if on_gpu else 128),
        seed=options.seed,
        precision=options.precision or ("float16" if on_gpu else "float32"),
        lanes=options.lanes or (4 if on_gpu else 2),
        batch=options.batch or (64 if on_gpu else 8),
        load_s=options.load_seconds or (2.0 if on_gpu else 1.0),
    )
    jax_version = accept_installed_jax()
    writer = _Writer(options.output, options.docs, chosen, _machine(device, why, jax_version, options.commit))
    session = Session(chosen, _serve)
    with watchdog(options.seconds + _GRACE_S, writer.give_up):
        run_plan(session.steps(), seconds=options.seconds, on_result=writer.take)
    writer.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nann gpu-report", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, required=True, help="Directory for report.json and gpu.md.")
    parser.add_argument("--docs", type=Path, help="Also write the text here, as docs/gpu.md.")
    parser.add_argument("--device", default="auto", help="auto, cpu, or cuda:K.")
    parser.add_argument("--items", type=int, default=_ITEMS, help="Items of the corpus.")
    parser.add_argument("--users", type=int, help="Distinct users; 512 on a GPU, else 128.")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="After which no step begins.")
    parser.add_argument("--load-seconds", type=float, help="Seconds of one load; 2 on a GPU, else 1.")
    parser.add_argument("--lanes", type=int, help="Lanes at most; 4 on a GPU, else 2.")
    parser.add_argument("--batch", type=int, help="Queries of one search at most; 64 on a GPU, else 8.")
    parser.add_argument("--precision", choices=("float16", "float32"), help="float16 on a GPU, else float32.")
    parser.add_argument("--seed", type=int, default=0, help="Draws the corpus.")
    parser.add_argument("--commit", help="The code's commit, where there is no repository to ask.")
    return parser


def _device(text: str) -> tuple[Device, str]:
    devices, why = choose_devices(text)
    return devices[0], why


class _CountSearches(BatchObserver):
    """How many batches were sent to a lane."""

    def __init__(self) -> None:
        self.searches = 0

    def dispatched(self, size: int, reason: DispatchReason) -> None:
        self.searches += 1


@asynccontextmanager
async def _serve(bench: Bench, queries: Sequence[Query], lanes: int, max_batch: int) -> AsyncIterator[Served]:
    """The engine behind the service's batcher."""
    engine, observer = bench.engine, _CountSearches()
    limits = BatcherLimits(
        n_lanes=lanes,
        max_batch=max_batch,
        queue_limit=64 * 1024,
        queue_work_limit=sys.maxsize,
        batch_work_limit=sys.maxsize,
    )
    batcher: Batcher[PreparedQuery, Hits] = Batcher(engine.search, limits, observer=observer)
    prepared = [engine.check(query) for query in queries]

    async def one(users: Sequence[int]) -> list[Hits]:
        checked = engine.check(queries[users[0]])
        return [(await batcher.submit(checked, deadline_s=time.monotonic() + _DEADLINE_S)).result]

    async def many(users: Sequence[int]) -> list[Hits]:
        deadline_s = time.monotonic() + _DEADLINE_S
        answers = await batcher.submit_many([prepared[user] for user in users], deadline_s=deadline_s)
        return [_result(answer) for answer in answers]

    try:
        yield Served(one, many, lambda: observer.searches, bench.launches)
    finally:
        await batcher.close()


def _result(answer: Answer[Hits] | Exception) -> Hits:
    if isinstance(answer, Exception):
        raise answer
    return answer.result


class _Writer:
    """Writes the report anew after every step, so that what was measured is never lost."""

    def __init__(self, output: Path, docs: Path | None, options: Options, machine: dict[str, Any]) -> None:
        self._output = output
        self._docs = docs
        self._report: dict[str, Any] = {
            "command": "make gpu-report" if options.device.kind == "cuda" else _command(options),
            "device": str(options.device),
            "items": options.items,
            "precision": options.precision,
            "options": {**asdict(options), "device": str(options.device)},
            "machine": machine,
            "steps": {},
        }
        output.mkdir(parents=True, exist_ok=True)

    def take(self, result: StepResult) -> None:
        """A step has ended."""
        self._report["steps"][result.name] = asdict(result)
        words = f"{result.name}: {result.status} after {result.seconds:.1f} s"
        print(f"{words}{f' ({result.why})' if result.why else ''}", flush=True)
        self._write()

    def finish(self) -> None:
        """All steps have ended."""
        self._publish(self._write())
        from nann.offline.benchmark.gpu.plots import draw

        for path in draw(self._report, self._output):
            print(f"wrote {path}")
        print(f"wrote {self._output / 'gpu.md'}")

    def _may_replace(self, docs: Path) -> bool:
        """A rehearsal never takes the place of figures of a GPU."""
        if self._report["device"] != "cpu" or not docs.is_file() or NO_FIGURE in docs.read_text("utf-8"):
            return True
        print(f"{docs} holds figures of a GPU and was left as it is")
        return False

    def give_up(self) -> None:
        """A step hangs, and no thread can be stopped: write what there is and end the process."""
        hung = StepResult("the step after those above", "failed", why="it did not end, and was given up")
        self.take(hung)
        self._publish(self._write())
        os._exit(1)

    def _publish(self, text: str) -> None:
        if self._docs is not None and self._may_replace(self._docs):
            self._docs.write_text(text, encoding="utf-8")

    def _write(self) -> str:
        text = report_text(self._report)
        body = json.dumps(_finite(self._report), indent=1, default=str)
        (self._output / "report.json").write_text(body + "\n", encoding="utf-8")
        (self._output / "gpu.md").write_text(text, encoding="utf-8")
        return text


def _finite(value: Any) -> Any:
    """The value without NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _command(options: Options) -> str:
    return f"make gpu-report ARGS='--device {options.device} --items {options.items}'"


def _machine(device: Device, why: str, jax_version: str, commit: str | None) -> dict[str, Any]:
    machine = Machine.here()
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    machine = replace(machine, versions={**machine.versions, **versions}, commit=commit or machine.commit)
    return {
        "device": why,
        "driver": _driver() if device.kind == "cuda" else None,
        "machine": machine.line(),
        "scorer": f"the model's functions as XLA programs through PJRT (JAX {jax_version})",
        "event loop": "asyncio",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.strip().splitlines())


if __name__ == "__main__":
    sys.exit(main())
