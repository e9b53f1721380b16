// Random masks with a fixed count per image: Philox noise, stable radix sort, three outputs in one pass per image.
#include "cpu/random_mask.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/noise_order.h"

namespace fastmim {
namespace FASTMIM_ISA {

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
      draw_noise(p.seed, p.step, static_cast<uint32_t>(p.first + b), p.cells, noise);
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
