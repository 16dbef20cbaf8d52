// What the library exports: RegisterCustomOps, which ONNX Runtime calls, and four functions that say what was built.
#include <onnxruntime_c_api.h>

#include <mutex>

#include "arithmetic.h"
#include "low_rank_add_op.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#ifndef ADAPTERX_KERNELS_VERSION
#define ADAPTERX_KERNELS_VERSION "0"
#endif

namespace {

OrtCustomOpDomain* domain = nullptr;
char failure[384] = "";

// Leaves the domain, or why there is none: a second call must not add the ops twice, and no status can be kept.
void make_domain(const OrtApi& api) {
  OrtStatus* failed = api.CreateCustomOpDomain("ai.adapterx", &domain);
  if (!failed) failed = adapterx::add_cpu_ops(api, domain);
#ifdef ADAPTERX_CUDA
  if (!failed) failed = adapterx::add_cuda_ops(api, domain);
#endif
  if (!failed) return;
  const char* reason = api.GetErrorMessage(failed);
  for (size_t i = 0; i + 1 < sizeof failure && reason[i]; ++i) failure[i] = reason[i];
  api.ReleaseStatus(failed);
}

}  // namespace

EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api)
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED,
                                         "adapterx-kernels is built for a newer ONNX Runtime than this one");
  const adapterx::Arithmetic* arithmetic = nullptr;
  if (adapterx::Fault fault = adapterx::choose(&arithmetic)) return api->CreateStatus(ORT_INVALID_ARGUMENT, fault.text);
  static std::once_flag once;
  std::call_once(once, make_domain, *api);
  if (failure[0]) return api->CreateStatus(ORT_FAIL, failure);
  return api->AddCustomOpDomain(options, domain);
}

EXPORT const char* adapterx_kernels_version() noexcept { return ADAPTERX_KERNELS_VERSION; }

EXPORT int adapterx_kernels_ort_api() noexcept { return ORT_API_VERSION; }

// The execution providers that it has kernels for, with commas between.
EXPORT const char* adapterx_kernels_providers() noexcept {
#ifdef ADAPTERX_CUDA
  return "CPUExecutionProvider,CUDAExecutionProvider";
#else
  return "CPUExecutionProvider";
#endif
}

// The instruction set that calls use now, or nullptr where ADAPTERX_KERNELS_ISA names one that cannot be used.
EXPORT const char* adapterx_kernels_isa() noexcept {
  const adapterx::Arithmetic* arithmetic = nullptr;
  return adapterx::choose(&arithmetic) ? nullptr : arithmetic->isa;
}
