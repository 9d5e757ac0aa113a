"""TensorFlow's side: the host waits both ways, capsules name the consumer's device, scores are held."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_shim import dlpack
from cuda_shim.machine import Machine
from fake_xla import FakeXla, XlaArray, fake_gpu
from handover_lane import SEEDS, Lane, truth

from nann.engine.cuda.handover import TensorFlowHandover
from nann.engine.errors import BackendError

LOGICAL = 3


class FakeTensorFlow:
    """`tf.experimental.dlpack` over one logical device, whose programs a `FakeXla` runs."""

    def __init__(self, machine: Machine, xla: FakeXla) -> None:
        self._machine, self._xla = machine, xla
        self.experimental = SimpleNamespace(dlpack=self)
        self.imported: list[tuple[int, int]] = []

    def from_dlpack(self, capsule: Any) -> XlaArray:
        """Orders nothing."""
        taken = dlpack.take(capsule)
        self.imported.append(taken.device)
        definition = SimpleNamespace(done=True)
        return XlaArray(
            self._xla, taken.address, taken.shape, taken.dtype, definition, _Release(taken.release)
        )

    def to_dlpack(self, tensor: XlaArray) -> Any:
        """Waits for the device, and names it as TensorFlow counts."""
        self._machine.synchronize_queue(self._xla.compute)
        device = (dlpack.CUDA, LOGICAL)
        return dlpack.export(tensor.address, tensor.shape, tensor.dtype, device, tensor.owner)


class _Release:
    def __init__(self, release: Any) -> None:
        self._release = release

    def __del__(self) -> None:
        self._release()


class NothingBeforeTheProgram(TensorFlowHandover):
    def __init__(self, stream: Any, *, logical: int) -> None:
        super().__init__(stream, logical=logical)
        self._stream = SimpleNamespace(device_id=stream.device_id, synchronize=lambda: None)


class ScoresAreNotHeld(TensorFlowHandover):
    def take(self, scores: Any) -> Any:
        taken = super().take(scores)
        self._taken = []
        return taken


@contextmanager
def logical_gpu(seed: int) -> Iterator[tuple[Lane, FakeTensorFlow]]:
    with fake_gpu(seed) as (cupy, machine, xla), pytest.MonkeyPatch.context() as patch:
        tf = FakeTensorFlow(machine, xla)
        patch.setitem(sys.modules, "tensorflow", tf)
        yield Lane(cupy, machine, xla), tf


def search(seed: int, handover: type[TensorFlowHandover] = TensorFlowHandover) -> int | str:
    try:
        with logical_gpu(seed) as (lane, _):
            return lane.search(handover(lane.stream, logical=LOGICAL))
    except AssertionError as error:
        return str(error)


def test_the_answer_is_right_in_every_schedule() -> None:
    assert {search(seed) for seed in SEEDS} == {truth()}


@pytest.mark.parametrize("handover", [NothingBeforeTheProgram, ScoresAreNotHeld])
def test_an_edge_less_is_seen(handover) -> None:
    assert any(search(seed, handover) != truth() for seed in SEEDS)


def test_each_side_finds_the_number_it_counts_by() -> None:
    with logical_gpu(0) as (lane, tf):
        handover = TensorFlowHandover(lane.stream, logical=LOGICAL)
        tensors = handover.lend(*lane.gather(0, 2))
        assert tf.imported == [(dlpack.CUDA, LOGICAL)] * 2
        assert lane.items.data.device_id == 0
        scores = handover.take(lane.xla.put(np.zeros((2, 3), np.float32)))
        assert scores.data.device_id == 0
        del tensors


def test_memory_that_is_not_contiguous_is_refused() -> None:
    with logical_gpu(0) as (lane, _):
        handover = TensorFlowHandover(lane.stream, logical=LOGICAL)
        torn = SimpleNamespace(flags=SimpleNamespace(c_contiguous=False), strides=(8, 16))
        with pytest.raises(BackendError, match=r"strides \(8, 16\)"):
            handover.lend(torn)
