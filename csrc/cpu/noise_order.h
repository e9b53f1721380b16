// Cells of an image (or of a group of images) in a random order: Philox noise, then a stable radix sort.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/philox.h"

namespace fastmim {
namespace FASTMIM_ISA {

// Word n % 4 of the counter (n / 4, index, step low, step high) for each n < count; `noise` has room for count rounded
// up to 64.
static inline void draw_noise(int64_t seed, int64_t step_number, uint32_t index, int64_t count, uint32_t* noise) {
  const uint64_t step = static_cast<uint64_t>(step_number);
  for (int64_t cell = 0; cell < count; cell += 4 * kPhiloxLanes)
    philox_lanes(static_cast<uint32_t>(cell / 4), index, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                 static_cast<uint64_t>(seed), noise + cell);
}

// Cells in ascending order of (noise, cell): four stable passes over bytes, so ties keep the cells' order.
// Linear in n, no comparison, no branch on data. The result ends in `order`.
static inline void argsort(const uint32_t* noise, uint32_t* order, uint32_t* spare, int64_t n) {
  uint32_t start[4][256];
  memset(start, 0, sizeof(start));
  for (int64_t i = 0; i < n; ++i)
    for (int byte = 0; byte < 4; ++byte) ++start[byte][(noise[i] >> (8 * byte)) & 255u];
  for (int byte = 0; byte < 4; ++byte) {
    uint32_t sum = 0;
    for (int v = 0; v < 256; ++v) {
      const uint32_t count = start[byte][v];
      start[byte][v] = sum;
      sum += count;
    }
  }
  for (int64_t i = 0; i < n; ++i) spare[start[0][noise[i] & 255u]++] = static_cast<uint32_t>(i);
  for (int byte = 1; byte < 4; ++byte) {
    const uint32_t* from = byte % 2 ? spare : order;
    uint32_t* to = byte % 2 ? order : spare;
    for (int64_t i = 0; i < n; ++i) to[start[byte][(noise[from[i]] >> (8 * byte)) & 255u]++] = from[i];
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
