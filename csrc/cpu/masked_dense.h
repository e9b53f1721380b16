#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// Dense convolution over tiles; t tile side of the input, s stride, k kernel side.
struct MaskedDense {
  int64_t batch, count;        // B, K
  int64_t side;                // t
  int64_t in_channels, out_channels;  // C, O
  int64_t kernel, stride;      // k in 1, 3, 5, 7; s in 1, 2
  const int32_t* neighbours;   // [B, K, 7, 7] tile or -1
  int element;                 // enum Element of x, out, and their gradients
  int weight_element;          // enum Element of weight, bias, and their gradients
  const void* x;               // [B, K, t, t, C]
  const void* weight;          // [O, C, k, k]
  const void* bias;            // [O] or null
  void* out;                   // [B, K, t/s, t/s, O]; its gradient in the backward passes
  void* x_gradient;            // [B, K, t, t, C]
  void* weight_gradient;       // [O, C, k, k]
  void* bias_gradient;         // [O] or null
  int32_t* places;             // [t, k, 2], see tile_places.h
  float* packed;               // [k * k, C, O padded], or [k * k, O, C padded] for the input gradient; unless streamed
  float* partial;              // [dense_parts(p), k * k * C + 1, O padded]; weight gradient only, unless whole
  float* wide_x;               // [rows, C] in fp32; where x has another type
  float* wide_out;             // [rows, O padded] in fp32; where out's gradient has another type or O is not padded
  char* scratch;               // [threads, dense_scratch(p)]
  bool streamed;               // few rows: a task brings the weights that it needs into order itself
  bool whole;                  // weight gradient: a task owns its weights, nothing is summed over tasks
};

constexpr int64_t kDenseRows = 128;  // rows of the result that one task handles, in whole tiles where they fit
static inline int64_t dense_padded(int64_t channels) { return (channels + 15) / 16 * 16; }
static inline int64_t dense_max(int64_t a, int64_t b) { return a > b ? a : b; }

// Few input channels: the taps of a row lie side by side in a copy, as one long dot product.
static inline bool dense_in_patches(const MaskedDense& p) { return p.kernel > 1 && p.in_channels < 16; }
constexpr int64_t kStreamedRows = 640, kMostOrdered = 9;  // rows, and taps of a kernel
constexpr int64_t kPanelDepth = 128, kPanelWidth = 64;     // of weights in order
// Few rows: bringing all weights into order in memory would take longer than using them.
static inline bool dense_streams(const MaskedDense& p, int64_t rows) {
  return p.kernel * p.kernel <= kMostOrdered && !dense_in_patches(p) && rows <= kStreamedRows;
}
// Enough blocks of 64 x 64 channels for every thread to have some.
static inline bool dense_owns_weights(const MaskedDense& p) {
  const int64_t blocks = (p.out_channels + 63) / 64 * ((p.in_channels + 63) / 64);
  return p.kernel * p.kernel <= kMostOrdered && !dense_in_patches(p) && blocks >= 16;
}
// Tiles whose rows a task handles together.
static inline int64_t dense_tiles(int64_t side) { return dense_max(kDenseRows / (side * side), 1); }
// Ranges of tiles that the weight gradient adds up one after the other. Depends on the shape alone.
static inline int64_t dense_parts(const MaskedDense& p) {
  const int64_t tasks = (p.out_channels + 63) / 64 * (dense_in_patches(p) ? 1 : p.kernel * p.kernel);
  const int64_t per_block = dense_tiles(p.side / p.stride), blocks = (p.batch * p.count + per_block - 1) / per_block;
  const int64_t parts = 32 / tasks < blocks ? 32 / tasks : blocks;
  return parts > 1 ? parts : 1;
}
// Bytes for one thread: pairs of rows that a tap joins, rows of the result, rows of patches or a panel of weights.
static inline int64_t dense_scratch(const MaskedDense& p) {
  const int64_t rows = dense_max(kDenseRows, p.side * p.side), taps = p.kernel * p.kernel;
  const int64_t panel = 4 * taps * kPanelWidth;
  if (p.whole) return (rows * 16 + panel * 64 + 4 * kPanelWidth + 127) / 64 * 64;
  if (p.streamed) return (kStreamedRows * (16 * taps + 4 * kPanelWidth) + panel * kPanelDepth + 127) / 64 * 64;
  const int64_t depth = dense_in_patches(p) ? taps * p.in_channels : 0;
  return (rows * (16 + 4 * 64 + 4 * depth) + 127) / 64 * 64;
}

}  // namespace fastmim

FASTMIM_DECLARE(void masked_dense(const MaskedDense& p))
FASTMIM_DECLARE(void masked_dense_input_gradient(const MaskedDense& p))
FASTMIM_DECLARE(void masked_dense_weight_gradient(const MaskedDense& p))
