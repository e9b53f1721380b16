#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

constexpr int kElementU8 = 3;  // beside enum Element of cpu/element.h, for pixels only

struct PatchRows {
  const void* images;
  int element;                         // enum Element or kElementU8
  int64_t image, channel, row, column;  // strides, in elements
  int64_t channels, patch_rows, patch_columns;  // C, p, q
  int64_t grid_columns;                         // gw
  int64_t sequences, length;                    // S, K
  const int64_t* image_ids;   // [S, K]; null: row (s, k) is from image s
  const int64_t* patch_ids;   // [S, K]; null: it is patch k
  const float* scale_shift;   // [2, C] pixel * scale + shift; null: pixels as they are
  void* rows;                 // [S, K, C * p * q] contiguous
  int rows_element;           // enum Element
};

}  // namespace fastmim

FASTMIM_DECLARE(void patch_rows(const PatchRows& p))
