// LowRankAdd on the CPU.
#pragma once

#include "arithmetic.h"
#include "low_rank_add.h"

namespace adapterx {

// Threads to work on: calls task(job, 0) ... task(job, count - 1), in any order and at once, and returns when all are done.
struct Pool {
  void* self;
  void (*run)(void* self, void (*task)(void* job, size_t unit), void* job, size_t count);
};

// Computes y, or says what is wrong with the mask, which is the one thing that measure() cannot know.
Fault compute(const LowRankAdd& call, const Arithmetic& arithmetic, const Pool& pool) noexcept;

}  // namespace adapterx
