#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// Batch norm over rows, and what follows it in a residual network: out = relu(((x - mean) * scale + bias) * factor +
// residual), with scale = weight / sqrt(variance + eps); each of factor, residual and relu may be missing.
struct RowsBatchNorm {
  int64_t rows, channels;      // M, C
  int64_t rows_per_image;      // M / B
  int element;                 // enum Element of x, residual, out and their gradients
  float eps;
  bool relu;
  const void* x;               // [M, C]
  const void* residual;        // [M, C] or null
  const float* weight;         // [C] or null
  const float* bias;           // [C] or null
  const float* factor;         // [B] or null
  float* mean;                 // [C], biased variance likewise; written by moments
  float* variance;
  void* out;                   // [M, C]; read by gradient_sums where there were a residual and a relu
  const void* gradient;        // [M, C], of out
  float* sums;                 // [2, C]: of the norm's gradient; of that times the normalised x
  const float* means;          // [2, C]: the same over M, or null where mean and variance are constants
  void* x_gradient;            // [M, C]
  void* masked;                // [M, C] or null: gradient where relu let it through, which is that of residual
  float* partial;              // [blocks, 2, C]
  float* scratch;              // [threads, 4, C]
};

// Rows that are summed together before anything else. Depends on the shape alone.
static inline int64_t norm_block_rows(const RowsBatchNorm& p) {
  const int64_t rows = 32768 / (p.channels > 0 ? p.channels : 1) / 16 * 16;
  return rows < 16 ? 16 : rows > 128 ? 128 : rows;
}
static inline int64_t norm_blocks(const RowsBatchNorm& p) {
  return (p.rows + norm_block_rows(p) - 1) / norm_block_rows(p);
}

}  // namespace fastmim

FASTMIM_DECLARE(void rows_moments(const RowsBatchNorm& p))
FASTMIM_DECLARE(void rows_batch_norm(const RowsBatchNorm& p))
FASTMIM_DECLARE(void rows_gradient_sums(const RowsBatchNorm& p))
FASTMIM_DECLARE(void rows_input_gradient(const RowsBatchNorm& p))
