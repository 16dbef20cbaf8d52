// LowRankAdd as ONNX Runtime sees it: one OrtCustomOp for each pair of types, all of one name, which it joins to one operator.
#pragma once

#include <onnxruntime_c_api.h>

#include "low_rank_add.h"

namespace adapterx {

struct LowRankAddOp : OrtCustomOp {
  Dtype activations;
  Dtype ports;
};

// What the ops of all providers share: name, types, inputs, outputs, shapes, working in place.
LowRankAddOp describe(const OrtApi& api, Dtype activations, Dtype ports);

// The sizes and arrays of a call, its output created. A status that names the fault, or nullptr.
OrtStatus* read_call(const OrtApi& api, OrtKernelContext* context, const LowRankAddOp& op, LowRankAdd* call);

// Adds the ops of the CPU to the domain. They live as long as the process.
OrtStatus* add_cpu_ops(const OrtApi& api, OrtCustomOpDomain* domain);

// ... and of CUDA, in a library that was built with ADAPTERX_CUDA.
OrtStatus* add_cuda_ops(const OrtApi& api, OrtCustomOpDomain* domain);

}  // namespace adapterx
