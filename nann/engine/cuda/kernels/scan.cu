// Inner products of queries with a range of the item vectors, these taken at unit length. In NumPy terms, for i < rows,
//     products[b, i] = queries[b] @ vectors[first + i] / norms[first + i], and 0 where the norm is 0
// summed over d in ascending order, whatever the batch: a product does not depend on who else asks.
//
//   vectors [N, dim]; norms [N]; queries [batch, dim]; products [batch, stride], of which [:, :rows] are written
//   grid (ceil(rows / SCAN_TILE), ceil(batch / SCAN_TILE)); block SCAN_TILE * SCAN_TILE / 16, a multiple of 32
//   shared: 2 * SCAN_DEPTH * (SCAN_TILE + 4) floats
//
// A block makes SCAN_TILE x SCAN_TILE products from SCAN_DEPTH dimensions at a time in shared memory, a thread 4 x 4 of
// them in registers, so that two reads of 16 bytes feed 16 multiplications.
#include "common.cuh"

#define QUARTER (SCAN_TILE / 4)
#define PITCH (SCAN_TILE + 4)  // a multiple of 16 bytes that is none of the 32 banks

// tile[k][r] = from[first_row + r][k0 + k] for r < SCAN_TILE and k < SCAN_DEPTH; 0 beyond the rows and dimensions.
__device__ void load_tile(const float* from, long long first_row, long long end_row, int k0, int dim, float* tile) {
  for (int i = threadIdx.x; i < SCAN_TILE * SCAN_DEPTH; i += blockDim.x) {
    int const r = i / SCAN_DEPTH, k = i % SCAN_DEPTH;
    bool const there = first_row + r < end_row && k0 + k < dim;
    tile[k * PITCH + r] = there ? __ldg(from + (first_row + r) * dim + k0 + k) : 0.0f;
  }
}

extern "C" __global__ void __launch_bounds__(SCAN_TILE* SCAN_TILE / 16)
    inner_products(const float* vectors, const float* norms, long long first, int rows, const float* queries, int batch,
                   int dim, float* products, long long stride) {
  DYNAMIC_SHARED(shared);
  float* const item_tile = (float*)shared;
  float* const query_tile = item_tile + SCAN_DEPTH * PITCH;
  int const i0 = blockIdx.x * SCAN_TILE, b0 = blockIdx.y * SCAN_TILE;
  int const mine = threadIdx.x % QUARTER, yours = threadIdx.x / QUARTER;
  float sum[4][4] = {};  // [query][item]
  for (int k0 = 0; k0 < dim; k0 += SCAN_DEPTH) {
    load_tile(vectors, first + i0, first + rows, k0, dim, item_tile);
    load_tile(queries, b0, batch, k0, dim, query_tile);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < SCAN_DEPTH; ++k) {
      float4 const i4 = *(const float4*)(item_tile + k * PITCH + 4 * mine);
      float4 const q4 = *(const float4*)(query_tile + k * PITCH + 4 * yours);
      float const item[4] = {i4.x, i4.y, i4.z, i4.w}, query[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int u = 0; u < 4; ++u) sum[q][u] += query[q] * item[u];
    }
    __syncthreads();
  }
  for (int u = 0; u < 4; ++u) {
    int const i = i0 + 4 * mine + u;
    if (i >= rows) continue;
    float const norm = norms[first + i];
    for (int q = 0; q < 4; ++q) {
      int const b = b0 + 4 * yours + q;
      if (b < batch) products[b * stride + i] = norm > 0.0f ? sum[q][u] / norm : 0.0f;
    }
  }
}
