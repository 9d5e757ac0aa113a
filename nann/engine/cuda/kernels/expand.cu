// The candidates of a step: items not visited so far, each once, and visited from now on. In NumPy terms, for query b,
//     expand: near = neighbors[frontier[b, :frontier_count[b]]].ravel()
//     seed:   near = rows[step * (row_start[b] + arange(row_count[b]))] >> shift
//     new = unique(near[near >= 0]); new = new[~visited[b, new]]; visited[b, new] = True
//     items[b, :new.size] = new, in any order; count[b] = new.size
// and then, by whichever block finishes last, the plan of the scoring (`plan_when_last` below).
//
// `seed` reads items with step 1 and shift 0, and those of a pool's keys, as pairs of ints, with step 2 and shift 1.
//
//   neighbors [N, degree], -1 where there is none; frontier [batch, width]; frontier_count [batch], at most width
//   visited [batch, words], bit i % 32 of word i / 32; items [batch, item_stride], with room for every new item
//   cursor [batch] and ticket [1] are 0 before and after; report [2 * batch] is host memory
//   grid (ceil(most candidates of a query / block), batch); block: any multiple of 32; shared: SCRATCH_INTS ints
#include "common.cuh"

// The last block to come here lays the candidates out in tiles of `tile_rows`, no tile having two queries:
//     tile_start = concatenate([[0], cumsum(ceil(count / tile_rows))]); report = concatenate([count, frontier_count])
// The host reads the report to choose the scorer's shape. `cursor` counts by atomics; its values become `count`.
__device__ void plan_when_last(int tile_rows, int* cursor, int* count, int* tile_start, const int* frontier_count,
                               int* ticket, int* report, int* scratch) {
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
__device__ void append_new(int item, unsigned* visited, long long words, int* items, long long item_stride, int* cursor,
                           int* scratch) {
  int const b = blockIdx.y;
  bool const fresh = item >= 0 && test_and_set(visited + b * words, item);
  int total;
  int const rank = rank_in_block(fresh, scratch, &total);
  if (threadIdx.x == 0) scratch[SLOT] = total ? atomicAdd(cursor + b, total) : 0;
  __syncthreads();
  if (fresh) items[b * item_stride + scratch[SLOT] + rank] = item;
}

extern "C" __global__ void __launch_bounds__(EXPAND_BLOCK)
    expand(const int* neighbors, int degree, const int* frontier, const int* frontier_count, int width,
           unsigned* visited, long long words, int* items, long long item_stride, int tile_rows, int* cursor,
           int* count, int* tile_start, int* ticket, int* report) {
  DYNAMIC_SHARED(shared);
  int* const scratch = (int*)shared;
  int const b = blockIdx.y, n = frontier_count[b] * degree;
  if ((int)(blockIdx.x * blockDim.x) < n) {
    int const place = blockIdx.x * blockDim.x + threadIdx.x;
    int item = -1;
    if (place < n) {  // neighbouring threads read neighbouring words of a row
      long long const node = frontier[(long long)b * width + place / degree];
      item = neighbors[node * degree + place % degree];
    }
    append_new(item, visited, words, items, item_stride, cursor, scratch);
  }
  plan_when_last(tile_rows, cursor, count, tile_start, frontier_count, ticket, report, scratch);
}

extern "C" __global__ void __launch_bounds__(EXPAND_BLOCK)
    seed(const int* rows, const int* row_start, const int* row_count, int step, int shift, unsigned* visited,
         long long words, int* items, long long item_stride, int tile_rows, int* cursor, int* count, int* tile_start,
         int* ticket, int* report) {
  DYNAMIC_SHARED(shared);
  int* const scratch = (int*)shared;
  int const n = row_count[blockIdx.y];
  if ((int)(blockIdx.x * blockDim.x) < n) {
    int const place = blockIdx.x * blockDim.x + threadIdx.x;
    int item = -1;
    if (place < n) item = (int)((unsigned)rows[(long long)(row_start[blockIdx.y] + place) * step] >> shift);
    append_new(item, visited, words, items, item_stride, cursor, scratch);
  }
  plan_when_last(tile_rows, cursor, count, tile_start, (const int*)0, ticket, report, scratch);
}
