// Many callers at once, each with threads of its own, over the same adapters: right in every value, and without a data race
// where this is built with -fsanitize=thread. In ONNX Runtime itself a thread sanitizer sees too little to tell right from wrong.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

using namespace adapterx;

struct Case {
  int64_t rows, tokens, segments, rank, d_in, d_out;
  bool composed, in_place;
};

constexpr Case kCases[] = {
    {1, 1, 1, 16, 2048, 2048, false, true},  {8, 1, 8, 8, 1024, 512, false, false}, {3, 1, 3, 16, 600, 700, true, true},
    {2, 70, 2, 8, 260, 300, false, true},    {1, 200, 1, 16, 130, 256, false, false}, {16, 1, 4, 16, 1024, 1024, true, true},
    {5, 3, 6, 7, 100, 90, true, false},
};

std::vector<float> numbers(std::mt19937& random, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

struct Data {
  Case c;
  std::vector<float> base, x, a, b, mask, expected;

  explicit Data(const Case& of) : c(of) {
    std::mt19937 random(7);
    const int64_t rows = c.rows * c.tokens, rank = c.segments * c.rank;
    base = numbers(random, rows * c.d_out);
    x = numbers(random, rows * c.d_in);
    a = numbers(random, rank * c.d_in);
    b = numbers(random, rank * c.d_out);
    mask.assign(static_cast<size_t>(c.rows * rank), 0.0f);
    for (int64_t row = 0; row < c.rows; ++row)
      for (int64_t k = 0; k < c.rank; ++k) {
        mask[static_cast<size_t>(row * rank + row % c.segments * c.rank + k)] = 1.0f;
        if (c.composed) mask[static_cast<size_t>(row * rank + (row + 1) % c.segments * c.rank + k)] = 0.5f;
      }
    expected = base;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < rank; ++j) {
        const double weight = mask[static_cast<size_t>(row / c.tokens * rank + j)];
        double low = 0;
        for (int64_t k = 0; k < c.d_in; ++k)
          low += static_cast<double>(x[static_cast<size_t>(row * c.d_in + k)]) * a[static_cast<size_t>(j * c.d_in + k)];
        for (int64_t k = 0; weight != 0 && k < c.d_out; ++k)
          expected[static_cast<size_t>(row * c.d_out + k)] +=
              static_cast<float>(low * weight * b[static_cast<size_t>(j * c.d_out + k)]);
      }
  }

  // How many values are wrong.
  int64_t wrong(const Arithmetic& arithmetic, Pool pool) const {
    const int64_t rank = c.segments * c.rank;
    const int64_t x_dims[] = {c.rows, c.tokens, c.d_in}, base_dims[] = {c.rows, c.tokens, c.d_out};
    const int64_t a_dims[] = {rank, c.d_in}, b_dims[] = {rank, c.d_out}, mask_dims[] = {c.rows, 1, rank};
    LowRankAdd call{};
    size_t ones = 0;
    if (measure({{base_dims, 3}, {x_dims, 3}, {a_dims, 2}, {b_dims, 2}, {mask_dims, 3}, {}, false}, &call, &ones)) return -1;
    std::vector<float> y = c.in_place ? base : std::vector<float>(base.size());
    call.base = c.in_place ? y.data() : base.data();
    call.x = x.data();
    call.a = a.data();
    call.b = b.data();
    call.mask = mask.data();
    call.y = y.data();
    if (compute(call, arithmetic, pool)) return -1;
    int64_t count = 0;
    for (size_t i = 0; i < y.size(); ++i) count += !(std::fabs(y[i] - expected[i]) <= 2e-3f + 1e-4f * std::fabs(expected[i]));
    return count;
  }
};

}  // namespace

int main() {
  const Arithmetic* arithmetic = nullptr;
  if (const Fault fault = choose(&arithmetic)) return std::puts(fault.text), 2;
  std::vector<Data> all(std::begin(kCases), std::end(kCases));
  std::atomic<int64_t> wrong{0}, calls{0};
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < 3; ++caller)
    callers.emplace_back([&, caller] {
      harness::Threads threads(1 + caller);
      for (size_t turn = 0; turn < 20 * all.size(); ++turn, ++calls)
        if (const int64_t found = all[(turn + caller) % all.size()].wrong(*arithmetic, threads.pool())) {
          std::printf("case %zu: %lld wrong\n", (turn + caller) % all.size(), static_cast<long long>(found));
          ++wrong;
        }
    });
  for (std::thread& caller : callers) caller.join();
  std::printf("%lld calls, %lld wrong\n", static_cast<long long>(calls), static_cast<long long>(wrong));
  return wrong ? 1 : 0;
}
