#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// Pooling over tiles; t tile side of the input, k window side, s stride.
struct MaskedPool {
  int64_t batch, count;    // B, K
  int64_t side, channels;  // t, C
  int64_t kernel, stride, padding;  // k * k at most kMostPoolTaps; padding <= k / 2 and k - 2 * padding - 1 in [0, s)
  const int32_t* neighbours;  // [B, K, 7, 7] tile or -1
  int element;             // enum Element of x, out, and their gradients
  bool visible;            // average: divide by the visible positions under the window, else by k * k
  const void* x;           // [B, K, t, t, C]
  void* out;               // [B, K, t/s, t/s, C]; its gradient in the backward passes
  uint8_t* chosen;         // [B, K, t/s, t/s, C] largest: ky * k + kx of the tap
  float* share;            // [B, K, t/s, t/s] average: what a tap weighs
  void* x_gradient;        // [B, K, t, t, C]
  int32_t* places;         // [t, k, 2] cell and position in it; see tile_places.h
};

constexpr int64_t kMostPoolTaps = 256;  // a tap's number is a byte

}  // namespace fastmim

FASTMIM_DECLARE(void masked_max_pool(const MaskedPool& p))
FASTMIM_DECLARE(void masked_max_pool_backward(const MaskedPool& p))
FASTMIM_DECLARE(void masked_avg_pool(const MaskedPool& p))
FASTMIM_DECLARE(void masked_avg_pool_backward(const MaskedPool& p))
