"""The fake CuPy's streams: order within a stream and along events is kept, and nothing else is."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cuda_shim import dlpack
from cuda_shim.errors import Misuse
from cuda_shim.fixtures import FakeCupy, installed
from cuda_shim.program import host_view

SEEDS = range(30)
KERNELS = r"""
extern "C" __global__ void add_one(const int* x, int* y, int n) {
  int const i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = x[i] + 1;
}
"""
N = 100


def add_one(cupy: Any) -> Any:
    kernel = cupy.RawModule(code=KERNELS, options=("-std=c++17",)).get_function("add_one")

    def launch(x: Any, y: Any, stream: Any = None) -> None:
        kernel((1,), (128,), (x, y, np.int32(N)), stream=stream)

    return launch


def new_stream(cupy: Any) -> Any:
    return cupy.cuda.Stream(non_blocking=True)


def pinned(cupy: Any, value: int) -> np.ndarray:
    memory = cupy.cuda.alloc_pinned_memory(4 * N)
    array = np.frombuffer(memory, np.int32, N)
    array[:] = value
    return array


def chain(seed: int, *, edge: bool) -> bool:
    """Two kernels on two streams, the second on what the first writes; whether the result is right."""
    with installed(seed) as fake:
        cupy = fake.cupy
        launch, first, second = add_one(cupy), new_stream(cupy), new_stream(cupy)
        with first:
            x, y, z = cupy.zeros(N, np.int32), cupy.empty(N, np.int32), cupy.empty(N, np.int32)
            ready = first.record()
            launch(x, y)
            if edge:
                ready = first.record()
        second.wait_event(ready)
        launch(y, z, second)
        return bool((z.get(stream=second) == 2).all())


def test_a_stream_that_waits_for_the_event_is_right_for_every_seed() -> None:
    assert all(chain(seed, edge=True) for seed in SEEDS)


def test_a_stream_that_waits_for_too_early_an_event_is_wrong_for_some_seed() -> None:
    assert not all(chain(seed, edge=False) for seed in SEEDS)


def overwritten(seed: int) -> bool:
    """The host waits for a copy of what later work of another stream overwrites; whether that was first."""
    with installed(seed, eagerness=0) as fake:
        cupy = fake.cupy
        first, second = new_stream(cupy), new_stream(cupy)
        with first:
            x = cupy.zeros(N, np.int32)
            first.synchronize()
            with second:
                cupy.cuda.runtime.memsetAsync(x.data.ptr, 1, x.nbytes, second.ptr)
            return bool(x.get().any())


def test_work_that_nobody_waits_for_may_come_first() -> None:
    outcomes = [overwritten(seed) for seed in SEEDS]
    assert any(outcomes)
    assert not all(outcomes)


@pytest.mark.parametrize("fake_cupy", range(6), indirect=True)
def test_one_stream_keeps_its_order(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    launch, stream = add_one(cupy), new_stream(cupy)
    with stream:
        x, y = cupy.zeros(N, np.int32), cupy.empty(N, np.int32)
        for _ in range(10):
            launch(x, y)
            launch(y, x)
        assert (x.get() == 20).all()


def test_nothing_runs_before_the_host_waits(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    launch, stream = add_one(cupy), new_stream(cupy)
    with stream:
        x, y = cupy.zeros(N, np.int32), cupy.empty(N, np.int32)
        launch(x, y)
        out = pinned(cupy, -1)
        y.get(out=out, blocking=False)
        event = stream.record()
    assert (out == -1).all()
    assert (fake_cupy.peek(x) != 0).all()
    event.synchronize()
    assert (out == 1).all()
    assert event.done


def test_get_waits_unless_it_is_told_not_to(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    stream = new_stream(cupy)
    with stream:
        x, out = cupy.zeros(N, np.int32), pinned(cupy, -1)
        assert x.get(out=out) is out
    assert not out.any()


def copied(seed: int, *, wait: bool, eagerness: float) -> bool:
    """A pinned buffer is filled anew after its copy was enqueued; whether the old bytes arrived."""
    with installed(seed, eagerness=eagerness) as fake:
        cupy = fake.cupy
        stream = new_stream(cupy)
        with stream:
            staging, x = pinned(cupy, 1), cupy.empty(N, np.int32)
            x.set(staging)
            if wait:
                stream.synchronize()
            staging[:] = 2
            return bool((x.get() == 1).all())


def test_a_pinned_buffer_is_read_when_the_copy_runs() -> None:
    assert all(copied(seed, wait=True, eagerness=0) for seed in SEEDS)
    assert not any(copied(seed, wait=False, eagerness=0) for seed in SEEDS)
    late = [copied(seed, wait=False, eagerness=0.5) for seed in SEEDS]
    assert any(late)
    assert not all(late)


def test_a_pageable_buffer_is_read_at_once(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    stream = new_stream(cupy)
    with stream:
        source, x = np.ones(N, np.int32), cupy.empty(N, np.int32)
        x.set(source)
        source[:] = 2
        assert (x.get() == 1).all()


def test_rows_are_copied_between_pitches(fake_cupy: FakeCupy) -> None:
    cupy, runtime = fake_cupy.cupy, fake_cupy.cupy.cuda.runtime
    stream = new_stream(cupy)
    source = np.arange(5 * 8, dtype=np.int32).reshape(5, 8)
    with stream:
        x = cupy.zeros((5, 4), np.int32)
        runtime.memcpy2DAsync(
            x.data.ptr + 4, 16, source.ctypes.data, 32, 12, 5, runtime.memcpyHostToDevice, stream.ptr
        )
        expected = np.zeros((5, 4), np.int32)
        expected[:, 1:] = source[:, :3]
        assert (x.get() == expected).all()
        runtime.memsetAsync(x.data.ptr, 0xFF, 8, stream.ptr)
        assert (x.get()[0] == [-1, -1, *expected[0, 2:]]).all()
        with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorInvalidValue"):
            runtime.memcpy2DAsync(x.data.ptr, 16, source.ctypes.data, 32, 17, 2, 1, stream.ptr)


def test_an_event_means_what_it_recorded_when_it_was_waited_for() -> None:
    outcomes = set()
    for seed in SEEDS:
        with installed(seed) as fake:
            cupy = fake.cupy
            launch, first, second = add_one(cupy), new_stream(cupy), new_stream(cupy)
            with first:
                x, y, z = cupy.zeros(N, np.int32), cupy.zeros(N, np.int32), cupy.empty(N, np.int32)
                event = first.record()
                second.wait_event(event)
                launch(x, y)
                event.record()  # too late for the wait above
                launch(y, z, second)
                outcomes.add(int(z.get(stream=second)[0]))
    assert outcomes == {1, 2}


def test_any_number_of_streams_wait_for_one_event() -> None:
    for seed in SEEDS:
        with installed(seed) as fake:
            cupy = fake.cupy
            launch, first, others = add_one(cupy), new_stream(cupy), [new_stream(cupy) for _ in range(3)]
            with first:
                x, y = cupy.zeros(N, np.int32), cupy.empty(N, np.int32)
                launch(x, y)
                event = first.record()
            for other in others:
                other.wait_event(event)
            assert all((y.get(stream=other) == 1).all() for other in reversed(others))


def test_the_host_waits_for_one_stream_and_not_for_all() -> None:
    def others_done(seed: int) -> bool:
        with installed(seed) as fake:
            cupy = fake.cupy
            streams, outs = [new_stream(cupy) for _ in range(4)], [pinned(fake.cupy, -1) for _ in range(4)]
            for stream, out in zip(streams, outs, strict=True):
                with stream:
                    cupy.zeros(N, np.int32).get(out=out, blocking=False)
            streams[0].synchronize()
            assert not outs[0].any()
            return not any(out.any() for out in outs)

    assert not all(others_done(seed) for seed in SEEDS)


def test_a_copy_to_pageable_memory_returns_when_it_is_done(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    with new_stream(cupy):
        out = np.full(N, -1, np.int32)
        cupy.zeros(N, np.int32).get(out=out, blocking=False)
    assert not out.any()


def test_an_event_that_recorded_nothing_holds_nobody_back(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    event, stream = cupy.cuda.Event(disable_timing=True), new_stream(cupy)
    stream.wait_event(event)
    assert event.done
    event.synchronize()
    stream.synchronize()


def test_asking_again_and_again_whether_an_event_is_done_comes_to_an_end(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    stream = new_stream(cupy)
    with stream:
        arrays = [cupy.zeros(N, np.int32) for _ in range(20)]
    event = stream.record()
    assert any(event.done for _ in range(1000))
    assert not any(fake_cupy.peek(array).any() for array in arrays)
    assert any(stream.done for _ in range(1000))


def test_a_host_function_runs_in_its_turn(fake_cupy: FakeCupy) -> None:
    cupy = fake_cupy.cupy
    stream, seen = new_stream(cupy), []
    with stream:
        x = cupy.zeros(N, np.int32)
        stream.launch_host_func(lambda array: seen.append(fake_cupy.peek(array).any()), x)
    assert seen == []
    stream.synchronize()
    assert seen == [False]


def lent(seed: int, *, ordered: bool) -> bool:
    """A foreign stream computes on an array that CuPy lends it, and lends the result back."""
    with installed(seed) as fake:
        cupy, machine = fake.cupy, fake.machine
        foreign, stream, launch = machine.new_queue(machine.device(0)), new_stream(cupy), add_one(cupy)
        with stream:
            x, y = cupy.zeros(N, np.int32), cupy.empty(N, np.int32)
            launch(x, y)
            taken = dlpack.take(y.__dlpack__(stream=foreign.ptr if ordered else -1))
        result = machine.allocate(machine.device(0), 4 * N, foreign.ptr)
        handle = result.handle()

        def program() -> None:
            twice = host_view(taken.address, taken.shape, taken.dtype) * 2
            host_view(result.address, (N,), np.int32)[:] = twice

        defined = machine.enqueue(foreign, "program", program)

        class Foreign:
            def __dlpack_device__(self) -> tuple[int, int]:
                return dlpack.CUDA, 0

            def __dlpack__(self, *, stream: int) -> Any:  # as older libraries have it
                if ordered:
                    machine.wait(machine.queue(stream), defined)
                return dlpack.export(result.address, (N,), np.dtype(np.int32), (dlpack.CUDA, 0), handle)

        with stream:
            z = cupy.from_dlpack(Foreign())
            assert z.data.ptr == result.address
            right = bool((z.get() == 2).all())
        machine.synchronize([defined])
        taken.release()
        return right


def test_dlpack_orders_the_streams_of_both_sides() -> None:
    with np.errstate(over="ignore"):
        assert all(lent(seed, ordered=True) for seed in SEEDS)
        assert not all(lent(seed, ordered=False) for seed in SEEDS)


def test_export_makes_the_consumer_wait_for_the_current_stream_only() -> None:
    def written_elsewhere(seed: int) -> bool:
        with installed(seed) as fake:
            cupy, machine = fake.cupy, fake.machine
            writer, other = new_stream(cupy), new_stream(cupy)
            consumer = machine.new_queue(machine.device(0))
            with writer:
                x = cupy.zeros(N, np.int32)
            with other:
                capsule = x.__dlpack__(stream=consumer.ptr)
            seen: list[bool] = []
            done = machine.enqueue(consumer, "look", lambda: seen.append(not fake.peek(x).any()))
            machine.synchronize([done])
            del capsule
            return seen[0]

    assert not all(written_elsewhere(seed) for seed in SEEDS)


def test_a_capsule_is_used_once_and_keeps_its_array(fake_cupy: FakeCupy) -> None:
    cupy, machine = fake_cupy.cupy, fake_cupy.machine
    with new_stream(cupy) as stream:
        x = cupy.zeros((4, 6), np.float16)
        before = machine.devices[0].budget.used
        capsules = [x.__dlpack__(stream=stream.ptr, max_version=version) for version in (None, (1, 0))]
        address = x.data.ptr
        del x
        taken = [cupy.from_dlpack(capsule) for capsule in capsules]
        assert {(a.data.ptr, a.shape, a.dtype) for a in taken} == {(address, (4, 6), np.dtype(np.float16))}
        with pytest.raises(ValueError, match="multiple times"):
            cupy.from_dlpack(capsules[0])
        machine.collect()
        assert machine.devices[0].budget.used == before
        del taken, capsules
        machine.collect()
        assert machine.devices[0].budget.used == before - 512


def test_an_unused_capsule_lets_its_array_go(fake_cupy: FakeCupy) -> None:
    cupy, machine = fake_cupy.cupy, fake_cupy.machine
    with new_stream(cupy) as stream:
        capsule = cupy.zeros(4, np.int8).__dlpack__(stream=stream.ptr)
    machine.collect()
    assert machine.devices[0].budget.used == 512
    del capsule
    machine.collect()
    assert machine.devices[0].budget.used == 0


def test_threads_have_streams_and_devices_of_their_own() -> None:
    with installed(0, n_devices=2) as fake:
        cupy = fake.cupy
        launch_here = add_one(cupy)
        wrong: list[object] = []

        def lane(device: int) -> None:
            try:
                with cupy.cuda.Device(device), new_stream(cupy):
                    launch = add_one(cupy)
                    for value in range(20):
                        x, y = cupy.empty(N, np.int32), cupy.empty(N, np.int32)
                        x.set(np.full(N, value, np.int32))
                        launch(x, y)
                        if (y.get() != value + 1).any() or y.data.device_id != device:
                            wrong.append(value)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=lane, args=(n % 2,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert cupy.cuda.get_device_id() == 0
        with fake.expect_violation("default stream"), pytest.raises(Misuse):
            launch_here(*[cupy.empty(N, np.int32)] * 2)
