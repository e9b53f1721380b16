// Depthwise convolution over tiles, and its gradients. Channels lie in the lanes; a row of output positions lies in
// registers; rows of the neighbours are found once per tile, and a masked neighbour's taps are never issued.
#include "cpu/masked_depthwise.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/element.h"
#include "cpu/tile_places.h"
#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int64_t kLongestSide = 64;      // of tiles that the fast kernels take
constexpr int64_t kSummedTogether = 64;   // summands of a weight gradient that make one sum

int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Rows of channels in fp32, as the kernels take them: the tensor itself, or a copy of some channels.
struct Rows {
  float* data;
  int64_t pitch;
};

template <typename T>
void widen(const T* from, int64_t from_pitch, int64_t rows, int64_t width, const Rows& to) {
  const int64_t padded = (width + kWidth - 1) / kWidth * kWidth;
  for (int64_t r = 0; r < rows; ++r, from += from_pitch) {
    float* row = to.data + r * to.pitch;
    for (int64_t c = 0; c < width; ++c) row[c] = to_float(from[c]);
    for (int64_t c = width; c < padded; ++c) row[c] = 0.0f;
  }
}

template <typename T>
void narrow(const Rows& from, int64_t rows, int64_t width, T* to, int64_t to_pitch) {
  for (int64_t r = 0; r < rows; ++r, to += to_pitch)
    for (int64_t c = 0; c < width; ++c) from_float(from.data[r * from.pitch + c], to + c);
}

bool in_place(int element, int64_t width) {
  return element == static_cast<int>(Element::f32) && width % kWidth == 0;
}

// `width` channels from `channel` on of `rows` rows that start at row `first` of a tensor [..., C].
Rows read_rows(int element, const void* data, int64_t channels, int64_t first, int64_t rows, int64_t channel,
               int64_t width, const Rows& room) {
  const int64_t at = first * channels + channel;
  if (in_place(element, width)) return {const_cast<float*>(static_cast<const float*>(data)) + at, channels};
  switch (static_cast<Element>(element)) {
    case Element::f32: widen(static_cast<const float*>(data) + at, channels, rows, width, room); break;
    case Element::bf16: widen(static_cast<const Bf16*>(data) + at, channels, rows, width, room); break;
    case Element::f16: widen(static_cast<const F16*>(data) + at, channels, rows, width, room); break;
  }
  return room;
}

void write_rows(int element, void* data, int64_t channels, int64_t first, int64_t rows, int64_t channel, int64_t width,
                const Rows& from) {
  const int64_t at = first * channels + channel;
  switch (static_cast<Element>(element)) {
    case Element::f32: narrow(from, rows, width, static_cast<float*>(data) + at, channels); break;
    case Element::bf16: narrow(from, rows, width, static_cast<Bf16*>(data) + at, channels); break;
    case Element::f16: narrow(from, rows, width, static_cast<F16*>(data) + at, channels); break;
  }
}

// Sixteen channels from `from` on.
template <typename T>
void pack_channels(const MaskedDepthwise& p, const T* weight, const T* bias, bool flipped, int64_t from) {
  const int64_t taps = p.kernel * p.kernel, padded = depthwise_padded(p);
  const int64_t width = p.channels - from < 16 ? p.channels - from : 16;
  weight += from * taps;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const T* source = weight + (flipped ? taps - 1 - tap : tap);
    float* to = p.packed + tap * padded + from;
    if (width == 16) {
      for (int c = 0; c < 16; ++c) to[c] = to_float(source[c * taps]);
    } else {
      for (int64_t c = 0; c < 16; ++c) to[c] = c < width ? to_float(source[c * taps]) : 0.0f;
    }
  }
  float* to = p.packed + taps * padded + from;
  for (int64_t c = 0; c < 16; ++c) to[c] = bias != nullptr && c < width ? to_float(bias[from + c]) : 0.0f;
}

// Weight and bias as [k * k + 1, padded C] in fp32. Called by all threads of a team.
void pack(const MaskedDepthwise& p, const void* bias, bool flipped) {
  const int64_t padded = depthwise_padded(p);
#pragma omp for schedule(static)
  for (int64_t block = 0; block < padded / 16; ++block) {
    const int64_t from = block * 16;
    switch (static_cast<Element>(p.weight_element)) {
      case Element::f32:
        pack_channels(p, static_cast<const float*>(p.weight), static_cast<const float*>(bias), flipped, from);
        break;
      case Element::bf16:
        pack_channels(p, static_cast<const Bf16*>(p.weight), static_cast<const Bf16*>(bias), flipped, from);
        break;
      case Element::f16:
        pack_channels(p, static_cast<const F16*>(p.weight), static_cast<const F16*>(bias), flipped, from);
        break;
    }
  }
}

// Any tile side and stride: the taps of a position as a list.

struct Tap {
  int64_t tap, row;  // ky * k + kx; row of the other tensor within the image
};

int64_t taps_of(const MaskedDepthwise& p, const int32_t* near, int64_t y, int64_t x, int64_t side, Tap* list) {
  const int64_t k = p.kernel;
  int64_t found = 0;
  const int32_t *up = p.places + 2 * y * k, *left = p.places + 2 * x * k;
  for (int64_t ky = 0; ky < k; ++ky) {
    if (up[2 * ky] > kReach) continue;
    const int32_t* row = near + (up[2 * ky] + kReach) * kWindow + kReach;
    for (int64_t kx = 0; kx < k; ++kx) {
      if (left[2 * kx] > kReach) continue;
      const int64_t tile = row[left[2 * kx]];
      list[found] = {ky * k + kx, (tile * side + up[2 * ky + 1]) * side + left[2 * kx + 1]};
      found += tile >= 0;
    }
  }
  return found;
}

template <int Blocks>
FASTMIM_INLINE void sum_taps(const Tap* list, int64_t count, const Rows& source, const float* weight, int64_t padded,
                             const float* bias, int64_t c, float* out) {
  Vec sums[Blocks];
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { sums[b] = load_vec(bias + c + b * kWidth); });
  for (int64_t i = 0; i < count;) {
    Vec some[Blocks] = {};  // short sums of sums keep more digits than one long sum
    for (const int64_t end = i + 16 < count ? i + 16 : count; i < end; ++i) {
      const float* from = source.data + list[i].row * source.pitch + c;
      const float* tap = weight + list[i].tap * padded + c;
      unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
        some[b] += load_vec(from + b * kWidth) * load_vec(tap + b * kWidth);
      });
    }
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { sums[b] += some[b]; });
  }
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { store_vec(out + c + b * kWidth, sums[b]); });
}

void tile_by_lists(const MaskedDepthwise& p, const int32_t* near, const Rows& source, int64_t source_side,
                   int64_t side, const float* weight, int64_t width, const Rows& out) {
  const int64_t padded = depthwise_padded(p);
  const float* bias = weight + p.kernel * p.kernel * padded;
  Tap list[kMostTaps + 1];
  for (int64_t y = 0; y < side; ++y)
    for (int64_t x = 0; x < side; ++x) {
      const int64_t count = taps_of(p, near, y, x, source_side, list);
      float* to = out.data + (y * side + x) * out.pitch;
      int64_t c = 0;
      for (; c + 8 * kWidth <= width; c += 8 * kWidth) sum_taps<8>(list, count, source, weight, padded, bias, c, to);
      for (; c + 4 * kWidth <= width; c += 4 * kWidth) sum_taps<4>(list, count, source, weight, padded, bias, c, to);
      for (; c < width; c += kWidth) sum_taps<1>(list, count, source, weight, padded, bias, c, to);
    }
}

// Stride 1 and a side of 2, 4 or a multiple of 8: rows of S output positions in registers.

bool by_rows(const MaskedDepthwise& p) {
  return p.stride == 1 && (p.side == 2 || p.side == 4 || (p.side % 8 == 0 && p.side <= kLongestSide));
}

// Where the pieces of S input positions around a tile begin; null where their cell is masked or outside. Row iy of the
// input (from -R on) and piece q (from -D on) are at [(iy + R) * pitch + q + D].
struct Pieces {
  const float* at[(kLongestSide + 6) * (kLongestSide / 8 + 4)];
  int64_t pitch;
};

template <int S, int K>
void find_pieces(const int32_t* near, int64_t side, const Rows& source, Pieces& pieces) {
  constexpr int64_t radius = K / 2, reach = (radius + S - 1) / S;
  const int64_t across = side / S;
  pieces.pitch = across + 2 * reach;
  const float** to = pieces.at;
  int64_t dr = -((radius + side - 1) / side), y = -radius - dr * side;
  for (int64_t row = 0; row < side + 2 * radius; ++row) {
    const int32_t* cells = near + (dr + kReach) * kWindow + kReach;
    int64_t dc = -((reach + across - 1) / across), q = -reach - dc * across;
    for (int64_t piece = 0; piece < across + 2 * reach; ++piece) {
      const int64_t tile = cells[dc];
      *to++ = tile < 0 ? nullptr : source.data + ((tile * side + y) * side + q * S) * source.pitch;
      if (++q == across) q = 0, ++dc;
    }
    if (++y == side) y = 0, ++dr;
  }
}

// Eight running sums are enough to keep the multipliers busy.
constexpr int blocks_of(int S) { return S >= 8 ? 1 : 8 / S; }

// S output positions, Blocks registers of channels each from channel c on, out of K rows of pieces.
template <int S, int K, int Blocks>
FASTMIM_INLINE void row_of_positions(const float* const* pieces, int64_t pieces_pitch, int64_t pitch, int64_t c,
                                     const float* weight, int64_t padded, const float* bias, float* out,
                                     int64_t out_pitch) {
  constexpr int radius = K / 2, reach = (radius + S - 1) / S;
  Vec sums[Blocks][S];
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
    const Vec start = load_vec(bias + b * kWidth);
    unroll<S>([&](auto o) FASTMIM_INLINE_LAMBDA { sums[b][o] = start; });
  });
  for (int ky = 0; ky < K; ++ky, pieces += pieces_pitch, weight += K * padded)
    unroll<2 * reach + 1>([&](auto piece) FASTMIM_INLINE_LAMBDA {
      if (pieces[piece] == nullptr) return;
      const float* from = pieces[piece] + c;
      unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
        unroll<S>([&](auto j) FASTMIM_INLINE_LAMBDA {
          constexpr int column = (decltype(piece)::value - reach) * S + decltype(j)::value;
          if constexpr (column >= -radius && column < S + radius) {
            const Vec x = load_vec(from + j * pitch + b * kWidth);
            unroll<S>([&](auto o) FASTMIM_INLINE_LAMBDA {
              constexpr int kx = column - decltype(o)::value + radius;
              if constexpr (kx >= 0 && kx < K) sums[b][o] += x * load_vec(weight + kx * padded + b * kWidth);
            });
          }
        });
      });
    });
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
    unroll<S>([&](auto o) FASTMIM_INLINE_LAMBDA { store_vec(out + o * out_pitch + b * kWidth, sums[b][o]); });
  });
}

template <int S, int K, int Blocks>
void positions(const Pieces& pieces, int64_t side, int64_t pitch, int64_t c, const float* weight, int64_t padded,
               const Rows& out) {
  const float* bias = weight + K * K * padded + c;
  for (int64_t y = 0; y < side; ++y)
    for (int64_t q = 0; q < side / S; ++q)
      row_of_positions<S, K, Blocks>(pieces.at + y * pieces.pitch + q, pieces.pitch, pitch, c, weight + c, padded, bias,
                                     out.data + (y * side + q * S) * out.pitch + c, out.pitch);
}

template <int S, int K>
void tile_by_rows(const MaskedDepthwise& p, const int32_t* near, const Rows& source, const float* weight, int64_t width,
                  const Rows& out) {
  constexpr int blocks = blocks_of(S);
  const int64_t padded = depthwise_padded(p);
  Pieces pieces;
  find_pieces<S, K>(near, p.side, source, pieces);
  int64_t c = 0;
  for (; c + blocks * kWidth <= width; c += blocks * kWidth)
    positions<S, K, blocks>(pieces, p.side, source.pitch, c, weight, padded, out);
  for (; c < width; c += kWidth) positions<S, K, 1>(pieces, p.side, source.pitch, c, weight, padded, out);
}

void one_tile(const MaskedDepthwise& p, const int32_t* near, const Rows& source, int64_t source_side, int64_t side,
              const float* weight, int64_t width, const Rows& out) {
  if (by_rows(p)) {
#define FASTMIM_BY_ROWS(S)                                                                        \
  switch (p.kernel) {                                                                             \
    case 3: return tile_by_rows<S, 3>(p, near, source, weight, width, out);                       \
    case 5: return tile_by_rows<S, 5>(p, near, source, weight, width, out);                       \
    case 7: return tile_by_rows<S, 7>(p, near, source, weight, width, out);                       \
  }
    if (side % 8 == 0) {
      FASTMIM_BY_ROWS(8)
    } else if (side == 4) {
      FASTMIM_BY_ROWS(4)
    } else if (side == 2) {
      FASTMIM_BY_ROWS(2)
    }
#undef FASTMIM_BY_ROWS
  }
  tile_by_lists(p, near, source, source_side, side, weight, width, out);
}

// Forward: from x to out. Transposed: from the gradient of out to that of x.
template <bool Transposed>
void convolve(const MaskedDepthwise& p, const void* from, void* to) {
  const int64_t narrowed = p.side / p.stride, chunk = depthwise_chunk(p), pitch = depthwise_pitch(p);
  const int64_t source_side = Transposed ? narrowed : p.side, side = Transposed ? p.side : narrowed;
  const int64_t source_rows = p.count * source_side * source_side, rows = side * side;
  const int64_t chunks = (p.channels + chunk - 1) / chunk;
  find_places(p.kernel, p.stride, Transposed, side, source_side, p.places);
#pragma omp parallel
  {
    // A list names taps by the forward direction, rows of pieces by where they lie: those want flipped weights.
    pack(p, Transposed ? nullptr : p.bias, Transposed && by_rows(p));
    float* room = p.scratch + thread_index() * depthwise_scratch(p);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.batch * chunks; ++task) {
      const int64_t b = task / chunks, channel = task % chunks * chunk;
      const int64_t width = p.channels - channel < chunk ? p.channels - channel : chunk;
      const Rows source =
          read_rows(p.element, from, p.channels, b * source_rows, source_rows, channel, width, {room, pitch});
      const bool direct = in_place(p.element, width);
      const int64_t padded_width = (width + kWidth - 1) / kWidth * kWidth;
      for (int64_t k = 0; k < p.count; ++k) {
        const int64_t tile = b * p.count + k;
        const Rows out = direct ? Rows{static_cast<float*>(to) + tile * rows * p.channels + channel, p.channels}
                                : Rows{room + source_rows * pitch, pitch};
        one_tile(p, p.neighbours + tile * kWindow * kWindow, source, source_side, side, p.packed + channel,
                             padded_width, out);
        if (!direct) write_rows(p.element, to, p.channels, tile * rows, rows, channel, width, out);
      }
    }
  }
}

// The weight gradient: for every tap, the sum over positions of input times output gradient.

// Sums [k * k + 1, pitch]: taps, then bias.
void tile_gradient_by_lists(const MaskedDepthwise& p, const int32_t* near, const Rows& x, const Rows& gradient,
                            int64_t tile, int64_t width, const Rows& sums) {
  const int64_t side = p.side / p.stride, taps = p.kernel * p.kernel;
  Tap list[kMostTaps + 1];
  for (int64_t y = 0; y < side; ++y)
    for (int64_t column = 0; column < side; ++column) {
      const int64_t count = taps_of(p, near, y, column, p.side, list);
      const float* from = gradient.data + ((tile * side + y) * side + column) * gradient.pitch;
      for (int64_t c = 0; c < width; c += kWidth) {
        const Vec g = load_vec(from + c);
        for (int64_t i = 0; i < count; ++i) {
          float* sum = sums.data + list[i].tap * sums.pitch + c;
          store_vec(sum, load_vec(sum) + g * load_vec(x.data + list[i].row * x.pitch + c));
        }
        float* sum = sums.data + taps * sums.pitch + c;
        store_vec(sum, load_vec(sum) + g);
      }
    }
}

// One row of the kernel over one tile: K running sums in registers, S gradients beside them. A tile is summed by itself
// before it is added: short sums of sums keep more digits than one long sum.
template <int S, int K, int Blocks>
FASTMIM_INLINE void kernel_row_gradient(const Pieces& pieces, int64_t side, int64_t ky, int64_t pitch, int64_t c,
                                        const float* gradient, int64_t gradient_pitch, float* sums,
                                        int64_t sums_pitch) {
  constexpr int radius = K / 2, reach = (radius + S - 1) / S;
  Vec sum[Blocks][K];
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
    unroll<K>([&](auto kx) FASTMIM_INLINE_LAMBDA { sum[b][kx] = Vec{}; });
  });
  for (int64_t y = 0; y < side; ++y)
    for (int64_t q = 0; q < side / S; ++q, gradient += S * gradient_pitch) {
      Vec g[Blocks][S];
      unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
        unroll<S>([&](auto o) FASTMIM_INLINE_LAMBDA {
          g[b][o] = load_vec(gradient + o * gradient_pitch + b * kWidth);
        });
      });
      const float* const* row = pieces.at + (y + ky) * pieces.pitch + q;
      unroll<2 * reach + 1>([&](auto piece) FASTMIM_INLINE_LAMBDA {
        if (row[piece] == nullptr) return;
        const float* from = row[piece] + c;
        unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
          unroll<S>([&](auto j) FASTMIM_INLINE_LAMBDA {
            constexpr int column = (decltype(piece)::value - reach) * S + decltype(j)::value;
            if constexpr (column >= -radius && column < S + radius) {
              const Vec x = load_vec(from + j * pitch + b * kWidth);
              unroll<S>([&](auto o) FASTMIM_INLINE_LAMBDA {
                constexpr int kx = column - decltype(o)::value + radius;
                if constexpr (kx >= 0 && kx < K) sum[b][kx] += x * g[b][o];
              });
            }
          });
        });
      });
    }
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
    unroll<K>([&](auto kx) FASTMIM_INLINE_LAMBDA {
      float* to = sums + kx * sums_pitch + b * kWidth;
      store_vec(to, load_vec(to) + sum[b][kx]);
    });
  });
}

template <int S, int K, int Blocks>
void kernel_gradient(const Pieces& pieces, int64_t side, int64_t pitch, int64_t c, const float* gradient,
                     int64_t gradient_pitch, const Rows& sums) {
  for (int64_t ky = 0; ky < K; ++ky)
    kernel_row_gradient<S, K, Blocks>(pieces, side, ky, pitch, c, gradient + c, gradient_pitch,
                                      sums.data + ky * K * sums.pitch + c, sums.pitch);
  for (int b = 0; b < Blocks; ++b) {
    float* bias = sums.data + K * K * sums.pitch + c + b * kWidth;
    Vec total = {};
    for (int64_t i = 0; i < side * side; i += side) {
      Vec row = {};
      for (int64_t j = i; j < i + side; ++j) row += load_vec(gradient + j * gradient_pitch + c + b * kWidth);
      total += row;
    }
    store_vec(bias, load_vec(bias) + total);
  }
}

template <int S, int K>
void tile_gradient_by_rows(const MaskedDepthwise& p, const int32_t* near, const Rows& x, const Rows& gradient,
                           int64_t tile, int64_t width, const Rows& sums) {
  constexpr int blocks = S < 8 && kRegisters > 16 ? 2 : 1;
  const float* from = gradient.data + tile * p.side * p.side * gradient.pitch;
  Pieces pieces;
  find_pieces<S, K>(near, p.side, x, pieces);
  int64_t c = 0;
  for (; c + blocks * kWidth <= width; c += blocks * kWidth)
    kernel_gradient<S, K, blocks>(pieces, p.side, x.pitch, c, from, gradient.pitch, sums);
  for (; c < width; c += kWidth) kernel_gradient<S, K, 1>(pieces, p.side, x.pitch, c, from, gradient.pitch, sums);
}

void tile_gradient(const MaskedDepthwise& p, const int32_t* near, const Rows& x, const Rows& gradient, int64_t tile,
                   int64_t width, const Rows& sums) {
  if (by_rows(p)) {
#define FASTMIM_BY_ROWS(S)                                                                        \
  switch (p.kernel) {                                                                             \
    case 3: return tile_gradient_by_rows<S, 3>(p, near, x, gradient, tile, width, sums);          \
    case 5: return tile_gradient_by_rows<S, 5>(p, near, x, gradient, tile, width, sums);          \
    case 7: return tile_gradient_by_rows<S, 7>(p, near, x, gradient, tile, width, sums);          \
  }
    if (p.side % 8 == 0) {
      FASTMIM_BY_ROWS(8)
    } else if (p.side == 4) {
      FASTMIM_BY_ROWS(4)
    } else if (p.side == 2) {
      FASTMIM_BY_ROWS(2)
    }
#undef FASTMIM_BY_ROWS
  }
  tile_gradient_by_lists(p, near, x, gradient, tile, width, sums);
}

// Adds the sums to others, and starts them anew.
void move_sums(const Rows& sums, int64_t rows, int64_t width, float* to, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) {
      to[r * pitch + c] += sums.data[r * sums.pitch + c];
      sums.data[r * sums.pitch + c] = 0.0f;
    }
}

template <typename T>
void sum_parts(const MaskedDepthwise& p, int64_t parts, int64_t channel, T* weight, T* bias) {
  const int64_t taps = p.kernel * p.kernel, padded = depthwise_padded(p);
  for (int64_t tap = 0; tap <= taps; ++tap) {
    float sums[16] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const float* from = p.partial + (part * (taps + 1) + tap) * padded + channel;
      for (int c = 0; c < 16; ++c) sums[c] += from[c];
    }
    for (int64_t c = 0; c < 16 && channel + c < p.channels; ++c) {
      if (tap < taps)
        from_float(sums[c], weight + (channel + c) * taps + tap);
      else if (bias != nullptr)
        from_float(sums[c], bias + channel + c);
    }
  }
}

}  // namespace

void masked_depthwise(const MaskedDepthwise& p) { convolve<false>(p, p.x, p.out); }

void masked_depthwise_input_gradient(const MaskedDepthwise& p) { convolve<true>(p, p.out, p.x_gradient); }

void masked_depthwise_weight_gradient(const MaskedDepthwise& p) {
  const int64_t chunk = depthwise_chunk(p), pitch = depthwise_pitch(p), padded = depthwise_padded(p);
  const int64_t chunks = (p.channels + chunk - 1) / chunk, parts = depthwise_parts(p), taps = p.kernel * p.kernel;
  const int64_t side = p.side / p.stride, rows = p.count * p.side * p.side, out_rows = p.count * side * side;
  find_places(p.kernel, p.stride, false, side, p.side, p.places);
#pragma omp parallel
  {
    float* room = p.scratch + thread_index() * depthwise_scratch(p);
    const Rows sums = {room, pitch};
    float* x_room = room + (taps + 1) * pitch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * chunks; ++task) {
      const int64_t part = task / chunks, channel = task % chunks * chunk;
      const int64_t width = p.channels - channel < chunk ? p.channels - channel : chunk;
      const int64_t padded_width = (width + kWidth - 1) / kWidth * kWidth;
      int64_t summed = 0;  // summands in `sums` that are not in `partial` yet
      float* to = p.partial + part * (taps + 1) * padded + channel;
      memset(room, 0, static_cast<size_t>((taps + 1) * pitch) * sizeof(float));
      for (int64_t tap = 0; tap <= taps; ++tap)
        memset(to + tap * padded, 0, static_cast<size_t>(padded_width) * sizeof(float));
      for (int64_t b = p.batch * part / parts; b < p.batch * (part + 1) / parts; ++b) {
        const Rows x = read_rows(p.element, p.x, p.channels, b * rows, rows, channel, width, {x_room, pitch});
        const Rows gradient = read_rows(p.element, p.out, p.channels, b * out_rows, out_rows, channel, width,
                                        {x_room + rows * pitch, pitch});
        for (int64_t k = 0; k < p.count; ++k) {
          tile_gradient(p, p.neighbours + (b * p.count + k) * kWindow * kWindow, x, gradient, k, padded_width, sums);
          summed += by_rows(p) ? 1 : side * side;
          if (summed >= kSummedTogether) {
            move_sums(sums, taps + 1, padded_width, to, padded);
            summed = 0;
          }
        }
      }
      move_sums(sums, taps + 1, padded_width, to, padded);
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < padded / 16; ++block) {
      switch (static_cast<Element>(p.weight_element)) {
        case Element::f32:
          sum_parts(p, parts, block * 16, static_cast<float*>(p.weight_gradient), static_cast<float*>(p.bias_gradient));
          break;
        case Element::bf16:
          sum_parts(p, parts, block * 16, static_cast<Bf16*>(p.weight_gradient), static_cast<Bf16*>(p.bias_gradient));
          break;
        case Element::f16:
          sum_parts(p, parts, block * 16, static_cast<F16*>(p.weight_gradient), static_cast<F16*>(p.bias_gradient));
          break;
      }
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
