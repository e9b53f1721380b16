#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

struct RandomMask {
  int64_t batch;       // B
  int64_t cells;       // N, below 2^26
  int64_t keep;        // K
  int64_t seed;        // Philox key
  int64_t step;        // Philox counter, upper half
  int64_t first;       // index of image 0 of this call in the global batch
  int64_t* ids_keep;     // [B, K]
  int64_t* ids_restore;  // [B, N]
  bool* mask;            // [B, N], true = removed
  uint32_t* scratch;     // [threads, 3, N rounded up to 64]
};

}  // namespace fastmim

FASTMIM_DECLARE(void random_mask(const RandomMask& p))
