// How near LowRankAdd comes to what the memory of a GPU can do. Needs a GPU; no test runs it.
//
//   cd kernels
//   nvcc -std=c++17 -O3 -arch=native -I . harness/cuda_bench.cu low_rank_add.cu shapes.cc -o cuda_bench && ./cuda_bench
//
// A line is one shape: microseconds a call (median of 200; banks take turns, more of them than the L2 holds), bytes of
// weights that must be read at least, GB/s of them, and the share of what a device copy moves on the same machine.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "low_rank_add_cuda.h"

namespace {

using adapterx::Dtype;

constexpr int kTimes = 200;
constexpr size_t kMoreThanL2 = size_t{512} << 20;

void check(int error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", adapterx::cuda::error_text(error));
  std::exit(1);
}

void* on_device(size_t bytes) {
  void* at = nullptr;
  check(cudaMalloc(&at, std::max<size_t>(bytes, 16)));
  check(cudaMemset(at, 0, bytes));
  return at;
}

int64_t byte_limit(int64_t adapters, int64_t rank, int64_t d_in, int64_t d_out, int64_t width) {
  return adapters * rank * (d_in + d_out) * width;
}

template <class Body>
double median_microseconds(cudaStream_t stream, Body body) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kTimes + 20; ++i) {
    check(cudaEventRecord(begin, stream));
    body(i);
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 20) times.push_back(1000 * milliseconds);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return times[times.size() / 2];
}

double copy_gigabytes_a_second(cudaStream_t stream) {
  const size_t bytes = size_t{256} << 20;
  void *from = on_device(bytes), *to = on_device(bytes);
  const double microseconds = median_microseconds(
      stream, [&](int) { check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream)); });
  cudaFree(from);
  cudaFree(to);
  return 2.0 * bytes / microseconds / 1e3;
}

struct Batch {
  int64_t rows, tokens, adapters;
};

constexpr Batch kBatches[] = {{1, 1, 1}, {8, 1, 8}, {32, 1, 32}, {64, 1, 64}, {32, 1, 4}, {8, 64, 8}, {1, 512, 1}};

struct Shape {
  int64_t rows, tokens, adapters, rank, d_in, d_out;
  Dtype ports;
};

// Row i of the batch has adapter i % adapters; activations are float16.
void measure(const Shape& shape, double copy, cudaStream_t stream) {
  const int64_t total = shape.adapters * shape.rank, m = shape.rows * shape.tokens;
  const size_t width = adapterx::width(shape.ports);
  adapterx::LowRankAdd call = {};
  const int64_t base[] = {shape.rows, shape.tokens, shape.d_out}, x[] = {shape.rows, shape.tokens, shape.d_in};
  const int64_t a[] = {total, shape.d_in}, b[] = {total, shape.d_out}, scale[] = {total, 2};
  const int64_t mask[] = {shape.rows, 1, total};
  adapterx::Shapes shapes = {{base, 3}, {x, 3}, {a, 2}, {b, 2}, {mask, 3}, {scale, 2}, shape.ports == Dtype::kInt8};
  call.activations = Dtype::kFloat16;
  call.ports = shape.ports;
  size_t leading_ones = 0;
  if (adapterx::Fault fault = adapterx::measure(shapes, &call, &leading_ones)) {
    std::fprintf(stderr, "%s\n", fault.text);
    std::exit(1);
  }
  std::vector<__half> weights(shape.rows * total, __float2half(0.0f));
  for (int64_t row = 0; row < shape.rows; ++row) {
    const int64_t adapter = row % shape.adapters;
    for (int64_t c = 0; c < shape.rank; ++c) weights[row * total + adapter * shape.rank + c] = __float2half(1.0f);
  }
  void* on = on_device(weights.size() * 2);
  check(cudaMemcpy(on, weights.data(), weights.size() * 2, cudaMemcpyHostToDevice));
  const size_t bank = static_cast<size_t>(total * (shape.d_in + shape.d_out)) * width;
  const int banks = static_cast<int>(std::max<size_t>(1, kMoreThanL2 / bank));
  char* all = static_cast<char*>(on_device(bank * banks));
  call.mask = on;
  call.x = on_device(m * shape.d_in * 2);
  call.base = call.y = on_device(m * shape.d_out * 2);
  call.scale = call.ports == Dtype::kInt8 ? static_cast<float*>(on_device(total * 8)) : nullptr;
  const adapterx::cuda::Plan plan = adapterx::cuda::plan(call, adapterx::cuda::processors());
  void* scratch = on_device(plan.scratch);
  const double microseconds = median_microseconds(stream, [&](int i) {
    call.a = all + bank * (i % banks);
    call.b = all + bank * (i % banks) + total * shape.d_in * width;
    check(adapterx::cuda::low_rank_add(call, plan, scratch, stream));
  });
  const int64_t limit = byte_limit(std::min(shape.adapters, shape.rows), shape.rank, shape.d_in, shape.d_out, width);
  const double reached = limit / microseconds / 1e3;
  const auto text = [](int64_t number) { return static_cast<long long>(number); };
  std::printf("%4lld x %-4lld %3lld adapters  r %-3lld  %5lld -> %-5lld  %zu bytes each  %s", text(shape.rows),
              text(shape.tokens), text(shape.adapters), text(shape.rank), text(shape.d_in), text(shape.d_out), width,
              plan.tiles ? "tiles" : "rows ");
  std::printf("  %8.1f us  %9lld bytes  %7.1f GB/s", microseconds, text(limit), reached);
  std::printf("  %5.1f %%\n", 100 * reached / copy);
  for (const void* at : {call.mask, call.x, call.base, static_cast<const void*>(all), static_cast<const void*>(scratch),
                         static_cast<const void*>(call.scale)}) {
    cudaFree(const_cast<void*>(at));
  }
}

}  // namespace

int main() {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  const double copy = copy_gigabytes_a_second(stream);
  std::printf("a device copy: %.0f GB/s\n", copy);
  for (const Dtype ports : {Dtype::kFloat16, Dtype::kInt8, Dtype::kFloat}) {
    for (const auto& size : {std::pair<int64_t, int64_t>{2048, 2048}, {2048, 8192}, {8192, 2048}, {4096, 4096}}) {
      for (const Batch& batch : kBatches) {
        measure({batch.rows, batch.tokens, batch.adapters, 16, size.first, size.second, ports}, copy, stream);
      }
    }
  }
  return 0;
}
