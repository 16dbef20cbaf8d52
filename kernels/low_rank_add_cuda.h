// LowRankAdd on a CUDA stream, without a word of ONNX Runtime: low_rank_add_cuda.cc and the harness call it.
//
// All arrays of the call are on the device. Nobody waits for them, so a NaN in the mask cannot be refused as it is on
// the CPU: it weighs like any number, which makes that row of y NaN, and no other.
#pragma once

#include <cstddef>

#include "low_rank_add.h"

struct CUstream_st;

namespace adapterx::cuda {

// How a call is cut into blocks. It depends on shapes alone: the mask is read by the blocks, and by nobody before them.
struct Plan {
  bool tiles;      // many rows an adapter: tiles, on tensor cores. Else few: each weight is read once
  int splits;      // parts of d_in that have blocks of their own
  int64_t split;   // ... and how long they are
  int64_t slab;    // rows a launch; bounds the scratch
  int group;       // rows that share what they read of b
  size_t scratch;  // bytes
};

// Of the current device.
int processors();

Plan plan(const LowRankAdd& call, int processors);

// Starts the kernels on the stream and returns at once. 0, or the cudaError_t of what could not be started.
int low_rank_add(const LowRankAdd& call, const Plan& plan, void* scratch, CUstream_st* stream);

const char* error_text(int error);

}  // namespace adapterx::cuda
