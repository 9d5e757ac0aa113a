// Lays candidates out for one call of the scorer: their rows of every item tensor. In NumPy terms, for each tile t,
//     b = searchsorted(tile_start, first_tile + t, "right") - 1;  own = (first_tile + t - tile_start[b]) * tile_rows
//     n = clip(count[b] - own, 0, tile_rows);  picked = items[b][own : own + n]
//     tile_query[t] = b;  out[t, :n] = table[picked], out[t, n:] = 0, for every (table, out)
// Tiles from tile_start[batch] on belong to no query: b = 0 and n = 0.
//
//   tables [n_tables, 4]: address of the table, address of out, words in a row, log2 of the bytes in a word; the table
//   is [N, words], out [tiles, tile_rows, words], both of 1-, 2-, 4- or 16-byte words, aligned to them
//   items of query b begin at item_start[b], or at b * item_stride without `item_start`; tile_start [batch + 1]
//   grid (tiles, tile_rows / GATHER_ROWS); block: any multiple of 32; shared: GATHER_ROWS ints
//
// A block copies GATHER_ROWS rows of each table, word by word over all of them, so that a warp writes consecutive words
// and, within a row, reads them; short rows leave no lane idle. Many small blocks of few registers, and IN_FLIGHT loads
// of each thread before its first store, keep memory busy.
#include "common.cuh"

#define IN_FLIGHT 4

template <class Word>
__device__ void copy_rows(const int* picked, long long table, long long out, long long first_row, int words) {
  const Word* const from = (const Word*)table;
  Word* const to = (Word*)out + first_row * words;
  int const all = GATHER_ROWS * words;
  for (int base = threadIdx.x; base < all; base += IN_FLIGHT * blockDim.x) {
    Word word[IN_FLIGHT] = {};
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; ++u) {
      int const i = base + u * blockDim.x;
      int const item = i < all ? picked[i / words] : -1;
      if (item >= 0) word[u] = __ldg(from + (long long)item * words + i % words);
    }
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; ++u) {
      int const i = base + u * blockDim.x;
      if (i < all) to[i] = word[u];
    }
  }
}

extern "C" __global__ void __launch_bounds__(GATHER_BLOCK)
    gather(const long long* tables, int n_tables, const int* items, const long long* item_start, long long item_stride,
           const int* count, const int* tile_start, int batch, int first_tile, int tile_rows, int* tile_query) {
  DYNAMIC_SHARED(shared);
  int* const picked = (int*)shared;
  int const tile = first_tile + blockIdx.x;
  int b = 0, n = 0;
  long long own = 0;  // the place of this block's first row among the query's candidates
  if (tile < tile_start[batch]) {
    int end = batch;  // the query is in b … end - 1; the same few words for every thread
    while (end - b > 1) {
      int const middle = (b + end) / 2;
      if (tile_start[middle] <= tile) b = middle;
      else end = middle;
    }
    own = (long long)(tile - tile_start[b]) * tile_rows + blockIdx.y * GATHER_ROWS;
    n = (int)min(max(count[b] - own, 0ll), (long long)GATHER_ROWS);
  }
  const int* const mine = items + (item_start ? item_start[b] : b * item_stride) + own;
  for (int r = threadIdx.x; r < GATHER_ROWS; r += blockDim.x) picked[r] = r < n ? mine[r] : -1;
  if (threadIdx.x == 0 && blockIdx.y == 0) tile_query[blockIdx.x] = b;
  __syncthreads();
  long long const first_row = (long long)blockIdx.x * tile_rows + blockIdx.y * GATHER_ROWS;
  for (int t = 0; t < n_tables; ++t) {
    long long const from = tables[4 * t], to = tables[4 * t + 1];
    int const words = (int)tables[4 * t + 2];
    switch (tables[4 * t + 3]) {
      case 4: copy_rows<uint4>(picked, from, to, first_row, words); break;
      case 2: copy_rows<unsigned>(picked, from, to, first_row, words); break;
      case 1: copy_rows<unsigned short>(picked, from, to, first_row, words); break;
      default: copy_rows<unsigned char>(picked, from, to, first_row, words);
    }
  }
}
