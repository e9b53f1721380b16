#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// Legend: B batch, K visible patches, N patches of an image, E width.
// out[b, k] = tokens[b, k] + positions[ids_keep[b, k]]
struct AddPositions {
  int64_t count, width, positions_count;  // B * K, E, N
  const void* tokens;                     // [B, K, E] contiguous
  int tokens_element;
  const float* positions;   // [N, E]
  const int64_t* ids_keep;  // [B, K] in [0, N)
  void* out;                // [B, K, E]
  int out_element;
  // Backward
  const void* gradient;  // [B, K, E] contiguous
  int gradient_element;
  float* grad_positions;   // [N, E]
  const int64_t* order;    // [B * K] rows sorted by position, each position's in their order
  const int64_t* offsets;  // [N + 1] where a position's rows begin in `order`
  float* scratch;          // [threads, 2, E rounded up to 16]
};

}  // namespace fastmim

FASTMIM_DECLARE(void add_positions(const AddPositions& p))
FASTMIM_DECLARE(void sum_by_position(const AddPositions& p))
