// LowRankAdd for many rows an adapter (prefill): tiles in shared memory, products on tensor cores, in tf32 parts.
//
// A tf32 number holds 11 significant bits, which is a half, a bfloat16 or an int8 code exactly. A float is cut in two
// parts, and so are the sums between the products: three products then for one, and an error near that of float. The
// tensor cores drop low bits when they add, so each tile of depth is summed there, and the tiles in plain float.
#pragma once

#include <type_traits>

#include "launch.h"

namespace adapterx::cuda {

namespace wmma = nvcuda::wmma;

constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarp;
constexpr int kTileRows = 16 * kTileWarps;
constexpr int kShrinkColumns = 16;
constexpr int kShrinkDepth = 64;
constexpr int kExpandColumns = 64;
constexpr int kExpandDepth = 32;
constexpr int kPad = 4;  // floats; keeps rows on 16 bytes and off each other's banks

using LeftTile = wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major>;
template <class Layout>
using RightTile = wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, Layout>;
using SumTile = wmma::fragment<wmma::accumulator, 16, 16, 8, float>;

template <class T>
constexpr bool kIsOnePart = !std::is_same<T, float>::value;

// whole = high + low. The high part is cut off, not rounded: rounding could carry a large number to infinity. What is
// infinite stays so beside half, bfloat16 and int8 ports; beside float ports, whose low parts it meets, it may be NaN.
template <class Tile>
__device__ inline void cut(Tile& whole, Tile& low) {
  for (int i = 0; i < whole.num_elements; ++i) {
    const float value = whole.x[i];
    if (!is_finite(value)) {
      low.x[i] = 0;
      continue;
    }
    const float high = from_bits(to_bits(value) & 0xffffe000u);
    low.x[i] = wmma::__float_to_tf32(value - high);
    whole.x[i] = high;
  }
}

template <bool one_left, bool one_right, class Right>
__device__ inline void multiply(SumTile& sum, LeftTile& left, Right& right) {
  if (!one_left) {
    LeftTile low;
    cut(left, low);
    wmma::mma_sync(sum, low, right, sum);  // of a right that is still whole the tensor cores see the high part
  }
  if (!one_right) {
    Right low;
    cut(right, low);
    wmma::mma_sync(sum, left, low, sum);
  }
  wmma::mma_sync(sum, left, right, sum);
}

__device__ inline void add(SumTile& total, const SumTile& part) {
  for (int i = 0; i < total.num_elements; ++i) total.x[i] += part.x[i];
}

struct alignas(32) ShrinkTile {
  float x[kTileRows][kShrinkDepth + kPad];
  float a[kShrinkColumns][kShrinkDepth + kPad];
  int lives[kShrinkColumns];
};

template <class T, class P>
__device__ inline bool find_living(const Launch<T, P>& go, uint32_t first, uint32_t first_column, ShrinkTile& tile) {
  if (threadIdx.x < kShrinkColumns) tile.lives[threadIdx.x] = 0;
  __syncthreads();
  const int own = threadIdx.x % kShrinkColumns;
  int lives = 0;
  int64_t before = -1;
  constexpr int kEach = kTileRows * kShrinkColumns / kTileThreads;
  const int begin = threadIdx.x / kShrinkColumns * kEach;
  for (int r = begin; r < begin + kEach; ++r) {
    if (first + r >= go.rows || first_column + own >= go.ranks) break;
    const int64_t offset = go.mask_row(first + r);
    if (offset != before) lives |= go.lives(offset, first_column + own);
    before = offset;
  }
  if (lives) tile.lives[own] = 1;
  return __syncthreads_or(lives);
}

// low[part, row, column] for 64 rows and 16 columns. Grid: columns / 16, rows / 64, splits. Columns that are zero for
// all rows of the tile stand as zeros, and their weights are not read.
template <class T, class P>
__global__ void __launch_bounds__(kTileThreads) shrink_tiles(const Launch<T, P> go) {
  constexpr int kLine = kShrinkDepth + kPad, kWideX = kVector<T>, kWideA = kVector<P>;
  ADAPTERX_SHARED(ShrinkTile, tile);
  const uint32_t first = blockIdx.y * kTileRows, first_column = blockIdx.x * kShrinkColumns;
  const int warp = threadIdx.x / kWarp;
  if (!find_living(go, first, first_column, tile)) return;
  const int64_t begin = blockIdx.z * go.split;
  const int64_t end = begin + go.split < go.d_in ? begin + go.split : go.d_in;
  SumTile total;
  wmma::fill_fragment(total, 0.0f);
  for (int64_t depth = begin; depth < end; depth += kShrinkDepth) {
    for (int i = threadIdx.x * kWideX; i < kTileRows * kShrinkDepth; i += kTileThreads * kWideX) {
      const int r = i / kShrinkDepth, k = i % kShrinkDepth;
      float values[kWideX] = {};
      const int64_t left = end - depth - k;
      if (first + r < go.rows && left > 0) load(go.x_at(first + r, depth + k), values, left, go.aligned_in);
#pragma unroll
      for (int v = 0; v < kWideX; ++v) tile.x[r][k + v] = values[v];
    }
    for (int i = threadIdx.x * kWideA; i < kShrinkColumns * kShrinkDepth; i += kTileThreads * kWideA) {
      const int c = i / kShrinkDepth, k = i % kShrinkDepth;
      float values[kWideA] = {};
      const int64_t left = end - depth - k;
      if (tile.lives[c] && left > 0) load(go.a_at(first_column + c, depth + k), values, left, go.aligned_in);
#pragma unroll
      for (int v = 0; v < kWideA; ++v) tile.a[c][k + v] = values[v];
    }
    __syncthreads();
    SumTile part;
    wmma::fill_fragment(part, 0.0f);
#pragma unroll
    for (int k = 0; k < kShrinkDepth; k += 8) {
      LeftTile left;
      RightTile<wmma::col_major> right;
      wmma::load_matrix_sync(left, &tile.x[16 * warp][k], kLine);
      wmma::load_matrix_sync(right, &tile.a[0][k], kLine);
      multiply<kIsOnePart<T>, kIsOnePart<P>>(part, left, right);
    }
    add(total, part);
    __syncthreads();
  }
  wmma::store_matrix_sync(&tile.x[16 * warp][0], total, kLine, wmma::mem_row_major);
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * kShrinkColumns; i += kTileThreads) {
    const int r = i / kShrinkColumns, c = i % kShrinkColumns;
    if (first + r < go.rows && tile.lives[c]) *go.sum_at(blockIdx.z, first + r, first_column + c) = tile.x[r][c];
  }
}

struct alignas(32) ExpandTile {
  union {
    struct {
      float low[kTileRows][kExpandDepth + kPad];
      float b[kExpandDepth][kExpandColumns + kPad];
    } in;
    float out[kTileRows][kExpandColumns + kPad];
  };
  int64_t offsets[kTileRows];  // of the mask's rows; -1 beyond the last row
  int touched[kTileRows];
  uint32_t ballots[kTileWarps];
  uint32_t column[kTileThreads];
};

// The living columns among the next kTileThreads, in order.
template <class T, class P>
__device__ inline int list_living(const Launch<T, P>& go, uint32_t chunk, ExpandTile& tile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t column = chunk + threadIdx.x;
  bool lives = false;
  int64_t before = -1;
  for (int r = 0; r < kTileRows && column < go.ranks && !lives; ++r) {
    const int64_t offset = tile.offsets[r];
    if (offset < 0) break;
    if (offset != before) lives = go.lives(offset, column);
    before = offset;
  }
  const uint32_t ballot = __ballot_sync(kAllLanes, lives);
  if (lane == 0) tile.ballots[warp] = ballot;
  __syncthreads();
  int count = 0, slot = __popc(ballot & ((1u << lane) - 1));
  for (int w = 0; w < kTileWarps; ++w) {
    if (w < warp) slot += __popc(tile.ballots[w]);
    count += __popc(tile.ballots[w]);
  }
  if (lives) tile.column[slot] = column;
  __syncthreads();
  return count;
}

// Shares and weights of the next kExpandDepth living columns. True if a weight is no number.
template <class T, class P>
__device__ inline bool stage(const Launch<T, P>& go, uint32_t first, int64_t j, const uint32_t* columns, int count,
                             ExpandTile& tile) {
  constexpr int kWide = kVector<P>;
  for (int i = threadIdx.x; i < kTileRows * kExpandDepth; i += kTileThreads) {
    const int r = i / kExpandDepth, k = i % kExpandDepth;
    float share = 0;
    if (k < count && tile.offsets[r] >= 0 && go.lives(tile.offsets[r], columns[k])) {
      share = go.share(first + r, columns[k], tile.offsets[r]);
      tile.touched[r] = 1;
    }
    tile.in.low[r][k] = share;
  }
  bool odd = false;
  for (int i = threadIdx.x * kWide; i < kExpandDepth * kExpandColumns; i += kTileThreads * kWide) {
    const int k = i / kExpandColumns, c = i % kExpandColumns;
    float values[kWide] = {};
    if (k < count && j + c < go.d_out) load(go.b_at(columns[k], j + c), values, go.d_out - j - c, go.aligned_out);
#pragma unroll
    for (int v = 0; v < kWide; ++v) {
      odd |= !is_finite(values[v]);
      tile.in.b[k][c + v] = values[v];
    }
  }
  return odd;
}

// One number at a time, each row with its own columns alone.
template <class T, class P>
__device__ inline void expand_apart(const Launch<T, P>& go, uint32_t first, int64_t j, ExpandTile& tile) {
  for (int i = threadIdx.x; i < kTileRows * kExpandColumns; i += kTileThreads) {
    const int r = i / kExpandColumns, c = i % kExpandColumns;
    if (tile.offsets[r] < 0 || j + c >= go.d_out) continue;
    float total = 0;
    bool touched = false;
    for (uint32_t column = 0; column < go.ranks; ++column) {
      if (!go.lives(tile.offsets[r], column)) continue;
      total += go.share(first + r, column, tile.offsets[r]) * widen(*go.b_at(column, j + c));
      touched = true;
    }
    const int64_t at = go.y_at(first + r, j + c);
    if (touched) {
      narrow(widen(go.base[at]) + total, &go.y[at]);
    } else if (go.y != go.base) {
      go.y[at] = go.base[at];
    }
  }
}

template <class T, class P>
__device__ inline void write_tile(const Launch<T, P>& go, uint32_t first, int64_t j, const ExpandTile& tile) {
  constexpr int kWide = kVector<T>;
  for (int i = threadIdx.x * kWide; i < kTileRows * kExpandColumns; i += kTileThreads * kWide) {
    const int r = i / kExpandColumns, c = i % kExpandColumns;
    const int64_t left = go.d_out - j - c, at = go.y_at(first + r, j + c);
    if (tile.offsets[r] < 0 || left <= 0) continue;
    if (!tile.touched[r] && go.y == go.base) continue;
    float sums[kWide];
    load(go.base + at, sums, left, go.aligned_y);
    for (int v = 0; v < kWide && tile.touched[r]; ++v) sums[v] += tile.out[r][c + v];
    store(sums, go.y + at, left, go.aligned_y);
  }
}

// y for 64 rows and 64 columns. Grid: d_out / 64, rows / 64.
template <class T, class P>
__global__ void __launch_bounds__(kTileThreads) expand_tiles(const Launch<T, P> go) {
  constexpr int kStep = 16, kSums = kExpandColumns / kStep;
  ADAPTERX_SHARED(ExpandTile, tile);
  const uint32_t first = blockIdx.y * kTileRows;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kExpandColumns;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x < kTileRows) {
    tile.offsets[threadIdx.x] = first + threadIdx.x < go.rows ? go.mask_row(first + threadIdx.x) : -1;
    tile.touched[threadIdx.x] = 0;
  }
  __syncthreads();
  const int64_t own = tile.offsets[threadIdx.x % kTileRows];
  const bool company = __syncthreads_or(own >= 0 && own != tile.offsets[0]);
  SumTile totals[kSums];
#pragma unroll
  for (int n = 0; n < kSums; ++n) wmma::fill_fragment(totals[n], 0.0f);
  for (uint32_t chunk = 0; chunk < go.ranks; chunk += kTileThreads) {
    const int count = list_living(go, chunk, tile);
    for (int depth = 0; depth < count; depth += kExpandDepth) {
      const bool odd = stage(go, first, j, tile.column + depth, count - depth, tile);
      if (__syncthreads_or(odd) && company) {
        // A row pays 0 * inf for what its neighbours use: these rows must not share a tile.
        expand_apart(go, first, j, tile);
        return;
      }
      SumTile parts[kSums];
#pragma unroll
      for (int n = 0; n < kSums; ++n) wmma::fill_fragment(parts[n], 0.0f);
      for (int k = 0; k < kExpandDepth && depth + k < count; k += 8) {
#pragma unroll
        for (int n = 0; n < kSums; ++n) {
          LeftTile left;
          RightTile<wmma::row_major> right;
          wmma::load_matrix_sync(left, &tile.in.low[16 * warp][k], kExpandDepth + kPad);
          wmma::load_matrix_sync(right, &tile.in.b[k][kStep * n], kExpandColumns + kPad);
          multiply<false, kIsOnePart<P>>(parts[n], left, right);
        }
      }
#pragma unroll
      for (int n = 0; n < kSums; ++n) add(totals[n], parts[n]);
      __syncthreads();
    }
  }
#pragma unroll
  for (int n = 0; n < kSums; ++n) {
    wmma::store_matrix_sync(&tile.out[16 * warp][kStep * n], totals[n], kExpandColumns + kPad, wmma::mem_row_major);
  }
  __syncthreads();
  write_tile(go, first, j, tile);
}

}  // namespace adapterx::cuda
