// The sums of LowRankAdd, one set of functions per instruction set. Each set is compiled from low_rank_add_lanes.h in a file
// of its own (low_rank_add_portable.cc, ..._avx2.cc, ..._avx512.cc) and reached through the table that its function returns.
#pragma once

#include <cstdint>

#include "low_rank_add.h"

namespace adapterx {

constexpr int kDtypes = 5;

// low[i][j] = x[i] . a[j], for `rows` rows of x and `columns` rows of a that lie side by side.
template <class Real>
struct Shrink {
  const Real* const* x;
  Real* const* low;
  int64_t rows;
  const void* a;
  int64_t columns;
  int64_t d_in;
};

// y[i][c] = base[i][c] + sum over k of low[i][k] * b[k][shift + c], for the columns c in [from, to). y[i] may be base[i].
template <class Real>
struct Expand {
  const Real* const* base;
  Real* const* y;
  const Real* const* low;
  int64_t rows;
  const void* const* b;
  int64_t count;
  int64_t from;
  int64_t to;
  int64_t shift;
};

template <class Real>
struct Sums {
  void (*shrink[kDtypes])(const Shrink<Real>&);  // by the type of a
  void (*expand[kDtypes])(const Expand<Real>&);  // by the type of b
  // Sets the bits of the values that are not zero, in (count + 63) / 64 words. False: one of them is NaN.
  bool (*scan)(const Real* values, int64_t count, uint64_t* bits);
};

struct Arithmetic {
  const char* isa;
  Sums<float> sums;
  void (*widen[kDtypes])(const void* from, int64_t count, float* to);  // float16 and bfloat16; others are null
  void (*narrow[kDtypes])(const float* from, int64_t count, void* to);
};

// Double is for checking, not for speed: one set serves all.
const Sums<double>& double_sums();

const Arithmetic* portable();
const Arithmetic* avx2();  // these two: x86-64 only
const Arithmetic* avx512();

// The best that this processor runs, or what the environment variable ADAPTERX_KERNELS_ISA (portable, avx2, avx512) names.
Fault choose(const Arithmetic** chosen);

}  // namespace adapterx
