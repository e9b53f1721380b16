#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// Pixels of patches wherever they lie. Element (p, q, c) of patch (b, y, x) is at
// data + b * batch + y * grid_row + x * grid_column + p * row + q * column + c * channel, in elements.
struct Patches {
  void* data;
  int element;  // enum Element of cpu/element.h
  int64_t batch, grid_row, grid_column, row, column, channel;
};

enum class PixelLoss : int { l2 = 0, l1 = 1, focal_l1 = 2 };

struct MaskedPatchLoss {
  int64_t batch, grid_rows, grid_columns;  // B, H/P, W/Q; N = grid_rows * grid_columns
  int64_t patch_rows, patch_columns, channels;  // P, Q, C
  Patches prediction;
  Patches image;
  const bool* mask;   // [B, N], true = removed
  bool norm_pix;
  PixelLoss loss;
  float* statistics;  // [B, N, 2] mean and 1/deviation of masked rows, zeros elsewhere; only with norm_pix
  float* partial;     // [B, N] loss summed over each masked row; forward only
  float* mean_loss;   // scalar; forward only
  float* scale;       // scalar, 1 / (number of masked values)
  const float* grad_loss;  // scalar; backward only
  Patches gradient;        // of the prediction, every row written; backward only
  float* scratch;          // [threads, 3, P * Q * C rounded up to 16]
};

}  // namespace fastmim

FASTMIM_DECLARE(void masked_patch_loss(const MaskedPatchLoss& p))
FASTMIM_DECLARE(void masked_patch_loss_backward(const MaskedPatchLoss& p))
