// The candidates of a step: items not visited so far, each once, and visited from now on. In NumPy terms, for query b,
//     expand: near = neighbors[frontier[b, :frontier_count[b]]].ravel()
//     seed:   near = rows[step * (row_start[b] + arange(row_count[b]))] >> shift
//     new = unique(near[near >= 0]); new = new[~visited[b, new]]
// listed, visited and planned as `candidates.cuh` says.
//
// `seed` reads items with step 1 and shift 0, and those of a pool's keys, as pairs of ints, with step 2 and shift 1.
//
//   neighbors [N, degree], -1 where there is none; frontier [batch, width]; frontier_count [batch], at most width
//   grid (ceil(most candidates of a query / block), batch); block: any multiple of 32; shared: SCRATCH_INTS ints
#include "candidates.cuh"
#include "common.cuh"

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
