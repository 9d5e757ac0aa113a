"""The shim that runs kernels on the CPU: right kernels are right for every seed, wrong ones are caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_shim import BadLaunch, CompilationFailed, KernelFault, Program, UnreadableSource, compile_program
from cuda_shim.program import DeviceBytes

SEEDS = range(12)

SOURCE = r"""
// A reduction of blockDim.x values a block, right only where `barrier` is set.
extern "C" __global__ void __launch_bounds__(1024) reduce(const unsigned* x, unsigned* out, int barrier) {
  DYNAMIC_SHARED(raw);
  unsigned* const sums = (unsigned*)raw;
  unsigned const t = threadIdx.x;
  sums[t] = x[blockIdx.x * blockDim.x + t];
  for (unsigned half = blockDim.x / 2; half; half /= 2) {
    if (barrier) __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) out[blockIdx.x] = sums[0];
}

extern "C" __global__ void set_bits(const int* items, unsigned* bitmap, int* fresh, int n, int atomic) {
  int const i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  unsigned* const word = bitmap + (items[i] >> 5);
  unsigned const bit = 1u << (items[i] & 31);
  if (atomic) {
    fresh[i] = !(atomicOr(word, bit) & bit);
  } else {
    unsigned const before = *word;
    __syncwarp(__ballot_sync(0xffffffffu, 1));
    *word = before | bit;
    fresh[i] = !(before & bit);
  }
}

extern "C" __global__ void count(unsigned long long* total, float* sum, int* least, int* order) {
  atomicAdd(total, 1ull);
  atomicAdd(sum, 0.5f);
  atomicMin(least, -(int)threadIdx.x);
  order[threadIdx.x] = atomicAdd(order + blockDim.x, 1);
}

extern "C" __global__ void warp_values(const int* x, int* out, unsigned* votes, int distance) {
  int const t = (int)threadIdx.x;
  unsigned const vote = __ballot_sync(0xffffffffu, x[t] & 1);
  if ((t & 31) == 0) votes[t / 32] = vote;
  out[t] = __shfl_up_sync(0xffffffffu, x[t], distance);
  out[t + blockDim.x] = __shfl_down_sync(0xffffffffu, x[t], distance, 16);
  out[t + 2 * blockDim.x] = __shfl_xor_sync(0xffffffffu, x[t], distance);
  out[t + 3 * blockDim.x] = __shfl_sync(0xffffffffu, x[t], t + 1);
  if (t & 1) out[t + 4 * blockDim.x] = __shfl_sync(0xaaaaaaaau, x[t], 1);
}

extern "C" __global__ void counts(const int* x, int* out) {
  out[threadIdx.x] = __syncthreads_count(x[threadIdx.x]) * 100 + __syncthreads_or(x[threadIdx.x] > 1) * 10 +
                     __syncthreads_and(x[threadIdx.x] < 2);
}

extern "C" __global__ void early_exit(int* x, int n) {
  if ((int)threadIdx.x >= n) return;
  __syncthreads();
  x[threadIdx.x] = 1;
}
extern "C" __global__ void exited_lane(unsigned* x, int n) {
  if ((int)threadIdx.x >= n) return;
  x[threadIdx.x] = __ballot_sync(0xffffffffu, 1);
}
extern "C" __global__ void unnamed_lane(int* x) { x[threadIdx.x] = __shfl_sync(0x1u, 1, 0); }
extern "C" __global__ void unnamed_source(int* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(0xffffu, (int)threadIdx.x, 20);
}
extern "C" __global__ void crossed(int* x) {
  if (threadIdx.x < 8) x[0] = __shfl_sync(0xffffu, 1, 0);
  else if (threadIdx.x < 16) __syncwarp(0xffffu);
}
extern "C" __global__ void deadlock() {
  if (threadIdx.x == 3) __syncwarp(0x18u);
  else __syncthreads();
}
extern "C" __global__ void endless(int* x) { while (atomicAdd(x, 0) == 0) {} }

extern "C" __global__ void store(int* x, int at) { x[at] = 7; }
extern "C" __global__ void store_at(const unsigned long long* address) { *(int*)address[0] = 7; }
__constant__ int SQUARES[8] = {0, 1, 4, 9, 16, 25, 36, 49};
extern "C" __global__ void squares(int* out) { out[threadIdx.x] = SQUARES[threadIdx.x]; }
extern "C" __global__ void tally(int* total, int atomic) {
  if (atomic) atomicAdd(total, 1);
  else total[0] = total[0] + 1;
}
extern "C" __global__ void load(const int* x, int* out, int at) { out[0] = x[at]; }
extern "C" __global__ void store_shared(unsigned char* out, int at) {
  DYNAMIC_SHARED(raw);
  raw[at] = 1;
  out[0] = raw[at];
}
extern "C" __global__ void load_shared(unsigned char* out, int at) {
  DYNAMIC_SHARED(raw);
  out[0] = raw[at];
}
extern "C" __global__ void wide_load(const unsigned char* x, uint4* out, int at) {
  out[0] = *(const uint4*)(x + at);
}
extern "C" __global__ void misplaced(unsigned char* x) { atomicAdd((int*)(x + 2), 1); }
extern "C" __global__ void overflow(int* x) { x[0] = x[0] + 1; }
extern "C" __global__ void deep(int* x) {
  volatile int local[100000];
  local[0] = 1;
  local[99999] = 2;
  x[0] = local[0];
}
extern "C" __global__ void places(int* out) {
  int const block = (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  int const thread = (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  int const threads = (int)(blockDim.x * blockDim.y * blockDim.z);
  out[block * threads + thread] =
      (int)(blockIdx.z * 1000 + blockIdx.y * 100 + threadIdx.z * 10 + threadIdx.y);
}
extern "C" __global__ void scalars(
    int a, unsigned b, long long c, unsigned long long d /* all of it, */, float e, void* raw) {
  double* const out = (double*)raw;
  out[0] = a, out[1] = b, out[2] = (double)c, out[3] = (double)d, out[4] = e;
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_program(SOURCE)


def reduce_once(program: Program, seed: int, *, barrier: bool) -> bool:
    x = np.random.default_rng(seed).integers(0, 1 << 32, 4 * 256, np.uint32)
    out = np.zeros(4, np.uint32)
    program.run("reduce", 4, 256, [x, out, np.int32(barrier)], shared_bytes=1024, seed=seed)
    return bool((out == x.reshape(4, 256).sum(axis=1, dtype=np.uint32)).all())


def test_a_reduction_with_barriers_is_right_for_every_seed(program: Program) -> None:
    assert all(reduce_once(program, seed, barrier=True) for seed in SEEDS)


def test_a_reduction_without_barriers_is_wrong_for_some_seed(program: Program) -> None:
    assert not all(reduce_once(program, seed, barrier=False) for seed in SEEDS)


def set_bits(program: Program, seed: int, *, atomic: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    items = np.random.default_rng(seed).integers(0, 320, 512, np.int32)
    bitmap, fresh = np.zeros(10, np.uint32), np.zeros(512, np.int32)
    program.run("set_bits", 4, 128, [items, bitmap, fresh, np.int32(512), np.int32(atomic)], seed=seed)
    return items, bitmap, fresh


def test_bitmaps_with_atomics_hold_every_item_and_call_each_fresh_once(program: Program) -> None:
    orders = set()
    for seed in SEEDS:
        items, bitmap, fresh = set_bits(program, seed, atomic=True)
        present = np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little"))
        assert present.tolist() == np.unique(items).tolist()
        assert sorted(items[fresh == 1].tolist()) == present.tolist()
        orders.add(fresh.tobytes())
    assert len(orders) > 1


def test_which_of_equal_items_is_fresh_depends_on_the_seed_and_on_nothing_else(program: Program) -> None:
    items = np.zeros(64, np.int32)

    def first(seed: int) -> int:
        bitmap, fresh = np.zeros(1, np.uint32), np.zeros(64, np.int32)
        program.run("set_bits", 1, 64, [items, bitmap, fresh, np.int32(64), np.int32(1)], seed=seed)
        return int(np.flatnonzero(fresh)[0])

    firsts = [first(seed) for seed in SEEDS]
    assert firsts == [first(seed) for seed in SEEDS]
    assert len(set(firsts)) > 3


def test_a_bitmap_without_atomics_loses_bits_for_some_seed(program: Program) -> None:
    outcomes = [set_bits(program, seed, atomic=False) for seed in SEEDS]
    lost = [
        len(np.unique(items)) != np.unpackbits(bitmap.view(np.uint8)).sum() for items, bitmap, _ in outcomes
    ]
    assert any(lost)


def test_atomics_of_every_width(program: Program) -> None:
    total, sums, least = np.zeros(1, np.uint64), np.zeros(1, np.float32), np.zeros(1, np.int32)
    order = np.zeros(97, np.int32)
    program.run("count", 1, 96, [total, sums, least, order], seed=5)
    assert (total[0], sums[0], least[0]) == (96, 48.0, -95)
    assert sorted(order[:96]) == list(range(96))
    assert order[:96].tolist() != list(range(96))


def test_warp_primitives_follow_ptx(program: Program) -> None:
    x = np.random.default_rng(1).integers(0, 1000, 64, np.int32)
    for seed, distance in zip(SEEDS, [1, 2, 5, 16, 31, 8, 3, 4, 7, 15, 30, 0], strict=True):
        out, votes = np.full(5 * 64, -1, np.int32), np.zeros(2, np.uint32)
        program.run("warp_values", 1, 64, [x, out, votes, np.int32(distance)], seed=seed)
        up, down, xor, following, masked = out.reshape(5, 2, 32)
        for warp in range(2):
            mine = x.reshape(2, 32)[warp]
            lanes = np.arange(32)
            assert votes[warp] == sum(int(v & 1) << lane for lane, v in enumerate(mine))
            assert (up[warp] == np.where(lanes < distance, mine, mine[lanes - distance])).all()
            target = lanes + distance
            inside = target // 16 == lanes // 16
            assert (down[warp] == np.where(inside, mine[np.where(inside, target, 0)], mine)).all()
            assert (xor[warp] == mine[lanes ^ distance]).all()
            assert (following[warp] == mine[(lanes + 1) % 32]).all()
            assert (masked[warp][1::2] == mine[1]).all()


def test_barriers_that_count(program: Program) -> None:
    x, out = np.array([0, 1, 1, 0] * 16, np.int32), np.zeros(64, np.int32)
    program.run("counts", 1, 64, [x, out], seed=2)
    assert set(out) == {32 * 100 + 1}


def test_every_thread_of_every_block_runs_once_at_its_place(program: Program) -> None:
    out = np.full((3, 2, 5, 4, 3, 2), -1, np.int32)
    program.run("places", (5, 2, 3), (2, 3, 4), [out.reshape(-1)], seed=3)
    z, y, _, tz, ty, _ = np.indices(out.shape)
    assert (out == z * 1000 + y * 100 + tz * 10 + ty).all()


def test_scalars_arrive_in_their_widths(program: Program) -> None:
    out = np.zeros(5, np.float64)
    arguments = [
        np.int32(-5),
        np.uint32(1 << 31),
        np.int64(-(1 << 40)),
        np.uint64(1 << 63),
        np.float32(0.5),
        out,
    ]
    program.run("scalars", 1, 1, arguments)
    assert out.tolist() == [-5, 1 << 31, -(1 << 40), 1 << 63, 0.5]


INTS = np.zeros(64, np.int32)


@pytest.mark.parametrize(
    ("name", "threads", "arguments", "words"),
    [
        ("early_exit", 64, [INTS, np.int32(40)], "barrier"),
        ("exited_lane", 64, [INTS.view(np.uint32), np.int32(40)], "mask 0xffffffff"),
        ("exited_lane", 40, [INTS.view(np.uint32), np.int32(40)], "a warp of 8 threads"),
        ("unnamed_lane", 32, [INTS], "does not name its own lane"),
        ("unnamed_source", 32, [INTS], "reads lane 20"),
        ("crossed", 32, [INTS], "__syncwarp"),
        ("deadlock", 32, [], "no thread can go on"),
        ("overflow", 1, [np.array([2**31 - 1], np.int32)], "undefined behaviour"),
        (
            "wide_load",
            1,
            [np.zeros(64, np.uint8), np.zeros(4, np.uint32), np.int32(4)],
            "undefined behaviour",
        ),
        ("deep", 1, [INTS], "illegal memory access"),
        ("misplaced", 1, [np.zeros(8, np.uint8)], "not a multiple of 4, kernel.cu:"),
    ],
)
def test_what_no_kernel_may_do_is_caught(
    program: Program, name: str, threads: int, arguments: list[np.ndarray | np.generic], words: str
) -> None:
    for seed in SEEDS:
        with pytest.raises(KernelFault, match=f"kernel {name}.*{words}"):
            program.run(name, 1, threads, arguments, seed=seed)


@pytest.mark.parametrize("at", [64, 65, 127, 5000, 200_000, -1, -3, -5000])
def test_stores_outside_an_array_are_caught(program: Program, at: int) -> None:
    with pytest.raises(KernelFault, match="kernel store"):
        program.run("store", 1, 1, [np.zeros(64, np.int32), np.int32(at)])


@pytest.mark.parametrize("at", [10, 63])
def test_the_rounding_behind_an_array_is_not_part_of_it(program: Program, at: int) -> None:
    with pytest.raises(KernelFault, match=f"store of 4 bytes: byte {4 * at} of an allocation of 40 bytes"):
        program.run("store", 1, 1, [np.zeros(10, np.int32), np.int32(at)])
    with pytest.raises(KernelFault, match=f"load of 4 bytes: byte {4 * at} of an allocation of 40 bytes"):
        program.run("load", 1, 1, [np.zeros(10, np.int32), INTS, np.int32(at)])


def test_memory_of_the_host_is_not_a_kernels(program: Program) -> None:
    host = np.zeros(4, np.int32)
    with pytest.raises(KernelFault, match="in no allocation"):
        program.run("store_at", 1, 1, [np.array([host.ctypes.data], np.uint64)])
    assert host[0] == 0


def test_what_is_written_around_an_allocation_by_other_means_is_noticed(program: Program) -> None:
    memory = DeviceBytes(40)
    memory.view((11,), np.int32)[10] = 0
    with pytest.raises(KernelFault, match="wrote just outside"):
        program.run("store", 1, 1, [np.zeros(10, np.int32), np.int32(0)])
    with pytest.raises(KernelFault, match="written just outside"):
        memory.free()


def test_constants_are_read(program: Program) -> None:
    out = np.zeros(8, np.int32)
    program.run("squares", 1, 8, [out])
    assert out.tolist() == [n * n for n in range(8)]


def test_a_plain_counter_loses_counts_for_some_seed_and_an_atomic_one_never(program: Program) -> None:
    def counted(seed: int, atomic: int) -> int:
        total = np.zeros(1, np.int32)
        program.run("tally", 2, 64, [total, np.int32(atomic)], seed=seed)
        return int(total[0])

    assert all(counted(seed, 1) == 128 for seed in SEEDS)
    assert not all(counted(seed, 0) == 128 for seed in SEEDS)


def test_loads_past_an_array_are_caught_and_name_thread_and_line(program: Program) -> None:
    with pytest.raises(KernelFault, match=r"thread .*: byte 256 of .* 256 bytes, kernel.cu:"):
        program.run("load", 1, 1, [np.zeros(64, np.int32), INTS, np.int32(64)])


@pytest.mark.parametrize(
    ("name", "at"), [("store_shared", 40), ("store_shared", -1), ("store_shared", 5000), ("load_shared", 48)]
)
def test_shared_memory_ends_where_it_was_said_to(program: Program, name: str, at: int) -> None:
    with pytest.raises(KernelFault, match=f"kernel {name}"):
        program.run(name, 1, 1, [np.zeros(1, np.uint8), np.int32(at)], shared_bytes=40)


def test_shared_memory_is_poisoned_for_every_block(program: Program) -> None:
    out = np.zeros(1, np.uint8)
    program.run("store_shared", 8, 1, [out, np.int32(0)], shared_bytes=16)
    program.run("load_shared", 8, 1, [out, np.int32(0)], shared_bytes=16)
    assert out[0] == 0xA5


def test_memory_is_closed_once_freed(program: Program) -> None:
    freed = DeviceBytes(4)
    freed.free()
    with pytest.raises(KernelFault, match="inside a freed allocation"):
        program["overflow"].launch((1,), (1,), [np.uint64(freed.address)])


def test_a_kernel_that_never_ends_is_ended(program: Program) -> None:
    zero = DeviceBytes(4)
    zero.view((1,), np.int32)[0] = 0
    with pytest.raises(KernelFault, match="time limit"):
        program["endless"].launch((1,), (32,), [np.uint64(zero.address)], limit_s=0.2)
    zero.free()


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes"),
    [
        (1, 1025, 0),
        (0, 32, 0),
        (1, (32, 33), 0),
        ((1, 65536), 32, 0),
        (1, (1, 1, 65), 0),
        (1, 32, 48 * 1024 + 1),
    ],
)
def test_sizes_that_no_gpu_takes_are_refused(
    program: Program, grid: int | tuple[int, ...], block: int | tuple[int, ...], shared_bytes: int
) -> None:
    with pytest.raises(BadLaunch):
        program.run("early_exit", grid, block, [INTS, np.int32(1)], shared_bytes=shared_bytes)


def test_more_shared_memory_must_be_asked_for(program: Program) -> None:
    arguments = [np.zeros(1, np.uint8), np.int32(99_999)]
    program.run("store_shared", 1, 1, arguments, shared_bytes=100_000, max_shared_bytes=100_000)


@pytest.mark.parametrize(
    "arguments",
    [
        [INTS],
        [INTS, 5],
        [INTS, np.int64(5)],
        [INTS, np.float32(5)],
        [INTS.astype(np.int64), np.int32(5)],
        [INTS.view(np.float32), np.int32(5)],
        [INTS[::2], np.int32(5)],
    ],
)
def test_arguments_must_fit_their_parameters(
    program: Program, arguments: list[np.ndarray | np.generic]
) -> None:
    with pytest.raises(BadLaunch):
        program.run("early_exit", 1, 32, arguments)


def test_launch_bounds_are_kept() -> None:
    bounded = compile_program(
        '#define LANES 32\nextern "C" __global__ void __launch_bounds__(LANES * 4) f(int* x) { x[0] = 1; }'
    )
    bounded.run("f", 1, 128, [INTS.copy()])
    with pytest.raises(BadLaunch, match="at most 128"):
        bounded.run("f", 1, 129, [INTS.copy()])


def test_a_file_finds_its_headers_and_is_compiled_anew_when_one_changes(tmp_path: Path) -> None:
    source = '#include "value.cuh"\nextern "C" __global__ void f(int* x) { x[0] = VALUE + EXTRA; }\n'
    (tmp_path / "f.cu").write_text(source)
    out = np.zeros(1, np.int32)
    for value in (3, 4):
        (tmp_path / "value.cuh").write_text(f"#pragma once\n#define VALUE {value}\n")
        compile_program(tmp_path / "f.cu", ["-DEXTRA=10"]).run("f", 1, 1, [out])
        assert out[0] == value + 10


@pytest.mark.parametrize(
    "body",
    [
        "static __shared__ int s[4]; x[0] = s[0];",
        "uint32_t n = 1; x[0] = n;",
        "atomicAdd((double*)x, 1.0);",
        "x[0] = undeclared;",
    ],
)
def test_language_that_the_kernels_may_not_use_does_not_compile(body: str) -> None:
    with pytest.raises(CompilationFailed):
        compile_program(f'extern "C" __global__ void f(int* x) {{ {body} }}')


@pytest.mark.parametrize(
    "source",
    [
        "__global__ void f(int* x) {}",
        'extern "C" __global__ void f(double x) {}',
        'extern "C" __global__ void f(int** x) {}',
    ],
)
def test_a_kernel_in_another_form_is_refused(source: str) -> None:
    with pytest.raises(UnreadableSource):
        compile_program(source)


def test_unknown_compiler_options_are_refused() -> None:
    with pytest.raises(CompilationFailed, match="use_fast_math"):
        compile_program('extern "C" __global__ void f(int* x) {}', ["--use_fast_math"])
