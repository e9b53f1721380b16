// Pixels of chosen patches as rows of a matrix, normalised on the way: each pixel that is wanted is read once, no other.
#include "cpu/patch_rows.h"

#include <string.h>

#include "cpu/element.h"
#include "cpu/lanes.h"

namespace fastmim {
namespace FASTMIM_ISA {

struct U8 {
  uint8_t value;
};
static inline float to_float(U8 x) { return static_cast<float>(x.value); }

namespace {

// `count` pixels that lie STEP apart (0: `step` apart).
template <int STEP, typename From, typename To>
FASTMIM_INLINE void pixels(const From* from, int64_t step, int64_t count, float scale, float shift, To* out) {
  for (int64_t i = 0; i < count; ++i) from_float(to_float(from[i * (STEP ? STEP : step)]) * scale + shift, out + i);
}

template <typename From, typename To>
void patch(const PatchRows& p, const From* from, To* out) {
  const int64_t Q = p.patch_columns;
  const bool known = p.scale_shift != nullptr;
  for (int64_t c = 0; c < p.channels; ++c, from += p.channel) {
    const float scale = known ? p.scale_shift[c] : 1.0f, shift = known ? p.scale_shift[p.channels + c] : 0.0f;
    for (int64_t y = 0; y < p.patch_rows; ++y, out += Q) {
      const From* line = from + y * p.row;
      if (p.column == 1 && Q == 16) pixels<1>(line, 1, 16, scale, shift, out);
      else if (p.column == 1) pixels<1>(line, 1, Q, scale, shift, out);
      else if (p.column == 3 && Q == 16) pixels<3>(line, 3, 16, scale, shift, out);
      else if (p.column == 3) pixels<3>(line, 3, Q, scale, shift, out);
      else pixels<0>(line, p.column, Q, scale, shift, out);
    }
  }
}

// The lines of a patch, asked for while the one before it is worked on.
template <typename From>
void prefetch(const PatchRows& p, const From* from) {
  const bool interleaved = p.channel == 1;
  const int64_t planes = interleaved ? 1 : p.channels;
  const int64_t bytes = ((p.patch_columns - 1) * p.column + 1) * static_cast<int64_t>(sizeof(From));
  for (int64_t c = 0; c < planes; ++c)
    for (int64_t y = 0; y < p.patch_rows; ++y)
      for (int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from + c * p.channel + y * p.row) + byte);
}

template <typename From, typename To>
void run(const PatchRows& p) {
  const int64_t count = p.sequences * p.length, values = p.channels * p.patch_rows * p.patch_columns;
  const auto at = [&p](int64_t index) {
    const int64_t image = p.image_ids != nullptr ? p.image_ids[index] : index / p.length;
    const int64_t id = p.patch_ids != nullptr ? p.patch_ids[index] : index % p.length;
    return static_cast<const From*>(p.images) + image * p.image + id / p.grid_columns * p.patch_rows * p.row +
           id % p.grid_columns * p.patch_columns * p.column;
  };
  // A second thread costs more than it saves below about 100 microseconds of work.
#pragma omp parallel for schedule(static) if (count * values > 100000)
  for (int64_t index = 0; index < count; ++index) {
    if (index + 1 < count) prefetch(p, at(index + 1));
    patch(p, at(index), static_cast<To*>(p.rows) + index * values);
  }
}

template <typename From>
void choose_rows(const PatchRows& p) {
  switch (static_cast<Element>(p.rows_element)) {
    case Element::f32: run<From, float>(p); break;
    case Element::bf16: run<From, Bf16>(p); break;
    case Element::f16: run<From, F16>(p); break;
  }
}

}  // namespace

void patch_rows(const PatchRows& p) {
  if (p.element == kElementU8) return choose_rows<U8>(p);
  switch (static_cast<Element>(p.element)) {
    case Element::f32: choose_rows<float>(p); break;
    case Element::bf16: choose_rows<Bf16>(p); break;
    case Element::f16: choose_rows<F16>(p); break;
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
