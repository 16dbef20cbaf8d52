#include "arithmetic.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace adapterx {
namespace {

#if defined(__x86_64__)

struct Processor {
  bool avx2, avx512;
};

// Asked of CPUID, and of XCR0, which registers the system saves. Not by __builtin_cpu_supports, which always says no where zig
// is the compiler.
Processor processor() {
  unsigned a, b, c, d, saved, unused;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return {};
  const bool half = (c & bit_FMA) && (c & bit_F16C);
  __asm__("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  constexpr unsigned kYmm = 0x06, kZmm = 0xe6, kAll512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  const bool avx2 = half && (b & bit_AVX2) && (saved & kYmm) == kYmm;
  return {avx2, avx2 && (b & kAll512) == kAll512 && (saved & kZmm) == kZmm};
}

bool runs(const Arithmetic* arithmetic) {
  static const Processor here = processor();
  return arithmetic == avx512() ? here.avx512 : arithmetic != avx2() || here.avx2;
}

const Arithmetic* const kAll[] = {avx512(), avx2(), portable()};

#else

bool runs(const Arithmetic* arithmetic) { return arithmetic != nullptr; }

const Arithmetic* const kAll[] = {nullptr, nullptr, portable()};

#endif

constexpr const char* kNames[] = {"avx512", "avx2", "portable"};

}  // namespace

Fault choose(const Arithmetic** chosen) {
  const char* wanted = std::getenv("ADAPTERX_KERNELS_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  Fault fault;
  for (int i = 0; i < 3; ++i) {
    if (wanted && std::strcmp(wanted, kNames[i]) != 0) continue;
    if (runs(kAll[i])) {
      *chosen = kAll[i];
      return {};
    }
    if (wanted)
      std::snprintf(fault.text, sizeof fault.text, "ADAPTERX_KERNELS_ISA is %s, which this processor does not run", wanted);
  }
  if (!fault)
    std::snprintf(fault.text, sizeof fault.text, "ADAPTERX_KERNELS_ISA is '%.60s', expected portable, avx2 or avx512", wanted);
  return fault;
}

}  // namespace adapterx
