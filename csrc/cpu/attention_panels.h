// Rows of one head, taken from wherever a tensor [B, tokens, H, D] lies into dense fp32 panels, and put back.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/element.h"
#include "cpu/lanes.h"
#include "cpu/packed_attention.h"
#include "cpu/small_product.h"
#include "cpu/transpose.h"

namespace fastmim {
namespace FASTMIM_ISA {

template <typename T>
void read_panel(const T* from, int64_t token, int64_t rows, int64_t width, float* to, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r, from += token, to += pitch) {
    for (int64_t d = 0; d < width; ++d) to[d] = to_float(from[d]);
    for (int64_t d = width; d < pitch; ++d) to[d] = 0.0f;
  }
}

// Rows [first, first + rows) of head h of image b as fp32 in `to`, with zeros between width and pitch.
static inline void read_panel(const Heads& at, int element, int64_t b, int64_t h, int64_t first, int64_t rows,
                              int64_t width, float* to, int64_t pitch) {
  const int64_t offset = b * at.batch + first * at.token + h * at.head;
  switch (static_cast<Element>(element)) {
    case Element::f32: read_panel(static_cast<const float*>(at.data) + offset, at.token, rows, width, to, pitch); break;
    case Element::bf16: read_panel(static_cast<const Bf16*>(at.data) + offset, at.token, rows, width, to, pitch); break;
    case Element::f16: read_panel(static_cast<const F16*>(at.data) + offset, at.token, rows, width, to, pitch); break;
  }
}

// The same rows where they are, if they are fp32 already, else in `room`. Good for reading once or twice: rows that
// lie thousands of bytes apart share few places of the nearest cache.
static inline Matrix rows_of(const Heads& at, int element, int64_t b, int64_t h, int64_t rows, int64_t width,
                             float* room, int64_t pitch) {
  if (element == static_cast<int>(Element::f32))
    return {static_cast<const float*>(at.data) + b * at.batch + h * at.head, at.token};
  read_panel(at, element, b, h, 0, rows, width, room, pitch);
  return {room, pitch};
}

template <typename T>
void write_panel(const float* from, int64_t pitch, const float* factors, float factor, int64_t rows, int64_t width,
                 T* to, int64_t token) {
  for (int64_t r = 0; r < rows; ++r, from += pitch, to += token) {
    const float by = factors == nullptr ? factor : factors[r];
    for (int64_t d = 0; d < width; ++d) from_float(from[d] * by, to + d);
  }
}

// Rows of a panel, each times its own factor (or all times `factor`), into the tensor.
static inline void write_panel(const float* from, int64_t pitch, const float* factors, float factor, const Heads& at,
                               int element, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width) {
  const int64_t offset = b * at.batch + first * at.token + h * at.head;
  switch (static_cast<Element>(element)) {
    case Element::f32:
      return write_panel(from, pitch, factors, factor, rows, width, static_cast<float*>(at.data) + offset, at.token);
    case Element::bf16:
      return write_panel(from, pitch, factors, factor, rows, width, static_cast<Bf16*>(at.data) + offset, at.token);
    case Element::f16:
      return write_panel(from, pitch, factors, factor, rows, width, static_cast<F16*>(at.data) + offset, at.token);
  }
}

alignas(64) static const float kZeros[16] = {};

// A square of sixteen rows of `from` (rows from `valid` on count as zeros), times factor, as columns of `to`.
FASTMIM_INLINE void transpose_square(const float* from, int64_t pitch, int64_t valid, float factor, float* to,
                                     int64_t to_pitch) {
#if defined(FASTMIM_ISA_avx512)
  __m512 rows[16];
  unroll<16>([&](auto i) FASTMIM_INLINE_LAMBDA { rows[i] = _mm512_loadu_ps(i < valid ? from + i * pitch : kZeros); });
  swap_blocks<8>(rows);
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
  const __m512 by = _mm512_set1_ps(factor);
  unroll<16>([&](auto i) FASTMIM_INLINE_LAMBDA { _mm512_storeu_ps(to + i * to_pitch, _mm512_mul_ps(rows[i], by)); });
#else
  for (int64_t i = 0; i < 16; ++i) {
    const float* row = i < valid ? from + i * pitch : kZeros;
    for (int64_t j = 0; j < 16; ++j) to[j * to_pitch + i] = row[j] * factor;
  }
#endif
}

// `rows` rows of a panel (its pitch a multiple of sixteen, width padded), times factor, as columns of `to`; columns up
// to the next multiple of sixteen are zero.
static inline void transpose_panel(const Matrix& from, int64_t rows, int64_t width, float factor, float* to,
                                   int64_t to_pitch) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t d = 0; d < width; d += 16)
      transpose_square(from.data + r * from.pitch + d, from.pitch, rows - r, factor, to + d * to_pitch + r, to_pitch);
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
