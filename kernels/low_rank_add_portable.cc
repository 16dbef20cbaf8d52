// The sums in the vectors that every processor has (16 bytes), by the compiler's own vector types.
#include "low_rank_add_lanes.h"

namespace adapterx {
namespace {

template <class T>
struct Lanes {
  using Real = T;
  static constexpr int kWidth = 16 / sizeof(T), kColumns = 2, kVectors = 2;
  typedef T V __attribute__((vector_size(16)));

  static V zero() { return V{}; }
  static V set(T value) { return V{} + value; }
  static V add(V a, V b) { return a + b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  template <class P>
  static V load(const P* from) {
    V value;
    for (int i = 0; i < kWidth; ++i) value[i] = wide(from[i]);
    return value;
  }
  static void store(T* to, V value) { std::memcpy(to, &value, sizeof value); }
  template <class P>
  static void store(P* to, V value) {
    for (int i = 0; i < kWidth; ++i) to[i] = narrow(value[i], P{});
  }
  static T sum(V value) {
    T total = 0;
    for (int i = 0; i < kWidth; ++i) total += value[i];
    return total;
  }
  template <int kCount>
  static void sum_each(const V* values, T* totals) {
    for (int i = 0; i < kCount; ++i) totals[i] = sum(values[i]);
  }
  static unsigned nonzero(V value) {
    unsigned bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<unsigned>(value[i] != 0) << i;
    return bits;
  }
  static unsigned unordered(V value) {
    unsigned bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<unsigned>(value[i] != value[i]) << i;
    return bits;
  }
};

using D = Lanes<double>;

constexpr Arithmetic kArithmetic = arithmetic<Lanes<float>>("portable");
constexpr Sums<double> kDoubleSums = {
    {shrink<D, float>, shrink<D, Half>, shrink<D, Brain>, shrink<D, double>, shrink<D, int8_t>},
    {expand<D, float>, expand<D, Half>, expand<D, Brain>, expand<D, double>, expand<D, int8_t>},
    scan<D>};

}  // namespace

const Arithmetic* portable() { return &kArithmetic; }
const Sums<double>& double_sums() { return kDoubleSums; }

}  // namespace adapterx
