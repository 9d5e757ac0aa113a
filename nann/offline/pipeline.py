"""`nann pipeline`: all offline steps in order, each skipped when its work is done already.

A step's key is a hash of its options and of the key of the step it builds on; the first one hashes
names, sizes and times of the input's files. A step is done when its output is there and was recorded
under the same key. Each step runs in a process of its own: TensorFlow takes its thread and compiler
settings once in a process, and training wants others than the engine that serves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

from nann.engine.artifacts import GATE_KEYS, GATE_QUERIES
from nann.engine.scoring.native_log import quiet_native_log
from nann.offline.build_index import GRAPH_FILE, PRESETS, GraphOptions
from nann.offline.pipeline_steps import STEPS, StepFailure, run_step
from nann.offline.progress import Progress

__all__ = ["PipelineError", "PipelineOptions", "PipelineReport", "StepResult", "run_pipeline"]

_RECORD_FILE = "steps.json"
# What says that a step's output is there; `export` records the version directory it made.
_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "prepare": ("data/meta.json",),
    "train": ("model/weights.npz",),
    "extract": ("embeddings/model.json",),
    "index": (f"index/{GRAPH_FILE}", "index/manifest.json"),
    "distill": (f"index/arrays/{GATE_KEYS}", f"index/arrays/{GATE_QUERIES}"),
    "evaluate": ("report.md", "report.json", "quality.json", "profiles.json"),
}


class PipelineError(Exception):
    """A step failed; the message names it and says why."""


class _InStep(Exception):
    """The traceback of a step's own process, as the cause of a `PipelineError`; never raised itself."""


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Options of the steps. `prepare`, `train`, `distill` and `evaluate` hold keyword arguments of
    `nann.offline.data.prepare.prepare`, `TrainConfig`, `DistillOptions` and `EvaluateOptions`: plain values,
    so that naming them loads no TensorFlow.
    """

    name: str = "nann"
    prepare: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    graph: GraphOptions = PRESETS["default"]
    distill: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    def of(self, step: str) -> dict[str, Any]:
        """What decides the output of `step`, besides the step before it."""
        match step:
            case "index":
                return asdict(self.graph)
            case "export":
                return {"name": self.name}
            case "extract":
                return {}
            case _:
                return dict(getattr(self, step))


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step: whether it had to run, and how long it took when it did."""

    name: str
    skipped: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """Where everything is. `repository` is ready to serve, `report` says how good it is."""

    run_dir: Path
    repository: Path
    version_dir: Path
    report: Path
    steps: tuple[StepResult, ...]


def run_pipeline(
    input: Path, run_dir: Path, *, options: PipelineOptions | None = None, progress: Progress | None = None
) -> PipelineReport:
    """Run every step that `run_dir` lacks: data, model, embeddings, index, gate, report, published version.

    A training that was interrupted goes on from its last checkpoint.

    Raises:
        PipelineError: a step failed, or its directory holds something that no pipeline put there.
    """
    options = options if options is not None else PipelineOptions()
    progress = progress if progress is not None else Progress(silent=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    record = _Record(run_dir)
    key = _input_key(input)
    results: list[StepResult] = []
    for number, step in enumerate(STEPS, start=1):
        key = _hash({"after": key, "step": step, "options": options.of(step)})
        title = f"[{number}/{len(STEPS)}] {step}"
        if record.is_done(step, key):
            progress.line(f"{title}: done before, skipped")
            results.append(StepResult(step, True, record.seconds(step)))
            continue
        progress.line(title)
        record.begin(step, key)
        started_s = monotonic()
        output = _in_own_process(step, input, run_dir, options.of(step))
        results.append(StepResult(step, False, monotonic() - started_s))
        record.finish(step, results[-1].seconds, output)
    return PipelineReport(
        run_dir, run_dir / "repository", Path(record.output("export")), run_dir / "report.md", tuple(results)
    )


class _Record:
    """``steps.json``: the key of every step begun here, and what came of it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / _RECORD_FILE
        self._steps: dict[str, dict[str, Any]] = (
            json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        )

    def is_done(self, step: str, key: str) -> bool:
        entry = self._steps.get(step, {})
        outputs = [Path(entry.get("output", ""))] if step == "export" else []
        outputs += [self._run_dir / name for name in _OUTPUTS.get(step, ())]
        return entry.get("key") == key and entry.get("done", False) and all(p.exists() for p in outputs)

    def begin(self, step: str, key: str) -> None:
        """Note the key before the work, so that an interrupted training is known as the same one."""
        if step == "train" and (model := self._run_dir / "model").exists():
            if step not in self._steps:
                raise PipelineError(f"{model} is not from a pipeline run here; name another --output")
            if self._steps[step]["key"] != key:
                shutil.rmtree(model)  # of other data or options: training must not go on from it
        self._steps[step] = {"key": key, "done": False}
        self._save()

    def finish(self, step: str, seconds: float, output: str) -> None:
        self._steps[step] |= {"done": True, "seconds": round(seconds, 2), "output": output}
        self._save()

    def seconds(self, step: str) -> float:
        return float(self._steps[step]["seconds"])

    def output(self, step: str) -> str:
        return str(self._steps[step]["output"])

    def _save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._steps, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._path)


def _in_own_process(step: str, input: Path, run_dir: Path, options: dict[str, Any]) -> str:
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=quiet_native_log) as pool:
            outcome = pool.submit(run_step, step, input, run_dir, options).result()
    except BrokenProcessPool:
        raise PipelineError(f"step {step} was killed, perhaps for want of memory; run it again") from None
    if isinstance(outcome, StepFailure):
        raise PipelineError(f"step {step} failed: {outcome.message}") from _InStep(outcome.traceback)
    return outcome


def _input_key(input: Path) -> str:
    if not input.exists():
        raise PipelineError(f"{input} does not exist")
    files = sorted(path for path in input.rglob("*") if path.is_file()) if input.is_dir() else [input]
    stats = [(path.relative_to(input).as_posix(), path.stat()) for path in files]
    return _hash(
        {
            "input": str(input.resolve()),
            "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
            "nann": metadata.version("nann"),
        }
    )


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
