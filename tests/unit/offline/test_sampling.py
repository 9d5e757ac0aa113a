"""Batches and negatives: counts, order, groups, prefetching."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nann.offline.data.dataset import Dataset
from nann.offline.sampling import Batch, BatchSampler, UnigramSampler, prefetched


def sampler_of(data: Path, seed: int = 3) -> BatchSampler:
    return BatchSampler(Dataset.load(data), batch_size=24, n_groups=4, num_neg=30, seed=seed)


def test_expected_counts_are_the_empirical_ones() -> None:
    weights = np.array([0.5, 0.25, 0.0, 0.2, 0.05], np.float32)
    sampler = UnigramSampler(weights, num_draws=20)
    n_sets = 20_000
    drawn = sampler.draw(np.random.default_rng(0), n_sets)
    empirical = np.bincount(drawn.ravel(), minlength=5) / n_sets
    expected = np.exp(sampler.log_expected_count)
    np.testing.assert_allclose(expected, 20 * weights, rtol=1e-5)
    # Four standard errors of a binomial count.
    np.testing.assert_array_less(np.abs(empirical - expected), 4 * np.sqrt(20 * 0.25 / n_sets) + 1e-12)
    assert empirical[2] == 0


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="item weights"):
        UnigramSampler(np.array(weights, np.float32), 3)


def test_batch_decodes_to_the_data_sets_own_samples(tiny_data: Path) -> None:
    dataset = Dataset.load(tiny_data)
    sampler = sampler_of(tiny_data)
    batch = sampler.batch(2)
    order = np.random.default_rng([3, 0, 0]).permutation(dataset.num_train_samples)
    histories, targets = dataset.train_samples(order[48:72])
    np.testing.assert_array_equal(batch.rows[batch.history].reshape(24, -1) - 1, histories)
    np.testing.assert_array_equal(batch.rows[batch.positive].ravel() - 1, targets)
    negatives = batch.rows[batch.negative] - 1
    assert negatives.min() >= 0
    np.testing.assert_array_equal(batch.negative_log_count, sampler.negatives.log_expected_count[negatives])
    np.testing.assert_array_equal(
        batch.positive_log_count.ravel(), sampler.negatives.log_expected_count[targets]
    )
    np.testing.assert_array_equal(
        batch.row_categories[batch.positive].ravel(), dataset.item_categories[targets]
    )


def test_rows_are_distinct_start_with_padding_and_have_one_length(tiny_data: Path) -> None:
    sampler = sampler_of(tiny_data)
    for step in range(3):
        rows = sampler.batch(step).rows
        assert rows.shape == (sampler.n_rows,)
        assert rows[0] == 0
        used = rows[rows > 0]
        assert len(np.unique(used)) == len(used)


def test_groups_draw_their_own_negatives(tiny_data: Path) -> None:
    batch = sampler_of(tiny_data).batch(0)
    assert batch.negative.shape == (4, 30)
    assert len({tuple(row) for row in batch.negative}) == 4


def test_an_epoch_visits_every_sample_once_and_epochs_differ(tiny_data: Path) -> None:
    sampler = sampler_of(tiny_data)
    sampler.batch(0)
    first = sampler._order.copy()
    assert sorted(first) == list(range(Dataset.load(tiny_data).num_train_samples))
    assert sampler.batch(sampler.steps_per_epoch).epoch == 1
    assert (sampler._order != first).any()


def test_batches_depend_on_seed_and_step_alone(tiny_data: Path) -> None:
    forward = [sampler_of(tiny_data).batch(step) for step in (0, 1, 2)]
    late = sampler_of(tiny_data).batch(2)
    for name in Batch.__slots__:
        np.testing.assert_array_equal(getattr(late, name), getattr(forward[2], name), err_msg=name)
    assert (late.rows[late.negative] != forward[1].rows[forward[1].negative]).any()
    other = sampler_of(tiny_data, seed=4).batch(2)
    assert (other.rows[other.negative] != late.rows[late.negative]).any()


def test_uneven_groups_and_too_little_data_are_refused(tiny_data: Path) -> None:
    dataset = Dataset.load(tiny_data)
    with pytest.raises(ValueError, match="not a multiple"):
        BatchSampler(dataset, batch_size=10, n_groups=4, num_neg=5, seed=0)
    with pytest.raises(ValueError, match="fewer than one batch"):
        BatchSampler(dataset, batch_size=4096, n_groups=4, num_neg=5, seed=0)


def test_prefetched_keeps_order_and_stops_early(tiny_data: Path) -> None:
    sampler = sampler_of(tiny_data)
    with prefetched(sampler.batch, 3, 9) as batches:
        assert [batch.step for batch in batches] == [3, 4, 5, 6, 7, 8]
    with prefetched(sampler.batch, 0, 1000) as batches:
        assert next(batches).step == 0


def test_prefetched_raises_the_makers_error() -> None:
    def make(step: int) -> Batch:
        raise RuntimeError(f"no step {step}")

    with prefetched(make, 7, 9) as batches, pytest.raises(RuntimeError, match="no step 7"):
        next(batches)
