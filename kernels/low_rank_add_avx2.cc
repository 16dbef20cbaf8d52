// The sums in 32-byte vectors. Compiled with -mavx2 -mfma -mf16c, and called only where the processor has all three.
#include "arithmetic.h"

#if defined(__x86_64__)
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with -mavx2 -mfma -mf16c"
#endif
#include <immintrin.h>

#include "low_rank_add_lanes.h"

namespace adapterx {
namespace {

struct Floats {
  using Real = float;
  using V = __m256;
  static constexpr int kWidth = 8, kColumns = 2, kVectors = 2;

  static V zero() { return _mm256_setzero_ps(); }
  static V set(float value) { return _mm256_set1_ps(value); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static __m128i half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static V load(const float* from) { return _mm256_loadu_ps(from); }
  static V load(const Half* from) { return _mm256_cvtph_ps(half(from)); }
  static V load(const Brain* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(from)), 16));
  }
  static V load(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static void store(float* to, V value) { _mm256_storeu_ps(to, value); }
  static void store(Half* to, V value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(Brain* to, V value) {
    float values[kWidth];
    store(values, value);
    for (int i = 0; i < kWidth; ++i) to[i] = narrow(values[i], Brain{});
  }
  static float sum(V value) {
    __m128 total = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    total = _mm_add_ps(total, _mm_movehl_ps(total, total));
    return _mm_cvtss_f32(_mm_add_ss(total, _mm_movehdup_ps(total)));
  }
  template <int kCount>
  static void sum_each(const V* values, float* totals) {
    for (int i = 0; i < kCount; ++i) totals[i] = sum(values[i]);
  }
  static unsigned nonzero(V value) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(value, zero(), _CMP_NEQ_UQ)));
  }
  static unsigned unordered(V value) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
  }
};

constexpr Arithmetic kArithmetic = arithmetic<Floats>("avx2");

}  // namespace

const Arithmetic* avx2() { return &kArithmetic; }

}  // namespace adapterx

#endif
