#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

constexpr int kBytes = 3;  // beside enum Element of cpu/element.h: uint8 pixels

// Legend: B batch, K visible patches, (P, Q) patch, C channels, N patches of an image, E width.
// Pixels of visible patches, times scale plus shift of their channel, as rows in the order (c, p, q).
struct VisibleRows {
  int64_t batch, visible, grid_rows, grid_columns;  // B, K, H/P, W/Q
  int64_t patch_rows, patch_columns, channels;      // P, Q, C
  const void* images;
  int element;                                        // enum Element or kBytes
  int64_t image, channel, row, column;                // strides, in elements
  const int64_t* ids_keep;                            // [B, K] in [0, N), or nullptr: all patches, K = N
  const float* scale_shift;                           // [2, C], or nullptr: pixels as they are
  void* rows;                                         // [B, K, C * P * Q]
  int rows_element;
  float* scratch;  // [threads, 2, C * P * Q rounded up to 16]
};

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

FASTMIM_DECLARE(void visible_rows(const VisibleRows& p))
FASTMIM_DECLARE(void add_positions(const AddPositions& p))
FASTMIM_DECLARE(void sum_by_position(const AddPositions& p))
