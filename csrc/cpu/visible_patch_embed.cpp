// Positions added to the tokens of visible patches, and the gradient of each: the sum over the tokens that had it.
#include "cpu/visible_patch_embed.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/element.h"
#include "cpu/lanes.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

float* scratch_of(float* scratch, int64_t width) {
#if defined(_OPENMP)
  return scratch + omp_get_thread_num() * 2 * padded(width);
#else
  return scratch;
#endif
}

void store_row(const float* from, int64_t count, void* to, int element) {
  switch (static_cast<Element>(element)) {
    case Element::f32: memcpy(to, from, static_cast<size_t>(count) * sizeof(float)); break;
    case Element::bf16:
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<Bf16*>(to) + i);
      break;
    case Element::f16:
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<F16*>(to) + i);
      break;
  }
}

}  // namespace

void add_positions(const AddPositions& p) {
  const int64_t E = p.width, size = p.out_element == static_cast<int>(Element::f32) ? 4 : 2;
#pragma omp parallel
  {
    float* room = scratch_of(p.scratch, E);
    float* sum = room + padded(E);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.count; ++index) {
      const float* token = as_floats(p.tokens, p.tokens_element, index * E, 1, E, room);
      const float* position = p.positions + p.ids_keep[index] * E;
      char* to = static_cast<char*>(p.out) + index * E * size;
      float* out = p.out_element == static_cast<int>(Element::f32) ? reinterpret_cast<float*>(to) : sum;
      for (int64_t i = 0; i < E; ++i) out[i] = token[i] + position[i];
      if (out == sum) store_row(sum, E, to, p.out_element);
    }
  }
}

// A position's gradient is added up by one thread in the order of the rows.
void sum_by_position(const AddPositions& p) {
  const int64_t E = p.width;
#pragma omp parallel
  {
    float* room = scratch_of(p.scratch, E);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.positions_count; ++n) {
      float* __restrict to = p.grad_positions + n * E;
      memset(to, 0, static_cast<size_t>(E) * sizeof(float));
      for (int64_t place = p.offsets[n]; place < p.offsets[n + 1]; ++place) {
        const float* from = as_floats(p.gradient, p.gradient_element, p.order[place] * E, 1, E, room);
        for (int64_t i = 0; i < E; ++i) to[i] += from[i];
      }
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
