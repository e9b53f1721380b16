// Depthwise convolution at stride 1 of tiles of 2 x 2 and 4 x 4: every visible cell around a tile adds its share.
//
// Taps, positions of the tile and positions of the cell are all constants in the code, and the only question is
// whether a cell is visible. Sums wait in the first cache meanwhile, not in registers, which takes less time than
// more questions.
#pragma once

#include "cpu/depthwise_tile.h"

namespace fastmim {
namespace FASTMIM_ISA {

// Which tap joins position o of a tile to position i of the cell that is Away from it, along one axis.
template <int T, int K, int Away>
constexpr int tap_between(int o, int i) {
  return Away * T + i - o + K / 2;
}
template <int T, int K, int Away>
constexpr bool meets(int o, int i) {
  return tap_between<T, K, Away>(o, i) >= 0 && tap_between<T, K, Away>(o, i) < K;
}
// Does position o meet any of the cell's positions?
template <int T, int K, int Away>
constexpr bool meets_any(int o) {
  for (int i = 0; i < T; ++i)
    if (meets<T, K, Away>(o, i)) return true;
  return false;
}

// Adds what one cell gives, two rows of the tile at a time. The first one, the tile's own, starts from the bias.
template <int T, int K, int Down, int Right>
void add_cell(const DepthwiseTile& tile, const float* cell) {
  constexpr bool first = Down == 0 && Right == 0;
  const int64_t width = tile.width, pitch = tile.source.pitch, out_pitch = tile.out.pitch;
  const float* weight = tile.weight;
  float* out = tile.out.data;
  for (int64_t c = 0; c < width; c += kWidth, cell += kWidth, out += kWidth, weight += kTaps<K>)
    unroll<T / 2>([&](auto pair) FASTMIM_INLINE_LAMBDA {
      constexpr int from = 2 * decltype(pair)::value;
      Vec sums[2][T];
      const auto for_sums = [&](const auto& f) FASTMIM_INLINE_LAMBDA {
        unroll<2 * T>([&](auto to) FASTMIM_INLINE_LAMBDA {
          constexpr int y = decltype(to)::value / T, o = decltype(to)::value % T;
          if constexpr (meets_any<T, K, Down>(from + y) && meets_any<T, K, Right>(o))
            f(sums[y][o], out + (from * T + decltype(to)::value) * out_pitch);
        });
      };
      // What a cell gives is summed by itself first: short sums of sums keep more digits than one long sum.
      for_sums([&](Vec& sum, const float*) FASTMIM_INLINE_LAMBDA { sum = Vec{}; });
      unroll<T * T>([&](auto position) FASTMIM_INLINE_LAMBDA {
        constexpr int row = decltype(position)::value / T, i = decltype(position)::value % T;
        constexpr bool upper = meets<T, K, Down>(from, row), lower = meets<T, K, Down>(from + 1, row);
        if constexpr ((upper || lower) && meets_any<T, K, -Right>(i)) {
          const Vec x = load_vec(cell + decltype(position)::value * pitch);
          unroll<2 * T>([&](auto to) FASTMIM_INLINE_LAMBDA {
            constexpr int y = decltype(to)::value / T, o = decltype(to)::value % T;
            if constexpr ((y == 0 ? upper : lower) && meets<T, K, Right>(o, i)) {
              constexpr int tap = tap_between<T, K, Down>(from + y, row) * K + tap_between<T, K, Right>(o, i);
              sums[y][o] += x * load_vec(weight + tap * kWidth);
            }
          });
        }
      });
      for_sums([&](const Vec& sum, float* at) FASTMIM_INLINE_LAMBDA {
        store_vec(at, load_vec(first ? weight + K * K * kWidth : at) + sum);
      });
    });
}

// Can the cell that is Away give anything to tap k?
template <int T, int K, int Away>
constexpr bool holds_tap(int k) {
  for (int o = 0; o < T; ++o)
    for (int i = 0; i < T; ++i)
      if (tap_between<T, K, Away>(o, i) == k) return true;
  return false;
}

// Adds to the weight gradient what the tile's x and the gradients in one cell give.
template <int T, int K, int Down, int Right>
void correlate_cell(const DepthwiseTile& tile, const float* cell) {
  const int64_t width = tile.width, pitch = tile.source.pitch, x_pitch = tile.x.pitch;
  const float* own = tile.x.data;
  float* to = tile.sums + (K * K - 1) * kWidth;  // in the order of the forward pass
  for (int64_t c = 0; c < width; c += kWidth, cell += kWidth, own += kWidth, to += kTaps<K>)
    unroll<K>([&](auto ky) FASTMIM_INLINE_LAMBDA {
      if constexpr (holds_tap<T, K, Down>(decltype(ky)::value)) {
        Vec sums[K];
        unroll<K>([&](auto kx) FASTMIM_INLINE_LAMBDA { sums[kx] = Vec{}; });
        unroll<T>([&](auto y) FASTMIM_INLINE_LAMBDA {
          constexpr int row = decltype(ky)::value - K / 2 - Down * T + decltype(y)::value;
          if constexpr (row >= 0 && row < T) {
            Vec x[T];
            unroll<T>([&](auto o) FASTMIM_INLINE_LAMBDA { x[o] = load_vec(own + (y * T + o) * x_pitch); });
            unroll<T>([&](auto i) FASTMIM_INLINE_LAMBDA {
              if constexpr (meets_any<T, K, -Right>(decltype(i)::value)) {
                const Vec g = load_vec(cell + (row * T + i) * pitch);
                unroll<T>([&](auto o) FASTMIM_INLINE_LAMBDA {
                  if constexpr (meets<T, K, Right>(decltype(o)::value, decltype(i)::value))
                    sums[tap_between<T, K, Right>(decltype(o)::value, decltype(i)::value)] += g * x[o];
                });
              }
            });
          }
        });
        unroll<K>([&](auto kx) FASTMIM_INLINE_LAMBDA {
          if constexpr (holds_tap<T, K, Right>(decltype(kx)::value)) {
            float* sum = to - (ky * K + kx) * kWidth;
            store_vec(sum, load_vec(sum) + sums[kx]);
          }
        });
      }
    });
}

// Calls f(down, right, cell) for the tile's own cell, then for every visible one that a tap can reach.
template <int T, int K, typename F>
FASTMIM_INLINE void for_cells(const DepthwiseTile& tile, const F& f) {
  constexpr int reach = (K / 2 + T - 1) / T, window = 2 * reach + 1;
  const int32_t* middle = tile.near + kReach * kWindow + kReach;
  const auto cell = [&](int64_t at) FASTMIM_INLINE_LAMBDA { return tile.source.data + at * T * T * tile.source.pitch; };
  f(Index<0>(), Index<0>(), cell(*middle));
  unroll<window * window>([&](auto i) FASTMIM_INLINE_LAMBDA {
    constexpr int down = decltype(i)::value / window - reach, right = decltype(i)::value % window - reach;
    if constexpr (down != 0 || right != 0) {
      const int64_t at = middle[down * kWindow + right];
      if (at >= 0) f(Index<down>(), Index<right>(), cell(at));
    }
  });
}

template <int T, int K>
void convolve_cells(const DepthwiseTile& tile) {
  for_cells<T, K>(tile, [&](auto down, auto right, const float* cell) FASTMIM_INLINE_LAMBDA {
    add_cell<T, K, decltype(down)::value, decltype(right)::value>(tile, cell);
  });
}

template <int T, int K>
void correlate_cells(const DepthwiseTile& tile) {
  for_cells<T, K>(tile, [&](auto down, auto right, const float* cell) FASTMIM_INLINE_LAMBDA {
    correlate_cell<T, K, decltype(down)::value, decltype(right)::value>(tile, cell);
  });
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
