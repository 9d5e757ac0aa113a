// One step's scores join the pools, and the next frontier is chosen. In NumPy terms, for query b,
//     key = make_key(scores[b], items[b])[isfinite(scores[b])];  nonfinite[b] += sum(~isfinite(scores[b]))
//     pool[b] = sort(concatenate([pool[b], sort(key)[:keep]]))[:capacity]
//     if forget: pool[b] &= ~1;  visited[b] = False (done before);  visited[b, item_of(pool[b])] = True
//     chosen = flatnonzero(pool[b] & 1 == 0)[:width];  frontier[b] = item_of(pool[b, chosen]);  pool[b, chosen] |= 1
//     frontier_score[b] = score_of(pool[b, chosen])
// and, where filtered[b], a second pool of the keys whose item is in admissible[b], with nothing but its size to say.
//
//   score j of query b is scores[(tile_start ? tile_start[b] : b) * score_stride + j]; its item is
//   items[(item_start ? item_start[b] : b * item_stride) + j], or first_item + j without `items`; j < count[b], or
//   < all_count without `count`
//   old_pools [pools, batch, old_capacity] and new_pools [pools, batch, capacity] are not the same memory
//   sizes [pools, batch]: how many keys of each pool are in use, before and after
//   room: a power of two, at least the count of every query or at least twice min(keep, capacity)
//   spill [pools, batch, room] when room > SORT_PIECE, else unused
//   grid (batch, pools), pools 1 or 2; block: any multiple of 32
//   shared: SCRATCH_INTS ints, then min(room, SORT_PIECE) keys
//
// A block has one query to itself from its scores to its frontier, as each part of that waits for all of the part
// before: what counts is the time of one block. So only keys that can still enter the pool (most cannot, after a few
// steps) are collected, in shared memory, and sorted; each key finds its place among the others by binary search.
#include "common.cuh"
#include "sort.cuh"

#define IN_FLIGHT 4            // loads of a thread before it uses the first
#define NOT_THERE 0x7fffffffu  // a NaN

struct Scored {  // the candidates of one query
  const float* scores;
  const int* items;
  int first_item;
  const unsigned* admissible;
};

// Appends the admissible keys below `limit` of candidates start … stop - 1 to `fresh`, in any order; returns how many
// scores this thread found not to be finite.
__device__ int collect(Scored const& from, int start, int stop, Key limit, Key* fresh, int* found) {
  int bad = 0;
  for (int base = start; base < stop; base += IN_FLIGHT * blockDim.x) {
    unsigned bits[IN_FLIGHT];
    int item[IN_FLIGHT];
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; ++u) {
      int const j = base + u * blockDim.x + threadIdx.x;
      bits[u] = j < stop ? __float_as_uint(__ldg(from.scores + j)) : NOT_THERE;
      item[u] = j < stop && from.items ? __ldg(from.items + j) : from.first_item + j;
    }
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; ++u) {
      bool const finite = is_finite(bits[u]);
      bad += !finite && (int)(base + u * blockDim.x + threadIdx.x) < stop;
      Key const key = finite ? make_key(bits[u], item[u]) : NO_KEY;
      bool const joins = key < limit && (!from.admissible || test(from.admissible, item[u]));
      unsigned const vote = __ballot_sync(WHOLE_WARP, joins);
      int at = 0;
      if (vote && (threadIdx.x & 31) == 0) at = atomicAdd(found, __popc(vote));
      at = __shfl_sync(WHOLE_WARP, at, 0) + rank_in_warp(vote);
      if (joins) fresh[at] = key;
    }
  }
  return bad;
}

extern "C" __global__ void __launch_bounds__(MERGE_BLOCK)
    merge(const float* scores, const int* tile_start, long long score_stride, const int* items,
          const long long* item_start, long long item_stride, int first_item, const int* count, int all_count,
          const unsigned long long* old_pools, int old_capacity, unsigned long long* new_pools, int capacity, int keep,
          int* sizes, const int* filtered, const unsigned* admissible, unsigned* visited, long long words, int forget,
          int* frontier, float* frontier_score, int* frontier_count, int width, unsigned long long* nonfinite,
          unsigned long long* spill, int room) {
  DYNAMIC_SHARED(shared);
  int* const scratch = (int*)shared;
  Key* const piece = (Key*)(scratch + SCRATCH_INTS);
  int const b = blockIdx.x, batch = gridDim.x;
  bool const answer = blockIdx.y == 1;
  if (answer && !filtered[b]) return;
  long long const p = blockIdx.y * (long long)batch + b;
  const Key* const old = old_pools + p * old_capacity;
  Key* const pool = new_pools + p * capacity;
  Key* const fresh = room > SORT_PIECE ? spill + p * room : piece;
  unsigned* const seen = visited + b * words;
  int const held = min(sizes[p], capacity), n = count ? count[b] : all_count, most = min(keep, capacity);
  Scored const from = {scores + (tile_start ? tile_start[b] : b) * score_stride,
                       items ? items + (item_start ? item_start[b] : b * item_stride) : items, first_item,
                       answer ? admissible + b * words : (const unsigned*)0};

  int* const found = scratch + SLOT;
  if (threadIdx.x == 0) *found = 0;
  __syncthreads();
  Key limit = held == capacity ? old[capacity - 1] : NO_KEY;
  int m = 0, bad = 0;
  for (int start = 0; start < n;) {
    int const stop = min(n, start + room - m);
    bad += collect(from, start, stop, limit, fresh, found);
    __syncthreads();
    m = *found;
    __syncthreads();
    start = stop;
    if (start == n || m <= room / 2) continue;  // nothing more to come, or room for it
    sort(fresh, m, piece);
    m = min(m, most);
    limit = m == most ? fresh[m - 1] : limit;
    if (threadIdx.x == 0) *found = m;
    __syncthreads();
  }
  if (bad && !answer) atomicAdd(nonfinite + b, (Key)bad);
  if (m) sort(fresh, m, piece);
  m = min(m, most);

  for (int i = threadIdx.x; i < held + m; i += blockDim.x) {
    // An answer may hold an item twice, with one key: the fresh one goes first.
    bool const is_old = i < held;
    Key key = is_old ? old[i] : fresh[i - held];
    int const place = is_old ? i + count_below(fresh, m, key + 1) : i - held + count_below(old, held, key);
    if (place >= capacity) continue;
    if (forget && !answer) {
      key &= ~1ull;
      test_and_set(seen, item_of(key));
    }
    pool[place] = key;
  }
  int const size = min(held + m, capacity);
  __syncthreads();
  if (threadIdx.x == 0) sizes[p] = size;
  if (answer) return;

  int chosen = 0;
  for (int base = 0; base < size && chosen < width; base += blockDim.x) {
    int const i = base + threadIdx.x;
    bool const open = i < size && !(pool[i] & 1);
    int opened;
    int const place = chosen + rank_in_block(open, scratch, &opened);
    if (open && place < width) {
      frontier[(long long)b * width + place] = item_of(pool[i]);
      frontier_score[(long long)b * width + place] = score_of(pool[i]);
      pool[i] |= 1;
    }
    chosen += opened;
  }
  if (threadIdx.x == 0) frontier_count[b] = min(chosen, width);
}
