// Which items each query may return, as a bitmap. In NumPy terms, for a query b with `filtered[b]`,
//     admissible[b] = masks[b] if masks[b] is given else True
//     admissible[b, excluded[excluded_start[b] : excluded_start[b + 1]]] = False
// Bits past the last item are of no meaning.
//
//   masks [batch]: 0, or the address of a packed mask, [words], which may be the row of `admissible` itself
//   excluded: ascending for each query; excluded_start [batch + 1]; admissible [batch, words]
//   grid (ceil(words / block), batch); block: any multiple of 32; shared: one word a thread
//
// A block makes blockDim.x words of one bitmap in shared memory: excluded items are few, so it finds those of its words
// by binary search and clears them there, and global memory is written once, in order.
#include "common.cuh"

// The place of the first of `items`[low … high - 1] (ascending) that is not below `item`.
__device__ int first_not_below(const int* items, int low, int high, long long item) {
  while (low < high) {
    int const middle = low + (high - low) / 2;
    if (items[middle] < item) low = middle + 1;
    else high = middle;
  }
  return low;
}

extern "C" __global__ void __launch_bounds__(FILTER_BLOCK)
    admit(const int* filtered, const long long* masks, const int* excluded, const int* excluded_start,
          unsigned* admissible, long long words) {
  DYNAMIC_SHARED(shared);
  unsigned* const mine = (unsigned*)shared;
  int const b = blockIdx.y;
  if (!filtered[b]) return;
  long long const first = (long long)blockIdx.x * blockDim.x, word = first + threadIdx.x;
  const unsigned* const mask = (const unsigned*)masks[b];
  mine[threadIdx.x] = mask && word < words ? mask[word] : ~0u;
  __syncthreads();
  int const low = first_not_below(excluded, excluded_start[b], excluded_start[b + 1], first * 32);
  int const high = first_not_below(excluded, low, excluded_start[b + 1], (first + blockDim.x) * 32);
  for (int i = low + threadIdx.x; i < high; i += blockDim.x) {
    int const bit = (int)(excluded[i] - first * 32);
    atomicAnd(mine + (bit >> 5), ~(1u << (bit & 31)));
  }
  __syncthreads();
  if (word < words) admissible[b * words + word] = mine[threadIdx.x];
}
