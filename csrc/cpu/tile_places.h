// Where the taps of a k x k window fall: cells away, and positions in them.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fastmim {
namespace FASTMIM_ISA {

constexpr int64_t kReach = 3, kWindow = 2 * kReach + 1;  // of the neighbour table [7, 7]
constexpr int64_t kMostTaps = kWindow * kWindow;

static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Along one axis, where position i of a tile meets tap d: to[2 * (i * k + d)] is the cell away, and the position in it
// follows; a cell beyond the reach where they do not meet. Forward: output i reads input i * s + d - padding.
// Transposed: input i went into output (i + padding - d) / s. `side` is that of the other tensor's tiles.
static inline void find_window_places(int64_t kernel, int64_t stride, int64_t padding, bool transposed,
                                      int64_t positions, int64_t side, int32_t* to) {
  for (int64_t i = 0; i < positions; ++i)
    for (int64_t d = 0; d < kernel; ++d, to += 2) {
      const int64_t scaled = transposed ? i + padding - d : i * stride + d - padding;
      const int64_t other = transposed ? floor_div(scaled, stride) : scaled, cell = floor_div(other, side);
      to[0] = static_cast<int32_t>(transposed && other * stride != scaled ? kReach + 1 : cell);
      to[1] = static_cast<int32_t>(other - cell * side);
    }
}

// The same for a convolution, whose padding is half its kernel.
static inline void find_places(int64_t kernel, int64_t stride, bool transposed, int64_t positions, int64_t side,
                               int32_t* to) {
  find_window_places(kernel, stride, kernel / 2, transposed, positions, side, to);
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
