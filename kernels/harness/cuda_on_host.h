// As much of CUDA as the kernels of LowRankAdd use, on the host: so that their arithmetic is tested where there is no
// GPU. It is slow and strict.
//
// The blocks of a grid run one after the other, and the threads of a block as fibers: each runs until it meets the
// others. A barrier, ballot or shuffle that not all threads reach stops the program. The order of the threads between
// two barriers can be turned (`order`), so that a barrier that is missing shows as a different result. Shared memory
// holds NaNs when a block begins, and tensor cores take no more bits of a number than theirs do.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1)
      : x(static_cast<unsigned>(x)), y(static_cast<unsigned>(y)), z(static_cast<unsigned>(z)) {}
};

namespace cuda_on_host {

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

// Bytes that kernels read of an array; arrays that nobody watches count nothing.
struct Watch {
  const char* begin = nullptr;
  const char* end = nullptr;
  int64_t bytes = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf where;
  std::vector<char> stack;
  bool begun = false, done = false, waits = false;
  int meeting = 0;  // what it waits for: 0 the block, else its warp and the kind of exchange
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned current = 0, threads = 0;
  uint64_t lanes[32][32];  // a slot for each lane of each warp
  int votes = 0;
  alignas(64) char shared[48 << 10];  // what a block gets without asking for more
  int order = 0;
  std::vector<Watch> watches;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline dim3& grid_dim() {
  static dim3 value;
  return value;
}
inline dim3& block_index() {
  static dim3 value;
  return value;
}
inline dim3& thread_index() {
  static dim3 value;
  return value;
}

inline void reads(const void* at, int64_t bytes, size_t bound) {
  if (reinterpret_cast<uintptr_t>(at) % bound != 0) stop("a vector is read off its bounds");
  for (Watch& watch : machine().watches) {
    if (at >= watch.begin && at < watch.end) watch.bytes += bytes;
  }
}

template <class T>
T& shared() {
  static_assert(sizeof(T) <= sizeof(Machine::shared), "48 KiB of shared memory");
  return *reinterpret_cast<T*>(machine().shared);
}

// Until all threads of the block (0) or of the warp have come.
inline void meet(int meeting) {
  Machine& all = machine();
  Fiber& own = *all.fibers[all.current];
  own.waits = true;
  own.meeting = meeting;
  if (_setjmp(own.where) == 0) _longjmp(all.scheduler, 1);
}

inline void run_fiber() {
  Machine& all = machine();
  all.body();
  all.fibers[all.current]->done = true;
  _longjmp(all.scheduler, 1);
}

inline void resume(unsigned index) {
  Machine& all = machine();
  Fiber& fiber = *all.fibers[index];
  all.current = index;
  thread_index().x = index;
  if (_setjmp(all.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.where, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

// Lets go whoever has all companions: true if anybody did.
inline bool release() {
  Machine& all = machine();
  bool any = false;
  auto let_go = [&](unsigned begin, unsigned end, bool block) {
    const Fiber& first = *all.fibers[begin];
    for (unsigned i = begin; i < end; ++i) {
      const Fiber& fiber = *all.fibers[i];
      if (fiber.done || !fiber.waits || (fiber.meeting == 0) != block || fiber.meeting != first.meeting) return;
    }
    for (unsigned i = begin; i < end; ++i) all.fibers[i]->waits = false;
    any = true;
  };
  let_go(0, all.threads, true);
  for (unsigned warp = 0; warp < all.threads; warp += 32) let_go(warp, std::min(warp + 32, all.threads), false);
  return any;
}

inline void run_block() {
  Machine& all = machine();
  std::memset(all.shared, 0xff, sizeof(all.shared));
  all.votes = 0;
  while (all.fibers.size() < all.threads) {
    all.fibers.push_back(std::make_unique<Fiber>());
    all.fibers.back()->stack.resize(64 << 10);
  }
  for (unsigned i = 0; i < all.threads; ++i) {
    Fiber& fiber = *all.fibers[i];
    fiber.begun = fiber.done = fiber.waits = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, run_fiber, 0);
  }
  for (;;) {
    bool ran = false, left = false;
    for (unsigned i = 0; i < all.threads; ++i) {
      const unsigned index = all.order ? all.threads - 1 - i : i;
      Fiber& fiber = *all.fibers[index];
      if (!fiber.done && !fiber.waits) {
        resume(index);
        ran = true;
      }
      left |= !fiber.done;
    }
    if (!left) return;
    if (!release() && !ran) stop("threads wait for others that never come");
  }
}

inline void run_grid(dim3 grid, unsigned threads, std::function<void()> body) {
  Machine& all = machine();
  if (grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0 || grid.z == 0) stop("no such grid");
  all.threads = threads;
  all.body = std::move(body);
  grid_dim() = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index() = dim3(x, y, z);
        run_block();
      }
    }
  }
}

template <class V>
V exchange(V value, unsigned from, int kind) {
  static_assert(sizeof(V) <= 8, "one slot");
  Machine& all = machine();
  const unsigned warp = all.current / 32, lane = all.current % 32;
  std::memcpy(&all.lanes[warp][lane], &value, sizeof(V));
  meet(kind);
  V got;
  std::memcpy(&got, &all.lanes[warp][from], sizeof(V));
  meet(kind + 1);
  return got;
}

inline float half_to_float(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  float size;
  if (exponent == 31) {
    size = mantissa ? std::nanf("") : INFINITY;
  } else {
    const float count = static_cast<float>(exponent ? mantissa + 1024 : mantissa);
    size = std::ldexp(count, static_cast<int>(exponent ? exponent : 1) - 25);
  }
  return half & 0x8000 ? -size : size;
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value != value) return 0x7e00;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  const int unit = size < 0x1p-14f ? -24 : std::ilogb(size) - 10;  // the last bit that a half of this size holds
  const float count = std::nearbyint(std::ldexp(size, -unit));
  if (unit == -24) return sign | static_cast<uint16_t>(count);
  // A count of 2048 carries into the exponent by itself.
  return sign | static_cast<uint16_t>(((unit + 24) << 10) + static_cast<int>(count));
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::thread_index())
#define blockIdx (cuda_on_host::block_index())
#define gridDim (cuda_on_host::grid_dim())
#define ADAPTERX_SHARED(Type, name) Type& name = cuda_on_host::shared<Type>()
#define ADAPTERX_UNPACK(...) __VA_ARGS__
#define ADAPTERX_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_on_host::run_grid(grid, block, [=] { ADAPTERX_UNPACK kernel(__VA_ARGS__); }))

inline void __syncthreads() { cuda_on_host::meet(0); }

inline int __syncthreads_or(int mine) {
  cuda_on_host::Machine& all = cuda_on_host::machine();
  __syncthreads();
  all.votes = 0;
  __syncthreads();
  all.votes |= mine != 0;
  __syncthreads();
  return all.votes;
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  cuda_on_host::Machine& all = cuda_on_host::machine();
  const unsigned warp = all.current / 32;
  all.lanes[warp][all.current % 32] = mine;
  cuda_on_host::meet(1);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(all.lanes[warp][lane] & 1) << lane;
  cuda_on_host::meet(2);
  return ballot;
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int step) {
  return cuda_on_host::exchange(value, (cuda_on_host::machine().current % 32) ^ static_cast<unsigned>(step), 3);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }

using cudaError_t = int;
constexpr int cudaErrorInvalidValue = 1, cudaMemcpyDeviceToDevice = 3, cudaDevAttrMultiProcessorCount = 16;
inline int cudaGetDevice(int*) { return 0; }
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = 4, 0; }
inline const char* cudaGetErrorString(int error) { return error ? "an error" : "no error"; }
inline int cudaGetLastError() { return 0; }
inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, CUstream_st*) {
  std::memcpy(to, from, bytes);
  return 0;
}

// Warp-wide matrices. Lane 0 holds and does everything, and nobody waits: what a lane must see of the others' writes,
// the kernel has to wait for itself.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };
namespace precision {
struct tf32;
}

inline bool is_first_lane() { return cuda_on_host::machine().current % 32 == 0; }

inline float to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float __float_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;
  std::memcpy(&value, &bits, 4);
  return to_tf32(value);
}

template <class Use, int m, int n, int k, class Element, class Layout = void>
struct fragment {
  static constexpr int num_elements = m * n;  // of the largest; lanes but the first hold zeros
  float x[m * n] = {};
};

inline void check_place(const float* at, unsigned line) {
  if (reinterpret_cast<uintptr_t>(at) % 32 != 0 || line % 4 != 0) cuda_on_host::stop("a matrix lies off its bounds");
}

template <class Use, class Layout, class E>
void load_matrix_sync(fragment<Use, 16, 16, 8, E, Layout>& to, const float* at, unsigned line) {
  check_place(at, line);
  constexpr bool is_left = std::is_same<Use, matrix_a>::value, by_row = std::is_same<Layout, row_major>::value;
  constexpr int rows = is_left ? 16 : 8, columns = is_left ? 8 : 16;
  if (!is_first_lane()) return;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) to.x[r * columns + c] = by_row ? at[r * line + c] : at[c * line + r];
  }
}

template <class Left, class Right, class Sum>
void mma_sync(Sum& out, const Left& left, const Right& right, const Sum& in) {
  if (!is_first_lane()) return;
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      float total = in.x[r * 16 + c];
      for (int k = 0; k < 8; ++k) total += to_tf32(left.x[r * 8 + k]) * to_tf32(right.x[k * 16 + c]);
      out.x[r * 16 + c] = total;
    }
  }
}

template <class Fragment>
void fill_fragment(Fragment& out, float value) {
  std::fill(out.x, out.x + 256, value);
}

template <class Fragment>
void store_matrix_sync(float* at, const Fragment& from, unsigned line, layout_t) {
  check_place(at, line);
  if (!is_first_lane()) return;
  for (int r = 0; r < 16; ++r) std::copy(from.x + r * 16, from.x + r * 16 + 16, at + r * line);
}

}  // namespace nvcuda::wmma
