#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

struct TileIndex {
  int64_t batch, count;        // B, K
  int64_t grid_rows, grid_columns;  // N = grid_rows * grid_columns
  const int64_t* ids_keep;     // [B, K]
  int32_t* slots;              // [B, N] tile of a cell or -1
  int32_t* neighbours;         // [B, K, 7, 7] tile of the cell (dr - 3, dc - 3) away or -1
  int32_t* scratch;            // [threads, grid_rows + 6, grid_columns + 6]
};

}  // namespace fastmim

// Position in ids_keep of an id that is out of range or is there twice in its image, else -1.
FASTMIM_DECLARE(int64_t tile_index(const TileIndex& p))
