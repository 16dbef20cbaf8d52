// The sums in 64-byte vectors. Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c, and called only where the
// processor has all of them.
#include "arithmetic.h"

#if defined(__x86_64__)
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "compile this file with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
#endif
#include <immintrin.h>

#include "low_rank_add_lanes.h"

namespace adapterx {
namespace {

struct Floats {
  using Real = float;
  using V = __m512;
  static constexpr int kWidth = 16, kColumns = 4, kVectors = 4;

  static V zero() { return _mm512_setzero_ps(); }
  static V set(float value) { return _mm512_set1_ps(value); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static __m256i half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static V load(const float* from) { return _mm512_loadu_ps(from); }
  static V load(const Half* from) { return _mm512_cvtph_ps(half(from)); }
  static V load(const Brain* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half(from)), 16));
  }
  static V load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store(float* to, V value) { _mm512_storeu_ps(to, value); }
  static void store(Half* to, V value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(Brain* to, V value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
  }
  static float sum(V value) { return _mm512_reduce_add_ps(value); }
  template <int kCount>
  static void sum_each(const V* values, float* totals) {
    static_assert(kCount == 16, "the sums of 16 vectors are one");
    V pairs[8], fours[4];  // every step adds halves, of which it puts those of two vectors into one
    for (int i = 0; i < 8; ++i) {
      const V even = values[2 * i], odd = values[2 * i + 1];
      pairs[i] = _mm512_unpacklo_ps(even, odd) + _mm512_unpackhi_ps(even, odd);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d even = _mm512_castps_pd(pairs[2 * i]), odd = _mm512_castps_pd(pairs[2 * i + 1]);
      fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
    }
    const auto halves = [](V a, V b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); };
    store(totals, halves(halves(fours[0], fours[1]), halves(fours[2], fours[3])));
  }
  static unsigned nonzero(V value) { return _mm512_cmp_ps_mask(value, zero(), _CMP_NEQ_UQ); }
  static unsigned unordered(V value) { return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q); }
};

constexpr Arithmetic kArithmetic = arithmetic<Floats>("avx512");

}  // namespace

const Arithmetic* avx512() { return &kArithmetic; }

}  // namespace adapterx

#endif
