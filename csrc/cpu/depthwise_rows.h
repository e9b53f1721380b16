// Depthwise convolution at stride 1 of tiles whose side is a multiple of eight: eight positions of a row in registers.
//
// Around eight positions lie a piece on the left, their own piece and one on the right. Those of all rows of a cell are
// visible or not together, so that is asked once for them: bit i of a mask says that piece i is there.
#pragma once

#include "cpu/depthwise_tile.h"

namespace fastmim {
namespace FASTMIM_ISA {

constexpr int kSpan = 8;
constexpr int64_t kLongestSide = 64;

// The pieces beside a row of cells, each from its cell's first row on; null where the cell is masked or outside.
struct Pieces {
  const float* at[kLongestSide / kSpan + 2];
};

static inline void find_pieces(const DepthwiseTile& tile, int64_t dr, Pieces& pieces) {
  const int32_t* cells = tile.near + (dr + kReach) * kWindow + kReach;
  const int64_t side = tile.side, across = side / kSpan;
  for (int64_t q = -1; q <= across; ++q) {
    const int64_t dc = q < 0 ? -1 : q == across ? 1 : 0, cell = cells[dc];
    pieces.at[q + 1] =
        cell < 0 ? nullptr : tile.source.data + (cell * side * side + (q - dc * across) * kSpan) * tile.source.pitch;
  }
}

// Calls f with the mask of three pieces as a constant, unless none is there.
template <typename F>
FASTMIM_INLINE void for_mask(const float* const* pieces, const F& f) {
  switch ((pieces[0] != nullptr) | (pieces[1] != nullptr) << 1 | (pieces[2] != nullptr) << 2) {
    case 1: return f(Index<1>());
    case 2: return f(Index<2>());
    case 3: return f(Index<3>());
    case 4: return f(Index<4>());
    case 5: return f(Index<5>());
    case 6: return f(Index<6>());
    case 7: return f(Index<7>());
  }
}

// Calls f(piece, position in it, column from the leftmost tap on) for every position that a tap can meet.
template <int K, int Mask, typename F>
FASTMIM_INLINE void for_columns(const F& f) {
  constexpr int radius = K / 2;
  unroll<kSpan + 2 * radius>([&](auto j) FASTMIM_INLINE_LAMBDA {
    constexpr int column = decltype(j)::value - radius, piece = column < 0 ? 0 : column < kSpan ? 1 : 2;
    if constexpr ((Mask >> piece) & 1) f(Index<piece>(), Index<column + kSpan - piece * kSpan>(), j);
  });
}

// Adds `rows` rows of the source, from row `first` of their cells on, under as many rows of taps.
template <int K>
FASTMIM_INLINE void add_rows(const float* const* pieces, int64_t first, int64_t rows, int64_t pitch, int64_t step,
                             const float* taps, int64_t c, Vec (&sums)[kSpan]) {
  if (rows <= 0) return;
  for_mask(pieces, [&](auto mask) FASTMIM_INLINE_LAMBDA {
    int64_t at = first * step + c;
    const float* tap = taps;
    for (int64_t row = 0; row < rows; ++row, at += step, tap += K * kWidth) {
      Vec w[K];
      unroll<K>([&](auto kx) FASTMIM_INLINE_LAMBDA { w[kx] = load_vec(tap + kx * kWidth); });
      for_columns<K, decltype(mask)::value>([&](auto piece, auto i, auto column) FASTMIM_INLINE_LAMBDA {
        const Vec x = load_vec(pieces[piece] + at + i * pitch);
        unroll<kSpan>([&](auto o) FASTMIM_INLINE_LAMBDA {
          constexpr int kx = decltype(column)::value - decltype(o)::value;
          if constexpr (kx >= 0 && kx < K) sums[o] += x * w[kx];
        });
      });
    }
  });
}

template <int K>
void convolve_rows(const DepthwiseTile& tile) {
  constexpr int64_t radius = K / 2;
  const int64_t side = tile.side, width = tile.width, pitch = tile.source.pitch, step = side * pitch;
  const Rows out = tile.out;
  const float* taps = tile.weight;
  Pieces above, beside, below;
  find_pieces(tile, -1, above);
  find_pieces(tile, 0, beside);
  find_pieces(tile, 1, below);
  for (int64_t c = 0; c < width; c += kWidth, taps += kTaps<K>)
    for (int64_t y = 0; y < side; ++y) {
      const int64_t over = y < radius ? radius - y : 0, under = y + radius < side ? 0 : y + radius + 1 - side;
      for (int64_t q = 0; q < side / kSpan; ++q) {
        Vec sums[kSpan];
        const Vec bias = load_vec(taps + K * K * kWidth);
        unroll<kSpan>([&](auto o) FASTMIM_INLINE_LAMBDA { sums[o] = bias; });
        add_rows<K>(above.at + q, side - over, over, pitch, step, taps, c, sums);
        add_rows<K>(beside.at + q, y + over - radius, K - over - under, pitch, step, taps + over * K * kWidth, c, sums);
        add_rows<K>(below.at + q, 0, under, pitch, step, taps + (K - under) * K * kWidth, c, sums);
        float* to = out.data + (y * side + q * kSpan) * out.pitch + c;
        unroll<kSpan>([&](auto o) FASTMIM_INLINE_LAMBDA { store_vec(to + o * out.pitch, sums[o]); });
      }
    }
}

// One row of the kernel: rows of x from `y` on beside rows of the source from `first` on.
template <int K>
FASTMIM_INLINE void correlate_rows(const Pieces& cells, const Rows& own, int64_t y, int64_t first, int64_t rows,
                                   int64_t side, int64_t pitch, int64_t c, Vec (&sums)[K]) {
  if (rows <= 0) return;
  for (int64_t q = 0; q < side / kSpan; ++q) {
    const float* const* pieces = cells.at + q;
    for_mask(pieces, [&](auto mask) FASTMIM_INLINE_LAMBDA {
      int64_t at = first * side * pitch + c;
      const float* from = own.data + (y * side + q * kSpan) * own.pitch + c;
      for (int64_t row = 0; row < rows; ++row, at += side * pitch, from += side * own.pitch) {
        Vec x[kSpan];
        unroll<kSpan>([&](auto o) FASTMIM_INLINE_LAMBDA { x[o] = load_vec(from + o * own.pitch); });
        for_columns<K, decltype(mask)::value>([&](auto piece, auto i, auto column) FASTMIM_INLINE_LAMBDA {
          const Vec g = load_vec(pieces[piece] + at + i * pitch);
          unroll<kSpan>([&](auto o) FASTMIM_INLINE_LAMBDA {
            constexpr int kx = decltype(column)::value - decltype(o)::value;
            if constexpr (kx >= 0 && kx < K) sums[kx] += g * x[o];
          });
        });
      }
    });
  }
}

// The sums of a tile are made by themselves before they are added: short sums of sums keep more digits than one long
// sum.
template <int K>
void correlate_all_rows(const DepthwiseTile& tile) {
  constexpr int64_t radius = K / 2;
  const int64_t side = tile.side, width = tile.width, pitch = tile.source.pitch;
  const Rows x = tile.x;
  float* to = tile.sums + (K * K - 1) * kWidth;  // in the order of the forward pass
  Pieces above, beside, below;
  find_pieces(tile, -1, above);
  find_pieces(tile, 0, beside);
  find_pieces(tile, 1, below);
  for (int64_t c = 0; c < width; c += kWidth, to += kTaps<K>)
    for (int64_t ky = 0; ky < K; ++ky) {
      const int64_t over = ky < radius ? radius - ky : 0, under = ky > radius ? ky - radius : 0;
      Vec sums[K];
      unroll<K>([&](auto kx) FASTMIM_INLINE_LAMBDA { sums[kx] = Vec{}; });
      correlate_rows<K>(above, x, 0, side - over, over, side, pitch, c, sums);
      correlate_rows<K>(beside, x, over, under, side - over - under, side, pitch, c, sums);
      correlate_rows<K>(below, x, side - under, 0, under, side, pitch, c, sums);
      float* row = to - ky * K * kWidth;
      unroll<K>([&](auto kx) FASTMIM_INLINE_LAMBDA {
        store_vec(row - kx * kWidth, load_vec(row - kx * kWidth) + sums[kx]);
      });
    }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
