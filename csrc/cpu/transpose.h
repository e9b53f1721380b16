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

FASTMIM_INLINE void transpose(Square& square) {
  __m512 rows[16];
  unroll<16>([&](auto i) FASTMIM_INLINE_LAMBDA { rows[i] = _mm512_loadu_ps(square.row[i]); });
  swap_blocks<8>(rows);
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
  unroll<16>([&](auto i) FASTMIM_INLINE_LAMBDA { _mm512_storeu_ps(square.row[i], rows[i]); });
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
#endif

}  // namespace FASTMIM_ISA
}  // namespace fastmim
