// Sorted keys, by one block. The sort is Batcher's bitonic network ("Sorting networks and their applications", 1968):
// which keys are compared is known beforehand, so that threads only ever wait at barriers.
#pragma once
#include "common.cuh"

// The comparisons of one stage: keys `stride` apart, among keys[0 … n - 1], which are those from `first` on of what is
// being sorted; runs of `size` keys come out ascending and descending in turn.
__device__ inline void compare_stage(Key* keys, int n, int first, int size, int stride) {
  for (int t = threadIdx.x; t < n / 2; t += blockDim.x) {
    int const i = 2 * t - (t & (stride - 1));
    bool const descending = ((first + i) & size) != 0;
    Key const a = keys[i], b = keys[i + stride];
    if ((a > b) != descending) {
      keys[i] = b;
      keys[i + stride] = a;
    }
  }
}

// All stages from runs of `size` to runs of `last`, as far as they stay within keys[0 … n - 1]. A stage of stride 32 or
// less moves keys within 64 consecutive ones, which one warp has: only the wider ones need the whole block to wait.
__device__ inline void compare_stages(Key* keys, int n, int first, int size, int last) {
  for (; size <= last; size *= 2) {
    for (int stride = min(size, n) / 2; stride > 0; stride /= 2) {
      if (stride >= 32) __syncthreads();
      else __syncwarp();
      compare_stage(keys, n, first, size, stride);
    }
  }
  __syncthreads();
}

// Sorts piece[0 … n - 1], n a power of two of at most SORT_PIECE, in shared memory.
__device__ inline void sort_piece(Key* piece, int n) {
  __syncthreads();
  compare_stages(piece, n, 0, 2, n);
}

// Sorts keys[0 … n - 1], n a power of two above SORT_PIECE, in global memory: stages narrower than SORT_PIECE run in
// shared memory, piece by piece.
__device__ inline void sort_by_pieces(Key* keys, int n, Key* piece) {
  for (int size = SORT_PIECE; size <= n; size *= 2) {
    for (int stride = size / 2; stride >= SORT_PIECE; stride /= 2) {
      __syncthreads();
      compare_stage(keys, n, 0, size, stride);
    }
    for (int first = 0; first < n; first += SORT_PIECE) {
      __syncthreads();
      for (int i = threadIdx.x; i < SORT_PIECE; i += blockDim.x) piece[i] = keys[first + i];
      __syncthreads();
      compare_stages(piece, SORT_PIECE, first, size == SORT_PIECE ? 2 : size, size);
      for (int i = threadIdx.x; i < SORT_PIECE; i += blockDim.x) keys[first + i] = piece[i];
    }
  }
  __syncthreads();
}

// Sorts fresh[0 … n - 1]: `piece` itself, or global memory with `piece` to sort parts in. Writes up to a power of two.
__device__ inline void sort(Key* fresh, int n, Key* piece) {
  int padded = fresh == piece ? 2 : 2 * SORT_PIECE;
  while (padded < n) padded *= 2;
  for (int i = n + threadIdx.x; i < padded; i += blockDim.x) fresh[i] = NO_KEY;
  if (fresh == piece) sort_piece(piece, padded);
  else sort_by_pieces(fresh, padded, piece);
}

// How many of keys[0 … n - 1], ascending, are below `key`.
__device__ inline int count_below(const Key* keys, int n, Key key) {
  int low = 0;
  while (low < n) {
    int const middle = (low + n) / 2;
    if (keys[middle] < key) low = middle + 1;
    else n = middle;
  }
  return low;
}
