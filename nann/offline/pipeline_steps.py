"""The steps of the pipeline, as they run in a process of their own: plain values in, plain values out."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nann.offline.progress import Progress

__all__ = ["STEPS", "StepFailure", "run_step"]

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepFailure:
    """Why a step failed. Not the exception itself: not every one survives the way between processes."""

    message: str
    traceback: str


def run_step(step: str, input: Path, run_dir: Path, options: Options) -> str | StepFailure:
    """Run one step; the answer is the path of its output, or why there is none."""
    try:
        with Progress() as progress:
            return str(STEPS[step](input, run_dir, options, progress))
    except Exception as error:
        return StepFailure(str(error) or type(error).__name__, traceback.format_exc())


def _prepare(input: Path, run_dir: Path, options: Options, progress: Progress) -> Path:
    from nann.offline.data.prepare import prepare

    report = prepare(input, run_dir / "data", **options, progress=progress)
    if report.bad_rows.count:
        progress.line(report.bad_rows.report())
    return report.output


def _train(input: Path, run_dir: Path, options: Options, progress: Progress) -> Path:
    from nann.offline.train import TrainConfig, train

    return train(run_dir / "data", run_dir / "model", TrainConfig(**options), progress=progress).model_dir


def _extract(input: Path, run_dir: Path, options: Options, progress: Progress) -> Path:
    from nann.offline.extract_embeddings import extract

    return extract(run_dir / "model", run_dir / "embeddings", run_dir / "data", progress=progress).output_dir


def _index(input: Path, run_dir: Path, options: Options, progress: Progress) -> Path:
    from nann.offline.build_index import GraphOptions, build_index

    return build_index(
        run_dir / "embeddings", run_dir / "index", options=GraphOptions(**options), progress=progress
    ).output


def _distill(input: Path, run_dir: Path, options: Options, progress: Progress) -> Path:
    from nann.offline.distill import DistillOptions, distill

    return distill(run_dir, options=DistillOptions(**options), progress=progress).index


def _evaluate(input: Path, run_dir: Path, options: Options, progress: Progress) -> Path:
    from nann.offline.evaluate import EvaluateOptions, evaluate

    evaluate(run_dir, options=EvaluateOptions(**options), progress=progress)
    return run_dir / "report.md"


def _export(input: Path, run_dir: Path, options: Options, progress: Progress) -> Path:
    from nann.offline.export import export

    return export(run_dir, run_dir / "repository", **options)


STEPS: Mapping[str, Callable[[Path, Path, Options, Progress], Path]] = {
    "prepare": _prepare,
    "train": _train,
    "extract": _extract,
    "index": _index,
    "distill": _distill,
    "evaluate": _evaluate,
    "export": _export,
}
