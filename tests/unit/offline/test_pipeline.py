"""What the pipeline does again and what it does not. The steps themselves are tested where they live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nann.offline import pipeline as module
from nann.offline.build_index import GraphOptions
from nann.offline.pipeline import PipelineError, PipelineOptions, run_pipeline
from nann.offline.pipeline_steps import STEPS, StepFailure, run_step


class Steps:
    """Stands for the processes that run the steps: notes which ran and leaves their outputs."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: str | None = None
        self.versions = 0
        self.model_at_start: list[bool] = []

    def __call__(self, step: str, input: Path, run_dir: Path, options: dict[str, Any]) -> str:
        self.ran.append(step)
        if step == "train":
            self.model_at_start.append((run_dir / "model").exists())
            (run_dir / "model" / "checkpoints").mkdir(parents=True, exist_ok=True)
        if step == self.fails:
            raise PipelineError(f"step {step} failed")
        if step == "export":
            self.versions += 1
            version = run_dir / "repository" / options["name"] / str(self.versions)
            version.mkdir(parents=True)
            return str(version)
        for name in module._OUTPUTS[step]:
            (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).write_text("{}")
        return ""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(module, "_in_own_process", steps)
    return steps


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text("1,2,3,pv,4\n")
    return path


ALL = list(STEPS)


def test_everything_once_in_order_and_nothing_twice(steps: Steps, log: Path, tmp_path: Path) -> None:
    first = run_pipeline(log, tmp_path / "run")
    assert steps.ran == ALL
    second = run_pipeline(log, tmp_path / "run")
    assert steps.ran == ALL
    assert all(step.skipped for step in second.steps)
    assert [step.seconds for step in second.steps] == [round(step.seconds, 2) for step in first.steps]
    assert first.version_dir == second.version_dir == tmp_path / "run" / "repository" / "nann" / "1"


@pytest.mark.parametrize(
    ("options", "again"),
    [
        (PipelineOptions(prepare={"seed": 1}), ALL),
        (PipelineOptions(train={"epochs": 1}), ALL[1:]),
        (PipelineOptions(graph=GraphOptions(m=8)), ALL[3:]),
        (PipelineOptions(distill={"steps": 1}), ALL[4:]),
        (PipelineOptions(evaluate={"n_tune": 1}), ALL[5:]),
        (PipelineOptions(name="films"), ALL[6:]),
    ],
)
def test_a_changed_option_repeats_its_step_and_those_after_it(
    steps: Steps, log: Path, tmp_path: Path, options: PipelineOptions, again: list[str]
) -> None:
    run_pipeline(log, tmp_path / "run")
    steps.ran.clear()
    run_pipeline(log, tmp_path / "run", options=options)
    assert steps.ran == again


def test_a_changed_input_repeats_everything(steps: Steps, log: Path, tmp_path: Path) -> None:
    run_pipeline(log, tmp_path / "run")
    steps.ran.clear()
    log.write_text("1,2,3,pv,4\n1,2,3,pv,5\n")
    run_pipeline(log, tmp_path / "run")
    assert steps.ran == ALL


def test_a_lost_output_is_made_again(steps: Steps, log: Path, tmp_path: Path) -> None:
    run_pipeline(log, tmp_path / "run")
    steps.ran.clear()
    (tmp_path / "run" / "report.md").unlink()
    run_pipeline(log, tmp_path / "run")
    assert steps.ran == ["evaluate"]


def test_lost_tables_are_learnt_again_and_the_index_is_kept(steps: Steps, log: Path, tmp_path: Path) -> None:
    run_pipeline(log, tmp_path / "run")
    steps.ran.clear()
    (tmp_path / "run" / "index" / "arrays" / "gate_keys.npy").unlink()
    run_pipeline(log, tmp_path / "run")
    assert steps.ran == ["distill"]


def test_a_failed_step_is_tried_again_and_training_keeps_its_checkpoints(
    steps: Steps, log: Path, tmp_path: Path
) -> None:
    steps.fails = "train"
    with pytest.raises(PipelineError, match="step train"):
        run_pipeline(log, tmp_path / "run")
    steps.fails = None
    steps.ran.clear()
    run_pipeline(log, tmp_path / "run")
    assert steps.ran == ALL[1:]
    assert steps.model_at_start == [False, True]


def test_training_with_other_options_starts_anew(steps: Steps, log: Path, tmp_path: Path) -> None:
    run_pipeline(log, tmp_path / "run")
    run_pipeline(log, tmp_path / "run", options=PipelineOptions(train={"epochs": 1}))
    assert steps.model_at_start == [False, False]


def test_a_model_that_the_pipeline_did_not_make_is_left_alone(
    steps: Steps, log: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(PipelineError, match="another --output"):
        run_pipeline(log, tmp_path / "run")
    assert "train" not in steps.ran


def test_a_missing_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="does not exist"):
        run_pipeline(tmp_path / "nothing", tmp_path / "run")


def test_a_step_tells_why_it_failed_instead_of_raising(tmp_path: Path) -> None:
    outcome = run_step("export", tmp_path, tmp_path, {"name": "nann"})
    assert isinstance(outcome, StepFailure)
    assert "nann index" in outcome.message
    assert "FileNotFoundError" in outcome.traceback


def test_the_failure_of_a_steps_own_process_names_the_step(log: Path, tmp_path: Path) -> None:
    log.write_text("no,click\n")
    with pytest.raises(PipelineError, match="step prepare failed") as raised:
        run_pipeline(log, tmp_path / "run")
    assert "Traceback" in str(raised.value.__cause__)
