// A step's candidates as every kernel that finds some leaves them: listed, visited, and planned for the scorer. In NumPy
// terms, `new` being what query b has found, each item once,
//     visited[b, new] = True; items[b, :new.size] = new, in any order; count[b] = new.size
// and then, by whichever block finishes last, the plan of the scoring (`plan_when_last` below).
//
//   visited [batch, words], bit i % 32 of word i / 32; items [batch, item_stride], with room for every new item
//   cursor [batch] and ticket [1] are 0 before and after; report [2 * batch] is host memory
//   grid (any, batch); shared: SCRATCH_INTS ints
#pragma once
#include "common.cuh"

// The last block to come here lays the candidates out in tiles of `tile_rows`, no tile having two queries:
//     tile_start = concatenate([[0], cumsum(ceil(count / tile_rows))]); report = concatenate([count, frontier_count])
// The host reads the report to choose the scorer's shape. `cursor` counts by atomics; its values become `count`.
__device__ inline void plan_when_last(int tile_rows, int* cursor, int* count, int* tile_start,
                                      const int* frontier_count, int* ticket, int* report, int* scratch) {
  int const batch = gridDim.y;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // this thread's reservation is seen by whoever sees its ticket
    scratch[SLOT] = atomicAdd(ticket, 1) == (int)(gridDim.x * gridDim.y) - 1;
  }
  __syncthreads();
  if (!scratch[SLOT]) return;
  int first = 0;
  for (int base = 0; base < batch; base += blockDim.x) {
    int const b = base + threadIdx.x;
    int const n = b < batch ? atomicExch(cursor + b, 0) : 0;
    int const tiles = ceil_div(n, tile_rows);
    int const up_to_lane = sum_up_to_lane(tiles);
    int total;
    int const before = sum_before_warp(__shfl_sync(WHOLE_WARP, up_to_lane, 31), scratch, &total);
    if (b < batch) {
      count[b] = n;
      tile_start[b] = first + before + up_to_lane - tiles;
      report[b] = n;
      report[batch + b] = frontier_count ? frontier_count[b] : 0;
    }
    first += total;
  }
  if (threadIdx.x == 0) {
    tile_start[batch] = first;
    *ticket = 0;
  }
}

// Appends this block's new items (-1: none) to those of query blockIdx.y, by one reservation a block.
__device__ inline void append_new(int item, unsigned* visited, long long words, int* items, long long item_stride,
                                  int* cursor, int* scratch) {
  int const b = blockIdx.y;
  bool const fresh = item >= 0 && test_and_set(visited + b * words, item);
  int total;
  int const rank = rank_in_block(fresh, scratch, &total);
  if (threadIdx.x == 0) scratch[SLOT] = total ? atomicAdd(cursor + b, total) : 0;
  __syncthreads();
  if (fresh) items[b * item_stride + scratch[SLOT] + rank] = item;
}
