// What the blocks of every kernel know: the call as their types see it, and who is alive in the mask.
#pragma once

#include "../low_rank_add.h"
#include "numbers.h"

namespace adapterx::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// One launch over rows [first, first + rows). `low` is theirs alone: [splits, rows, ranks], written where a column
// lives and nowhere else, so nobody clears it and nobody may read it where the mask is zero.
template <class T, class P>
struct Launch {
  const T* base;
  const T* x;
  const P* a;
  const P* b;
  const T* mask;
  const float* scale;
  T* y;
  Sum<T>* low;
  MaskRows mask_rows;
  int64_t d_in, d_out, mask_width, split;
  uint32_t first, rows, ranks;
  int splits, group;
  bool aligned_in, aligned_out, aligned_y;  // rows of a with x; of b; of base and y: whole vectors, on their bounds

  // Where the mask of a row begins. As MaskRows does it, but in 32 bits: a division of 64 is slow on the device.
  __device__ int64_t mask_row(uint32_t row) const {
    row += first;
    int64_t found = 0;
    for (int k = mask_rows.loops - 1; k >= 0; --k) {
      const uint32_t size = static_cast<uint32_t>(mask_rows.size[k]);
      found += mask_rows.step[k] * (row % size);
      row /= size;
    }
    return found * mask_width;
  }

  __device__ Sum<T> weight(int64_t offset, uint32_t column) const {
    return widen(mask[mask_width == 1 ? offset : offset + column]);
  }

  // Not "!= 0": a NaN lives, and its row says so.
  __device__ bool lives(int64_t offset, uint32_t column) const { return !(weight(offset, column) == 0); }

  __device__ Sum<T>* sum_at(int part, uint32_t row, uint32_t column) const {
    return low + (static_cast<int64_t>(part) * rows + row) * ranks + column;
  }

  // What row `row` takes of row `column` of b. The scales of int8 ports act on this one number, not on the weights.
  __device__ Sum<T> share(uint32_t row, uint32_t column, int64_t offset) const {
    Sum<T> total = 0;
    for (int part = 0; part < splits; ++part) total += *sum_at(part, row, column);
    if (scale != nullptr) total *= scale[2 * static_cast<int64_t>(column)];
    total *= weight(offset, column);
    if (scale != nullptr) total *= scale[2 * static_cast<int64_t>(column) + 1];
    return total;
  }

  __device__ const T* x_at(uint32_t row, int64_t k) const { return x + static_cast<int64_t>(first + row) * d_in + k; }
  __device__ const P* a_at(uint32_t column, int64_t k) const { return a + static_cast<int64_t>(column) * d_in + k; }
  __device__ const P* b_at(uint32_t column, int64_t j) const { return b + static_cast<int64_t>(column) * d_out + j; }
  __device__ int64_t y_at(uint32_t row, int64_t j) const { return static_cast<int64_t>(first + row) * d_out + j; }
};

}  // namespace adapterx::cuda
