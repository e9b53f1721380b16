#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// Between a feature map and its tiles. Element (b, c, h, w) of the map is at b * stride[0] + c * stride[1] + ..., in
// elements; scatter_tiles writes a map whose channels are innermost and dense.
struct Tiles {
  int64_t batch, count;         // B, K
  int64_t rows, columns;        // of cells; N = rows * columns
  int64_t side, channels;       // t, C
  int64_t stride[4];            // of dense
  int64_t bytes;                // of an element: 1, 2, 4 or 8
  const int64_t* ids_keep;      // [B, K]; gather_tiles
  const int32_t* slots;         // [B, N] tile or -1; scatter_tiles and masked_sum
  void* dense;                  // [B, C, rows * t, columns * t]
  void* x;                      // [B, K, t, t, C]
  const void* fill;             // [C] of masked cells, or null for zeros; scatter_tiles
  int element;                  // enum Element, or kFp64; masked_sum
  void* partial;                // [masked_sum_parts(p), C] fp32, or fp64 where dense is; masked_sum
  void* sum;                    // [C] in the type of dense; masked_sum
};

constexpr int kFp64 = 3;

// Ranges of grid rows that are added up one after the other. Depends on the shape alone.
static inline int64_t masked_sum_parts(const Tiles& p) {
  const int64_t grid_rows = p.batch * p.rows;
  return grid_rows < 64 ? grid_rows : 64;
}

}  // namespace fastmim

FASTMIM_DECLARE(void gather_tiles(const Tiles& p))
FASTMIM_DECLARE(void scatter_tiles(const Tiles& p))
FASTMIM_DECLARE(void masked_sum(const Tiles& p))
