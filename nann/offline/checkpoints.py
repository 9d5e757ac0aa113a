"""What a training run leaves on disk: config, metrics, resumable checkpoints and the best weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from nann.offline.models.model import ModelSpec, RetrievalModel
from nann.offline.models.registry import create_model

__all__ = ["Checkpoints", "MetricsLog", "ModelNotTrainedError", "load_model", "save_weights", "write_json"]

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
WEIGHTS_FILE = "weights.npz"
KEPT_CHECKPOINTS = 2  # the newest, and one before it in case of a crash while writing


class ModelNotTrainedError(Exception):
    """A directory does not hold a trained model, or one that does not fit; the message says what to do."""


class Checkpoints:
    """Resumable state of a run: every variable by name, and the number of steps done."""

    def __init__(self, directory: Path, variables: Mapping[str, Any]) -> None:
        self._variables = dict(variables)
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
        # A checkpoint's children are attributes, which cannot hold the slashes of the names.
        children = {name.replace("/", "."): variable for name, variable in self._variables.items()}
        self._checkpoint = tf.train.Checkpoint(step=self._step, **children)
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, str(directory), max_to_keep=KEPT_CHECKPOINTS
        )

    def restore(self) -> int:
        """Load the newest checkpoint, when there is one; the number of steps done, else 0."""
        newest = self._manager.latest_checkpoint
        if newest is None:
            return 0
        try:
            self._checkpoint.restore(newest).assert_consumed()
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            raise ModelNotTrainedError(
                f"{newest} does not fit this model and data ({error}); choose another output directory"
            ) from error
        return int(self._step.numpy())

    def save(self, step: int) -> None:
        """Write a checkpoint of `step` steps done."""
        self._step.assign(step)
        self._manager.save(checkpoint_number=step)


class MetricsLog:
    """`metrics.jsonl`, one object a line; a resumed run drops the lines after the step it resumes from."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        kept = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line and json.loads(line)["step"] <= resumed_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.records: list[dict[str, Any]] = [json.loads(line) for line in kept]

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it names its `step`."""
        self.records.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` so that readers see the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def save_weights(model: RetrievalModel, path: Path) -> None:
    """Write every variable of the model by name, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    arrays = {name: variable.numpy() for name, variable in model.weights_by_name().items()}
    with partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_model(model_dir: Path) -> tuple[RetrievalModel, dict[str, Any]]:
    """The best model of a run directory and its `config.json`.

    Raises ModelNotTrainedError, naming the file, when a part is missing or does not fit.
    """
    config_path, weights_path = model_dir / CONFIG_FILE, model_dir / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ModelNotTrainedError(
                f"{path} is missing; train a model first: nann train --data DIR --output {model_dir}"
            )
    config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
    model = create_model(config["model"], ModelSpec(**config["spec"]))
    variables = model.weights_by_name()
    with np.load(weights_path, allow_pickle=False) as arrays:
        found = {name: arrays[name].shape for name in arrays.files}
        expected = {name: tuple(variable.shape) for name, variable in variables.items()}
        if found != expected:
            wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            raise ModelNotTrainedError(f"{weights_path} does not fit {config_path} (first: {wrong[0]})")
        for name, variable in variables.items():
            variable.assign(arrays[name])
    return model, config
