"""Batches of training: samples in a seeded order, negatives by unigram, all decoded by columns.

Everything drawn is a function of (seed, epoch) or (seed, step) alone, so a resumed run sees the data that
an uninterrupted one would have seen, and no generator state needs saving.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nann.offline.data.dataset import Dataset

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int32, Int64

__all__ = ["Batch", "BatchSampler", "UnigramSampler", "prefetched"]

ORDER_STREAM, NEGATIVE_STREAM = 0, 1  # keeps the generators of one seed apart
PREFETCHED_BATCHES = 4


class UnigramSampler:
    """Draws items in proportion to a weight, with replacement (so expected counts are exact).

    Raises ValueError when a weight is negative or not finite, or when none is positive.
    """

    def __init__(self, weights: Float32[np.ndarray, " items"], num_draws: int) -> None:
        weights = np.asarray(weights, np.float64)
        if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
            raise ValueError("item weights must be finite, not negative, and not all zero")
        self.num_draws = num_draws
        probabilities = weights / weights.sum()
        self._cumulative = np.cumsum(probabilities)
        self._cumulative[-1] = 1.0
        with np.errstate(divide="ignore"):
            self.log_expected_count: Float32[np.ndarray, " items"] = np.log(num_draws * probabilities).astype(
                np.float32
            )

    def draw(self, rng: np.random.Generator, n_sets: int) -> Int32[np.ndarray, "n_sets num_draws"]:
        """`n_sets` independent sets of `num_draws` items each."""
        uniform: Float64[np.ndarray, "n_sets num_draws"] = rng.random((n_sets, self.num_draws))
        return np.searchsorted(self._cumulative, uniform, side="right").astype(np.int32)


@dataclass(frozen=True, slots=True)
class Batch:
    """One training step's input. Items are given by position in `rows`, the distinct table rows.

    `rows` is padded with 0 (the tables' row of the missing item) to one fixed length, so that the compiled
    step has one shape; position 0 of it is always row 0.
    """

    step: int
    epoch: int
    rows: Int32[np.ndarray, " n_rows"]
    row_categories: Int32[np.ndarray, " n_rows"]
    history: Int32[np.ndarray, "groups users length"]
    positive: Int32[np.ndarray, "groups users"]
    negative: Int32[np.ndarray, "groups num_neg"]
    positive_log_count: Float32[np.ndarray, "groups users"]
    negative_log_count: Float32[np.ndarray, "groups num_neg"]


class BatchSampler:
    """Batches of `batch_size` train samples in `n_groups` groups, each group with its own negatives.

    Sharing negatives within a group lets a candidate's item-only work be done once. Negatives are drawn
    independently of the batch: the positives of other users are negatives only when drawn, and a draw
    that equals a user's own positive stays, as the noise-contrastive estimator requires (the classifier
    tells a sample of the data from a sample of the noise, whichever item it is).
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, n_groups: int, num_neg: int, seed: int) -> None:
        if batch_size % n_groups:
            raise ValueError(f"batch size {batch_size} is not a multiple of the {n_groups} negative groups")
        if dataset.num_train_samples < batch_size:
            raise ValueError(
                f"{dataset.directory} has {dataset.num_train_samples} train samples, "
                f"fewer than one batch of {batch_size}"
            )
        self._dataset = dataset
        self._seed = seed
        self.batch_size, self.n_groups = batch_size, n_groups
        self.negatives = UnigramSampler(dataset.item_weights, num_neg)
        self._category_of_row = np.concatenate([[0], dataset.item_categories]).astype(np.int32)
        self._order_epoch = -1
        self._order: Int64[np.ndarray, " samples"] = np.empty(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the rest of a pass, less than a batch, is left out."""
        return self._dataset.num_train_samples // self.batch_size

    @property
    def n_rows(self) -> int:
        """The fixed length of `Batch.rows`: the most distinct rows a batch can name, and row 0."""
        drawn = (
            self.batch_size * (self._dataset.history_length + 1) + self.n_groups * self.negatives.num_draws
        )
        return 1 + min(drawn, self._dataset.num_items)

    def batch(self, step: int) -> Batch:
        """The batch of a global step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._order_epoch:
            rng = np.random.default_rng([self._seed, ORDER_STREAM, epoch])
            self._order, self._order_epoch = rng.permutation(self._dataset.num_train_samples), epoch
        chosen = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        histories, targets = self._dataset.train_samples(chosen)
        rng = np.random.default_rng([self._seed, NEGATIVE_STREAM, step])
        negatives = self.negatives.draw(rng, self.n_groups)
        items = np.concatenate([[-1], histories.ravel(), targets, negatives.ravel()]) + 1
        distinct, local = np.unique(items, return_inverse=True)
        rows = np.zeros(self.n_rows, np.int32)
        rows[: len(distinct)] = distinct
        history, positive, negative = np.split(
            local[1:].astype(np.int32), [histories.size, histories.size + targets.size]
        )
        groups = self.n_groups
        log_count = self.negatives.log_expected_count
        return Batch(
            step=step,
            epoch=epoch,
            rows=rows,
            row_categories=self._category_of_row[rows],
            history=history.reshape(groups, -1, self._dataset.history_length),
            positive=positive.reshape(groups, -1),
            negative=negative.reshape(groups, -1),
            positive_log_count=log_count[targets].reshape(groups, -1),
            negative_log_count=log_count[negatives],
        )


@contextmanager
def prefetched(make: Callable[[int], Batch], first: int, end: int) -> Iterator[Iterator[Batch]]:
    """Batches `first` .. `end` - 1, made ahead of use by one thread; its error is raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=PREFETCHED_BATCHES)
    stopped = threading.Event()

    def put(value: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(value, timeout=0.2)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for step in range(first, end):
                if stopped.is_set():
                    return
                put(make(step))
            put(None)
        except BaseException as error:  # handed over, not swallowed
            put(error)

    def batches() -> Iterator[Batch]:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield batches()
    finally:
        stopped.set()
        thread.join()
