// The ops of the CPU: each call is read, computed on the threads of the session, and answered with a status.
#include <new>

#include "compute.h"
#include "low_rank_add_op.h"

namespace adapterx {
namespace {

struct Kernel {
  const OrtApi* api;
  const LowRankAddOp* op;
  const Arithmetic* arithmetic;
};

OrtStatusPtr ORT_API_CALL create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo*, void** kernel) noexcept {
  const Arithmetic* arithmetic = nullptr;
  if (Fault fault = choose(&arithmetic)) return api->CreateStatus(ORT_INVALID_ARGUMENT, fault.text);
  *kernel = new (std::nothrow) Kernel{api, static_cast<const LowRankAddOp*>(op), arithmetic};
  return *kernel ? nullptr : api->CreateStatus(ORT_FAIL, "LowRankAdd: out of memory");
}

void ORT_API_CALL destroy(void* kernel) noexcept { delete static_cast<Kernel*>(kernel); }

struct Threads {
  const OrtApi* api;
  const OrtKernelContext* context;
};

void run(void* self, void (*task)(void*, size_t), void* job, size_t count) {
  const Threads& threads = *static_cast<const Threads*>(self);
  OrtStatus* failed = threads.api->KernelContext_ParallelFor(threads.context, task, count, 0, job);
  if (!failed) return;
  threads.api->ReleaseStatus(failed);
  for (size_t i = 0; i < count; ++i) task(job, i);
}

OrtStatusPtr ORT_API_CALL answer(void* of, OrtKernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(of);
  LowRankAdd call;
  if (OrtStatus* failed = read_call(*kernel.api, context, *kernel.op, &call)) return failed;
  Threads threads{kernel.api, context};
  const Fault fault = compute(call, *kernel.arithmetic, {&threads, run});
  return fault ? kernel.api->CreateStatus(ORT_INVALID_ARGUMENT, fault.text) : nullptr;
}

constexpr Dtype kAll[] = {Dtype::kFloat, Dtype::kFloat16, Dtype::kBfloat16, Dtype::kDouble, Dtype::kInt8};

}  // namespace

OrtStatus* add_cpu_ops(const OrtApi& api, OrtCustomOpDomain* domain) {
  static LowRankAddOp ops[sizeof kAll * sizeof kAll];
  size_t count = 0;
  for (const Dtype activations : kAll) {
    for (const Dtype ports : kAll) {
      if (!takes(activations, ports)) continue;
      LowRankAddOp& op = ops[count++] = describe(api, activations, ports);
      op.CreateKernelV2 = create;
      op.KernelComputeV2 = answer;
      op.KernelDestroy = destroy;
      if (OrtStatus* failed = api.CustomOpDomain_Add(domain, &op)) return failed;
    }
  }
  return nullptr;
}

}  // namespace adapterx
