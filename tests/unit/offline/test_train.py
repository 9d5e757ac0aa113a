"""Losses, optimizers, the step, and whole small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from nann.offline import train as train_module
from nann.offline.checkpoints import ModelNotTrainedError, load_model
from nann.offline.data.dataset import Dataset
from nann.offline.losses import kl_divergence, sampled_cross_entropy
from nann.offline.models.model import ModelSpec
from nann.offline.models.registry import create_model
from nann.offline.optimizers import AdamSettings, DenseAdamW, LazyAdamRows, learning_rate_at
from nann.offline.progress import Progress
from nann.offline.sampling import BatchSampler
from nann.offline.train import TrainConfig, TrainingDivergedError, train
from nann.offline.train_step import TrainStep, adversarial_embeddings
from nann.offline.validation import rank_of_target

SILENT = Progress(silent=True)
# Without XLA, and without attention: these runs are too short to pay for it. Two tests have one or both.
SMALL = TrainConfig(
    model="dnn",
    batch_size=32,
    num_neg=20,
    negative_groups=2,
    adv_groups=1,
    max_steps=12,
    warmup_steps=2,
    jit=False,
)


def variant(**changes: Any) -> TrainConfig:
    fields = {name: getattr(SMALL, name) for name in TrainConfig.__slots__}
    return TrainConfig(**{**fields, **changes})


def step_of(data: Path, name: str = "dnn", **changes: Any) -> tuple[TrainStep, BatchSampler]:
    dataset = Dataset.load(data)
    sampler = BatchSampler(dataset, batch_size=32, n_groups=2, num_neg=20, seed=0)
    model = create_model(name, ModelSpec(dataset.num_items, dataset.num_categories), seed=1)
    settings: dict[str, Any] = {"adv_eps": 0.0, "adv_groups": 1, "weight_decay": 1e-4, "clip_norm": 0.0}
    return TrainStep(model, **{**settings, "jit": False, **changes}), sampler


def values_of(step: TrainStep) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in step.variables().items()}


def test_cross_entropy_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    logits, log_count = rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 7))
    sigmoid = 1 / (1 + np.exp(-(logits - log_count)))
    expected = -(np.log(sigmoid[..., 0]) + np.log(1 - sigmoid[..., 1:]).sum(-1)).mean()
    found = sampled_cross_entropy(tf.constant(logits), tf.constant(log_count))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_kl_is_the_formula_and_leaves_the_clean_logits_alone() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    softmax = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p, q)]
    expected = (softmax[0] * np.log(softmax[0] / softmax[1])).sum(-1).mean()
    clean, adversarial = tf.Variable(p), tf.Variable(q)
    with tf.GradientTape() as tape:
        found = kl_divergence(clean, adversarial)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    into_clean, into_adversarial = tape.gradient(found, [clean, adversarial])
    assert into_clean is None
    np.testing.assert_allclose(into_adversarial.numpy(), (softmax[1] - softmax[0]) / 4, rtol=1e-8)


def test_fgsm_steps_up_the_loss_by_the_sign_of_its_gradient() -> None:
    """By hand: loss = 3 a - 2 b + 0 c, so a rises by eps, b falls by eps, c stays."""
    embeddings = tf.Variable([[1.0, 2.0, 3.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(embeddings * [[3.0, -2.0, 0.0]])
    moved = adversarial_embeddings(embeddings, tape.gradient(loss, embeddings), 0.5)
    np.testing.assert_array_equal(moved.numpy(), [[1.5, 1.5, 3.0]])


def test_adam_is_the_published_update() -> None:
    s = AdamSettings(weight_decay=0.1)
    start, gradients = np.array([1.0, -2.0]), [np.array([0.5, -1.0]), np.array([0.1, 0.4])]
    kernel, bias = tf.Variable(start, dtype=tf.float32), tf.Variable(start, dtype=tf.float32)
    adam = DenseAdamW({"kernel": kernel, "bias": bias}, ["kernel"], s)
    expected = {"kernel": start.copy(), "bias": start.copy()}
    m = v = np.zeros(2)
    for t, gradient in enumerate(gradients, start=1):
        tensor = tf.constant(gradient, tf.float32)
        adam.apply({"kernel": tensor, "bias": tensor}, tf.constant(0.01), tf.constant(float(t)))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        expected["bias"] = expected["bias"] - 0.01 * direction
        expected["kernel"] = expected["kernel"] - 0.01 * (direction + 0.1 * expected["kernel"])
    np.testing.assert_allclose(kernel.numpy(), expected["kernel"], rtol=1e-4)
    np.testing.assert_allclose(bias.numpy(), expected["bias"], rtol=1e-4)


def test_lazy_rows_move_alone() -> None:
    table = tf.Variable(np.ones((5, 2), np.float32))
    adam = LazyAdamRows(table, AdamSettings())
    rows = tf.constant([0, 3, 0, 0])
    gradient = tf.constant([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    state = adam.updated(adam.gather(rows), gradient, tf.constant(0.5), tf.constant(1.0))
    adam.scatter(rows, state)
    expected = np.ones((5, 2))
    expected[3] = [0.5, 1.5]
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-5)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [
        learning_rate_at(step, peak=1.0, warmup_steps=4, total_steps=14, final_share=0.1)
        for step in range(15)
    ]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(rates[9], 0.55)
    np.testing.assert_allclose(rates[14], 0.1)


def test_a_step_moves_only_named_rows_and_every_weight(tiny_data: Path) -> None:
    step, sampler = step_of(tiny_data)
    before, batch = values_of(step), sampler.batch(0)
    metrics = {name: float(value) for name, value in step(batch, 1e-3).items()}
    after = values_of(step)
    moved = np.flatnonzero((before["model/item_table"] != after["model/item_table"]).any(1))
    assert set(moved) <= set(batch.rows.tolist()) - {0}
    assert len(moved) > 10
    for name, old in before.items():
        if name.startswith("model/") and "kernel" in name:
            assert (after[name] != old).any(), name
    assert metrics["loss"] == metrics["loss_xe"] > 0
    assert metrics["loss_adv"] == 0


def test_the_first_loss_is_that_of_a_blind_model(tiny_data: Path) -> None:
    """A model at logit 0 (p uniform) has a loss that NumPy can say from the counts alone."""
    step, sampler = step_of(tiny_data)
    step.model.score_4.kernel.assign(np.zeros((32, 1), np.float32))
    batch = sampler.batch(0)
    n_items = step.model.spec.num_items
    positive = -batch.positive_log_count - np.log(n_items)
    negative = -batch.negative_log_count - np.log(n_items)
    expected = np.log1p(np.exp(-positive)).mean() + np.log1p(np.exp(negative)).sum(1).mean()
    np.testing.assert_allclose(float(step(batch, 0.0)["loss_xe"]), expected, rtol=1e-5)


def test_adversarial_term_off_is_the_plain_step(tiny_data: Path) -> None:
    """eps so small that no float32 embedding moves, against eps 0: the term is zero and so is its pull."""
    plain, sampler = step_of(tiny_data)
    tiny, _ = step_of(tiny_data, adv_eps=1e-30)
    real, _ = step_of(tiny_data, adv_eps=0.1)
    losses = [step(sampler.batch(0), 1e-3) for step in (plain, tiny, real)]
    assert float(losses[0]["loss_adv"]) == 0
    assert abs(float(losses[1]["loss_adv"])) < 1e-6
    assert float(losses[2]["loss_adv"]) > 1e-6
    assert float(losses[0]["loss_xe"]) == float(losses[1]["loss_xe"]) == float(losses[2]["loss_xe"])
    for name, value in values_of(plain).items():
        if "moving" in name:
            np.testing.assert_array_equal(value, values_of(real)[name], err_msg=name)


def test_clipping_bounds_the_gradient(tiny_data: Path) -> None:
    free, sampler = step_of(tiny_data)
    clipped, _ = step_of(tiny_data, clip_norm=0.01)
    norm = float(free(sampler.batch(0), 1e-3)["grad_norm"])
    assert norm > 0.01
    clipped(sampler.batch(0), 1e-3)
    ratio = 0.01 / norm
    name = "adam/dense/first/dnn_2/fc_kernel"
    np.testing.assert_allclose(values_of(clipped)[name], values_of(free)[name] * ratio, rtol=1e-3, atol=1e-9)


def test_compiled_step_is_the_plain_step(tiny_data: Path) -> None:
    plain, sampler = step_of(tiny_data, "attention_dnn", adv_eps=1e-3)
    compiled, _ = step_of(tiny_data, "attention_dnn", adv_eps=1e-3, jit=True)
    for batch in (sampler.batch(0), sampler.batch(1)):
        expected, found = plain(batch, 1e-3), compiled(batch, 1e-3)
        for name in expected:
            np.testing.assert_allclose(float(found[name]), float(expected[name]), rtol=1e-2, err_msg=name)


def test_training_learns_the_planted_tastes(tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    """2,000 items in 10 tastes: the 200 best can be exactly those of the taste; popularity finds a tenth."""
    data = write_dataset(tmp_path / "data", n_users=400, n_items=2000, length=40)
    config = variant(model="attention_dnn", batch_size=128, max_steps=120, learning_rate=1e-2, eval_users=40)
    report = train(data, tmp_path / "model", config, progress=SILENT)
    assert report.eval_users == 40
    assert report.best_hit_rate >= 0.8
    assert report.popularity_hit_rate <= 0.35
    assert report.collapsed_at_step is None


def test_a_run_leaves_all_its_files(tiny_data: Path, tmp_path: Path) -> None:
    report = train(tiny_data, tmp_path / "model", variant(eval_every=6), progress=SILENT)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model"] == "dnn"
    assert config["step"] == report.steps == 12
    assert config["training"]["num_neg"] == 20
    assert config["data_hash"] == Dataset.load(tiny_data).meta.data_hash
    records = [json.loads(line) for line in (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "hit_rate" in r] == [6, 12]
    last = [r for r in records if "loss" in r][-1]
    assert {"loss", "loss_xe", "loss_adv", "acc", "acc_origin", "step_ms", "learning_rate"} <= last.keys()
    assert list((tmp_path / "model" / "tensorboard").glob("events*"))
    model, _ = load_model(tmp_path / "model")
    assert model.spec.num_items == 60


def test_resumed_run_is_the_uninterrupted_one(tiny_data: Path, tmp_path: Path) -> None:
    whole = train(tiny_data, tmp_path / "whole", variant(checkpoint_every=5), progress=SILENT)
    original = TrainStep.__call__

    def dies_at_step_8(self: TrainStep, batch: Any, learning_rate: float) -> dict[str, Any]:
        if batch.step == 8:
            raise KeyboardInterrupt
        return original(self, batch, learning_rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", dies_at_step_8)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_data, tmp_path / "cut", variant(checkpoint_every=5), progress=SILENT)
    resumed = train(tiny_data, tmp_path / "cut", variant(checkpoint_every=5), progress=SILENT)
    assert (whole.resumed_from_step, resumed.resumed_from_step) == (0, 5)
    with np.load(tmp_path / "whole/weights.npz") as one, np.load(tmp_path / "cut/weights.npz") as other:
        assert sorted(one.files) == sorted(other.files)
        for name in one.files:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)
    losses = [
        [(r["step"], r["loss"]) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
         if "loss" in (r := json.loads(line))]
        for run in ("whole", "cut")
    ]  # fmt: skip
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_finished_run_is_not_trained_again(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_data, tmp_path / "model", SMALL, progress=SILENT)
    before = (tmp_path / "model" / "weights.npz").read_bytes()
    again = train(tiny_data, tmp_path / "model", SMALL, progress=SILENT)
    assert again.resumed_from_step == again.steps == 12
    assert (tmp_path / "model" / "weights.npz").read_bytes() == before


def test_resume_refuses_another_model(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_data, tmp_path / "model", SMALL, progress=SILENT)
    with pytest.raises(ModelNotTrainedError, match="another output directory"):
        train(tiny_data, tmp_path / "model", variant(model="two_sided"), progress=SILENT)


@pytest.mark.parametrize("model", ["attention_dnn", "two_sided"])
def test_every_model_trains(model: str, tiny_data: Path, tmp_path: Path) -> None:
    report = train(
        tiny_data, tmp_path / "model", variant(model=model, adv_eps=1e-3, max_steps=3), progress=SILENT
    )
    assert report.steps == 3


def test_a_loss_that_is_no_number_stops_the_run(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="lower the learning rate"):
        train(tiny_data, tmp_path / "model", variant(learning_rate=1e30, warmup_steps=0), progress=SILENT)


def test_collapse_is_noticed_once() -> None:
    watch = train_module._CollapseWatch()
    rising = [watch.sees(step, 0.02 * step) for step in range(12)]
    falling = [watch.sees(step, 0.02) for step in range(12, 30)]
    assert not any(rising)
    assert sum(falling) == 1
    assert watch.step is not None
    assert 12 < watch.step < 25


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"adv_eps": -1.0}, {"max_steps": 0}, {"adv_groups": 9}, {"epochs": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        variant(**wrong)


def test_rank_follows_the_total_order() -> None:
    scores = np.array([[3.0, 5.0, 3.0, 1.0], [np.nan, 1.0, 1.0, 0.5], [np.nan, 1.0, 2.0, 0.0]])
    np.testing.assert_array_equal(rank_of_target(scores, np.array([2, 2, 0])), [2, 1, 4])
