#include "low_rank_add_op.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace adapterx {
namespace {

constexpr size_t kInputs = 6, kMask = 4, kScale = 5;

ONNXTensorElementDataType element(Dtype type) {
  switch (type) {
    case Dtype::kFloat: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Dtype::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Dtype::kBfloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Dtype::kDouble: return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    case Dtype::kInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

const LowRankAddOp& own(const OrtCustomOp* op) { return *static_cast<const LowRankAddOp*>(op); }

// The type, the shape and the names of the dimensions of an input, as far as the model says them.
struct Known {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> dims;
  std::vector<const char*> names;
};

#define RETURN_IF_FAILED(call) \
  if (OrtStatus* failed = (call)) return failed

OrtStatus* known(const OrtApi& api, const OrtShapeInferContext* context, size_t input, Known* found) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own, not ours to release
  RETURN_IF_FAILED(api.ShapeInferContext_GetInputTypeShape(context, input, &info));
  RETURN_IF_FAILED(api.GetTensorElementType(info, &found->type));
  size_t count = 0;
  RETURN_IF_FAILED(api.GetDimensionsCount(info, &count));
  found->dims.resize(count);
  found->names.resize(count);
  if (!count) return nullptr;
  RETURN_IF_FAILED(api.GetDimensions(info, found->dims.data(), count));
  return api.GetSymbolicDimensions(info, found->names.data(), count);
}

OrtStatus* set_output(const OrtApi& api, OrtShapeInferContext* context, const Known& found) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  RETURN_IF_FAILED(api.CreateTensorTypeAndShapeInfo(&info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> held(
      info, api.ReleaseTensorTypeAndShapeInfo);
  std::vector<const char*> names = found.names;
  RETURN_IF_FAILED(api.SetTensorElementType(info, found.type));
  RETURN_IF_FAILED(api.SetDimensions(info, found.dims.data(), found.dims.size()));
  RETURN_IF_FAILED(api.SetSymbolicDimensions(info, names.data(), names.size()));
  return api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
}

// y is like base, with a dimension of 1 before it for each that the mask has more. No dimensions: the model does not say them.
OrtStatus* infer(const OrtApi& api, OrtShapeInferContext* context) {
  Known base, mask;
  RETURN_IF_FAILED(known(api, context, 0, &base));
  RETURN_IF_FAILED(known(api, context, kMask, &mask));
  if (base.dims.empty()) return nullptr;
  // ONNX Runtime would take a size that is neither known nor named for a size of -1 (and it may be computed with).
  for (size_t i = 0; i < base.dims.size(); ++i)
    if (base.dims[i] < 0 && !(base.names[i] && *base.names[i])) return nullptr;
  while (base.dims.size() < mask.dims.size()) {
    base.dims.insert(base.dims.begin(), 1);
    base.names.insert(base.names.begin(), "");
  }
  return set_output(api, context, base);
}

// The inference function is handed none.
const OrtApi* shape_api = nullptr;

OrtStatusPtr ORT_API_CALL infer_shape(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  try {
    return infer(*shape_api, context);
  } catch (const std::exception& error) {
    return shape_api->CreateStatus(ORT_FAIL, error.what());
  }
}

// The shape of an input, read without an allocation of ours for all usual ranks.
struct Input {
  const OrtValue* value = nullptr;
  int64_t few[8];
  std::unique_ptr<int64_t[]> many;
  Dims dims;
};

OrtStatus* read(const OrtApi& api, const OrtKernelContext* context, size_t index, Input* input, const void** data) {
  RETURN_IF_FAILED(api.KernelContext_GetInput(context, index, &input->value));
  if (!input->value) return nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  RETURN_IF_FAILED(api.GetTensorTypeAndShape(input->value, &info));
  OrtStatus* failed = api.GetDimensionsCount(info, &input->dims.count);
  int64_t* dims = input->few;
  if (!failed && input->dims.count > sizeof input->few / sizeof *input->few) {
    input->many.reset(new (std::nothrow) int64_t[input->dims.count]);
    dims = input->many.get();
    if (!dims) failed = api.CreateStatus(ORT_FAIL, "LowRankAdd: out of memory");
  }
  if (!failed) failed = api.GetDimensions(info, dims, input->dims.count);
  api.ReleaseTensorTypeAndShapeInfo(info);
  input->dims.of = dims;
  void* start = nullptr;
  if (!failed) failed = api.GetTensorMutableData(const_cast<OrtValue*>(input->value), &start);
  *data = start;
  return failed;
}

}  // namespace

OrtStatus* read_call(const OrtApi& api, OrtKernelContext* context, const LowRankAddOp& op, LowRankAdd* call) {
  Input inputs[kInputs];
  const void* data[kInputs] = {};
  size_t count = 0;
  RETURN_IF_FAILED(api.KernelContext_GetInputCount(context, &count));
  for (size_t i = 0; i < count && i < kInputs; ++i) RETURN_IF_FAILED(read(api, context, i, inputs + i, data + i));
  *call = LowRankAdd{};
  call->activations = op.activations;
  call->ports = op.ports;
  size_t ones = 0;
  const bool scaled = inputs[kScale].value != nullptr;
  const Shapes shapes{inputs[0].dims, inputs[1].dims, inputs[2].dims, inputs[3].dims, inputs[4].dims, inputs[5].dims, scaled};
  if (Fault fault = measure(shapes, call, &ones)) return api.CreateStatus(ORT_INVALID_ARGUMENT, fault.text);
  const Dims base = shapes.base;
  int64_t few[8];
  std::unique_ptr<int64_t[]> many(ones + base.count > 8 ? new (std::nothrow) int64_t[ones + base.count] : nullptr);
  int64_t* dims = ones + base.count > 8 ? many.get() : few;
  if (!dims) return api.CreateStatus(ORT_FAIL, "LowRankAdd: out of memory");
  for (size_t i = 0; i < ones + base.count; ++i) dims[i] = i < ones ? 1 : base.of[i - ones];
  OrtValue* y = nullptr;
  RETURN_IF_FAILED(api.KernelContext_GetOutput(context, 0, dims, ones + base.count, &y));
  call->base = data[0];
  call->x = data[1];
  call->a = data[2];
  call->b = data[3];
  call->mask = data[4];
  call->scale = static_cast<const float*>(data[5]);
  return api.GetTensorMutableData(y, &call->y);
}

LowRankAddOp describe(const OrtApi& api, Dtype activations, Dtype ports) {
  shape_api = &api;
  LowRankAddOp op{};
  op.activations = activations;
  op.ports = ports;
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp*) noexcept -> const char* { return "LowRankAdd"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) noexcept -> const char* { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) noexcept { return kInputs; };
  op.GetInputType = [](const OrtCustomOp* of, size_t index) noexcept {
    if (index == kScale) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return element(index == 2 || index == 3 ? own(of).ports : own(of).activations);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) noexcept {
    return index == kScale ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) noexcept { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) noexcept { return size_t{1}; };
  op.GetOutputType = [](const OrtCustomOp* of, size_t) noexcept { return element(own(of).activations); };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) noexcept { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) noexcept { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) noexcept { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) noexcept { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) noexcept { return 0; };
  op.InferOutputShapeFn = infer_shape;
  op.GetStartVersion = [](const OrtCustomOp*) noexcept { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) noexcept { return 2147483647; };
  op.GetMayInplace = [](int** input, int** output) noexcept -> size_t {
    *input = static_cast<int*>(std::malloc(sizeof(int)));
    *output = static_cast<int*>(std::malloc(sizeof(int)));
    if (!*input || !*output) return 0;
    **input = **output = 0;
    return 1;
  };
  op.ReleaseMayInplace = [](int* input, int* output) noexcept {
    std::free(input);
    std::free(output);
  };
  op.GetAliasMap = [](int**, int**) noexcept -> size_t { return 0; };
  op.ReleaseAliasMap = [](int*, int*) noexcept {};
  return op;
}

}  // namespace adapterx
