// A square of sixteen rows and columns, transposed in registers where there are enough of them.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(FASTMIM_ISA_avx512)
#include <immintrin.h>
#endif

#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

struct Square {
  float row[16][16];
};

#if defined(FASTMIM_ISA_avx512)
// Swaps, for pairs of rows that are `Distance` apart, the blocks of that size which lie off the diagonal.
template <int Distance>
FASTMIM_INLINE void swap_blocks(__m512 (&rows)[16]) {
  alignas(64) int32_t upper[16], lower[16];
  for (int i = 0; i < 16; ++i) {
    upper[i] = i & Distance ? 16 + i - Distance : i;
    lower[i] = i & Distance ? 16 + i : i + Distance;
  }
  const __m512i to_upper = _mm512_load_si512(upper), to_lower = _mm512_load_si512(lower);
  unroll<16>([&](auto i) FASTMIM_INLINE_LAMBDA {
    if constexpr (!(decltype(i)::value & Distance)) {
      const __m512 a = rows[i], b = rows[i + Distance];
      rows[i] = _mm512_permutex2var_ps(a, to_upper, b);
      rows[i + Distance] = _mm512_permutex2var_ps(a, to_lower, b);
    }
  });
}

// The sixteen rows that from(i) points to, as columns in the sixteen places that to(j) points to; j counts up.
template <typename From, typename To>
FASTMIM_INLINE void transpose_rows(const From& from, const To& to) {
  __m512 rows[16];
  unroll<16>([&](auto i) FASTMIM_INLINE_LAMBDA { rows[i] = _mm512_loadu_ps(from(static_cast<int>(i))); });
  swap_blocks<8>(rows);
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
  unroll<16>([&](auto i) FASTMIM_INLINE_LAMBDA { _mm512_storeu_ps(to(static_cast<int>(i)), rows[i]); });
}

FASTMIM_INLINE void transpose(Square& square) {
  const auto row = [&](int i) FASTMIM_INLINE_LAMBDA { return square.row[i]; };
  transpose_rows(row, row);
}
#else
FASTMIM_INLINE void transpose(Square& square) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const float kept = square.row[i][j];
      square.row[i][j] = square.row[j][i];
      square.row[j][i] = kept;
    }
}

template <typename From, typename To>
FASTMIM_INLINE void transpose_rows(const From& from, const To& to) {
  Square square;
  for (int i = 0; i < 16; ++i) memcpy(square.row[i], from(i), sizeof(square.row[i]));
  transpose(square);
  for (int j = 0; j < 16; ++j) memcpy(to(j), square.row[j], sizeof(square.row[j]));
}
#endif

}  // namespace FASTMIM_ISA
}  // namespace fastmim
