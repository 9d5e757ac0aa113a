"""The model in JAX against the model in NumPy, and that its landscape is worth searching."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nann.offline.benchmark.gpu.corpus import make_corpus
from nann.offline.benchmark.gpu.model import MULTIPLY_ADDS_A_PAIR, make_weights
from nann.offline.benchmark.gpu.programs import ModelFunctions, Precision

CORPUS = make_corpus(4000, 6)
WEIGHTS = make_weights()
ITEMS = WEIGHTS.encode_items(CORPUS.embeddings)


def oracle(user: int) -> np.ndarray:
    return WEIGHTS.score(WEIGHTS.encode_user(CORPUS.embeddings, CORPUS.history[user]), ITEMS)


def test_dimensions_are_those_of_the_paper() -> None:
    # 50 positions of 128 keys and 128 values, then 128 x 64, 64 x 32 and 32 x 1.
    assert MULTIPLY_ADDS_A_PAIR == 50 * 256 + 8192 + 2048 + 32 == 23_072
    assert {name: array.shape[1:] for name, array in ITEMS.items()} == {
        "item_hidden": (128,),
        "item_query": (128,),
    }
    assert all(array.dtype == np.float16 for array in ITEMS.values())


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("float16", 0.15)])
def test_tiled_and_crossed_scores_are_the_oracle_s(precision: Precision, tolerance: float) -> None:
    functions = ModelFunctions(precision)
    weights = functions.weights(WEIGHTS, CORPUS.embeddings)
    users = functions.encode_user(weights, CORPUS.history)
    assert {name: (array.shape[1:], str(array.dtype)) for name, array in users.items()} == (
        functions.user_tensors
    )
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4000, (12, 32))
    tile_query = rng.integers(0, 6, 12)
    tiled = functions.score(
        weights,
        {name: array[tile_query] for name, array in users.items()},
        {name: table[rows] for name, table in ITEMS.items()},
    )
    assert tiled.shape == (12, 32) and tiled.dtype == np.float32
    exact = np.stack([oracle(user) for user in range(6)])
    np.testing.assert_allclose(tiled, exact[tile_query[:, None], rows], atol=tolerance)
    crossed = functions.score(weights, users, {name: table[None, :100] for name, table in ITEMS.items()})
    np.testing.assert_allclose(crossed, exact[:, :100], atol=tolerance)


def test_padded_columns_take_no_weight() -> None:
    """Half precision has six columns more than the history, whatever their values hold."""
    functions = ModelFunctions("float16")
    weights = functions.weights(WEIGHTS, CORPUS.embeddings)
    users = {name: np.array(array) for name, array in functions.encode_user(weights, CORPUS.history).items()}
    items = {name: table[None, :50] for name, table in ITEMS.items()}
    users["user_keys"][:] = 0  # every position takes the same weight
    users["user_key_bias"][:, :, :50] = 0
    before = np.array(functions.score(weights, users, items))
    users["user_values"][:, 50:] = 7
    np.testing.assert_array_equal(functions.score(weights, users, items), before)


def test_a_history_decides_and_its_order_does_not() -> None:
    tops = [set(np.argsort(-oracle(user))[:200].tolist()) for user in range(6)]
    assert max(len(tops[a] & tops[b]) for a in range(6) for b in range(a)) < 100
    history = CORPUS.history[0]
    shuffled = np.random.default_rng(0).permutation(history)
    moved = WEIGHTS.score(WEIGHTS.encode_user(CORPUS.embeddings, shuffled), ITEMS)
    np.testing.assert_allclose(moved, oracle(0), atol=1e-4)


def test_one_vector_cannot_stand_for_a_user() -> None:
    """The mean of neither the history nor the answers finds the answers in a tenth of the items."""
    found: list[list[float]] = [[], []]
    for user in range(6):
        scores = oracle(user)
        best = np.argsort(-scores)[:50]
        history = CORPUS.history[user]
        for shares, items in zip(found, (history[history >= 0], best), strict=True):
            products = CORPUS.embeddings @ CORPUS.embeddings[items].mean(axis=0)
            shares.append(len(np.intersect1d(np.argsort(-products)[:400], best)) / 50)
    assert np.mean(found[0]) < 0.9
    assert np.mean(found[1]) < 0.9


def test_weights_are_of_their_seed() -> None:
    again, other = make_weights(), make_weights(seed=6)
    for field in dataclasses.fields(WEIGHTS):
        assert np.array_equal(getattr(WEIGHTS, field.name), getattr(again, field.name))
    assert not np.array_equal(WEIGHTS.kernel_2, other.kernel_2)
