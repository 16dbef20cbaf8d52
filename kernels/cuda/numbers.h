// Numbers as they lie in memory, and as sums are made of them: float, or double for double.
//
// The kernels are CUDA, and they are C++ too: harness/cuda_on_host.h stands in for the device where there is none, and
// the tests run this very text on it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <mma.h>
#define ADAPTERX_SHARED(Type, name) __shared__ Type name
#define ADAPTERX_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#else
#include "../harness/cuda_on_host.h"
#endif

namespace adapterx::cuda {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <class T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};
template <class T>
using Sum = typename SumOf<T>::Type;

__device__ inline float from_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}

__device__ inline uint32_t to_bits(float value) {
  union {
    float value;
    uint32_t bits;
  } both = {value};
  return both.bits;
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(int8_t value) { return static_cast<float>(value); }
__device__ inline float widen(Bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

__device__ inline void narrow(float value, float* out) { *out = value; }
__device__ inline void narrow(double value, double* out) { *out = value; }

__device__ inline void narrow(float value, Bfloat16* out) {
  const uint32_t bits = to_bits(value);
  // To the nearest, ties to even. What carries out of the mantissa of a NaN could make it an infinity.
  out->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __CUDACC__
__device__ inline float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline void narrow(float value, Half* out) { out->bits = __half_as_ushort(__float2half_rn(value)); }
#else
inline float widen(Half value) { return cuda_on_host::half_to_float(value.bits); }
inline void narrow(float value, Half* out) { out->bits = cuda_on_host::float_to_half(value); }
#endif

__device__ inline bool is_finite(float value) { return (to_bits(value) & 0x7f800000u) != 0x7f800000u; }

// How a load of `bytes` is cut: the widest that the device has is 16.
template <int bytes>
struct Piece {
  static_assert(bytes % 16 == 0, "whole pieces");
  static constexpr int kBytes = 16;
  struct alignas(16) Type {
    uint32_t words[4];
  };
};
template <>
struct Piece<8> {
  static constexpr int kBytes = 8;
  struct alignas(8) Type {
    uint32_t words[2];
  };
};
template <>
struct Piece<4> {
  static constexpr int kBytes = 4;
  struct alignas(4) Type {
    uint32_t words[1];
  };
};

// `out[i] = at[i]`, zero from `left` on. Whole vectors at once where everything is `aligned`, and then left >= N.
template <int N, class P, class S>
__device__ inline void load(const P* at, S (&out)[N], int64_t left, bool aligned) {
  using Part = Piece<N * sizeof(P)>;
  if (aligned) {
    union {
      typename Part::Type parts[N * sizeof(P) / Part::kBytes];
      P values[N];
    } raw;
#ifndef __CUDACC__
    cuda_on_host::reads(at, N * sizeof(P), Part::kBytes);
#endif
#pragma unroll
    for (int i = 0; i < static_cast<int>(N * sizeof(P) / Part::kBytes); ++i) {
      raw.parts[i] = reinterpret_cast<const typename Part::Type*>(at)[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = static_cast<S>(widen(raw.values[i]));
    return;
  }
#ifndef __CUDACC__
  cuda_on_host::reads(at, sizeof(P) * (left < N ? left : N), alignof(P));
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = i < left ? static_cast<S>(widen(at[i])) : S(0);
}

// `at[i] = values[i]` below `left`.
template <int N, class P, class S>
__device__ inline void store(const S (&values)[N], P* at, int64_t left, bool aligned) {
  using Part = Piece<N * sizeof(P)>;
  union {
    typename Part::Type parts[N * sizeof(P) / Part::kBytes];
    P numbers[N];
  } raw;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(values[i], &raw.numbers[i]);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(N * sizeof(P) / Part::kBytes); ++i) {
      reinterpret_cast<typename Part::Type*>(at)[i] = raw.parts[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < left) at[i] = raw.numbers[i];
  }
}

template <class P>
constexpr int kVector = 16 / static_cast<int>(sizeof(P));

}  // namespace adapterx::cuda
