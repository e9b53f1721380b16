// Random masks with a fixed count per image: Philox noise, stable radix sort, three outputs in one pass per image.
#include "cpu/random_mask.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/philox.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

// Noise of one image; `noise` has room for N rounded up to 64.
void draw(const RandomMask& p, int64_t image, uint32_t* noise) {
  const uint32_t index = static_cast<uint32_t>(p.first + image);
  const uint64_t step = static_cast<uint64_t>(p.step);
  for (int64_t cell = 0; cell < p.cells; cell += 4 * kPhiloxLanes)
    philox_lanes(static_cast<uint32_t>(cell / 4), index, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                 static_cast<uint64_t>(p.seed), noise + cell);
}

// Cells in ascending order of (noise, cell): four stable passes over bytes, so ties keep the cells' order.
// Linear in N, no comparison, no branch on data. The result ends in `order`.
void argsort(const uint32_t* noise, uint32_t* order, uint32_t* spare, int64_t n) {
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

}  // namespace

void random_mask(const RandomMask& p) {
  const int64_t room = (p.cells + 63) / 64 * 64;
  // A second thread costs more than it saves below about 100 microseconds of work.
#pragma omp parallel if (p.batch * p.cells > 32768)
  {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    uint32_t* noise = p.scratch + thread * 3 * room;
    uint32_t* order = noise + room;
    uint32_t* spare = order + room;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < p.batch; ++b) {
      draw(p, b, noise);
      argsort(noise, order, spare, p.cells);
      int64_t* restore = p.ids_restore + b * p.cells;
      bool* mask = p.mask + b * p.cells;
      for (int64_t rank = 0; rank < p.cells; ++rank) {
        restore[order[rank]] = rank;
        mask[order[rank]] = rank >= p.keep;
      }
      int64_t* keep = p.ids_keep + b * p.keep;
      for (int64_t rank = 0; rank < p.keep; ++rank) keep[rank] = order[rank];
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
