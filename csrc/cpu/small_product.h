// Products of fp32 matrices small enough to stay in the nearest caches, by register tiles: no packing, no threads.
#pragma once

#include <stdint.h>

#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

constexpr int kProductColumns = kRegisters > 16 ? 4 : 2;  // registers across a tile
constexpr int kProductSums = kRegisters > 16 ? 24 : 12;   // registers that hold its sums
constexpr int kMostRows = 12;
constexpr int most_rows(int columns) { return kProductSums / columns < kMostRows ? kProductSums / columns : kMostRows; }
constexpr int64_t kProductDepth = 64;  // products that one sum takes up before it goes back to memory

struct Matrix {
  const float* data;
  int64_t pitch;  // elements from one row to the next
};

// How the left factor lies in memory: `across` = [m][depth], `down` = [depth][m].
enum class Left { across, down };

// result[m][n] = or += the sum over d of left(m, d) * right[d][n], for M rows and N registers.
template <int M, int N, Left L>
void product_tile(const float* left, int64_t left_pitch, const float* right, int64_t right_pitch, int64_t depth,
                  bool add, float* result, int64_t pitch) {
  Vec sums[M][N];
  const float* from[M];
  unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
    from[m] = L == Left::across ? left + m * left_pitch : left + m;
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { sums[m][n] = Vec{}; });
  });
  for (int64_t d = 0; d < depth; ++d, right += right_pitch) {
    Vec r[N];
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { r[n] = load_vec(right + n * kWidth); });
    unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
      // Minus nothing is the value itself, also for -0, so this is a broadcast and no arithmetic.
      const Vec x = (L == Left::across ? from[m][d] : left[m]) - Vec{};
      unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { sums[m][n] += x * r[n]; });
    });
    if (L == Left::down) left += left_pitch;
  }
  unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA {
      float* to = result + m * pitch + n * kWidth;
      store_vec(to, add ? load_vec(to) + sums[m][n] : sums[m][n]);
    });
  });
}

// f(Index<M>, Index<N>) for a tile of m rows and n registers.
template <typename F, int N = kProductColumns, int M = most_rows(N)>
FASTMIM_INLINE void with_product_tile(int64_t m, int64_t n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_product_tile<F, N - 1>(m, n, f);
  }
  if constexpr (M > 1) {
    if (m < M) return with_product_tile<F, N, M - 1>(m, n, f);
  }
  f(Index<M>(), Index<N>());
}

// result [rows, columns] = or += left times right [depth, columns]. `columns` counts whole registers; long sums are
// sums of short ones, which keep more digits.
template <Left L>
void product(const Matrix& left, int64_t rows, const Matrix& right, int64_t depth, int64_t columns, bool add,
             float* result, int64_t pitch) {
  const int64_t registers = columns / kWidth, chunks = (registers + kProductColumns - 1) / kProductColumns;
  for (int64_t from = 0; from < depth; from += kProductDepth) {
    const int64_t many = depth - from < kProductDepth ? depth - from : kProductDepth;
    const float* left_from = left.data + from * (L == Left::across ? 1 : left.pitch);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = registers * chunk / chunks, n = registers * (chunk + 1) / chunks - first;
      const int64_t pieces = (rows + most_rows(n) - 1) / most_rows(n);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t row = rows * piece / pieces, m = rows * (piece + 1) / pieces - row;
        with_product_tile(m, n, [&](auto M, auto N) FASTMIM_INLINE_LAMBDA {
          product_tile<decltype(M)::value, decltype(N)::value, L>(
              left_from + row * (L == Left::across ? left.pitch : 1), left.pitch,
              right.data + from * right.pitch + first * kWidth, right.pitch, many, add || from > 0,
              result + row * pitch + first * kWidth, pitch);
        });
      }
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
