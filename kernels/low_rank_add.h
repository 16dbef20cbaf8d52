// LowRankAdd, defined in adapterx/ops.py: what one call is, whoever computes it (CPU, CUDA, the stand-alone harness).
//
//   y = base + ((x @ a.T) * mask) @ b
//
//   base, y  [..., d_out]   y may be base
//   x        [..., d_in]    leading dimensions as base
//   a        [R, d_in]      R = 0 is exactly the base
//   b        [R, d_out]
//   mask     broadcasts against x @ a.T [..., R]; its last dimension is R or 1
//   scale    [R, 2]         only beside int8 a and b: value = code * scale, column 0 for a, column 1 for b
//
// base, x, mask and y have one type: float, float16, bfloat16 or double. a and b have that type, or float16, bfloat16 or
// float beside another one, or int8. Sums are float (double where the type is double), rounded once.
// A row of a or b is read only if some row of the batch gives it a mask that is not zero.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define ADAPTERX_HOST_DEVICE __host__ __device__
#else
#define ADAPTERX_HOST_DEVICE
#endif

namespace adapterx {

enum class Dtype : uint8_t { kFloat, kFloat16, kBfloat16, kDouble, kInt8 };

constexpr size_t width(Dtype type) {
  return type == Dtype::kDouble ? 8 : type == Dtype::kFloat ? 4 : type == Dtype::kInt8 ? 1 : 2;
}

constexpr bool takes(Dtype activations, Dtype ports) {
  return activations != Dtype::kInt8 && (ports != Dtype::kDouble || activations == Dtype::kDouble);
}

// Which row of the mask belongs to a row of x, as nested loops, outermost first: loop k has `size[k]` turns, each of which
// moves on by `step[k]` rows of the mask (0 where the mask is broadcast). Loops that behave as one are one, so nearly every
// real mask has one or two: [n, 1, R] beside [n, t, d_in] is {n, 1}, {t, 0}.
struct MaskRows {
  static constexpr int kMost = 8;
  int loops;
  int64_t size[kMost];
  int64_t step[kMost];

  ADAPTERX_HOST_DEVICE int64_t operator()(int64_t row) const {
    int64_t found = 0;
    for (int k = loops - 1; k >= 0; --k) {
      found += row % size[k] * step[k];
      row /= size[k];
    }
    return found;
  }
};

// One call. All arrays are dense, in C order, and need only their own type's alignment.
struct LowRankAdd {
  Dtype activations;
  Dtype ports;
  int64_t rows;        // of x, base and y: the product of the leading dimensions
  int64_t d_in;
  int64_t d_out;
  int64_t rank;        // R
  int64_t mask_count;  // rows that the mask array has
  int64_t mask_width;  // values in each of them: R, or 1 for all columns
  MaskRows mask_rows;
  const void* base;
  const void* x;
  const void* a;
  const void* b;
  const void* mask;
  const float* scale;  // [R, 2], or nullptr where a and b are not int8
  void* y;
};

struct Dims {
  const int64_t* of = nullptr;
  size_t count = 0;
};

// What is wrong with a call, in words for its user; empty when nothing is.
struct Fault {
  char text[384] = "";
  explicit operator bool() const { return text[0] != 0; }
};

struct Shapes {
  Dims base, x, a, b, mask, scale;
  bool scaled = false;  // there is a scale
};

// Fills the sizes of `call` (not its arrays) from the shapes of the inputs; `call.activations` and `call.ports` are set.
// The result has the shape of base, with `leading_ones` dimensions of 1 before it where the mask has more dimensions.
Fault measure(const Shapes& shapes, LowRankAdd* call, size_t* leading_ones);

}  // namespace adapterx
