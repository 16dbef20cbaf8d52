// How fast, against what this machine can do: bytes read a second where memory is the limit, operations where arithmetic is.
//
//   bench [threads]       shapes of Llama-3.2-1B, rank 16; "cold" walks over more adapters than any cache holds
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

using namespace adapterx;
using Clock = std::chrono::steady_clock;

double seconds() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

struct Case {
  const char* name;
  int64_t rows, tokens, adapters;
  Dtype ports;
};

struct Site {
  int64_t d_in, d_out;
};

constexpr Site kSites[] = {{2048, 2048}, {2048, 512}, {2048, 512}, {2048, 2048}, {2048, 8192}, {2048, 8192}, {8192, 2048}};
constexpr int64_t kRank = 16;

// The tenth part of the times is shorter: neighbours on a shared machine only ever make it slower.
template <class F>
double best(F&& run, int times) {
  std::vector<double> took;
  for (int i = 0; i < times; ++i) {
    const double start = seconds();
    run();
    took.push_back(seconds() - start);
  }
  std::nth_element(took.begin(), took.begin() + times / 10, took.end());
  return took[static_cast<size_t>(times / 10)];
}

// What memory gives: a plain loop that reads and adds.
double read_bandwidth(const std::vector<float>& memory, Pool pool) {
  struct Job {
    const float* from;
    float found[64];
  } job{};
  constexpr size_t kEach = size_t{1} << 16;
  const auto part = [](void* of, size_t unit) {
    Job& own = *static_cast<Job*>(of);
    typedef float V __attribute__((vector_size(64), aligned(4)));
    V sums[4] = {};
    const float* from = own.from + unit * kEach;
    for (size_t i = 0; i < kEach; i += 64)
      for (int u = 0; u < 4; ++u) sums[u] += *reinterpret_cast<const V*>(from + i + 16 * u);
    own.found[unit] = (sums[0] + sums[1] + sums[2] + sums[3])[0];
  };
  const size_t steps = memory.size() / (8 * kEach);
  size_t step = 0;
  const double took = best(
      [&] {
        job.from = memory.data() + step++ % steps * 8 * kEach;
        pool.run(pool.self, part, &job, 8);
      },
      static_cast<int>(3 * steps));
  return static_cast<double>(8 * kEach * 4) / took / 1e9;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"), noinline)) double fma_wide(long turns) {
  for (long i = 0; i < turns; ++i)  // in registers that nothing else uses for as long as it takes
    asm volatile(
        "vfmadd231ps %%zmm30, %%zmm31, %%zmm16\n\tvfmadd231ps %%zmm30, %%zmm31, %%zmm17\n\t"
        "vfmadd231ps %%zmm30, %%zmm31, %%zmm18\n\tvfmadd231ps %%zmm30, %%zmm31, %%zmm19\n\t"
        "vfmadd231ps %%zmm30, %%zmm31, %%zmm20\n\tvfmadd231ps %%zmm30, %%zmm31, %%zmm21\n\t"
        "vfmadd231ps %%zmm30, %%zmm31, %%zmm22\n\tvfmadd231ps %%zmm30, %%zmm31, %%zmm23\n\t"
        "vfmadd231ps %%zmm30, %%zmm31, %%zmm24\n\tvfmadd231ps %%zmm30, %%zmm31, %%zmm25" ::
            : "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25");
  return 10.0 * 16 * 2 * static_cast<double>(turns);
}

double peak() {
  double done = 0;
  const double took = best([&] { done = fma_wide(20000); }, 200);
  return done / took / 1e9;
}
#else
double peak() { return 0; }
#endif

struct Work {
  std::vector<float> x, y, mask;
  std::vector<float> scale;
  const char* bank;
  size_t bank_size, at = 0;

  const void* next(size_t bytes) {
    if (at + bytes > bank_size) at = 0;
    const void* found = bank + at;
    at += (bytes + 63) / 64 * 64;
    return found;
  }
};

struct Sum {
  double bytes = 0, operations = 0;
};

// One decoder layer: seven sites.
Sum layer(const Case& c, Work& work, const Arithmetic& arithmetic, Pool pool) {
  Sum sum;
  for (const Site& site : kSites) {
    LowRankAdd call{};
    call.activations = Dtype::kFloat;
    call.ports = c.ports;
    const int64_t rank = c.adapters * kRank;
    const int64_t x_dims[] = {c.rows, c.tokens, site.d_in}, base_dims[] = {c.rows, c.tokens, site.d_out};
    const int64_t a_dims[] = {rank, site.d_in}, b_dims[] = {rank, site.d_out}, mask_dims[] = {c.rows, 1, rank};
    const int64_t scale_dims[] = {rank, 2};
    const bool codes = c.ports == Dtype::kInt8;
    size_t ones = 0;
    const Fault fault = measure({{base_dims, 3}, {x_dims, 3}, {a_dims, 2}, {b_dims, 2}, {mask_dims, 3}, {scale_dims, 2}, codes},
                                &call, &ones);
    if (fault) std::puts(fault.text), std::exit(1);
    const size_t a = static_cast<size_t>(rank * site.d_in) * width(c.ports);
    const size_t b = static_cast<size_t>(rank * site.d_out) * width(c.ports);
    call.x = work.x.data();
    call.base = call.y = work.y.data();
    call.a = work.next(a);
    call.b = work.next(b);
    call.mask = work.mask.data();
    call.scale = codes ? work.scale.data() : nullptr;
    if (const Fault wrong = compute(call, arithmetic, pool)) std::puts(wrong.text), std::exit(1);
    sum.bytes += static_cast<double>(a + b);
    sum.operations += 2.0 * static_cast<double>(c.rows * c.tokens * kRank * (site.d_in + site.d_out));
  }
  return sum;
}

void run(const Case& c, const std::vector<float>& memory, bool cold, const Arithmetic& arithmetic, Pool pool, double limit) {
  Work work;
  const size_t rows = static_cast<size_t>(c.rows * c.tokens);
  work.x.assign(rows * 8192, 0.01f);
  work.y.assign(rows * 8192, 0.0f);
  work.mask.assign(static_cast<size_t>(c.rows * c.adapters * kRank), 0.0f);
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t k = 0; k < kRank; ++k)
      work.mask[static_cast<size_t>(row * c.adapters * kRank + row * c.adapters / c.rows * kRank + k)] = 1.0f;
  work.scale.assign(static_cast<size_t>(c.adapters * kRank * 2), 0.01f);
  work.bank = reinterpret_cast<const char*>(memory.data());
  work.bank_size = memory.size() * sizeof(float);
  const Sum sum = layer(c, work, arithmetic, pool);
  const double one = best([&] { layer(c, work, arithmetic, pool); }, 3);
  const double took = best(
      [&] {
        if (!cold) work.at = 0;
        layer(c, work, arithmetic, pool);
      },
      std::max(12, std::min(1000, static_cast<int>(0.3 / one))));
  std::printf("%-34s %s  %9.1f us/layer  %6.1f GB/s (%3.0f %%)  %6.1f GFLOP/s\n", c.name, cold ? "cold" : "warm", took * 1e6,
              sum.bytes / took / 1e9, 100 * sum.bytes / took / 1e9 / limit, sum.operations / took / 1e9);
}

}  // namespace

int main(int count, char** words) {
  const size_t threads = count > 1 ? static_cast<size_t>(std::atoi(words[1])) : 1;
  harness::Threads pool(threads);
  const Arithmetic* arithmetic = nullptr;
  if (const Fault fault = choose(&arithmetic)) return std::puts(fault.text), 1;
  std::vector<float> memory(size_t{64} << 20);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i % 13) * 1e-3f;
  const double limit = read_bandwidth(memory, pool.pool());
  std::printf("%s, %zu threads: memory %.1f GB/s, peak %.1f GFLOP/s a thread\n", arithmetic->isa, threads, limit, peak());
  const Case cases[] = {{"1 row, 1 adapter, float32", 1, 1, 1, Dtype::kFloat},
                        {"1 row, 1 adapter, float16", 1, 1, 1, Dtype::kFloat16},
                        {"1 row, 1 adapter, int8", 1, 1, 1, Dtype::kInt8},
                        {"8 rows, 8 adapters, float32", 8, 1, 8, Dtype::kFloat},
                        {"8 rows, 8 adapters, float16", 8, 1, 8, Dtype::kFloat16},
                        {"8 rows, 8 adapters, bfloat16", 8, 1, 8, Dtype::kBfloat16},
                        {"8 rows, 8 adapters, int8", 8, 1, 8, Dtype::kInt8},
                        {"32 rows, 32 adapters, float32", 32, 1, 32, Dtype::kFloat},
                        {"32 rows, 32 adapters, int8", 32, 1, 32, Dtype::kInt8},
                        {"8 rows, 1 adapter, float32", 8, 1, 1, Dtype::kFloat},
                        {"32 rows, 4 adapters, float32", 32, 1, 4, Dtype::kFloat},
                        {"8 rows x 64 tokens, 8, float32", 8, 64, 8, Dtype::kFloat},
                        {"8 rows x 64 tokens, 8, float16", 8, 64, 8, Dtype::kFloat16},
                        {"8 rows x 64 tokens, 8, int8", 8, 64, 8, Dtype::kInt8},
                        {"1 row x 512 tokens, 1, float32", 1, 512, 1, Dtype::kFloat}};
  for (const Case& c : cases)
    for (const bool cold : {true, false})
      if (cold || c.tokens > 1 || c.adapters < 32) run(c, memory, cold, *arithmetic, pool.pool(), limit);
}
