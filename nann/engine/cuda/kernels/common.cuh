// What every kernel here shares: the key, appending to a list, ranks and sums over a block.
//
// A key holds a score and an item in one integer whose unsigned order is the search's total order (score
// descending, then item ascending). In NumPy terms, for finite scores:
//     bits = (score + 0.0).view(uint32); up = where(bits >> 31, ~bits, bits | 1 << 31)
//     key = uint64(~up) << 32 | uint64(item) << 1 | expanded
// The expanded flag is the lowest bit and never decides an order, as no two entries of a pool hold one item.
//
// Every kernel runs blocks of whole warps, and takes shared memory by DYNAMIC_SHARED only. The tests run these files
// on a CPU, where that macro and the language are theirs; no standard header exists there, nor under NVRTC.
#pragma once

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

using Key = unsigned long long;

#define NO_KEY (~0ull)  // after every key; no finite score has it
#define WHOLE_WARP 0xffffffffu
#define SCRATCH_INTS 64  // of shared memory, for the functions below: 32 sums of warps, and slots from 32 on
#define SLOT 32

__device__ inline bool is_finite(unsigned bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

__device__ inline Key make_key(unsigned bits, int item) {
  if (bits == 0x80000000u) bits = 0;  // -0.0 ranks as 0.0
  unsigned const up = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (Key)~up << 32 | (unsigned)item << 1;
}

__device__ inline float score_of(Key key) {
  unsigned const up = ~(unsigned)(key >> 32);
  return __uint_as_float(up >> 31 ? up ^ 0x80000000u : ~up);
}

__device__ inline int item_of(Key key) { return (int)((unsigned)key >> 1); }

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Whether `item` was absent from the bitmap, where it is present from now on.
__device__ inline bool test_and_set(unsigned* bitmap, int item) {
  unsigned const bit = 1u << (item & 31);
  return !(atomicOr(bitmap + (item >> 5), bit) & bit);
}

__device__ inline bool test(const unsigned* bitmap, int item) { return bitmap[item >> 5] >> (item & 31) & 1u; }

// How many of the lower lanes of this warp have `flag`; `vote` = __ballot_sync of the whole warp.
__device__ inline int rank_in_warp(unsigned vote) { return __popc(vote & ((1u << (threadIdx.x & 31)) - 1)); }

__device__ inline int sum_up_to_lane(int value) {
  int const lane = threadIdx.x & 31;
  for (int distance = 1; distance < 32; distance *= 2) {
    int const lower = __shfl_up_sync(WHOLE_WARP, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

// The sum of `of_warp` over the warps before this one, and over all warps (`total`). All threads of the block call it,
// with one value a warp.
__device__ inline int sum_before_warp(int of_warp, int* scratch, int* total) {
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();  // a call before may still be reading the scratch
  if (lane == 0) scratch[warp] = of_warp;
  __syncthreads();
  if (warp == 0) scratch[lane] = sum_up_to_lane(lane < (int)(blockDim.x >> 5) ? scratch[lane] : 0);
  __syncthreads();
  *total = scratch[31];
  return warp ? scratch[warp - 1] : 0;
}

// How many of the lower threads of the block have `flag`, and how many threads have it (`total`).
__device__ inline int rank_in_block(bool flag, int* scratch, int* total) {
  unsigned const vote = __ballot_sync(WHOLE_WARP, flag);
  return sum_before_warp(__popc(vote), scratch, total) + rank_in_warp(vote);
}
