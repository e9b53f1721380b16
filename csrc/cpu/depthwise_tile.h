// What the depthwise kernels work on: one tile, some of its channels, and the tiles around it.
#pragma once

#include <stdint.h>

#include "cpu/tile_places.h"
#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

// Rows of channels in fp32: the tensor itself, or a copy of some channels.
struct Rows {
  float* data;
  int64_t pitch;
};

// Taps, and their gradients, lie by registers of channels: [C / kWidth, k * k + 1, kWidth], the bias last. So every
// tap of a kernel whose size is known lies at a constant distance.
template <int K>
constexpr int64_t kTaps = (K * K + 1) * kWidth;

// A gradient is the same sum as the output: of the gradients around a tile instead of the inputs, with the taps in
// reverse order. So forward and backward share these words and these kernels.
struct DepthwiseTile {
  const int32_t* near;  // [7, 7] tiles around this one, or -1
  int64_t side, width;  // width: channels, a multiple of kWidth
  Rows source;          // of the whole image: the input, or the gradient of the output
  const float* weight;  // in reverse order for a gradient, except for lists of taps
  Rows out;             // of this tile: the output, or the gradient of the input
  Rows x;               // of this tile: the input; weight gradient only
  float* sums;          // weight gradient
};

}  // namespace FASTMIM_ISA
}  // namespace fastmim
