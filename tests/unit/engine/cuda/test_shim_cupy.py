"""The fake CuPy is as strict as CuPy, stricter where CuPy would err in silence, and fails when told to."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_shim.errors import Misuse
from cuda_shim.fixtures import FakeCupy, installed
from cuda_shim.program import KernelFault

CODE = r"""
extern "C" __global__ void fill(int* out, float value, int n) {
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) out[i] = (int)value;
}
extern "C" __global__ void wide(const uint4* in, unsigned char* out) {
  DYNAMIC_SHARED(raw);
  raw[threadIdx.x] = 1;
  out[threadIdx.x] = (unsigned char)in[threadIdx.x].x + raw[threadIdx.x];
}
"""
N = 64


@pytest.fixture
def fill(fake_cupy: FakeCupy) -> Any:
    return fake_cupy.cupy.RawModule(code=CODE, options=("-std=c++17",)).get_function("fill")


@pytest.fixture
def stream(fake_cupy: FakeCupy) -> Any:
    return fake_cupy.cupy.cuda.Stream(non_blocking=True).use()


@pytest.fixture
def out(fake_cupy: FakeCupy, stream: Any) -> Any:
    return fake_cupy.cupy.zeros(N, np.int32)


def test_the_host_has_no_way_around_get(out: Any) -> None:
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(out)
    with pytest.raises(TypeError):
        np.add(out, 1)
    with pytest.raises(TypeError):
        out + 1
    for use in (bool, list, lambda a: a.__setitem__(0, 1), lambda a: a[np.arange(3)], lambda a: a[::2]):
        with pytest.raises(Misuse):
            use(out)


def test_views_share_memory(fake_cupy: FakeCupy, out: Any) -> None:
    grid = out.reshape(8, -1)
    assert (grid.shape, grid.strides, grid.nbytes, grid.size, grid.ndim) == ((8, 8), (32, 4), 256, 64, 2)
    assert grid[2:5].data.ptr == out.data.ptr + 64
    assert grid[3, 2:4].shape == (2,)
    assert grid[3, 2:4].data.ptr == out.data.ptr + 3 * 32 + 8
    assert out.view(np.uint8).shape == (256,)
    assert out.view(np.uint64).reshape(4, 8).dtype == np.uint64
    assert grid[8:].shape == (0, 8)
    assert out.flags.c_contiguous
    assert grid.base is out
    grid[1].set(np.arange(8, dtype=np.int32))
    assert out.get()[8:16].tolist() == list(range(8))
    assert fake_cupy.cupy.asnumpy(grid[1]).tolist() == list(range(8))
    with pytest.raises(Misuse, match="not contiguous"):
        grid[:, 1]
    with pytest.raises(ValueError, match="reshape"):
        grid.reshape(7, 9)


def test_copies_need_equal_shapes_and_types(out: Any) -> None:
    with pytest.raises(ValueError, match="Shape mismatch"):
        out.get(out=np.empty(N + 1, np.int32))
    with pytest.raises(TypeError, match="cannot be obtained"):
        out.get(out=np.empty(N, np.uint32))
    with pytest.raises(TypeError, match="cannot be set"):
        out.set(np.empty(N, np.int64))
    with pytest.raises(ValueError, match="Shape mismatch"):
        out.set(np.empty((N, 1), np.int32))


def test_fresh_memory_is_poisoned_and_no_bytes_have_no_address(fake_cupy: FakeCupy, stream: Any) -> None:
    assert fake_cupy.cupy.empty((0, 4), np.int32).data.ptr == 0
    fresh = fake_cupy.cupy.empty(N, np.int32)
    assert fresh.data.ptr % 256 == 0
    assert (np.abs(fake_cupy.peek(fresh).astype(np.int64)) > 1 << 29).all()


def test_a_kernel_runs_on_the_stream(fake_cupy: FakeCupy, fill: Any, out: Any, stream: Any) -> None:
    fill((1,), (32,), (out, np.float32(3), np.int32(N)))
    fill((1,), (32,), (out.data, np.float32(4), np.int32(N)), stream=stream)
    fill((1,), (32,), (np.uint64(out.data.ptr + 4), np.float32(5), np.int32(2)), stream=stream)
    assert out.get().tolist() == [4, 5, 5] + [4] * (N - 3)
    assert (fake_cupy.count("launches"), fake_cupy.count("launch fill")) == (3, 3)


Arguments = Callable[[Any], tuple[Any, ...]]


@pytest.mark.parametrize(
    "arguments",
    [
        lambda out: (out, np.float32(3)),
        lambda out: (out, np.float32(3), np.int32(N), np.int32(N)),
        lambda out: (out, 3.0, np.int32(N)),
        lambda out: (out, np.float64(3), np.int32(N)),
        lambda out: (out, np.float32(3), N),
        lambda out: (out, np.float32(3), np.int64(N)),
        lambda out: (out, np.int32(3), np.int32(N)),
        lambda out: (np.zeros(N, np.int32), np.float32(3), np.int32(N)),
        lambda out: (out.data.ptr, np.float32(3), np.int32(N)),
        lambda out: (out.view(np.int64), np.float32(3), np.int32(N)),
        lambda out: (out.view(np.float32), np.float32(3), np.int32(N)),
        lambda out: (np.uint64(out.data.ptr + 1), np.float32(3), np.int32(N)),
        lambda out: (np.uint64(0x1000), np.float32(3), np.int32(N)),
    ],
)
def test_arguments_that_do_not_fit_are_refused_for_good(
    fake_cupy: FakeCupy, fill: Any, out: Any, arguments: Arguments
) -> None:
    with fake_cupy.expect_violation("fill"), pytest.raises(Misuse, match="fill"):
        fill((1,), (32,), arguments(out))


@pytest.mark.parametrize(
    ("grid", "block", "shared_mem"),
    [((1,), (1025,), 0), ((1, 65536), (32,), 0), ((1,), (32,), 48 * 1024 + 1)],
)
def test_sizes_that_a_gpu_refuses_raise_as_the_driver_does(
    fake_cupy: FakeCupy, fill: Any, out: Any, grid: Any, block: Any, shared_mem: int
) -> None:
    with pytest.raises(fake_cupy.cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_INVALID_VALUE"):
        fill(grid, block, (out, np.float32(3), np.int32(N)), shared_mem=shared_mem)


def test_an_empty_grid_is_refused_though_cupy_launches_one_block(
    fake_cupy: FakeCupy, fill: Any, out: Any
) -> None:
    with fake_cupy.expect_violation("empty grid"), pytest.raises(Misuse):
        fill((0,), (32,), (out, np.float32(3), np.int32(N)))


def test_more_shared_memory_must_be_asked_for_on_each_device() -> None:
    with installed(0, n_devices=2) as fake:
        cupy = fake.cupy
        wide = cupy.RawModule(code=CODE).get_function("wide")
        wide.max_dynamic_shared_size_bytes = 100_000
        for device in range(2):
            with cupy.cuda.Device(device), cupy.cuda.Stream() as stream:
                x, y = cupy.zeros(128, np.uint8), cupy.empty(8, np.uint8)
                if device == 1:
                    with pytest.raises(cupy.cuda.driver.CUDADriverError):
                        wide((1,), (8,), (x, y), shared_mem=100_000)
                    wide.max_dynamic_shared_size_bytes = 100_000
                wide((1,), (8,), (x, y), shared_mem=100_000, stream=stream)
                assert y.get().tolist() == [1] * 8
        assert fake.count("compilations") == 2


def test_a_module_that_does_not_compile_says_so_like_nvrtc(fake_cupy: FakeCupy) -> None:
    module = fake_cupy.cupy.RawModule(code='extern "C" __global__ void f(int* x) { x[0] = nothing; }')
    with pytest.raises(fake_cupy.cupy.cuda.compiler.CompileException, match="nothing"):
        module.get_function("f")
    with pytest.raises(TypeError, match="options"):
        fake_cupy.cupy.RawModule(code=CODE, options=["-std=c++17"])
    with pytest.raises(fake_cupy.cupy.cuda.driver.CUDADriverError):
        fake_cupy.cupy.RawModule(code=CODE).get_function("missing")


@pytest.mark.parametrize(
    "use", ["kernel", "zeros", "set", "get", "record", "memset", "memcpy", "from_dlpack", "export"]
)
def test_the_default_stream_is_refused(fake_cupy: FakeCupy, fill: Any, use: str) -> None:
    cupy = fake_cupy.cupy
    x = cupy.empty(N, np.int32)
    uses: dict[str, Callable[[], object]] = {
        "kernel": lambda: fill((1,), (32,), (x, np.float32(3), np.int32(N))),
        "zeros": lambda: cupy.zeros(3, np.int32),
        "set": lambda: x.set(np.zeros(N, np.int32)),
        "get": lambda: x.get(stream=cupy.cuda.Stream.null),
        "record": lambda: cupy.cuda.Event().record(),
        "memset": lambda: cupy.cuda.runtime.memset(x.data.ptr, 0, 4),
        "memcpy": lambda: cupy.cuda.runtime.memcpy(x.data.ptr, x.data.ptr, 4, 3),
        "from_dlpack": lambda: cupy.from_dlpack(x),
        "export": lambda: x.__dlpack__(stream=fake_cupy.machine.new_queue(fake_cupy.machine.device(0)).ptr),
    }
    with fake_cupy.expect_violation("default stream"), pytest.raises(Misuse):
        uses[use]()


def test_devices_are_apart() -> None:
    with installed(0, n_devices=2, memory_bytes=1 << 20) as fake:
        cupy = fake.cupy
        fill = cupy.RawModule(code=CODE).get_function("fill")
        zero, one = (cupy.cuda.Device(n) for n in range(2))
        with zero:
            stream_0 = cupy.cuda.Stream(non_blocking=True)
        with one:
            stream_1 = cupy.cuda.Stream(non_blocking=True)
            with stream_1:
                y = cupy.zeros(N, np.int32)
        assert (y.data.device_id, y.device.id, y.__dlpack_device__()) == (1, 1, (2, 1))
        assert zero.mem_info == (1 << 20, 1 << 20)
        assert one.mem_info == ((1 << 20) - 512, 1 << 20)
        with pytest.raises(RuntimeError, match="does not match with the current device"):
            stream_1.use()
        with pytest.raises(cupy.cuda.driver.CUDADriverError, match="INVALID_HANDLE"):
            fill((1,), (32,), (y, np.float32(1), np.int32(N)), stream=stream_1)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="InvalidResourceHandle"):
            cupy.cuda.Event().record(stream_1)
        with fake.expect_violation("memory of device 1"), pytest.raises(Misuse):
            fill((1,), (32,), (y, np.float32(1), np.int32(N)), stream=stream_0)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="invalid device"):
            cupy.cuda.Device(2).use()
        assert cupy.cuda.runtime.getDeviceCount() == 2
        assert cupy.cuda.runtime.getDeviceProperties(1)["totalGlobalMem"] == 1 << 20


def test_memory_beyond_the_budget_is_out_of_memory() -> None:
    with installed(0, memory_bytes=10_240) as fake:
        cupy, pool = fake.cupy, fake.cupy.get_default_memory_pool()
        oom = cupy.cuda.memory.OutOfMemoryError
        a, b = cupy.empty(5000, np.uint8), cupy.empty(5000, np.uint8)
        with pytest.raises(oom, match="allocating 512 bytes"):
            cupy.empty(1, np.uint8)
        del b
        assert (pool.used_bytes(), pool.total_bytes(), pool.free_bytes()) == (5120, 10_240, 5120)
        assert cupy.cuda.Device().mem_info == (0, 10_240)
        pool.free_all_blocks()
        assert cupy.cuda.Device().mem_info == (5120, 10_240)
        pool.set_limit(size=6000)
        with pytest.raises(oom, match="limit set to: 6,000"):
            cupy.empty(1000, np.uint8)
        pool.set_limit(size=0)
        fake.refuse_allocations_over(1000)
        with pytest.raises(oom):
            cupy.empty(1001, np.uint8)
        fake.refuse_allocations_over(None)
        fake.occupy(5120)
        with pytest.raises(oom):
            cupy.empty(1, np.uint8)
        fake.occupy(0)
        a = [a]  # in a cycle, which only the collector undoes
        a.append(a)
        del a
        assert cupy.empty(10_240, np.uint8).nbytes == 10_240


def test_memory_goes_back_in_the_order_of_its_own_stream(fake_cupy: FakeCupy, fill: Any, stream: Any) -> None:
    for _ in range(5):
        scratch = fake_cupy.cupy.empty(N, np.int32)
        fill((1,), (32,), (scratch, np.float32(3), np.int32(N)))
        del scratch
    stream.synchronize()


def dropped_early(seed: int, *, edge: bool) -> bool:
    """Memory of one stream that another still uses when it is dropped; whether that was noticed."""
    try:
        with installed(seed) as fake:
            cupy = fake.cupy
            fill = cupy.RawModule(code=CODE).get_function("fill")
            owner, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
            with owner:
                scratch = cupy.zeros(N, np.int32)
                other.wait_event(owner.record())
                fill((1,), (32,), (scratch, np.float32(3), np.int32(N)), stream=other)
                if edge:
                    owner.wait_event(other.record())
                del scratch
                cupy.zeros(N, np.int32)
    except KernelFault as fault:
        assert "freed" in str(fault)
        return True
    return False


def test_memory_dropped_while_another_stream_uses_it_is_noticed() -> None:
    assert any(dropped_early(seed, edge=False) for seed in range(20))
    assert not any(dropped_early(seed, edge=True) for seed in range(20))


def test_pinned_memory_dropped_before_its_copy_is_noticed(fake_cupy: FakeCupy, out: Any, stream: Any) -> None:
    cupy = fake_cupy.cupy
    memory = cupy.cuda.alloc_pinned_memory(4 * N)
    assert (memory.size(), len(np.frombuffer(memory, np.int32))) == (
        512,
        128,
    )  # rounded up, as CuPy's pool does
    out.get(out=np.frombuffer(memory, np.int32, N), blocking=False)
    del memory
    gc.collect()
    with fake_cupy.expect_violation("had been released"):
        stream.synchronize()


def test_kernels_reach_pinned_memory(fake_cupy: FakeCupy, fill: Any, stream: Any) -> None:
    memory = fake_cupy.cupy.cuda.alloc_pinned_memory(8)
    fill((1,), (32,), (np.uint64(memory.ptr), np.float32(7), np.int32(2)))
    seen = np.frombuffer(memory, np.int32, 2)
    assert (seen != 7).all()
    stream.synchronize()
    assert seen.tolist() == [7, 7]


def test_copies_must_name_their_kind_and_stay_inside(fake_cupy: FakeCupy, out: Any, stream: Any) -> None:
    runtime, host = fake_cupy.cupy.cuda.runtime, np.zeros(N, np.int32)
    with fake_cupy.expect_violation("runs out of"), pytest.raises(Misuse):
        runtime.memcpyAsync(out.data.ptr + 4, host.ctypes.data, 4 * N, 1, stream.ptr)
    with fake_cupy.expect_violation("pageable"), pytest.raises(Misuse):
        runtime.memcpyAsync(out.data.ptr, host.ctypes.data, 4 * N, runtime.memcpyDeviceToDevice, stream.ptr)
    with fake_cupy.expect_violation("runs out of"), pytest.raises(Misuse):
        runtime.memsetAsync(out.data.ptr, 0, 4 * N + 1, stream.ptr)


def test_a_failed_launch_loses_the_device_until_reset(
    fake_cupy: FakeCupy, fill: Any, out: Any, stream: Any
) -> None:
    cupy = fake_cupy.cupy
    arguments = (out, np.float32(3), np.int32(N))
    fake_cupy.fail_launch(skip=1)
    fill((1,), (32,), arguments)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_LAUNCH_FAILED"):
        fill((1,), (32,), arguments)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_LAUNCH_FAILED"):
        fill((1,), (32,), arguments)
    calls: list[Callable[[], object]] = [
        stream.synchronize,
        stream.record,
        out.get,
        lambda: out.set(np.zeros(N, np.int32)),
        lambda: cupy.empty(1, np.int32),
        cupy.cuda.Stream,
        cupy.cuda.Event,
        lambda: cupy.cuda.Device().mem_info,
        lambda: out.__dlpack__(stream=stream.ptr + 16),
    ]
    for call in calls:
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorLaunchFailure"):
            call()
    fake_cupy.reset()
    fill((1,), (32,), arguments)
    assert out.get().tolist() == [3] * N


def test_a_kernel_that_fails_late_is_noticed_where_the_host_waits(
    fake_cupy: FakeCupy, fill: Any, out: Any
) -> None:
    fake_cupy.fail_launch(late=True, status=700)
    fill((1,), (32,), (out, np.float32(3), np.int32(N)))
    with pytest.raises(fake_cupy.cupy.cuda.runtime.CUDARuntimeError, match="illegal memory access"):
        out.get()


def test_losing_one_device_leaves_the_other() -> None:
    with installed(0, n_devices=2) as fake:
        cupy = fake.cupy
        fake.lose_device(0)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            cupy.empty(1, np.int32)
        with cupy.cuda.Device(1), cupy.cuda.Stream():
            assert not cupy.zeros(N, np.int32).get().any()


def test_what_a_kernel_did_wrong_fails_the_test_even_if_it_was_swallowed() -> None:
    with pytest.raises(AssertionError, match="kernel fill"), installed(0) as fake:
        stream = fake.cupy.cuda.Stream().use()
        fill = fake.cupy.RawModule(code=CODE).get_function("fill")
        fill((1,), (32,), (fake.cupy.empty(4, np.int32), np.float32(1), np.int32(5)))
        with pytest.raises(KernelFault, match="kernel fill"):
            stream.synchronize()


def test_what_is_never_waited_for_is_run_and_checked_in_the_end() -> None:
    with pytest.raises(KernelFault, match="kernel fill"), installed(0) as fake:
        fake.cupy.cuda.Stream().use()
        fill = fake.cupy.RawModule(code=CODE).get_function("fill")
        fill((1,), (32,), (fake.cupy.empty(4, np.int32), np.float32(1), np.int32(5)))


def test_the_fake_goes_and_what_was_there_comes_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: sys.modules.get(name) for name in ("cupy", "cupy.cuda", "nann.engine.cuda")}
    monkeypatch.setitem(sys.modules, "nann.engine.cuda.bound", type(sys)("nann.engine.cuda.bound"))
    bound = sys.modules["nann.engine.cuda.bound"]
    with installed(0) as fake:
        assert importlib.import_module("cupy.cuda.runtime") is fake.cupy.cuda.runtime
        assert "nann.engine.cuda.bound" not in sys.modules
        inside = importlib.import_module("nann.engine.cuda.inventory")
        assert len(inside.cuda_devices()) == 1
        stream = fake.cupy.cuda.Stream()
    assert sys.modules["nann.engine.cuda.bound"] is bound
    assert {name: sys.modules.get(name) for name in before} == before
    assert sys.modules.get("nann.engine.cuda.inventory") is not inside
    with installed(1), pytest.raises(Misuse, match="outlived"):
        stream.synchronize()
