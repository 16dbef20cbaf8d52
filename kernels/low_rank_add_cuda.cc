// The ops of CUDA: each call is read, started on the stream of the session, and answered before it has run.
#include "low_rank_add_cuda.h"

#include <exception>
#include <new>

#include "low_rank_add_op.h"

namespace adapterx {
namespace {

struct Kernel {
  const OrtApi* api;
  const LowRankAddOp* op;
  int processors;
};

OrtStatusPtr ORT_API_CALL create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo*,
                                 void** kernel) noexcept {
  *kernel = new (std::nothrow) Kernel{api, static_cast<const LowRankAddOp*>(op), cuda::processors()};
  return *kernel ? nullptr : api->CreateStatus(ORT_FAIL, "LowRankAdd: out of memory");
}

void ORT_API_CALL destroy(void* kernel) noexcept { delete static_cast<Kernel*>(kernel); }

// Memory of the session's own arena, marked with its stream. It goes back when the kernels are started, not when they
// are done: the arena gives it to what follows on this stream, and makes other streams wait.
class Scratch {
 public:
  explicit Scratch(const OrtApi& api) : api_(api) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (at_ && allocator_) allocator_->Free(allocator_, at_);
    if (allocator_) api_.ReleaseAllocator(allocator_);
  }

  // `beside`: the number of an input that lies on the device.
  OrtStatus* take(OrtKernelContext* context, size_t beside, size_t bytes) {
    const OrtValue* value = nullptr;
    const OrtMemoryInfo* where = nullptr;
    if (OrtStatus* failed = api_.KernelContext_GetInput(context, beside, &value)) return failed;
    if (OrtStatus* failed = api_.GetTensorMemoryInfo(value, &where)) return failed;
    if (OrtStatus* failed = api_.KernelContext_GetAllocator(context, where, &allocator_)) return failed;
    return api_.KernelContext_GetScratchBuffer(context, where, bytes, &at_);
  }

  void* at() const { return at_; }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* at_ = nullptr;
};

OrtStatus* start(const Kernel& kernel, OrtKernelContext* context) {
  LowRankAdd call;
  if (OrtStatus* failed = read_call(*kernel.api, context, *kernel.op, &call)) return failed;
  void* stream = nullptr;
  if (OrtStatus* failed = kernel.api->KernelContext_GetGPUComputeStream(context, &stream)) return failed;
  const cuda::Plan plan = cuda::plan(call, kernel.processors);
  Scratch scratch(*kernel.api);
  if (plan.scratch) {
    if (OrtStatus* failed = scratch.take(context, 1, plan.scratch)) return failed;
  }
  const int error = cuda::low_rank_add(call, plan, scratch.at(), static_cast<CUstream_st*>(stream));
  return error ? kernel.api->CreateStatus(ORT_FAIL, cuda::error_text(error)) : nullptr;
}

OrtStatusPtr ORT_API_CALL answer(void* of, OrtKernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(of);
  try {
    return start(kernel, context);
  } catch (const std::exception& error) {  // the arena throws when it is empty
    return kernel.api->CreateStatus(ORT_FAIL, error.what());
  }
}

constexpr Dtype kAll[] = {Dtype::kFloat, Dtype::kFloat16, Dtype::kBfloat16, Dtype::kDouble, Dtype::kInt8};

}  // namespace

OrtStatus* add_cuda_ops(const OrtApi& api, OrtCustomOpDomain* domain) {
  static LowRankAddOp ops[sizeof kAll * sizeof kAll];
  size_t count = 0;
  for (const Dtype activations : kAll) {
    for (const Dtype ports : kAll) {
      if (!takes(activations, ports)) continue;
      LowRankAddOp& op = ops[count++] = describe(api, activations, ports);
      op.GetExecutionProviderType = [](const OrtCustomOp*) noexcept -> const char* { return "CUDAExecutionProvider"; };
      op.CreateKernelV2 = create;
      op.KernelComputeV2 = answer;
      op.KernelDestroy = destroy;
      if (OrtStatus* failed = api.CustomOpDomain_Add(domain, &op)) return failed;
    }
  }
  return nullptr;
}

}  // namespace adapterx
