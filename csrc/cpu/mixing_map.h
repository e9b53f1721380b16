#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

struct MixingMap {
  int64_t groups;      // B / G
  int64_t group_size;  // G
  int64_t cells;       // L, below 2^26, at least G
  int64_t seed;        // Philox key
  int64_t step;        // Philox counter, upper half
  int64_t first;       // index of image 0 of this call in the global batch, a multiple of G
  int64_t* segments;   // [B / G, L] which image of the group a position shows
  bool* mask;          // [B, L], true = another image's
  uint32_t* scratch;   // [threads, 3, L + G rounded up to 64]
};

}  // namespace fastmim

FASTMIM_DECLARE(void mixing_map(const MixingMap& p))
