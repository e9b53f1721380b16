#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// A tap, and the row of the image that it falls on.
struct DepthwiseTap {
  int32_t tap, row;
};

// Depthwise convolution over tiles; t tile side of the input, s stride, k kernel side.
struct MaskedDepthwise {
  int64_t batch, count;    // B, K
  int64_t side, channels;  // t, C
  int64_t kernel, stride;  // k in 3, 5, 7; s in 1, 2
  const int32_t* neighbours;  // [B, K, 7, 7] tile or -1
  int element;             // enum Element of x, out, and their gradients
  int weight_element;      // enum Element of weight, bias, and their gradients
  const void* x;           // [B, K, t, t, C]
  const void* weight;      // [C, k, k]
  const void* bias;        // [C] or null
  void* out;               // [B, K, t/s, t/s, C]; its gradient in the backward passes
  void* x_gradient;        // [B, K, t, t, C] or null: not wanted
  void* weight_gradient;   // [C, k, k] or null: not wanted
  void* bias_gradient;     // [C] or null
  int32_t* places;         // [t, k, 2] cell and position in it; see tile_places.h
  DepthwiseTap* lists;     // [B, K, 50], the last one counts; t = 1 only
  float* packed;           // C rounded up to 16 times k * k + 1: taps, then bias
  float* partial;          // [depthwise_parts(p), the same]; weight gradient only
  float* scratch;          // [threads, depthwise_scratch(p)]
};

// Channels that one task handles: taps, their sums and a tile with its surroundings fit into the first cache together.
// Small tiles have little to do for each channel, so they take more at once.
static inline int64_t depthwise_chunk(const MaskedDepthwise& p) {
  const int64_t most = p.side >= 4 ? 32 : 64, chunks = (p.channels + most - 1) / most;
  return chunks > 0 ? ((p.channels + chunks - 1) / chunks + 15) / 16 * 16 : 16;
}
static inline int64_t depthwise_padded(const MaskedDepthwise& p) { return (p.channels + 15) / 16 * 16; }
// Distance between rows in scratch: an odd number of cache lines, so that the rows of a tile spread over the sets.
static inline int64_t depthwise_pitch(const MaskedDepthwise& p) { return depthwise_chunk(p) + 16; }
// Ranges of tiles that the weight gradient adds up one after the other: enough tasks for many threads, but few partial
// sums beside the work that goes into them. Depends on the shape alone.
static inline int64_t depthwise_parts(const MaskedDepthwise& p) {
  const int64_t tiles = p.batch * p.count, rows = tiles * p.side * p.side, chunk = depthwise_chunk(p);
  const int64_t chunks = (p.channels + chunk - 1) / chunk;
  int64_t parts = 1;
  while (parts * chunks < 16 && chunks > 0) parts *= 2;
  if (parts < rows / 2048) parts = rows / 2048 < 32 ? rows / 2048 : 32;
  if (parts > rows / 64) parts = rows / 64;
  if (parts > tiles) parts = tiles;
  return parts > 1 ? parts : 1;
}
// Floats for one thread: an image's chunk of input and output, one tile, the sums of a weight gradient.
static inline int64_t depthwise_scratch(const MaskedDepthwise& p) {
  const int64_t rows = (2 * p.count + 1) * p.side * p.side + p.kernel * p.kernel + 1;
  return (rows * depthwise_pitch(p) + 63) / 64 * 64;
}

}  // namespace fastmim

FASTMIM_DECLARE(void masked_depthwise(const MaskedDepthwise& p))
FASTMIM_DECLARE(void masked_depthwise_gradients(const MaskedDepthwise& p))
