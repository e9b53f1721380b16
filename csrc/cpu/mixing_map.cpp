// Mixing maps: the cells of a group in a random order, cut into one part per image; the longer parts go to random images.
#include "cpu/mixing_map.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/noise_order.h"

namespace fastmim {
namespace FASTMIM_ISA {

void mixing_map(const MixingMap& p) {
  const int64_t G = p.group_size, L = p.cells, room = (L + G + 63) / 64 * 64;
#pragma omp parallel if (p.groups * (L + G) > 32768)
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
    for (int64_t group = 0; group < p.groups; ++group) {
      draw_noise(p.seed, p.step, static_cast<uint32_t>(p.first / G + group), L + G, noise);
      argsort(noise, order, spare, L);
      int64_t* segments = p.segments + group * L;
      bool* mask = p.mask + group * G * L;
      const uint32_t* images = noise + L;
      for (int64_t image = 0; image < G; ++image) {
        int64_t part = 0;  // the image's own place in the random order of images
        for (int64_t other = 0; other < G; ++other)
          part += images[other] < images[image] || (images[other] == images[image] && other < image);
        const int64_t rest = L % G, from = part * (L / G) + (part < rest ? part : rest);
        const int64_t to = from + L / G + (part < rest);
        bool* row = mask + image * L;
        memset(row, 1, static_cast<size_t>(L));
        for (int64_t rank = from; rank < to; ++rank) {
          segments[order[rank]] = image;
          row[order[rank]] = false;
        }
      }
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
