#include "plan.h"

#include <cstring>

namespace adapterx {
namespace {

struct Patterns {
  const uint64_t** bits;  // the distinct ones but zero
  int64_t* of;            // row of the mask -> which; `count` for a row of zeros
  int64_t count;
};

bool zero(const uint64_t* bits, int64_t words) {
  for (int64_t w = 0; w < words; ++w)
    if (bits[w]) return false;
  return true;
}

uint64_t hash(const uint64_t* bits, int64_t words) {
  uint64_t mixed = 0;
  for (int64_t w = 0; w < words; ++w) {
    mixed = (mixed ^ bits[w]) * 0x9e3779b97f4a7c15u;
    mixed ^= mixed >> 29;
  }
  return mixed;
}

Patterns find_patterns(const uint64_t* bits, int64_t count, int64_t words, Arena& arena) {
  Patterns found{arena.take<const uint64_t*>(count), arena.take<int64_t>(count), 0};
  int64_t size = 2;
  while (size < 2 * count) size *= 2;
  int64_t* table = arena.take<int64_t>(size);
  std::memset(table, 0xff, static_cast<size_t>(size) * sizeof(int64_t));
  const size_t bytes = static_cast<size_t>(words) * sizeof(uint64_t);
  for (int64_t row = 0; row < count; ++row) {
    const uint64_t* own = bits + row * words;
    found.of[row] = -1;
    if (zero(own, words)) continue;
    uint64_t at = hash(own, words);
    for (;; ++at) {
      int64_t& slot = table[at & static_cast<uint64_t>(size - 1)];
      if (slot < 0) found.bits[slot = found.count++] = own;
      if (std::memcmp(found.bits[slot], own, bytes)) continue;
      found.of[row] = slot;
      break;
    }
  }
  for (int64_t row = 0; row < count; ++row)
    if (found.of[row] < 0) found.of[row] = found.count;
  return found;
}

bool has(const uint64_t* bits, int64_t column) { return bits[column / 64] >> (column % 64) & 1; }

// Columns at which some pattern changes between used and not used, in order.
int64_t find_edges(const Patterns& patterns, int64_t words, int64_t* edges, Arena& arena) {
  uint64_t* changes = arena.take<uint64_t>(words);
  std::memset(changes, 0, static_cast<size_t>(words) * sizeof(uint64_t));
  for (int64_t p = 0; p < patterns.count; ++p) {
    uint64_t carry = 0;
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t own = patterns.bits[p][w];
      changes[w] |= own ^ (own << 1 | carry);
      carry = own >> 63;
    }
  }
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t rest = changes[w]; rest; rest &= rest - 1) edges[count++] = w * 64 + __builtin_ctzll(rest);
  return count;
}

// The rows of every group, and behind them those that use nothing.
Row* sort_rows(const LowRankAdd& call, const Patterns& patterns, int64_t* counts, Arena& arena) {
  const MaskRows& mask = call.mask_rows;
  const int last = mask.loops - 1;
  const int64_t run = mask.loops && !mask.step[last] ? mask.size[last] : 1;
  std::memset(counts, 0, static_cast<size_t>(patterns.count + 1) * sizeof(int64_t));
  for (int64_t row = 0; row < call.rows; row += run) counts[patterns.of[mask(row)]] += run;
  int64_t* next = arena.take<int64_t>(patterns.count + 1);
  int64_t before = 0;
  for (int64_t g = 0; g <= patterns.count; before += counts[g++]) next[g] = before;
  Row* rows = arena.take<Row>(call.rows);
  for (int64_t row = 0; row < call.rows; row += run) {
    const int64_t own = mask(row);
    int64_t& at = next[patterns.of[own]];
    for (int64_t i = 0; i < run; ++i) rows[at++] = {row + i, own};
  }
  return rows;
}

void find_segments(Plan* plan, const Patterns& patterns, const int64_t* edges, int64_t edge_count, Arena& arena) {
  plan->segments = arena.take<Segment>(edge_count);
  int64_t* uses = arena.take<int64_t>(edge_count * patterns.count);
  for (int64_t g = 0; g < patterns.count; ++g) {
    plan->groups[g].segments = uses + g * edge_count;
    plan->groups[g].segment_count = plan->groups[g].columns = 0;
  }
  for (int64_t e = 0; e + 1 < edge_count; ++e) {
    Segment found{edges[e], edges[e + 1], 0, 0};
    for (int64_t g = 0; g < patterns.count; ++g) {
      if (!has(patterns.bits[g], found.from)) continue;
      Group& group = plan->groups[g];
      uses[g * edge_count + group.segment_count++] = plan->segment_count;
      group.columns += found.to - found.from;
      ++found.groups;
      found.rows += group.count;
    }
    if (found.groups) plan->segments[plan->segment_count++] = found;
  }
}

}  // namespace

Plan make_plan(const LowRankAdd& call, const uint64_t* bits, Arena& arena) {
  const int64_t words = (call.rank + 63) / 64;
  const Patterns patterns = find_patterns(bits, call.mask_count, words, arena);
  Plan plan{};
  plan.group_count = patterns.count;
  plan.groups = arena.take<Group>(patterns.count);
  int64_t* counts = arena.take<int64_t>(patterns.count + 1);
  const Row* rows = sort_rows(call, patterns, counts, arena);
  for (int64_t g = 0; g < patterns.count; rows += counts[g++]) {
    plan.groups[g].rows = rows;
    plan.groups[g].count = counts[g];
  }
  plan.idle = rows;
  plan.idle_count = counts[patterns.count];
  int64_t* edges = arena.take<int64_t>(call.rank + 1);
  int64_t edge_count = find_edges(patterns, words, edges, arena);
  if (!edge_count || edges[edge_count - 1] != call.rank) edges[edge_count++] = call.rank;
  find_segments(&plan, patterns, edges, edge_count, arena);
  return plan;
}

}  // namespace adapterx
