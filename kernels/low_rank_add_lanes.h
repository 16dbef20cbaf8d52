// The arithmetic of LowRankAdd over vectors ("lanes") of some width. Included by one file per instruction set, each of which
// first defines its lanes: a type with
//   Real, V                  float or double, and a vector of kWidth of them
//   kColumns, kVectors       how many rows of a, and vectors of b, are worked on at once: as many as there are registers for
//   zero set load store fma sum nonzero unordered
// Everything here has internal linkage: a function that another file shares could be the copy for a processor that is not there.
#pragma once

#include <cstdint>
#include <cstring>

#include "arithmetic.h"

namespace adapterx {
namespace {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] float wide(float value) { return value; }
[[maybe_unused]] double wide(double value) { return value; }
[[maybe_unused]] float wide(int8_t value) { return static_cast<float>(value); }
[[maybe_unused]] float wide(Brain value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

[[maybe_unused]] float wide(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = as_float((rest << 13) + (112u << 23));  // exact but for subnormals, whose leading one is not there
  return as_float(sign | as_bits(rest < 0x400 ? size * 2 - as_float(113u << 23) : size));
}

[[maybe_unused]] Brain narrow(float value, Brain) {
  const uint32_t bits = as_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

[[maybe_unused]] Half narrow(float value, Half) {
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (rest < 0x38800000)  // subnormal: adding 1/2 leaves its bits, rounded, in the lowest places of the sum
    return {static_cast<uint16_t>(sign | (as_bits(as_float(rest) + 0.5f) - as_bits(0.5f)))};
  return {static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
}

// The first `count` < kWidth values, and zeros: what lies behind them may be the end of the memory.
template <class L, class P>
typename L::V load_part(const P* from, int64_t count) {
  P whole[L::kWidth] = {};
  std::memcpy(whole, from, static_cast<size_t>(count) * sizeof(P));
  return L::load(whole);
}

template <class L>
void store_part(typename L::Real* to, typename L::V value, int64_t count) {
  typename L::Real whole[L::kWidth];
  L::store(whole, value);
  std::memcpy(to, whole, static_cast<size_t>(count) * sizeof(typename L::Real));
}

// ---- low = x @ a.T ------------------------------------------------------------------------------------------------

// One row of x and one of a: a comes from memory in one straight stream, which is the fastest that memory gives.
template <class L, class P>
typename L::Real dot(const typename L::Real* x, const P* a, int64_t d_in) {
  constexpr int64_t kStep = L::kWidth;
  typename L::V sums[4] = {L::zero(), L::zero(), L::zero(), L::zero()};
  int64_t k = 0;
  for (; k + 4 * kStep <= d_in; k += 4 * kStep)
    for (int u = 0; u < 4; ++u) sums[u] = L::fma(L::load(x + k + u * kStep), L::load(a + k + u * kStep), sums[u]);
  for (; k + kStep <= d_in; k += kStep) sums[0] = L::fma(L::load(x + k), L::load(a + k), sums[0]);
  if (k < d_in) sums[1] = L::fma(load_part<L>(x + k, d_in - k), load_part<L>(a + k, d_in - k), sums[1]);
  return L::sum(L::add(L::add(sums[0], sums[1]), L::add(sums[2], sums[3])));
}

// kRows of x by kColumns of a, of which the part [from, to) is added to `sums`.
template <class L, class P, int kRows, int kColumns>
void tile(const typename L::Real* const* x, const P* a, int64_t d_in, int64_t from, int64_t to, typename L::V* sums) {
  using V = typename L::V;
  V acc[kRows][kColumns];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) acc[i][j] = sums[i * kColumns + j];
  const auto step = [&](auto load_x, auto load_a) {
    V values[kColumns];
    for (int j = 0; j < kColumns; ++j) values[j] = load_a(j);
    for (int i = 0; i < kRows; ++i) {
      const V row = load_x(i);
      for (int j = 0; j < kColumns; ++j) acc[i][j] = L::fma(row, values[j], acc[i][j]);
    }
  };
  int64_t k = from;
  for (; k + L::kWidth <= to; k += L::kWidth)
    step([&](int i) { return L::load(x[i] + k); }, [&](int j) { return L::load(a + j * d_in + k); });
  if (k < to)
    step([&](int i) { return load_part<L>(x[i] + k, to - k); }, [&](int j) { return load_part<L>(a + j * d_in + k, to - k); });
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sums[i * kColumns + j] = acc[i][j];
}

// kRows of x by up to 16 rows of a, in pieces of d_in that stay in the nearest cache while all rows of a pass over them.
template <class L, class P, int kRows>
void block(const typename L::Real* const* x, typename L::Real* const* low, const P* a, int64_t columns, int64_t d_in) {
  constexpr int64_t kPiece = 512;
  constexpr int kMost = 16, kColumns = L::kColumns;
  typename L::V sums[kRows * kMost];
  for (int64_t i = 0; i < kRows * columns; ++i) sums[i] = L::zero();
  for (int64_t from = 0; from < d_in; from += kPiece) {
    const int64_t to = from + kPiece < d_in ? from + kPiece : d_in;
    int64_t j = 0;
    for (; j + kColumns <= columns; j += kColumns)
      tile<L, P, kRows, kColumns>(x, a + j * d_in, d_in, from, to, sums + j * kRows);
    for (; j < columns; ++j) tile<L, P, kRows, 1>(x, a + j * d_in, d_in, from, to, sums + j * kRows);
  }
  const int64_t even = columns / kColumns * kColumns;
  for (int i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < even; ++j)
      low[i][j] = L::sum(sums[j / kColumns * kColumns * kRows + i * kColumns + j % kColumns]);
    for (int64_t j = even; j < columns; ++j) low[i][j] = L::sum(sums[j * kRows + i]);
  }
}

template <class L, class P>
void shrink(const Shrink<typename L::Real>& s) {
  using Real = typename L::Real;
  constexpr int64_t kBlock = 16;
  for (int64_t j = 0; j < s.columns; j += kBlock) {
    const int64_t columns = s.columns - j < kBlock ? s.columns - j : kBlock;
    const P* a = static_cast<const P*>(s.a) + j * s.d_in;
    int64_t i = 0;
    for (; i + 4 <= s.rows; i += 4) {
      Real* const low[] = {s.low[i] + j, s.low[i + 1] + j, s.low[i + 2] + j, s.low[i + 3] + j};
      block<L, P, 4>(s.x + i, low, a, columns, s.d_in);
    }
    for (; i < s.rows; ++i)
      for (int64_t k = 0; k < columns; ++k) s.low[i][j + k] = dot<L, P>(s.x[i], a + k * s.d_in, s.d_in);
  }
}

// ---- y = base + low @ b -------------------------------------------------------------------------------------------

// One row of y: each row of b comes in one straight stream, and y stays in the nearest cache.
template <class L, class P>
void stream(const Expand<typename L::Real>& e, int64_t row) {
  const typename L::Real* base = e.base[row];
  typename L::Real* y = e.y[row];
  for (int64_t k = 0; k < e.count; ++k, base = y) {
    const P* b = static_cast<const P*>(e.b[k]) + e.shift;
    const auto low = L::set(e.low[row][k]);
    int64_t c = e.from;
    for (; c + 4 * L::kWidth <= e.to; c += 4 * L::kWidth)
      for (int u = 0; u < 4; ++u) {
        const int64_t at = c + u * L::kWidth;
        L::store(y + at, L::fma(low, L::load(b + at), L::load(base + at)));
      }
    for (; c + L::kWidth <= e.to; c += L::kWidth) L::store(y + c, L::fma(low, L::load(b + c), L::load(base + c)));
    if (c < e.to) {
      const int64_t rest = e.to - c;
      store_part<L>(y + c, L::fma(low, load_part<L>(b + c, rest), load_part<L>(base + c, rest)), rest);
    }
  }
}

// 4 rows of y by kVectors vectors, which stay in registers while all rows of b pass over them.
template <class L, class P, int kVectors>
void patch(const Expand<typename L::Real>& e, int64_t row, int64_t c) {
  using V = typename L::V;
  constexpr int kRows = 4;
  V acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) acc[i][v] = L::load(e.base[row + i] + c + v * L::kWidth);
  for (int64_t k = 0; k < e.count; ++k) {
    const P* b = static_cast<const P*>(e.b[k]) + e.shift + c;
    V values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = L::load(b + v * L::kWidth);
    for (int i = 0; i < kRows; ++i) {
      const V low = L::set(e.low[row + i][k]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = L::fma(low, values[v], acc[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) L::store(e.y[row + i] + c + v * L::kWidth, acc[i][v]);
}

template <class L, class P>
void patch_end(const Expand<typename L::Real>& e, int64_t row, int64_t c) {
  const int64_t rest = e.to - c;
  for (int64_t i = row; i < row + 4; ++i) {
    auto acc = load_part<L>(e.base[i] + c, rest);
    for (int64_t k = 0; k < e.count; ++k)
      acc = L::fma(L::set(e.low[i][k]), load_part<L>(static_cast<const P*>(e.b[k]) + e.shift + c, rest), acc);
    store_part<L>(e.y[i] + c, acc, rest);
  }
}

template <class L, class P>
void panel(const Expand<typename L::Real>& e) {
  constexpr int64_t kStep = L::kWidth * L::kVectors;
  int64_t row = 0;
  for (; row + 4 <= e.rows; row += 4) {
    int64_t c = e.from;
    for (; c + kStep <= e.to; c += kStep) {
      if (row + 8 <= e.rows)
        for (int i = 4; i < 8; ++i)
          for (int64_t at = 0; at < kStep; at += 64 / static_cast<int64_t>(sizeof(typename L::Real)))
            __builtin_prefetch(e.base[row + i] + c + at);
      patch<L, P, L::kVectors>(e, row, c);
    }
    for (; c + L::kWidth <= e.to; c += L::kWidth) patch<L, P, 1>(e, row, c);
    if (c < e.to) patch_end<L, P>(e, row, c);
  }
  for (; row < e.rows; ++row) stream<L, P>(e, row);
}

template <class L, class P>
void expand(const Expand<typename L::Real>& e) {
  const int64_t piece = e.rows < 4 ? 2048 : 512;
  for (int64_t from = e.from; from < e.to; from += piece) {
    Expand<typename L::Real> part = e;
    part.from = from;
    part.to = from + piece < e.to ? from + piece : e.to;
    panel<L, P>(part);
  }
}

// ---- masks and types ----------------------------------------------------------------------------------------------

template <class L>
bool scan(const typename L::Real* values, int64_t count, uint64_t* bits) {
  uint64_t nan = 0;
  for (int64_t word = 0; word * 64 < count; ++word) {
    uint64_t found = 0;
    const typename L::Real* from = values + word * 64;
    const int64_t many = count - word * 64 < 64 ? count - word * 64 : 64;
    int64_t i = 0;
    for (; i + L::kWidth <= many; i += L::kWidth) {
      const auto part = L::load(from + i);
      found |= static_cast<uint64_t>(L::nonzero(part)) << i;
      nan |= L::unordered(part);
    }
    for (; i < many; ++i) {
      found |= static_cast<uint64_t>(from[i] != 0) << i;
      nan |= from[i] != from[i];
    }
    bits[word] = found;
  }
  return !nan;
}

template <class L, class P>
void widen(const void* from, int64_t count, float* to) {
  const P* values = static_cast<const P*>(from);
  int64_t i = 0;
  for (; i + L::kWidth <= count; i += L::kWidth) L::store(to + i, L::load(values + i));
  for (; i < count; ++i) to[i] = wide(values[i]);
}

template <class L, class P>
void narrow_all(const float* from, int64_t count, void* to) {
  P* values = static_cast<P*>(to);
  int64_t i = 0;
  for (; i + L::kWidth <= count; i += L::kWidth) L::store(values + i, L::load(from + i));
  for (; i < count; ++i) values[i] = narrow(from[i], P{});
}

template <class L, class D>
constexpr Arithmetic arithmetic(const char* isa) {
  return {isa,
          {{shrink<L, float>, shrink<L, Half>, shrink<L, Brain>, nullptr, shrink<L, int8_t>},
           {expand<L, float>, expand<L, Half>, expand<L, Brain>, nullptr, expand<L, int8_t>},
           scan<L>},
          {{shrink<D, float>, shrink<D, Half>, shrink<D, Brain>, shrink<D, double>, shrink<D, int8_t>},
           {expand<D, float>, expand<D, Half>, expand<D, Brain>, expand<D, double>, expand<D, int8_t>},
           scan<D>},
          {nullptr, widen<L, Half>, widen<L, Brain>, nullptr, nullptr},
          {nullptr, narrow_all<L, Half>, narrow_all<L, Brain>, nullptr, nullptr}};
}

}  // namespace
}  // namespace adapterx
