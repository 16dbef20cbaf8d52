// Who needs what: the mask of a call, cut into segments of columns that nobody tells apart, and groups of rows that use the
// same segments.
#pragma once

#include <cstdint>

#include "arena.h"
#include "low_rank_add.h"

namespace adapterx {

struct Row {
  int64_t x;     // row of x, base and y
  int64_t mask;  // row of the mask
};

// Neighbouring columns of which every row of the mask uses all or none. Columns that no row uses are in no segment.
struct Segment {
  int64_t from;
  int64_t to;
  int64_t groups;  // how many groups use it
  int64_t rows;    // how many rows use it
};

// All rows whose masks are non-zero in the same columns: `columns` of them, the segments side by side.
struct Group {
  const Row* rows;
  int64_t count;
  const int64_t* segments;
  int64_t segment_count;
  int64_t columns;
};

struct Plan {
  Group* groups;
  int64_t group_count;
  Segment* segments;
  int64_t segment_count;
  const Row* idle;  // rows that use nothing
  int64_t idle_count;
};

// `bits`: a bit for every value of a row of the mask, [mask_count, words of 64]; set where the value is not zero.
Plan make_plan(const LowRankAdd& call, const uint64_t* bits, Arena& arena);

}  // namespace adapterx
