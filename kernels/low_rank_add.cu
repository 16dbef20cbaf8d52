// LowRankAdd on CUDA: how a call is cut, and what is launched. The arithmetic is in cuda/rows.h and cuda/tiles.h.
//
// Nothing here waits for the device, and nothing here reads the mask: blocks whose columns nobody uses find that out
// themselves and end. There are no atomic sums: a result depends on shapes and numbers alone.
#include "low_rank_add_cuda.h"

#include <algorithm>
#include <limits>

#include "cuda/rows.h"
#include "cuda/tiles.h"

namespace adapterx::cuda {
namespace {

constexpr int64_t kScratchLimit = int64_t{64} << 20;
constexpr int64_t kSlabRows = 32768;  // keeps every grid within 65535 blocks in y and z
constexpr int64_t kMostSplits = 16;
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
// Tiles pay from here: this many rows that surely share an adapter, or so many that some must.
constexpr int64_t kSharedRows = 16;
constexpr int64_t kManyRows = 128;

int64_t blocks(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <class T>
bool is_vector_row(const void* start, int64_t length) {
  return reinterpret_cast<uintptr_t>(start) % 16 == 0 && length * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// Rows that follow each other with one row of the mask.
int64_t shared_rows(const MaskRows& mask) {
  return mask.loops && mask.step[mask.loops - 1] == 0 ? mask.size[mask.loops - 1] : 1;
}

template <class T, class P>
Launch<T, P> launch_of(const LowRankAdd& call, const Plan& plan, void* scratch) {
  Launch<T, P> go = {};
  go.base = static_cast<const T*>(call.base);
  go.x = static_cast<const T*>(call.x);
  go.a = static_cast<const P*>(call.a);
  go.b = static_cast<const P*>(call.b);
  go.mask = static_cast<const T*>(call.mask);
  go.scale = call.scale;
  go.y = static_cast<T*>(call.y);
  go.low = static_cast<Sum<T>*>(scratch);
  go.mask_rows = call.mask_rows;
  go.d_in = call.d_in;
  go.d_out = call.d_out;
  go.mask_width = call.mask_width;
  go.split = plan.split;
  go.ranks = static_cast<uint32_t>(call.rank);
  go.splits = plan.splits;
  go.group = plan.group;
  go.aligned_in = is_vector_row<T>(call.x, call.d_in) && is_vector_row<P>(call.a, call.d_in);
  go.aligned_out = is_vector_row<P>(call.b, call.d_out);
  go.aligned_y = is_vector_row<T>(call.y, call.d_out) && is_vector_row<T>(call.base, call.d_out);
  return go;
}

template <class T, class P>
void start_rows(const Launch<T, P>& go, CUstream_st* stream) {
  const dim3 shrink(blocks(go.ranks, kShrinkWarps), go.splits, blocks(go.rows, kShrinkRows));
  const dim3 expand(blocks(go.d_out, kWarp * kVector<P>), blocks(go.rows, go.group));
  ADAPTERX_LAUNCH((shrink_rows<T, P>), shrink, kShrinkWarps * kWarp, stream, go);
  ADAPTERX_LAUNCH((expand_rows<T, P>), expand, kExpandThreads, stream, go);
}

template <class T, class P>
void start_tiles(const Launch<T, P>& go, CUstream_st* stream) {
  const dim3 shrink(blocks(go.ranks, kShrinkColumns), blocks(go.rows, kTileRows), go.splits);
  const dim3 expand(blocks(go.d_out, kExpandColumns), blocks(go.rows, kTileRows));
  ADAPTERX_LAUNCH((shrink_tiles<T, P>), shrink, kTileThreads, stream, go);
  ADAPTERX_LAUNCH((expand_tiles<T, P>), expand, kTileThreads, stream, go);
}

template <class T, class P>
int start(const LowRankAdd& call, const Plan& plan, void* scratch, CUstream_st* stream) {
  Launch<T, P> go = launch_of<T, P>(call, plan, scratch);
  for (int64_t first = 0; first < call.rows; first += plan.slab) {
    go.first = static_cast<uint32_t>(first);
    go.rows = static_cast<uint32_t>(std::min(plan.slab, call.rows - first));
    if constexpr (!std::is_same<T, double>::value) {
      if (plan.tiles) start_tiles(go, stream);
    }
    if (!plan.tiles) start_rows(go, stream);
    if (const int failed = cudaGetLastError()) return failed;
  }
  return 0;
}

template <class T>
int start_ports(const LowRankAdd& call, const Plan& plan, void* scratch, CUstream_st* stream) {
  switch (call.ports) {
    case Dtype::kFloat: return start<T, float>(call, plan, scratch, stream);
    case Dtype::kFloat16: return start<T, Half>(call, plan, scratch, stream);
    case Dtype::kBfloat16: return start<T, Bfloat16>(call, plan, scratch, stream);
    case Dtype::kInt8: return start<T, int8_t>(call, plan, scratch, stream);
    case Dtype::kDouble:
      if constexpr (std::is_same<T, double>::value) return start<T, double>(call, plan, scratch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int processors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return 1;
  return count;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

Plan plan(const LowRankAdd& call, int processors) {
  Plan plan = {};
  const bool is_double = call.activations == Dtype::kDouble;
  plan.tiles = !is_double && (shared_rows(call.mask_rows) >= kSharedRows || call.rows > kManyRows);
  // Enough blocks to keep every processor reading. Who shares an adapter is not known here: in tiles, one living tile
  // of columns for each tile of rows is the guess.
  const int64_t uncut = plan.tiles ? blocks(call.rows, kTileRows)
                                   : blocks(call.rank, kShrinkWarps) * blocks(call.rows, kShrinkRows);
  const int64_t wanted = blocks(4 * static_cast<int64_t>(processors), std::max<int64_t>(uncut, 1));
  const int64_t most = std::min(kMostSplits, blocks(call.d_in, 4 * kShrinkDepth));
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, most));
  plan.split = std::max<int64_t>(1, blocks(blocks(call.d_in, splits), kShrinkDepth)) * kShrinkDepth;
  plan.splits = static_cast<int>(std::max<int64_t>(1, blocks(call.d_in, plan.split)));
  const int64_t sum = is_double ? sizeof(double) : sizeof(float);
  const int64_t row = std::max<int64_t>(1, plan.splits * call.rank * sum);
  plan.slab = std::min({call.rows, kSlabRows, std::max<int64_t>(1, kScratchLimit / row / kTileRows) * kTileRows});
  const int64_t tiles_of_y = blocks(call.d_out, kWarp * 16 / static_cast<int64_t>(width(call.ports)));
  plan.group = tiles_of_y * call.rows < 4 * static_cast<int64_t>(processors) ? 1 : kTogether;
  plan.scratch = static_cast<size_t>(plan.slab * row);
  return plan;
}

int low_rank_add(const LowRankAdd& call, const Plan& plan, void* scratch, CUstream_st* stream) {
  if (call.rows == 0 || call.d_out == 0) return 0;
  if (call.rows > kMostRows || call.rank > kMostRows) return cudaErrorInvalidValue;
  if (call.rank == 0) {
    if (call.y == call.base) return 0;
    const size_t bytes = static_cast<size_t>(call.rows * call.d_out) * width(call.activations);
    return cudaMemcpyAsync(call.y, call.base, bytes, cudaMemcpyDeviceToDevice, stream);
  }
  switch (call.activations) {
    case Dtype::kFloat: return start_ports<float>(call, plan, scratch, stream);
    case Dtype::kFloat16: return start_ports<Half>(call, plan, scratch, stream);
    case Dtype::kBfloat16: return start_ports<Bfloat16>(call, plan, scratch, stream);
    case Dtype::kDouble: return start_ports<double>(call, plan, scratch, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace adapterx::cuda
