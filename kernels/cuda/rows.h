// LowRankAdd for decoding: few rows an adapter. Each living row of a and of b comes from memory once and is used by all
// rows that ask for it; what comes twice (x, the sums, the mask) is small and lies in cache.
#pragma once

#include "launch.h"

namespace adapterx::cuda {

constexpr int kShrinkWarps = 4;
constexpr int kShrinkRows = 2 * kWarp;  // rows a block looks after
constexpr int kTogether = 4;            // rows that share one reading of a, or of b
constexpr int kExpandWarps = 8;
constexpr int kExpandThreads = kExpandWarps * kWarp;

template <class S>
__device__ inline S warp_total(S value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// low[part, row, column] = x[row] . a[column] over one part of d_in. Grid: columns / 4, splits, rows / 64; a warp is a
// column. A column that is zero for all rows of the block ends before its weights are touched.
template <class T, class P>
__global__ void shrink_rows(const Launch<T, P> go) {
  constexpr int kWide = kVector<P>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t column = blockIdx.x * kShrinkWarps + threadIdx.x / kWarp;
  if (column >= go.ranks) return;  // the whole warp, and below only warps meet
  const uint32_t first = blockIdx.z * kShrinkRows;
  uint64_t living = 0;
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = first + half * kWarp + lane;
    const bool mine = row < go.rows && go.lives(go.mask_row(row), column);
    living |= static_cast<uint64_t>(__ballot_sync(kAllLanes, mine)) << (half * kWarp);
  }
  const int64_t begin = blockIdx.y * go.split;
  const int64_t end = begin + go.split < go.d_in ? begin + go.split : go.d_in;
  while (living) {
    uint32_t rows[kTogether];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (!living) break;
      rows[i] = first + __ffsll(static_cast<long long>(living)) - 1;
      living &= living - 1;
      ++count;
    }
    Sum<T> sums[kTogether] = {};
#pragma unroll 2
    for (int64_t k = begin + lane * kWide; k < end; k += kWarp * kWide) {
      Sum<T> weights[kWide];
      load(go.a_at(column, k), weights, end - k, go.aligned_in);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (i >= count) break;
        Sum<T> values[kWide];
        load(go.x_at(rows[i], k), values, end - k, go.aligned_in);
#pragma unroll
        for (int v = 0; v < kWide; ++v) sums[i] += weights[v] * values[v];
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (i >= count) break;
      const Sum<T> total = warp_total(sums[i]);
      if (lane == 0) *go.sum_at(blockIdx.y, rows[i], column) = total;
    }
  }
}

template <class S, int kWide>
struct ExpandRows {
  uint32_t ballots[kExpandWarps];
  uint32_t column[kExpandThreads];
  uint32_t users[kExpandThreads];  // a bit for each row of the group
  S share[kTogether][kExpandThreads];
  S part[kExpandWarps][kWarp * kWide];
};

// The living columns among the next kExpandThreads, in order, with what each row of the group takes of them.
template <class T, class P, class Shared>
__device__ inline int list_columns(const Launch<T, P>& go, uint32_t chunk, uint32_t first, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t column = chunk + threadIdx.x;
  uint32_t users = 0;
  for (int g = 0; g < go.group && column < go.ranks; ++g) {
    if (first + g < go.rows && go.lives(go.mask_row(first + g), column)) users |= 1u << g;
  }
  const uint32_t ballot = __ballot_sync(kAllLanes, users != 0);
  if (lane == 0) shared.ballots[warp] = ballot;
  __syncthreads();
  int count = 0, slot = 0;
  for (int w = 0; w < kExpandWarps; ++w) {
    if (w < warp) slot += __popc(shared.ballots[w]);
    count += __popc(shared.ballots[w]);
  }
  if (users) {
    slot += __popc(ballot & ((1u << lane) - 1));
    shared.column[slot] = column;
    shared.users[slot] = users;
    for (int g = 0; g < go.group; ++g) {
      if (users >> g & 1) shared.share[g][slot] = go.share(first + g, column, go.mask_row(first + g));
    }
  }
  __syncthreads();
  return count;
}

// y[row] = base[row] + sum of share * b[column]. Grid: d_out / (32 vectors), rows / group. The warps of a block divide
// the living columns among them; their parts are added in the order of the warps, so that a result never varies.
template <class T, class P>
__global__ void __launch_bounds__(kExpandThreads) expand_rows(const Launch<T, P> go) {
  constexpr int kWide = kVector<P>, kColumns = kWarp * kWide;
  using Shared = ExpandRows<Sum<T>, kWide>;
  ADAPTERX_SHARED(Shared, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t first = blockIdx.y * go.group;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kColumns, j = tile + lane * kWide;
  Sum<T> sums[kTogether][kWide] = {};
  uint32_t touched = 0;
  for (uint32_t chunk = 0; chunk < go.ranks; chunk += kExpandThreads) {
    const int count = list_columns(go, chunk, first, shared);
#pragma unroll 2
    for (int i = warp; i < count; i += kExpandWarps) {
      touched |= shared.users[i];
      if (j >= go.d_out) continue;
      Sum<T> weights[kWide];
      load(go.b_at(shared.column[i], j), weights, go.d_out - j, go.aligned_out);
#pragma unroll
      for (int g = 0; g < kTogether; ++g) {
        // A zero share is not enough: 0 * inf of another's weights would be NaN here.
        if (!(shared.users[i] >> g & 1)) continue;
        const Sum<T> share = shared.share[g][i];
#pragma unroll
        for (int v = 0; v < kWide; ++v) sums[g][v] += share * weights[v];
      }
    }
  }
  if (lane == 0) shared.ballots[warp] = touched;
  __syncthreads();
  for (int w = 0; w < kExpandWarps; ++w) touched |= shared.ballots[w];
#pragma unroll
  for (int g = 0; g < kTogether; ++g) {
    const uint32_t row = first + g;
    if (g >= go.group || row >= go.rows) break;
#pragma unroll
    for (int v = 0; v < kWide; ++v) shared.part[warp][lane * kWide + v] = sums[g][v];
    __syncthreads();
    for (int c = threadIdx.x; c < kColumns && tile + c < go.d_out; c += kExpandThreads) {
      const int64_t at = go.y_at(row, tile + c);
      if (!(touched >> g & 1)) {
        if (go.y != go.base) go.y[at] = go.base[at];
        continue;
      }
      Sum<T> total = 0;
      for (int w = 0; w < kExpandWarps; ++w) total += shared.part[w][c];
      narrow(widen(go.base[at]) + total, &go.y[at]);
    }
    __syncthreads();
  }
}

}  // namespace adapterx::cuda
