// How a call becomes units of work. There are two ways:
//   whole   a unit is some rows of one group, from x to y. One pass over the threads, and enough groups or rows for all of them.
//   split   first units of x @ a.T (a segment's rows, some of its columns), then units of + low @ b (a group's rows, some
//           columns of y). Two passes, which keep all threads busy with one row; a segment of several groups is read once.
// Either way each value of y is one unit's own, and what a unit computes does not depend on which thread runs it.
#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <thread>

#include "compute.h"
#include "plan.h"

namespace adapterx {
namespace {

constexpr int64_t kRowsPerUnit = 64, kPanel = 512, kNarrowest = 256;

int64_t threads() {
  static const int64_t count = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return count;
}

const Sums<float>& sums_of(const Arithmetic& arithmetic, float) { return arithmetic.sums; }
const Sums<double>& sums_of(const Arithmetic&, double) { return double_sums(); }

const char* at(const void* array, int64_t index, int64_t row, Dtype type) {
  return static_cast<const char*>(array) + index * row * static_cast<int64_t>(width(type));
}

// Some rows of a group or of a segment, and some of its columns (of a, or of y).
struct Unit {
  int64_t of;
  int64_t from_row, to_row;
  int64_t from, to;
};

template <class Real>
struct Job {
  const LowRankAdd& call;
  const Arithmetic& arithmetic;
  const Sums<Real>& sums;
  Plan plan{};
  const Real* mask = nullptr;  // [mask_count, mask_width]
  const Unit* units = nullptr;
  std::atomic<bool> out_of_memory{false};
  // The split way's: low of every group [count, columns], and of every segment its rows and where their low lies.
  Real** low = nullptr;
  const Row** rows = nullptr;
  Real*** places = nullptr;
  const Real** widened = nullptr;  // by row of x, or null

  bool half() const { return width(call.activations) == 2; }
};

template <class Real>
const Real** rows_of_x(const Job<Real>& job, const Row* rows, int64_t count, Arena& arena) {
  const LowRankAdd& call = job.call;
  const Real** x = arena.take<const Real*>(count);
  for (int64_t i = 0; i < count; ++i) {
    const char* row = at(call.x, rows[i].x, call.d_in, call.activations);
    x[i] = reinterpret_cast<const Real*>(row);
    if constexpr (sizeof(Real) == sizeof(float)) {
      if (job.widened) {
        x[i] = job.widened[rows[i].x];
      } else if (job.half()) {
        float* wide = arena.take<float>(call.d_in);
        job.arithmetic.widen[static_cast<int>(call.activations)](row, call.d_in, wide);
        x[i] = wide;
      }
    }
  }
  return x;
}

// low = (x @ a.T) * mask for some rows and the columns [from, to) of the bank.
template <class Real>
void shrink(const Job<Real>& job, const Row* rows, const Real* const* x, Real* const* low, int64_t count, int64_t from,
            int64_t to) {
  const LowRankAdd& call = job.call;
  job.sums.shrink[static_cast<int>(call.ports)]({x, low, count, at(call.a, from, call.d_in, call.ports), to - from, call.d_in});
  const bool one = call.mask_width == 1;
  for (int64_t i = 0; i < count; ++i) {
    const Real* mask = job.mask + rows[i].mask * call.mask_width;
    for (int64_t j = from; j < to; ++j) low[i][j - from] *= mask[one ? 0 : j];
    if (!call.scale) continue;
    for (int64_t j = from; j < to; ++j)
      low[i][j - from] *= static_cast<Real>(call.scale[2 * j]) * static_cast<Real>(call.scale[2 * j + 1]);
  }
}

// y = base + low @ b for some rows of a group, and the columns [from, to) of y.
template <class Real>
void expand(const Job<Real>& job, const Group& group, const Row* rows, const Real* const* low, const Unit& unit, Arena& arena) {
  const LowRankAdd& call = job.call;
  const int64_t count = unit.to_row - unit.from_row;
  const void** b = arena.take<const void*>(group.columns);
  int64_t k = 0;
  for (int64_t s = 0; s < group.segment_count; ++s) {
    const Segment& segment = job.plan.segments[group.segments[s]];
    for (int64_t j = segment.from; j < segment.to; ++j) b[k++] = at(call.b, j, call.d_out, call.ports);
  }
  const Real** base = arena.take<const Real*>(count);
  Real** y = arena.take<Real*>(count);
  const auto add = [&](int64_t from, int64_t to, int64_t shift) {
    job.sums.expand[static_cast<int>(call.ports)]({base, y, low, count, b, k, from, to, shift});
  };
  if (!job.half()) {
    for (int64_t i = 0; i < count; ++i) {
      base[i] = static_cast<const Real*>(call.base) + rows[i].x * call.d_out;
      y[i] = static_cast<Real*>(call.y) + rows[i].x * call.d_out;
    }
    return add(unit.from, unit.to, 0);
  }
  if constexpr (sizeof(Real) == sizeof(float)) {
    const int type = static_cast<int>(call.activations);
    const int64_t panel = count < 4 ? std::min(unit.to - unit.from, 16 * kPanel) : kPanel;
    float* wide = arena.take<float>(count * panel);
    for (int64_t i = 0; i < count; ++i) base[i] = y[i] = wide + i * panel;
    for (int64_t from = unit.from; from < unit.to; from += panel) {
      const int64_t many = std::min(panel, unit.to - from);
      const auto place = [&](int64_t i) { return rows[i].x * call.d_out + from; };
      for (int64_t i = 0; i < count; ++i)
        job.arithmetic.widen[type](static_cast<const uint16_t*>(call.base) + place(i), many, y[i]);
      add(0, many, from);
      for (int64_t i = 0; i < count; ++i)
        job.arithmetic.narrow[type](y[i], many, static_cast<uint16_t*>(call.y) + place(i));
    }
  }
}

// ---- units: what runs on the threads ------------------------------------------------------------------------------

template <class Real>
void whole_unit(Job<Real>& job, const Unit& unit, Arena& arena) {
  const Group& group = job.plan.groups[unit.of];
  const Row* rows = group.rows + unit.from_row;
  const int64_t count = unit.to_row - unit.from_row;
  const Real** x = rows_of_x(job, rows, count, arena);
  Real* values = arena.take<Real>(count * group.columns);
  Real** low = arena.take<Real*>(count);
  int64_t before = 0;
  for (int64_t s = 0; s < group.segment_count; ++s) {
    const Segment& segment = job.plan.segments[group.segments[s]];
    for (int64_t i = 0; i < count; ++i) low[i] = values + i * group.columns + before;
    shrink(job, rows, x, low, count, segment.from, segment.to);
    before += segment.to - segment.from;
  }
  for (int64_t i = 0; i < count; ++i) low[i] = values + i * group.columns;
  expand(job, group, rows, low, unit, arena);
}

template <class Real>
void shrink_unit(Job<Real>& job, const Unit& unit, Arena& arena) {
  const Segment& segment = job.plan.segments[unit.of];
  const Row* rows = job.rows[unit.of] + unit.from_row;
  const int64_t count = unit.to_row - unit.from_row;
  Real** low = arena.take<Real*>(count);
  for (int64_t i = 0; i < count; ++i) low[i] = job.places[unit.of][unit.from_row + i] + (unit.from - segment.from);
  shrink(job, rows, rows_of_x(job, rows, count, arena), low, count, unit.from, unit.to);
}

template <class Real>
void expand_unit(Job<Real>& job, const Unit& unit, Arena& arena) {
  const Group& group = job.plan.groups[unit.of];
  const int64_t count = unit.to_row - unit.from_row;
  Real** low = arena.take<Real*>(count);
  for (int64_t i = 0; i < count; ++i) low[i] = job.low[unit.of] + (unit.from_row + i) * group.columns;
  expand(job, group, group.rows + unit.from_row, low, unit, arena);
}

template <class Real, void (*kUnit)(Job<Real>&, const Unit&, Arena&)>
void task(void* job_of, size_t unit) {
  Job<Real>& job = *static_cast<Job<Real>*>(job_of);
  try {
    Scratch scratch;
    kUnit(job, job.units[unit], *scratch);
  } catch (const std::bad_alloc&) {
    job.out_of_memory = true;
  }
}

template <class Real, void (*kUnit)(Job<Real>&, const Unit&, Arena&)>
void run(Job<Real>& job, const Unit* units, int64_t count, bool small, const Pool& pool) {
  job.units = units;
  if (small || count == 1) {
    for (int64_t i = 0; i < count; ++i) task<Real, kUnit>(&job, static_cast<size_t>(i));
  } else {
    pool.run(pool.self, task<Real, kUnit>, &job, static_cast<size_t>(count));
  }
}

// ---- how to cut ---------------------------------------------------------------------------------------------------

int64_t pieces(int64_t rows) { return (rows + kRowsPerUnit - 1) / kRowsPerUnit; }

// Cuts `of` into pieces of rows, and each of them into `parts` of its columns.
int64_t cut(Unit* units, int64_t of, int64_t rows, int64_t from, int64_t to, int64_t parts, int64_t step) {
  int64_t count = 0;
  const int64_t each = ((to - from + parts - 1) / parts + step - 1) / step * step;
  for (int64_t row = 0; row < rows; row += kRowsPerUnit)
    for (int64_t at = from; at < to; at += each)
      units[count++] = {of, row, std::min(rows, row + kRowsPerUnit), at, std::min(to, at + each)};
  return count;
}

// Is it over before other threads have begun? They take some microseconds, in which one does about this much.
template <class Real>
bool small(const Job<Real>& job, int64_t row_length) {
  double elements = 0, products = 0;
  for (int64_t s = 0; s < job.plan.segment_count; ++s) {
    const Segment& segment = job.plan.segments[s];
    const double own = static_cast<double>((segment.to - segment.from) * row_length);
    elements += own;
    products += own * static_cast<double>(segment.rows);
  }
  return elements * static_cast<double>(width(job.call.ports)) < 1e5 && products < 3e5;
}

template <class Real>
void run_whole(Job<Real>& job, int64_t count, const Pool& pool, Arena& arena) {
  Unit* units = arena.take<Unit>(count);
  int64_t made = 0;
  for (int64_t g = 0; g < job.plan.group_count; ++g)
    made += cut(units + made, g, job.plan.groups[g].count, 0, job.call.d_out, 1, 1);
  run<Real, whole_unit<Real>>(job, units, made, small(job, job.call.d_in + job.call.d_out), pool);
}

// Where the low values of every row of every segment lie: side by side for a row, so that the second pass reads them straight.
template <class Real>
void place(Job<Real>& job, Arena& arena) {
  const Plan& plan = job.plan;
  job.low = arena.take<Real*>(plan.group_count);
  job.rows = arena.take<const Row*>(plan.segment_count);
  job.places = arena.take<Real**>(plan.segment_count);
  Row** rows = arena.take<Row*>(plan.segment_count);
  int64_t* filled = arena.take<int64_t>(plan.segment_count);
  for (int64_t s = 0; s < plan.segment_count; ++s) {
    job.rows[s] = rows[s] = arena.take<Row>(plan.segments[s].rows);
    job.places[s] = arena.take<Real*>(plan.segments[s].rows);
    filled[s] = 0;
  }
  for (int64_t g = 0; g < plan.group_count; ++g) {
    const Group& group = plan.groups[g];
    job.low[g] = arena.take<Real>(group.count * group.columns);
    int64_t before = 0;
    for (int64_t k = 0; k < group.segment_count; ++k) {
      const int64_t s = group.segments[k];
      for (int64_t i = 0; i < group.count; ++i, ++filled[s]) {
        rows[s][filled[s]] = group.rows[i];
        job.places[s][filled[s]] = job.low[g] + i * group.columns + before;
      }
      before += plan.segments[s].to - plan.segments[s].from;
    }
  }
}

template <class Real>
void widen_x(Job<Real>& job, Arena& arena) {
  const LowRankAdd& call = job.call;
  const Real** widened = arena.take<const Real*>(call.rows);
  for (int64_t g = 0; g < job.plan.group_count; ++g) {
    const Group& group = job.plan.groups[g];
    const Real** x = rows_of_x(job, group.rows, group.count, arena);
    for (int64_t i = 0; i < group.count; ++i) widened[group.rows[i].x] = x[i];
  }
  job.widened = widened;
}

template <class Real>
void run_split(Job<Real>& job, const Pool& pool, Arena& arena) {
  const LowRankAdd& call = job.call;
  const Plan& plan = job.plan;
  place(job, arena);
  if (job.half()) widen_x(job, arena);
  int64_t total = 0;
  for (int64_t s = 0; s < plan.segment_count; ++s) total += pieces(plan.segments[s].rows);
  int64_t parts = threads() / std::gcd(total, threads());
  Unit* units = arena.take<Unit>(total * parts);
  int64_t made = 0;
  for (int64_t s = 0; s < plan.segment_count; ++s) {
    const Segment& segment = plan.segments[s];
    made += cut(units + made, s, segment.rows, segment.from, segment.to, parts, segment.rows < 4 ? 1 : 4);
  }
  run<Real, shrink_unit<Real>>(job, units, made, small(job, call.d_in), pool);
  total = made = 0;
  for (int64_t g = 0; g < plan.group_count; ++g) total += pieces(plan.groups[g].count);
  parts = threads() / std::gcd(total, threads());
  units = arena.take<Unit>(total * parts);
  for (int64_t g = 0; g < plan.group_count; ++g)
    made += cut(units + made, g, plan.groups[g].count, 0, call.d_out, parts, kNarrowest);
  run<Real, expand_unit<Real>>(job, units, made, small(job, call.d_out), pool);
}

// ---- a call -------------------------------------------------------------------------------------------------------

void copy_all(const LowRankAdd& call) {
  const size_t bytes = static_cast<size_t>(call.rows * call.d_out) * width(call.activations);
  if (call.y != call.base && bytes) std::memcpy(call.y, call.base, bytes);
}

void copy_idle(const LowRankAdd& call, const Plan& plan) {
  if (call.y == call.base) return;
  const size_t bytes = static_cast<size_t>(call.d_out) * width(call.activations);
  for (int64_t i = 0; i < plan.idle_count; ++i) {
    const size_t from = static_cast<size_t>(plan.idle[i].x) * bytes;
    std::memcpy(static_cast<char*>(call.y) + from, static_cast<const char*>(call.base) + from, bytes);
  }
}

template <class Real>
Fault nan_in(const LowRankAdd& call, const Real* mask) {
  int64_t i = 0;
  while (!std::isnan(mask[i])) ++i;
  Fault fault;
  std::snprintf(fault.text, sizeof fault.text, "LowRankAdd: mask holds NaN, at row %" PRId64 ", column %" PRId64,
                i / call.mask_width, i % call.mask_width);
  return fault;
}

// The mask as `Real`s, and a bit for every value of it that is not zero.
template <class Real>
Fault read_mask(Job<Real>& job, uint64_t* bits, Arena& arena) {
  const LowRankAdd& call = job.call;
  const int64_t count = call.mask_count * call.mask_width, words = (call.rank + 63) / 64;
  job.mask = static_cast<const Real*>(call.mask);
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (job.half()) {
      float* wide = arena.take<float>(count);
      job.arithmetic.widen[static_cast<int>(call.activations)](call.mask, count, wide);
      job.mask = wide;
    }
  }
  bool numbers = true;
  for (int64_t row = 0; row < call.mask_count; ++row) {
    uint64_t* own = bits + row * words;
    numbers &= job.sums.scan(job.mask + row * call.mask_width, call.mask_width, own);
    if (call.mask_width == call.rank || !numbers) continue;
    const uint64_t all = own[0] ? ~uint64_t{0} : 0;
    for (int64_t w = 0; w < words; ++w) own[w] = all;
    if (call.rank % 64) own[words - 1] &= (uint64_t{1} << call.rank % 64) - 1;
  }
  return numbers ? Fault{} : nan_in(call, job.mask);
}

template <class Real>
Fault compute_as(const LowRankAdd& call, const Arithmetic& arithmetic, const Pool& pool) {
  Scratch scratch;
  Arena& arena = *scratch;
  Job<Real> job{call, arithmetic, sums_of(arithmetic, Real{})};
  uint64_t* bits = arena.take<uint64_t>(call.mask_count * ((call.rank + 63) / 64));
  if (Fault fault = read_mask(job, bits, arena)) return fault;
  job.plan = make_plan(call, bits, arena);
  const Plan& plan = job.plan;
  if (!plan.group_count) return copy_all(call), Fault{};
  copy_idle(call, plan);
  int64_t units = 0, most = 0;
  for (int64_t g = 0; g < plan.group_count; ++g) units += pieces(plan.groups[g].count);
  for (int64_t s = 0; s < plan.segment_count; ++s) most = std::max(most, plan.segments[s].groups);
  // Reading a segment for each of many rows costs nothing beside the sums; for each of few it is what costs.
  const bool apart = most == 1 || call.rows >= 16 * plan.group_count;
  if (apart && (units % threads() == 0 || units >= 4 * threads()))
    run_whole(job, units, pool, arena);
  else
    run_split(job, pool, arena);
  Fault fault;
  if (job.out_of_memory) std::snprintf(fault.text, sizeof fault.text, "LowRankAdd: out of memory");
  return fault;
}

}  // namespace

Fault compute(const LowRankAdd& call, const Arithmetic& arithmetic, const Pool& pool) noexcept {
  if (!call.rows || !call.d_out) return {};
  if (!call.rank) return copy_all(call), Fault{};
  try {
    return call.activations == Dtype::kDouble ? compute_as<double>(call, arithmetic, pool)
                                              : compute_as<float>(call, arithmetic, pool);
  } catch (const std::exception& error) {
    Fault fault;
    std::snprintf(fault.text, sizeof fault.text, "LowRankAdd: %s", error.what());
    return fault;
  }
}

}  // namespace adapterx
