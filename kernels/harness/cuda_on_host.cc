// The CUDA source of LowRankAdd as a host library with one C function, for tests/kernels/test_cuda_source.py:
//
//   g++ -std=c++17 -O1 -Wno-unknown-pragmas -shared -fPIC kernels/harness/cuda_on_host.cc -o libcuda_on_host.so
#include "../low_rank_add.cu"
#include "../shapes.cc"

extern "C" {

struct HostArray {
  void* at;
  const int64_t* dims;
  int64_t count;
};

struct HostCall {
  HostArray base, x, a, b, mask, scale;
  void* y;
  int32_t activations, ports, processors, order;
  int64_t most_rows;                             // a smaller slab than the plan's; 0 for the plan's own
  int32_t tiles, splits, group;                  // out: the plan
  int64_t read_of_a, read_of_b;                  // out: bytes
};

const char* adapterx_cuda_on_host(HostCall* host) {
  using namespace adapterx;
  const auto dims = [](const HostArray& array) { return Dims{array.dims, static_cast<size_t>(array.count)}; };
  LowRankAdd call = {};
  call.activations = static_cast<Dtype>(host->activations);
  call.ports = static_cast<Dtype>(host->ports);
  Shapes shapes = {dims(host->base), dims(host->x), dims(host->a), dims(host->b), dims(host->mask), dims(host->scale)};
  shapes.scaled = host->scale.at != nullptr;
  size_t leading_ones = 0;
  static Fault fault;
  fault = measure(shapes, &call, &leading_ones);
  if (fault) return fault.text;
  call.base = host->base.at;
  call.x = host->x.at;
  call.a = host->a.at;
  call.b = host->b.at;
  call.mask = host->mask.at;
  call.scale = static_cast<const float*>(host->scale.at);
  call.y = host->y;
  cuda::Plan plan = cuda::plan(call, host->processors);
  if (host->most_rows) plan.slab = std::min(plan.slab, host->most_rows);
  host->tiles = plan.tiles;
  host->splits = plan.splits;
  host->group = plan.group;
  cuda_on_host::Machine& machine = cuda_on_host::machine();
  const auto watch = [&](const void* at, int64_t columns) {
    const char* begin = static_cast<const char*>(at);
    return cuda_on_host::Watch{begin, begin + call.rank * columns * static_cast<int64_t>(width(call.ports)), 0};
  };
  machine.watches = {watch(call.a, call.d_in), watch(call.b, call.d_out)};
  machine.order = host->order;
  std::vector<char> scratch(plan.scratch, static_cast<char>(0xff));
  const int failed = cuda::low_rank_add(call, plan, scratch.data(), nullptr);
  host->read_of_a = machine.watches[0].bytes;
  host->read_of_b = machine.watches[1].bytes;
  return failed ? cuda::error_text(failed) : nullptr;
}

}  // extern "C"
