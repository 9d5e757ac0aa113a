// What a gate (engine/gate.py) says of a step's candidates. In NumPy terms, for query b with known[b] > 0,
//     about(i) = q[i, 0] + max(bias[b] + keys[b].T @ q[i, 1 : 1 + dim]) + context[b] @ q[i, 1 + dim :]
// and for each node p of frontier[b, :frontier_count[b]]
//     near = neighbors[p][neighbors[p] >= 0]; near = near[~visited[b, near]]; estimated[b] += 1 + near.size
//     e = about(near) + residual_weight[b] * (frontier_score[b, p] - about(p))
//     least = score_of(pools[b, rank[b] - 1]) - margin[b] if rank[b] <= sizes[b] else -inf
//     found[b] += make_key(e, near)[e >= least], in any order: an item comes once for each node it is met from
// With known[b] == 0 no estimate is made: e = 0 and least = -inf. `choose.cu` makes candidates of what is found.
//
// float32 throughout, summed in the order of the index, every product and sum rounded: the bits are those of the CPU.
//
//   neighbors [N, degree], -1 where there is none; frontier and frontier_score [batch, width]; frontier_count [batch]
//   pools [batch, capacity]; sizes [batch]; queries q [N, 1 + dim + context_dim], float16, finite
//   bias [batch, stride], -inf from known[b] on; keys [batch, dim, stride], 16-byte aligned; context [batch, context_dim]
//   known [batch] (or the next multiple of GATE_SUMS) and stride are multiples of GATE_SUMS
//   found [batch, found_stride], with room for every meeting; n_found [batch] counts by atomics
//   grid (ceil(width / nodes), batch), nodes * (degree + 1) <= block unless nodes is 1; block: any multiple of 32
//   shared: SCRATCH_INTS ints, 3 ints a thread, (1 + dim + context_dim) * (block + 1) floats
#include "common.cuh"

__device__ float float_of_half(unsigned bits) {  // finite
  return __uint_as_float((bits & 0x7fffu) << 13 | (bits & 0x8000u) << 16) * 0x1p112f;
}

__device__ float add_product(float sum, float a, float b) { return __fadd_rn(sum, __fmul_rn(a, b)); }

struct Gate {  // of one query
  const float *bias, *keys, *context;
  int known, stride, dim, context_dim;
};

// What the gate says of the row (b, q, y) whose numbers lie `pitch` apart. GATE_SUMS products grow side by side, so that
// a number of the row is read once for all of them; the keys are the same words for every thread.
__device__ float about(const float* row, int pitch, Gate const& gate) {
  float best = __uint_as_float(0xff800000u);  // -inf
  for (int j = 0; j < gate.known; j += GATE_SUMS) {
    float sum[GATE_SUMS];
#pragma unroll
    for (int u = 0; u < GATE_SUMS; ++u) sum[u] = __ldg(gate.bias + j + u);
    for (int t = 0; t < gate.dim; ++t) {
      float const q = row[(1 + t) * pitch];
      const float4* const key = (const float4*)(gate.keys + t * gate.stride + j);
#pragma unroll
      for (int u = 0; u < GATE_SUMS; u += 4) {
        float4 const k = __ldg(key + u / 4);
        sum[u] = add_product(sum[u], k.x, q);
        sum[u + 1] = add_product(sum[u + 1], k.y, q);
        sum[u + 2] = add_product(sum[u + 2], k.z, q);
        sum[u + 3] = add_product(sum[u + 3], k.w, q);
      }
    }
#pragma unroll
    for (int u = 0; u < GATE_SUMS; ++u) best = fmaxf(best, sum[u]);
  }
  float estimate = __fadd_rn(row[0], best);
  for (int t = 0; t < gate.context_dim; ++t)
    estimate = add_product(estimate, __ldg(gate.context + t), row[(1 + gate.dim + t) * pitch]);
  return estimate;
}

// A block has `nodes` nodes of one frontier: first they themselves, then their neighbours. What is to be estimated is
// picked first, since visited neighbours (half of all) would leave threads idle; rows are read by neighbouring threads.
extern "C" __global__ void __launch_bounds__(GATE_BLOCK)
    estimate(const int* neighbors, int degree, const int* frontier, const float* frontier_score,
             const int* frontier_count, int width, const unsigned* visited, long long words,
             const unsigned long long* pools, int capacity, const int* sizes, const unsigned short* queries, int dim,
             int context_dim, const float* bias, const float* keys, int stride, const float* context, const int* known,
             const int* rank, const float* margin, const float* residual_weight, int nodes, unsigned long long* found,
             long long found_stride, int* n_found, unsigned long long* estimated) {
  DYNAMIC_SHARED(shared);
  int* const scratch = (int*)shared;
  int* const picked = scratch + SCRATCH_INTS;
  int* const node_of = picked + blockDim.x;
  float* const rest = (float*)(node_of + blockDim.x);
  float* const rows = rest + blockDim.x;  // [column][thread], one word apart from a multiple of the 32 banks
  int const b = blockIdx.y, first = blockIdx.x * nodes, n_nodes = min(nodes, frontier_count[b] - first);
  if (n_nodes <= 0) return;
  int const pitch = blockDim.x + 1, columns = 1 + dim + context_dim, me = threadIdx.x;
  Gate const gate = {bias + (long long)b * stride,
                     keys + (long long)b * dim * stride,
                     context + b * context_dim,
                     known[b],
                     stride,
                     dim,
                     context_dim};
  bool const gated = gate.known > 0;
  long long const start = (long long)b * width + first;
  float least = __uint_as_float(0xff800000u);
  if (gated && rank[b] <= sizes[b])
    least = __fsub_rn(score_of(pools[(long long)b * capacity + rank[b] - 1]), margin[b]);

  for (int base = -n_nodes; base < n_nodes * degree; base += blockDim.x) {
    int const place = base + me;  // below 0: a node itself
    int item = -1, node = 0;
    if (place < 0) {
      node = place + n_nodes;
      if (gated) item = frontier[start + node];
    } else if (place < n_nodes * degree) {
      node = place / degree;
      item = neighbors[(long long)frontier[start + node] * degree + place % degree];
      if (item >= 0 && test(visited + b * words, item)) item = -1;
    }
    int total, n;
    int const at = rank_in_block(item >= 0, scratch, &total);
    if (item >= 0) {
      picked[at] = item;
      node_of[at] = node;
    }
    __syncthreads();
    for (int i = me; gated && i < total * columns; i += blockDim.x) {
      unsigned const half = __ldg(queries + (long long)picked[i / columns] * columns + i % columns);
      rows[i % columns * pitch + i / columns] = float_of_half(half);
    }
    __syncthreads();
    float e = gated && me < total ? about(rows + me, pitch, gate) : 0.0f;
    bool const itself = gated && base < 0 && me < n_nodes;  // the nodes were picked first, in order
    if (itself) rest[me] = __fmul_rn(residual_weight[b], __fsub_rn(frontier_score[start + me], e));
    __syncthreads();
    if (gated && me < total && !itself) e = __fadd_rn(e, rest[node_of[me]]);
    bool const passes = me < total && !itself && e >= least;
    int const mine = rank_in_block(passes, scratch, &n);
    if (me == 0) {
      scratch[SLOT] = n ? atomicAdd(n_found + b, n) : 0;
      if (gated) atomicAdd(estimated + b, (Key)total);
    }
    __syncthreads();
    if (passes) found[b * found_stride + scratch[SLOT] + mine] = make_key(__float_as_uint(e), picked[me]);
  }
}
