"""The models against a literal NumPy network, the folded form against the training forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from nann.offline.models.attention_dnn import AttentionDnn
from nann.offline.models.layers import DenseBlock
from nann.offline.models.model import ModelSpec, RetrievalModel
from nann.offline.models.registry import MODELS, create_model

N_ITEMS, N_CATEGORIES, LENGTH = 40, 5, 50
CATEGORIES = (np.arange(N_ITEMS) % (N_CATEGORIES + 1)).astype(np.int32)


def randomised(model: RetrievalModel, seed: int = 0) -> RetrievalModel:
    """Every weight and moment away from its initial value, so that no term can hide."""
    rng = np.random.default_rng(seed)
    for name, variable in model.weights_by_name().items():
        if name.endswith("variance"):
            value = rng.uniform(0.3, 2.0, variable.shape)
        elif variable.shape.rank == 2:
            value = rng.normal(0, 1.5 / np.sqrt(variable.shape[0]), variable.shape)
        else:
            value = rng.normal(0, 0.3, variable.shape) + (1 if name.endswith("gamma") else 0)
        variable.assign(value.astype(np.float32))
    for table in (model.item_table, model.category_table):
        table.assign(rng.normal(0, 0.5, table.shape).astype(np.float32))
    return model


def histories(n: int = 3) -> np.ndarray:
    rng = np.random.default_rng(5)
    out = np.full((n, LENGTH), -1, np.int32)
    for row, count in enumerate((LENGTH, 7, 0)[:n]):
        out[row, :count] = rng.integers(0, N_ITEMS, count)
    return out


def raw_inputs(model: RetrievalModel, items: np.ndarray) -> np.ndarray:
    item_table, category_table = model._tables_with_padding()
    category = np.where(items >= 0, CATEGORIES[items], 0)
    return np.concatenate([item_table[items + 1], category_table[category]], -1).astype(np.float64)


def np_block(block: DenseBlock, x: np.ndarray) -> np.ndarray:
    def array(name: str) -> np.ndarray:
        return np.asarray(getattr(block, name).value.numpy(), np.float64)

    x = x @ array("kernel")
    if block.use_bias:
        x = x + array("bias")
    if block.norm:
        normed = (x - array("moving_mean")) / np.sqrt(array("moving_variance") + 1e-3)
        x = normed * array("gamma") + array("beta")
    return np.where(x > 0, x, array("slope") * x) if block.activate else x


def np_attention_dnn(model: AttentionDnn, history: np.ndarray, items: np.ndarray) -> np.ndarray:
    """reference/nann.md, "Model", word for word: nothing factored, nothing folded."""
    item = np_block(model.item_3, np_block(model.item_2, np_block(model.item_1, raw_inputs(model, items))))
    values = raw_inputs(model, history)
    q = np_block(model.query_2, np_block(model.query_1, item))
    k = np_block(model.key_2, np_block(model.key_1, values))
    logits = np.einsum("cq,ulq->ucl", q, k) / np.sqrt(256)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("ucl,uld->ucd", weights, values)
    joined = np.concatenate([attended, np.broadcast_to(item, (len(history), *item.shape))], -1)
    for block in (model.score_1, model.score_2, model.score_3, model.score_4):
        joined = np_block(block, joined)
    return np.asarray(joined[..., 0])


def training_forward(model: RetrievalModel, history: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The forward of training in inference mode: [users, candidates]."""
    history_inputs = tf.constant(raw_inputs(model, history)[None], tf.float32)
    item_inputs = tf.constant(raw_inputs(model, items)[None, None], tf.float32)
    user = model.encode_history(history_inputs)
    scores: np.ndarray = model.tail(model.pair_hidden(user, model.embed_items(item_inputs))).numpy()
    return np.asarray(scores[0])


def served(model: RetrievalModel, history: np.ndarray, items: np.ndarray) -> np.ndarray:
    serving = model.fold(CATEGORIES)
    item = serving.encode_items(tf.constant(items, tf.int32))
    user = serving.encode_user(tf.constant(history, tf.int32))
    tiled = {name: tf.tile(t[None], [len(history)] + [1] * t.shape.rank) for name, t in item.items()}
    scores: np.ndarray = serving.score(user, tiled).numpy()
    return scores


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> RetrievalModel:
    return randomised(create_model(request.param, ModelSpec(N_ITEMS, N_CATEGORIES)))


def test_attention_model_is_the_published_network() -> None:
    model = randomised(AttentionDnn(ModelSpec(N_ITEMS, N_CATEGORIES)))
    items = np.arange(N_ITEMS)
    expected = np_attention_dnn(model, histories(), items)
    assert expected.std() > 0.1
    np.testing.assert_allclose(training_forward(model, histories(), items), expected, atol=1e-4, rtol=1e-4)


def test_folded_form_equals_training_forward(model: RetrievalModel) -> None:
    items = np.arange(N_ITEMS)
    expected = training_forward(model, histories(), items)
    assert expected.std() > 0.1
    np.testing.assert_allclose(served(model, histories(), items), expected, atol=1e-4, rtol=1e-4)


def test_one_shared_row_of_items_scores_like_copies(model: RetrievalModel) -> None:
    serving = model.fold(CATEGORIES)
    items = np.arange(N_ITEMS)
    item = {name: t[None] for name, t in serving.encode_items(tf.constant(items, tf.int32)).items()}
    user = serving.encode_user(tf.constant(histories()))
    np.testing.assert_allclose(
        serving.score(user, item).numpy(), served(model, histories(), items), atol=1e-5
    )


def test_embedded_history_is_the_history(model: RetrievalModel) -> None:
    serving = model.fold(CATEGORIES)
    comm_seq = raw_inputs(model, histories()).reshape(3, -1).astype(np.float32)
    by_index = serving.encode_user(tf.constant(histories()))
    by_embedding = serving.encode_user_comm_seq(tf.constant(comm_seq))
    assert sorted(by_index) == sorted(serving.user_shapes)
    for name, tensor in by_index.items():
        np.testing.assert_array_equal(tensor.numpy(), by_embedding[name].numpy(), err_msg=name)


def test_declared_shapes_are_the_shapes(model: RetrievalModel) -> None:
    serving = model.fold(CATEGORIES)
    user = serving.encode_user(tf.constant(histories()))
    item = serving.encode_items(tf.range(4, dtype=tf.int32))
    assert {name: tuple(t.shape[1:]) for name, t in user.items()} == dict(serving.user_shapes)
    assert {name: tuple(t.shape[1:]) for name, t in item.items()} == dict(serving.item_shapes)
    assert all(name.startswith("user_") for name in user)
    assert all(name.startswith("item_") for name in item)
    assert serving.embed_items(tf.range(4, dtype=tf.int32)).shape == (4, 64)


def test_dimensions_are_nanns() -> None:
    shapes = {
        n: tuple(v.shape) for n, v in AttentionDnn(ModelSpec(N_ITEMS, N_CATEGORIES)).weights_by_name().items()
    }
    assert shapes["item_table"] == (N_ITEMS + 1, 32)
    assert shapes["category_table"] == (N_CATEGORIES + 1, 32)
    assert [shapes[f"dnn_item_{i}/fc_kernel"] for i in (1, 2, 3)] == [(64, 64)] * 3
    assert [shapes[f"attention_{side}_{i}/fc_kernel"] for side in "qk" for i in (1, 2)] == [
        (64, 128), (128, 256), (64, 128), (128, 256),
    ]  # fmt: skip
    assert [shapes[f"dnn_{i}/fc_kernel"] for i in (1, 2, 3, 4)] == [(128, 128), (128, 64), (64, 32), (32, 1)]
    assert "dnn_4/fc_bias" not in shapes
    assert "dnn_item_3/prelu" not in shapes


@pytest.mark.parametrize("own", [False, True])
def test_grouped_candidates_score_like_single_ones(model: RetrievalModel, own: bool) -> None:
    """Sharing candidates within a group changes the cost, not the score."""
    rng = np.random.default_rng(3)
    groups, users, candidates = 2, 3, 4
    history = tf.constant(rng.normal(size=(groups, users, LENGTH, 64)), tf.float32)
    shape = (groups, users if own else 1, candidates, 64)
    items = tf.constant(rng.normal(size=shape), tf.float32)
    user = model.encode_history(history)
    together = model.tail(model.pair_hidden(user, items)).numpy()
    assert together.shape == (groups, users, candidates)
    for group in range(groups):
        for one in range(users):
            alone = {name: t[group : group + 1, one : one + 1] for name, t in user.items()}
            row = one if own else 0
            expected = model.tail(model.pair_hidden(alone, items[group : group + 1, row : row + 1]))
            np.testing.assert_allclose(together[group, one], expected.numpy()[0, 0], atol=1e-5)


def test_batch_norm_trains_on_moments_of_the_batch() -> None:
    block = DenseBlock(2, 3, norm=True, activate=False, name="block", seed=0)
    inputs = tf.constant(np.random.default_rng(0).normal(5, 2, (4, 6, 2)), tf.float32)
    outputs = block(inputs, training=True).numpy()
    np.testing.assert_allclose(outputs.mean((0, 1)), 0, atol=1e-5)
    flat = (inputs.numpy().reshape(-1, 2) @ block.kernel.numpy()).astype(np.float64)
    np.testing.assert_allclose(outputs.var((0, 1)), flat.var(0) / (flat.var(0) + 1e-3), rtol=1e-4)
    np.testing.assert_allclose(block.moving_mean.numpy(), 0.01 * flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(block.moving_variance.numpy(), 0.99 + 0.01 * flat.var(0), rtol=1e-4)


def test_moments_kept_leaves_moving_moments_alone(model: RetrievalModel) -> None:
    def moments() -> list[Any]:
        return [v.numpy() for n, v in model.weights_by_name().items() if "moving" in n]

    before = moments()
    inputs = tf.constant(np.random.default_rng(0).normal(size=(9, 64)), tf.float32)
    with model.moments_kept():
        model.embed_items(inputs, training=True)
    for old, new in zip(before, moments(), strict=True):
        np.testing.assert_array_equal(old, new)
    model.embed_items(inputs, training=True)
    assert any((old != new).any() for old, new in zip(before, moments(), strict=True))


def test_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'transformer'.*attention_dnn"):
        create_model("transformer", ModelSpec(1, 1))


def test_fold_refuses_categories_of_another_catalogue(model: RetrievalModel) -> None:
    with pytest.raises(ValueError, match=r"expected \[40\]"):
        model.fold(CATEGORIES[:-1])
