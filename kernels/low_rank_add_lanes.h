// The arithmetic of LowRankAdd over vectors ("lanes") of some width. Included by one file per instruction set, each of which
// first defines its lanes: a type with
//   Real, V                  float or double, and a vector of kWidth of them
//   kColumns, kVectors       how many rows of a, and vectors of b, are worked on at once: as many as there are registers for
//   zero set add fma load store sum sum_each nonzero unordered
// Everything here has internal linkage: of a function that files share, the linker may keep the copy for another processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arithmetic.h"

// Arrays of vectors become registers only where the loops over them are unrolled early.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

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

// A row of so many floats takes half of the nearest cache, and leaves too little for what streams past it.
constexpr int64_t kLong = 4096;
// Where many rows are worked on, they share what is packed: pieces of 4 rows of x, panels of kBlock rows of b.
constexpr int64_t kBlock = 16, kPiece = 512, kPanel = 256;

// Values side by side, as many as they are, then zeros up to a whole vector.
template <class L, class P>
void pack(const P* from, int64_t count, typename L::Real* to) {
  int64_t i = 0;
  for (; i + L::kWidth <= count; i += L::kWidth) L::store(to + i, L::load(from + i));
  if (i < count) L::store(to + i, load_part<L>(from + i, count - i));
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

// One row of x and 8 of a: where x is longer than the nearest cache holds, and would come anew for each of them.
template <class L, class P>
void dots(const typename L::Real* x, const P* a, int64_t d_in, typename L::Real* low) {
  constexpr int kMany = 8;
  typename L::V sums[kMany];
  for (auto& sum : sums) sum = L::zero();
  int64_t k = 0;
  for (; k + L::kWidth <= d_in; k += L::kWidth) {
    const auto values = L::load(x + k);
    for (int j = 0; j < kMany; ++j) sums[j] = L::fma(values, L::load(a + j * d_in + k), sums[j]);
  }
  for (int j = 0; j < kMany; ++j) {
    if (k < d_in) sums[j] = L::fma(load_part<L>(x + k, d_in - k), load_part<L>(a + j * d_in + k, d_in - k), sums[j]);
    low[j] = L::sum(sums[j]);
  }
}

// 4 rows of x by kColumns of a, over a piece of d_in that begins at `from`: added to `sums`. The rows of x lie packed.
template <class L, class P, int kColumns>
void tile(const typename L::Real* x, const P* a, int64_t d_in, int64_t from, int64_t to, typename L::V* sums) {
  typename L::V acc[4][kColumns];
  UNROLL for (int i = 0; i < 4; ++i)
    UNROLL for (int j = 0; j < kColumns; ++j) acc[i][j] = sums[i * kColumns + j];
  const auto step = [&](int64_t k, auto load_a) {
    typename L::V values[kColumns];
    UNROLL for (int j = 0; j < kColumns; ++j) values[j] = load_a(a + j * d_in + k);
    UNROLL for (int i = 0; i < 4; ++i) {
      const auto row = L::load(x + i * kPiece + k - from);
      UNROLL for (int j = 0; j < kColumns; ++j) acc[i][j] = L::fma(row, values[j], acc[i][j]);
    }
  };
  int64_t k = from;
  for (; k + L::kWidth <= to; k += L::kWidth) step(k, [](const P* at) { return L::load(at); });
  if (k < to) step(k, [&](const P* at) { return load_part<L>(at, to - k); });
  UNROLL for (int i = 0; i < 4; ++i)
    UNROLL for (int j = 0; j < kColumns; ++j) sums[i * kColumns + j] = acc[i][j];
}

// 4 rows of x by up to kBlock rows of a. The rows of x are packed, a piece at a time: their distance in memory is often a power
// of two, which gives all of them, and those of a, the same few places in the cache.
template <class L, class P>
void block(const typename L::Real* const* x, typename L::Real* const* low, const P* a, int64_t columns, int64_t d_in) {
  constexpr int kColumns = L::kColumns;
  alignas(64) typename L::Real packed[4 * kPiece];
  typename L::V sums[4 * kBlock];
  for (int64_t i = 0; i < 4 * columns; ++i) sums[i] = L::zero();
  for (int64_t from = 0; from < d_in; from += kPiece) {
    const int64_t to = from + kPiece < d_in ? from + kPiece : d_in;
    for (int i = 0; i < 4; ++i) pack<L>(x[i] + from, to - from, packed + i * kPiece);
    int64_t j = 0;
    for (; j + kColumns <= columns; j += kColumns) tile<L, P, kColumns>(packed, a + j * d_in, d_in, from, to, sums + j * 4);
    for (; j < columns; ++j) tile<L, P, 1>(packed, a + j * d_in, d_in, from, to, sums + j * 4);
  }
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns) {
    typename L::Real totals[4 * kColumns];
    L::template sum_each<4 * kColumns>(sums + j * 4, totals);
    for (int i = 0; i < 4; ++i)
      for (int v = 0; v < kColumns; ++v) low[i][j + v] = totals[i * kColumns + v];
  }
  for (; j < columns; ++j)
    for (int i = 0; i < 4; ++i) low[i][j] = L::sum(sums[j * 4 + i]);
}

template <class L, class P>
void shrink(const Shrink<typename L::Real>& s) {
  using Real = typename L::Real;
  for (int64_t j = 0; j < s.columns; j += kBlock) {
    const int64_t columns = s.columns - j < kBlock ? s.columns - j : kBlock;
    const P* a = static_cast<const P*>(s.a) + j * s.d_in;
    int64_t i = 0;
    for (; i + 4 <= s.rows; i += 4) {
      Real* const low[] = {s.low[i] + j, s.low[i + 1] + j, s.low[i + 2] + j, s.low[i + 3] + j};
      block<L, P>(s.x + i, low, a, columns, s.d_in);
    }
    for (; i < s.rows; ++i) {
      int64_t k = 0;
      if (s.d_in >= kLong)
        for (; k + 8 <= columns; k += 8) dots<L, P>(s.x[i], a + k * s.d_in, s.d_in, s.low[i] + j + k);
      for (; k < columns; ++k) s.low[i][j + k] = dot<L, P>(s.x[i], a + k * s.d_in, s.d_in);
    }
  }
}

// ---- y = base + low @ b -------------------------------------------------------------------------------------------

// One row of y and kMany of b, from the k-th on.
template <class L, class P, int kMany>
void add_rows(const Expand<typename L::Real>& e, int64_t row, int64_t k, const typename L::Real* base) {
  constexpr int kVectors = kMany == 1 ? 4 : 2;
  typename L::Real* y = e.y[row];
  typename L::V low[kMany];
  const P* b[kMany];
  for (int j = 0; j < kMany; ++j) {
    low[j] = L::set(e.low[row][k + j]);
    b[j] = static_cast<const P*>(e.b[k + j]) + e.shift;
  }
  const auto vectors = [&](auto count, int64_t c) {
    typename L::V acc[count.value];
    for (int v = 0; v < count.value; ++v) acc[v] = L::load(base + c + v * L::kWidth);
    for (int j = 0; j < kMany; ++j)
      for (int v = 0; v < count.value; ++v) acc[v] = L::fma(low[j], L::load(b[j] + c + v * L::kWidth), acc[v]);
    for (int v = 0; v < count.value; ++v) L::store(y + c + v * L::kWidth, acc[v]);
  };
  int64_t c = e.from;
  for (; c + kVectors * L::kWidth <= e.to; c += kVectors * L::kWidth) vectors(std::integral_constant<int, kVectors>{}, c);
  for (; c + L::kWidth <= e.to; c += L::kWidth) vectors(std::integral_constant<int, 1>{}, c);
  if (c == e.to) return;
  auto acc = load_part<L>(base + c, e.to - c);
  for (int j = 0; j < kMany; ++j) acc = L::fma(low[j], load_part<L>(b[j] + c, e.to - c), acc);
  store_part<L>(y + c, acc, e.to - c);
}

// Rows of b one by one, each in one straight stream, while y stays in the nearest cache; 8 at once where y is longer than that.
template <class L, class P>
void stream(const Expand<typename L::Real>& e, int64_t row) {
  const typename L::Real* base = e.base[row];
  int64_t k = 0;
  if (e.to - e.from >= kLong)
    for (; k + 8 <= e.count; k += 8, base = e.y[row]) add_rows<L, P, 8>(e, row, k, base);
  for (; k < e.count; ++k, base = e.y[row]) add_rows<L, P, 1>(e, row, k, base);
}

// 4 rows of y by kVectors vectors, which stay in registers while the packed rows of b pass over them.
template <class L, int kVectors>
void patch(const Expand<typename L::Real>& e, int64_t row, int64_t c, int64_t k, int64_t count, const typename L::Real* b) {
  typename L::V acc[4][kVectors];
  const typename L::Real* const* base = k ? e.y + row : e.base + row;
  const typename L::Real* low[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    low[i] = e.low[row + i] + k;
    UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = L::load(base[i] + c + v * L::kWidth);
  }
  for (int64_t j = 0; j < count; ++j, b += kPanel) {
    typename L::V values[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) values[v] = L::load(b + v * L::kWidth);
    UNROLL for (int i = 0; i < 4; ++i) {
      const auto each = L::set(low[i][j]);
      UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = L::fma(each, values[v], acc[i][v]);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i)
    UNROLL for (int v = 0; v < kVectors; ++v) L::store(e.y[row + i] + c + v * L::kWidth, acc[i][v]);
}

template <class L>
void patch_end(const Expand<typename L::Real>& e, int64_t row, int64_t c, int64_t k, int64_t count, const typename L::Real* b) {
  const int64_t rest = e.to - c;
  for (int64_t i = row; i < row + 4; ++i) {
    auto acc = load_part<L>((k ? e.y[i] : e.base[i]) + c, rest);
    for (int64_t j = 0; j < count; ++j) acc = L::fma(L::set(e.low[i][k + j]), L::load(b + j * kPanel), acc);
    store_part<L>(e.y[i] + c, acc, rest);
  }
}

// Many rows of y by a panel of b: up to kBlock of its rows, from the k-th on, packed as those of x are above.
template <class L, class P>
void panel(const Expand<typename L::Real>& e, int64_t k) {
  constexpr int64_t kStep = L::kWidth * L::kVectors, kLine = 64 / static_cast<int64_t>(sizeof(typename L::Real));
  alignas(64) typename L::Real packed[kBlock * kPanel];
  const int64_t count = e.count - k < kBlock ? e.count - k : kBlock;
  for (int64_t j = 0; j < count; ++j)
    pack<L>(static_cast<const P*>(e.b[k + j]) + e.shift + e.from, e.to - e.from, packed + j * kPanel);
  for (int64_t row = 0; row + 4 <= e.rows; row += 4) {
    int64_t c = e.from;
    for (; c + kStep <= e.to; c += kStep) {
      for (int64_t i = row + 4; i < row + 8 && i < e.rows; ++i)
        for (int64_t at = 0; at < kStep; at += kLine) __builtin_prefetch(e.base[i] + c + at);
      patch<L, L::kVectors>(e, row, c, k, count, packed + (c - e.from));
    }
    for (; c + L::kWidth <= e.to; c += L::kWidth) patch<L, 1>(e, row, c, k, count, packed + (c - e.from));
    if (c < e.to) patch_end<L>(e, row, c, k, count, packed + (c - e.from));
  }
}

template <class L, class P>
void expand(const Expand<typename L::Real>& e) {
  const int64_t even = e.rows / 4 * 4;
  Expand<typename L::Real> part = e;
  for (; even && part.from < e.to; part.from = part.to) {
    part.to = e.to - part.from < kPanel ? e.to : part.from + kPanel;
    for (int64_t k = 0; k < e.count; k += kBlock) panel<L, P>(part, k);
  }
  for (int64_t row = even; row < e.rows; ++row) stream<L, P>(e, row);
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

template <class L>
constexpr Arithmetic arithmetic(const char* isa) {
  return {isa,
          {{shrink<L, float>, shrink<L, Half>, shrink<L, Brain>, nullptr, shrink<L, int8_t>},
           {expand<L, float>, expand<L, Half>, expand<L, Brain>, nullptr, expand<L, int8_t>},
           scan<L>},
          {nullptr, widen<L, Half>, widen<L, Brain>, nullptr, nullptr},
          {nullptr, narrow_all<L, Half>, narrow_all<L, Brain>, nullptr, nullptr}};
}

}  // namespace
}  // namespace adapterx
