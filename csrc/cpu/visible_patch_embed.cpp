// Pixels of visible patches as rows of a matrix, and the positions of what the matrix product makes of them.
#include "cpu/visible_patch_embed.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/element.h"
#include "cpu/lanes.h"

namespace fastmim {
namespace FASTMIM_ISA {

// Beside the others, where they do not hide each other.
static inline float to_float(uint8_t x) { return static_cast<float>(x); }

namespace {

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

float* scratch_of(float* scratch, int64_t width) {
#if defined(_OPENMP)
  return scratch + omp_get_thread_num() * 2 * padded(width);
#else
  return scratch;
#endif
}

template <typename T>
void scaled(const T* from, int64_t step, int64_t count, float scale, float shift, float* out) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]) * scale + shift;
  else if (step == 3)
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[3 * i]) * scale + shift;
  else
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i * step]) * scale + shift;
}

template <typename T>
void plain(const T* from, int64_t step, int64_t count, float* out) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
  else if (step == 3)
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[3 * i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i * step]);
}

// One patch, whose first pixel is `from`, as a row (c, p, q) of floats. `room` holds a row, too.
template <typename T>
void patch_row(const T* from, const VisibleRows& p, float* room, float* out) {
  const int64_t P = p.patch_rows, Q = p.patch_columns, C = p.channels;
  const float* scale = p.scale_shift;
  const float* shift = scale == nullptr ? nullptr : scale + C;
  // Channels side by side: their conversion is one run, and the rest happens in the nearest cache.
  if (p.channel == 1 && p.column == C && C > 1 && sizeof(T) != sizeof(float)) {
    for (int64_t y = 0; y < P; ++y) plain(from + y * p.row, 1, Q * C, room + y * Q * C);
    for (int64_t c = 0; c < C; ++c, out += P * Q)
      if (p.scale_shift != nullptr)
        scaled(room + c, C, P * Q, scale[c], shift[c], out);
      else
        plain(room + c, C, P * Q, out);
    return;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t y = 0; y < P; ++y, out += Q) {
      const T* run = from + c * p.channel + y * p.row;
      if (p.scale_shift != nullptr)
        scaled(run, p.column, Q, scale[c], shift[c], out);
      else
        plain(run, p.column, Q, out);
    }
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

// Where the first pixel of visible patch `index` = b * K + k lies, in elements.
int64_t offset_of(const VisibleRows& p, int64_t index) {
  const int64_t b = index / p.visible, n = p.ids_keep != nullptr ? p.ids_keep[index] : index % p.visible;
  const int64_t y = n / p.grid_columns * p.patch_rows, x = n % p.grid_columns * p.patch_columns;
  return b * p.image + y * p.row + x * p.column;
}

template <typename T>
void rows_of(const VisibleRows& p) {
  const int64_t count = p.channels * p.patch_rows * p.patch_columns, size = p.rows_element == 0 ? 4 : 2;
  const bool planes = p.channel != 1;
  const int64_t runs = planes ? p.channels : 1;
  const int64_t bytes = (planes ? 1 : p.channels) * p.patch_columns * static_cast<int64_t>(sizeof(T));
#pragma omp parallel
  {
    float* room = scratch_of(p.scratch, count);
    float* row = room + padded(count);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.batch * p.visible; ++index) {
      // The lines of the next patch: too short and too far apart for the processor to see a pattern.
      if (index + 1 < p.batch * p.visible) {
        const char* next = static_cast<const char*>(p.images) + offset_of(p, index + 1) * static_cast<int64_t>(sizeof(T));
        for (int64_t y = 0; y < p.patch_rows; ++y)
          for (int64_t c = 0; c < runs; ++c)
            for (int64_t byte = 0; byte < bytes; byte += 64)
              __builtin_prefetch(next + (y * p.row + c * p.channel) * static_cast<int64_t>(sizeof(T)) + byte);
      }
      char* to = static_cast<char*>(p.rows) + index * count * size;
      const bool direct = p.rows_element == static_cast<int>(Element::f32);
      float* out = direct ? reinterpret_cast<float*>(to) : row;
      patch_row(static_cast<const T*>(p.images) + offset_of(p, index), p, room, out);
      if (!direct) store_row(row, count, to, p.rows_element);
    }
  }
}

}  // namespace

void visible_rows(const VisibleRows& p) {
  if (p.element == kBytes) return rows_of<uint8_t>(p);
  switch (static_cast<Element>(p.element)) {
    case Element::f32: rows_of<float>(p); break;
    case Element::bf16: rows_of<Bf16>(p); break;
    case Element::f16: rows_of<F16>(p); break;
  }
}

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
