#include "arithmetic.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace adapterx {
namespace {

#if defined(__x86_64__)

bool runs(const Arithmetic* arithmetic) {
  // Every processor with AVX2 has F16C, for which not every compiler knows the question.
  const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (arithmetic == avx512())
    return half && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return half || arithmetic != avx2();
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
