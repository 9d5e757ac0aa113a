// The candidates of a step that pass their query's gate, out of what `gate.cu` found. In NumPy terms, for query b,
//     best = sort(found[b, :n_found[b]]);  items = item_of(best);  first = unique(items, return_index=True)[1]
//     new = items[sort(first)][:admit], and without the limit where known[b] == 0, as that query has no gate
// listed, visited and planned as `candidates.cuh` says. n_found is 0 afterwards.
//
//   found [batch, found_stride], of unvisited items; n_found, known [batch]; spill [batch, room] when room > SORT_PIECE,
//   else unused; room: a power of two, at least 32 and 1.5 times the most found of a query
//   grid (1, batch); block: any multiple of 32; shared: SCRATCH_INTS ints, then min(room, SORT_PIECE) keys
//
// The order of candidates is free, so only a query that found more than `admit` sorts; what others found twice, the
// bitmap of visited items lets through once.
#include "candidates.cuh"
#include "common.cuh"
#include "sort.cuh"

// The smallest of each item's keys: puts them into table[0 … 2^bits - 1], the rest of which is NO_KEY; at least as many
// as there are items.
__device__ void keep_best_of_each_item(const Key* keys, int n, Key* table, int bits) {
  unsigned const last = (1u << bits) - 1;
  for (int i = threadIdx.x; i <= (int)last; i += blockDim.x) table[i] = NO_KEY;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    Key const key = keys[i];
    for (unsigned at = (unsigned)item_of(key) * 2654435769u >> (32 - bits);; at = (at + 1) & last) {
      Key const held = atomicCAS(table + at, NO_KEY, key);  // a place keeps its item
      if (held != NO_KEY && item_of(held) != item_of(key)) continue;
      if (held != NO_KEY) atomicMin(table + at, key);
      break;
    }
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(MERGE_BLOCK)
    choose(const unsigned long long* found, long long found_stride, int* n_found, const int* known, int admit,
           unsigned long long* spill, int room, unsigned* visited, long long words, int* items, long long item_stride,
           int tile_rows, const int* frontier_count, int* cursor, int* count, int* tile_start, int* ticket,
           int* report) {
  DYNAMIC_SHARED(shared);
  int* const scratch = (int*)shared;
  Key* const piece = (Key*)(scratch + SCRATCH_INTS);
  int const b = blockIdx.y, n = n_found[b];
  const Key* chosen = found + b * found_stride;
  int m = n;
  if (known[b] && n > admit) {
    int bits = 5;
    while (1 << bits < n + n / 2) ++bits;
    Key* const table = 1 << bits <= SORT_PIECE ? piece : spill + (long long)b * room;
    keep_best_of_each_item(chosen, n, table, bits);
    sort(table, 1 << bits, piece);
    chosen = table;
    m = admit;
  }
  for (int base = 0; base < m; base += blockDim.x) {
    int const i = base + threadIdx.x;
    Key const key = i < m ? chosen[i] : NO_KEY;
    append_new(key == NO_KEY ? -1 : item_of(key), visited, words, items, item_stride, cursor, scratch);
  }
  plan_when_last(tile_rows, cursor, count, tile_start, frontier_count, ticket, report, scratch);
  if (threadIdx.x == 0) n_found[b] = 0;  // all have read it before the barriers of the plan
}
