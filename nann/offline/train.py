"""Train a retrieval model on a prepared data set: the loop, its schedule and what it records."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from nann.offline.checkpoints import (
    CONFIG_FILE,
    METRICS_FILE,
    WEIGHTS_FILE,
    Checkpoints,
    MetricsLog,
    save_weights,
    write_json,
)
from nann.offline.data.dataset import Dataset
from nann.offline.models.model import ModelSpec, RetrievalModel
from nann.offline.models.registry import create_model
from nann.offline.optimizers import learning_rate_at
from nann.offline.progress import Progress, Stage
from nann.offline.sampling import BatchSampler, prefetched
from nann.offline.train_step import TrainStep
from nann.offline.validation import Validation, ValidationSample

__all__ = ["TrainConfig", "TrainReport", "TrainingDivergedError", "train"]

HIT_RATE_K = 200  # NANN's cut-off (reference/nann.md)
LOG_EVERY_STEPS = 50
# Collapse (reference/search-findings.md: FGSM drove accuracy from 0.24 to 0.02): the smoothed accuracy
# falls under a third of its own best after that was well above chance.
COLLAPSE_SHARE = 1 / 3
COLLAPSE_MIN_ACCURACY = 0.05
ACCURACY_SMOOTHING = 0.3


class TrainingDivergedError(Exception):
    """The loss is no longer a number."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. Defaults are NANN's (reference/nann.md, "Model") where NANN has one.

    `negative_groups` sets of `num_neg` negatives are drawn a step, each shared by an equal part of the
    batch. `adv_groups` of those groups carry the adversarial term (it costs about three plain passes).
    `max_steps` ends the run before `epochs` do. `eval_every` 0 evaluates at the end of each epoch only.
    """

    model: str = "attention_dnn"
    batch_size: int = 800
    num_neg: int = 200
    negative_groups: int = 8
    epochs: int = 5
    max_steps: int | None = None
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    final_learning_rate_share: float = 0.05
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    adv_eps: float = 0.0
    adv_groups: int = 2
    seed: int = 0
    eval_every: int = 0
    eval_users: int = 200
    checkpoint_every: int = 500
    jit: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        at_least_one = (
            "batch_size",
            "num_neg",
            "negative_groups",
            "epochs",
            "eval_users",
            "checkpoint_every",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "clip_norm", "adv_eps", "warmup_steps", "eval_every"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if not 1 <= self.adv_groups <= self.negative_groups:
            raise ValueError(f"adv_groups must be 1 … negative_groups, got {self.adv_groups}")


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run came to. Rates are of `eval_users` validation users at k = 200 over the whole corpus."""

    model_dir: Path
    steps: int
    resumed_from_step: int
    seconds: float
    step_ms: float
    best_step: int
    best_hit_rate: float
    last_hit_rate: float
    popularity_hit_rate: float
    eval_users: int
    collapsed_at_step: int | None


def train(
    data_dir: Path | str,
    output_dir: Path | str,
    config: TrainConfig | None = None,
    *,
    progress: Progress | None = None,
) -> TrainReport:
    """Train, or go on with, the run in `output_dir`; its `weights.npz` is the best model seen.

    Raises NotPreparedError for a directory that holds no data set, ValueError for a setting that does not
    fit the data, ModelNotTrainedError when a checkpoint there is of another model, TrainingDivergedError
    when the loss stops being finite.
    """
    config = config if config is not None else TrainConfig()
    run = _Run(Path(data_dir), Path(output_dir), config)
    with progress if progress is not None else Progress() as shown:
        return run.execute(shown)


class _Run:
    """One call of `train`: the parts, and the loop over them."""

    def __init__(self, data_dir: Path, output_dir: Path, config: TrainConfig) -> None:
        self.config, self.output_dir, self.data_dir = config, output_dir, data_dir
        _limit_threads(config.threads)
        self.dataset = Dataset.load(data_dir)
        self.sampler = BatchSampler(
            self.dataset,
            batch_size=config.batch_size,
            n_groups=config.negative_groups,
            num_neg=config.num_neg,
            seed=config.seed,
        )
        spec = ModelSpec(self.dataset.num_items, self.dataset.num_categories, self.dataset.history_length)
        self.model: RetrievalModel = create_model(config.model, spec, seed=config.seed)
        self.train_step = TrainStep(
            self.model,
            adv_eps=config.adv_eps,
            adv_groups=config.adv_groups,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            jit=config.jit,
        )
        sample = ValidationSample.of(self.dataset, max_users=config.eval_users, seed=config.seed)
        self.validation = Validation(sample, jit=config.jit)
        self.popularity = sample.popularity_hit_rate(self.dataset.item_weights, HIT_RATE_K)
        all_steps = config.epochs * self.sampler.steps_per_epoch
        self.total_steps = min(config.max_steps, all_steps) if config.max_steps is not None else all_steps
        output_dir.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(output_dir / "checkpoints", self.train_step.variables())
        self.first_step = self.checkpoints.restore()
        self.log = MetricsLog(output_dir / METRICS_FILE, resumed_step=self.first_step)
        self.collapse = _CollapseWatch()
        self.last_eval: dict[str, Any] = {}

    def execute(self, progress: Progress) -> TrainReport:
        started = time.perf_counter()
        n_steps = max(self.total_steps - self.first_step, 0)
        if self.first_step:
            progress.line(f"resuming after step {self.first_step} of {self.total_steps}")
        writer = tf.summary.create_file_writer(str(self.output_dir / "tensorboard"))
        training_s = 0.0
        with writer.as_default(), progress.stage("train", total=self.total_steps, unit="steps") as stage:
            stage.move_to(self.first_step)
            with prefetched(self.sampler.batch, self.first_step, self.total_steps) as batches:
                training_s = self._loop(batches, stage, progress.line)
        writer.close()
        if not any("hit_rate" in record for record in self.log.records):
            self._evaluate(self.first_step, progress.line)
        best = max((r for r in self.log.records if "hit_rate" in r), key=lambda record: record["hit_rate"])
        last = [r for r in self.log.records if "hit_rate" in r][-1]
        self._write_config(self.total_steps, best)
        return TrainReport(
            model_dir=self.output_dir,
            steps=max(self.total_steps, self.first_step),
            resumed_from_step=self.first_step,
            seconds=time.perf_counter() - started,
            step_ms=1000 * training_s / n_steps if n_steps else 0.0,
            best_step=best["step"],
            best_hit_rate=best["hit_rate"],
            last_hit_rate=last["hit_rate"],
            popularity_hit_rate=self.popularity,
            eval_users=len(self.validation.sample.targets),
            collapsed_at_step=self.collapse.step,
        )

    def _loop(self, batches: Iterator[Any], stage: Stage, say: Callable[[str], None]) -> float:
        """Run the steps; seconds spent training, evaluations and checkpoints left out."""
        training_s, since_log, mark = 0.0, 0, time.perf_counter()
        for batch in batches:
            metrics = self.train_step(batch, self._learning_rate(batch.step))
            done = batch.step + 1
            since_log += 1
            stage.move_to(done)
            is_last = done == self.total_steps
            ends_epoch = done % self.sampler.steps_per_epoch == 0
            evaluates = (
                is_last or ends_epoch or (self.config.eval_every and done % self.config.eval_every == 0)
            )
            saves = is_last or done % self.config.checkpoint_every == 0
            if done % LOG_EVERY_STEPS == 0 or evaluates or saves:
                values = {name: float(value) for name, value in metrics.items()}
                elapsed = time.perf_counter() - mark
                training_s += elapsed
                self._record(done, batch.epoch, values, elapsed / since_log, stage, say)
                if evaluates:
                    self._evaluate(done, say)
                if saves:
                    self.checkpoints.save(done)
                since_log, mark = 0, time.perf_counter()
        return training_s

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(
            step,
            peak=self.config.learning_rate,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.total_steps,
            final_share=self.config.final_learning_rate_share,
        )

    def _record(
        self,
        done: int,
        epoch: int,
        values: dict[str, float],
        step_s: float,
        stage: Stage,
        say: Callable[[str], None],
    ) -> None:
        values = {**values, "learning_rate": self._learning_rate(done - 1), "step_ms": 1000 * step_s}
        if not np.isfinite(values["loss"]):
            raise TrainingDivergedError(
                f"the loss is {values['loss']} at step {done}; lower the learning rate "
                f"({self.config.learning_rate}) or adv_eps ({self.config.adv_eps}), or set clip_norm"
            )
        for name, value in values.items():
            tf.summary.scalar(name, value, step=done)
        self.log.write({"step": done, "epoch": epoch, **values})
        stage.note(f"loss {values['loss']:.3f} acc {values['acc_origin']:.3f} {1000 * step_s:.0f} ms/step")
        if self.collapse.sees(done, values["acc_origin"]):
            say(
                f"COLLAPSE at step {done}: accuracy {values['acc_origin']:.3f} after a best of "
                f"{self.collapse.best:.3f}; the best weights so far are kept"
            )

    def _evaluate(self, done: int, say: Callable[[str], None]) -> None:
        started = time.perf_counter()
        serving = self.model.fold(np.asarray(self.dataset.item_categories))
        hit_rate = self.validation.hit_rate(serving, HIT_RATE_K)
        seconds = time.perf_counter() - started
        best_before = max((r["hit_rate"] for r in self.log.records if "hit_rate" in r), default=-1.0)
        n_users = len(self.validation.sample.targets)
        record = {"step": done, "hit_rate": hit_rate, "eval_users": n_users, "eval_s": round(seconds, 2)}
        self.log.write(record)
        tf.summary.scalar(f"hit_rate_at_{HIT_RATE_K}", hit_rate, step=done)
        if hit_rate > best_before:
            save_weights(self.model, self.output_dir / WEIGHTS_FILE)
            self._write_config(done, record)
        say(
            f"step {done}: hit_rate@{HIT_RATE_K} {hit_rate:.4f} of {n_users} validation users "
            f"(popularity {self.popularity:.4f}), {seconds:.1f} s"
        )

    def _write_config(self, step: int, best: dict[str, Any]) -> None:
        write_json(
            self.output_dir / CONFIG_FILE,
            {
                "format_version": 1,
                "model": self.config.model,
                "spec": asdict(self.model.spec),
                "data_dir": str(self.data_dir.resolve()),
                "data_hash": self.dataset.meta.data_hash,
                "training": asdict(self.config),
                "step": step,
                "total_steps": self.total_steps,
                "best_step": best["step"],
                "validation": {
                    "hit_rate_at_200": best["hit_rate"],
                    "users": best["eval_users"],
                    "popularity_hit_rate_at_200": self.popularity,
                },
                "collapsed_at_step": self.collapse.step,
            },
        )


class _CollapseWatch:
    """Notices when smoothed training accuracy falls far below its own best."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.best = 0.0
        self._smoothed: float | None = None

    def sees(self, step: int, accuracy: float) -> bool:
        """Take in one more value; True once, when the collapse is first noticed."""
        before = accuracy if self._smoothed is None else self._smoothed
        self._smoothed = before + ACCURACY_SMOOTHING * (accuracy - before)
        self.best = max(self.best, self._smoothed)
        collapsed = self.best >= COLLAPSE_MIN_ACCURACY and self._smoothed < COLLAPSE_SHARE * self.best
        if collapsed and self.step is None:
            self.step = step
            return True
        return False


def _limit_threads(threads: int | None) -> None:
    if threads is None:
        return
    # TensorFlow fixes its pools at first use and raises then; a limit asked for too late is not an error
    # for the result, only for the speed, and a process may train twice with the same limit.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(max(1, threads // 2))
