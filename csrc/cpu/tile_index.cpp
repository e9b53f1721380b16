// Slots and neighbours of the visible cells: one pass per image over a grid with a border as wide as the reach.
#include "cpu/tile_index.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int64_t kReach = 3, kWindow = 2 * kReach + 1;

// Index of an id that cannot be, or -1.
int64_t one_image(const TileIndex& p, int64_t b, int32_t* padded) {
  const int64_t cells = p.grid_rows * p.grid_columns, pitch = p.grid_columns + 2 * kReach;
  const int64_t* ids = p.ids_keep + b * p.count;
  int32_t* slots = p.slots + b * cells;
  memset(slots, 0xff, static_cast<size_t>(cells) * sizeof(int32_t));
  memset(padded, 0xff, static_cast<size_t>((p.grid_rows + 2 * kReach) * pitch) * sizeof(int32_t));
  for (int64_t k = 0; k < p.count; ++k) {
    if (ids[k] < 0 || ids[k] >= cells || slots[ids[k]] >= 0) return k;
    slots[ids[k]] = static_cast<int32_t>(k);
    padded[(ids[k] / p.grid_columns + kReach) * pitch + ids[k] % p.grid_columns + kReach] = static_cast<int32_t>(k);
  }
  int32_t* out = p.neighbours + b * p.count * kWindow * kWindow;
  for (int64_t k = 0; k < p.count; ++k) {
    const int32_t* corner = padded + ids[k] / p.grid_columns * pitch + ids[k] % p.grid_columns;
    for (int64_t row = 0; row < kWindow; ++row, corner += pitch, out += kWindow)
      memcpy(out, corner, kWindow * sizeof(int32_t));
  }
  return -1;
}

}  // namespace

int64_t tile_index(const TileIndex& p) {
  const int64_t room = (p.grid_rows + 2 * kReach) * (p.grid_columns + 2 * kReach);
  int64_t first_bad = p.batch * p.count;
  // A second thread costs more than it saves below some ten microseconds of work.
#pragma omp parallel for schedule(static) reduction(min : first_bad) if (p.batch * p.count > 4096)
  for (int64_t b = 0; b < p.batch; ++b) {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    const int64_t bad = one_image(p, b, p.scratch + thread * room);
    if (bad >= 0 && b * p.count + bad < first_bad) first_bad = b * p.count + bad;
  }
  return first_bad < p.batch * p.count ? first_bad : -1;
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
