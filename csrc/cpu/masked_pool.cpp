// Pooling over tiles, and its gradients. Channels lie in the lanes; the taps of a position are found once for all of
// them. Backward is a gather too: a position adds up, in a fixed order, what the windows over it hand back.
#include "cpu/masked_pool.h"

#include <string.h>

#include "cpu/element.h"
#include "cpu/tile_places.h"
#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

typedef int32_t VecInt __attribute__((vector_size(kWidth * sizeof(int32_t))));
typedef uint8_t VecByte __attribute__((vector_size(kWidth)));

struct Tap {
  int32_t tap;  // ky * k + kx
  int64_t row;  // of the other tensor, within the image
};

int64_t taps_of(const MaskedPool& p, const int32_t* near, int64_t y, int64_t x, int64_t side, Tap* list) {
  const int64_t k = p.kernel;
  int64_t found = 0;
  const int32_t *up = p.places + 2 * y * k, *left = p.places + 2 * x * k;
  for (int64_t ky = 0; ky < k; ++ky) {
    if (up[2 * ky] > kReach) continue;
    const int32_t* row = near + (up[2 * ky] + kReach) * kWindow + kReach;
    for (int64_t kx = 0; kx < k; ++kx) {
      if (left[2 * kx] > kReach) continue;
      const int64_t tile = row[left[2 * kx]];
      list[found].tap = static_cast<int32_t>(ky * k + kx);
      list[found].row = (tile * side + up[2 * ky + 1]) * side + left[2 * kx + 1];
      found += tile >= 0;
    }
  }
  return found;
}

// kWidth elements as fp32; the first `width` of them where there are fewer.
template <bool Whole, typename T>
FASTMIM_INLINE Vec load_wide(const T* from, int64_t width) {
  T room[kWidth] = {};
  memcpy(room, from, Whole ? sizeof(room) : static_cast<size_t>(width) * sizeof(T));
  float wide[kWidth];
  for (int i = 0; i < kWidth; ++i) wide[i] = to_float(room[i]);
  return load_vec(wide);
}

template <bool Whole, typename T>
FASTMIM_INLINE void store_narrow(const Vec& x, int64_t width, T* to) {
  float wide[kWidth];
  store_vec(wide, x);
  T room[kWidth];
  for (int i = 0; i < kWidth; ++i) from_float(wide[i], room + i);
  memcpy(to, room, Whole ? sizeof(room) : static_cast<size_t>(width) * sizeof(T));
}

template <bool Whole>
FASTMIM_INLINE VecInt load_bytes(const uint8_t* from, int64_t width) {
  VecByte bytes = {};
  memcpy(&bytes, from, Whole ? sizeof(bytes) : static_cast<size_t>(width));
  return __builtin_convertvector(bytes, VecInt);
}

template <bool Whole>
FASTMIM_INLINE void store_bytes(const VecInt& x, int64_t width, uint8_t* to) {
  const VecByte bytes = __builtin_convertvector(x, VecByte);
  memcpy(to, &bytes, Whole ? sizeof(bytes) : static_cast<size_t>(width));
}

// One position, some of its channels: pointers are those of its first channel here.
template <int Blocks, bool Whole>
struct Channels {  // members are inlined for certain, as lambdas are: Vec has no calling convention of its own
  int64_t width;  // of the last block, where it is not whole

  // As torch's: the first of equal values, and the last NaN.
  template <typename T>
  FASTMIM_INLINE_LAMBDA void largest(const Tap* taps, int64_t count, const T* x, int64_t channels, T* out,
                              uint8_t* chosen) const {
    Vec best[Blocks];
    VecInt tap[Blocks];
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
      best[b] = load_wide<Whole>(x + taps[0].row * channels + b * kWidth, width);
      tap[b] = VecInt{} + taps[0].tap;
    });
    for (int64_t i = 1; i < count; ++i) {
      const T* from = x + taps[i].row * channels;
      const VecInt here = VecInt{} + taps[i].tap;
      unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
        const Vec value = load_wide<Whole>(from + b * kWidth, width);
        const VecInt better = (value > best[b]) | (value != value);
        best[b] = better ? value : best[b];
        tap[b] = better ? here : tap[b];
      });
    }
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
      store_narrow<Whole>(best[b], width, out + b * kWidth);
      store_bytes<Whole>(tap[b], width, chosen + b * kWidth);
    });
  }

  template <typename T>
  FASTMIM_INLINE_LAMBDA void average(const Tap* taps, int64_t count, const T* x, int64_t channels, float share,
                              T* out) const {
    Vec sum[Blocks];
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { sum[b] = Vec{}; });
    for (int64_t i = 0; i < count; ++i) {
      const T* from = x + taps[i].row * channels;
      unroll<Blocks>(
          [&](auto b) FASTMIM_INLINE_LAMBDA { sum[b] += load_wide<Whole>(from + b * kWidth, width); });
    }
    unroll<Blocks>(
        [&](auto b) FASTMIM_INLINE_LAMBDA { store_narrow<Whole>(sum[b] * share, width, out + b * kWidth); });
  }

  // `chosen` null: average, with the shares of the image's outputs.
  template <bool Largest, typename T>
  FASTMIM_INLINE_LAMBDA void hand_back(const Tap* taps, int64_t count, const T* gradient, int64_t channels,
                                const uint8_t* chosen, const float* share, T* x_gradient) const {
    Vec sum[Blocks];
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { sum[b] = Vec{}; });
    for (int64_t i = 0; i < count; ++i) {
      const T* from = gradient + taps[i].row * channels;
      unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
        const Vec value = load_wide<Whole>(from + b * kWidth, width);
        if constexpr (Largest) {
          const VecInt tap = load_bytes<Whole>(chosen + taps[i].row * channels + b * kWidth, width);
          sum[b] += tap == taps[i].tap ? value : Vec{};
        } else {
          sum[b] += value * share[taps[i].row];
        }
      });
    }
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { store_narrow<Whole>(sum[b], width, x_gradient + b * kWidth); });
  }
};

// f(channels, first channel) for all channels: four registers at a time, one, and what is left.
template <typename F>
FASTMIM_INLINE void over_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth) f(Channels<4, true>{kWidth}, c);
  for (; c + kWidth <= channels; c += kWidth) f(Channels<1, true>{kWidth}, c);
  if (c < channels) f(Channels<1, false>{channels - c}, c);
}

template <bool Largest, typename T>
void forward(const MaskedPool& p) {
  const int64_t side = p.side / p.stride, channels = p.channels;
  find_window_places(p.kernel, p.stride, p.padding, false, side, p.side, p.places);
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < p.batch * p.count; ++tile) {
    Tap taps[kMostPoolTaps];
    const T* x = static_cast<const T*>(p.x) + tile / p.count * p.count * p.side * p.side * channels;
    const int32_t* near = p.neighbours + tile * kWindow * kWindow;
    for (int64_t i = 0; i < side * side; ++i) {
      const int64_t found = taps_of(p, near, i / side, i % side, p.side, taps), row = tile * side * side + i;
      T* out = static_cast<T*>(p.out) + row * channels;
      if constexpr (Largest) {
        over_channels(channels, [&](const auto& some, int64_t c) FASTMIM_INLINE_LAMBDA {
          some.largest(taps, found, x + c, channels, out + c, p.chosen + row * channels + c);
        });
      } else {
        const float share = 1.0f / static_cast<float>(p.visible ? found : p.kernel * p.kernel);
        p.share[row] = share;
        over_channels(channels, [&](const auto& some, int64_t c) FASTMIM_INLINE_LAMBDA {
          some.average(taps, found, x + c, channels, share, out + c);
        });
      }
    }
  }
}

template <bool Largest, typename T>
void backward(const MaskedPool& p) {
  const int64_t side = p.side / p.stride, channels = p.channels;
  find_window_places(p.kernel, p.stride, p.padding, true, p.side, side, p.places);
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < p.batch * p.count; ++tile) {
    Tap taps[kMostPoolTaps];
    const int64_t first = tile / p.count * p.count * side * side;  // output of the image
    const T* gradient = static_cast<const T*>(p.out) + first * channels;
    const uint8_t* chosen = Largest ? p.chosen + first * channels : nullptr;
    const float* share = Largest ? nullptr : p.share + first;
    const int32_t* near = p.neighbours + tile * kWindow * kWindow;
    for (int64_t i = 0; i < p.side * p.side; ++i) {
      const int64_t found = taps_of(p, near, i / p.side, i % p.side, side, taps);
      T* to = static_cast<T*>(p.x_gradient) + (tile * p.side * p.side + i) * channels;
      over_channels(channels, [&](const auto& some, int64_t c) FASTMIM_INLINE_LAMBDA {
        some.template hand_back<Largest>(taps, found, gradient + c, channels, Largest ? chosen + c : nullptr, share,
                                         to + c);
      });
    }
  }
}

template <bool Largest>
void run(const MaskedPool& p, bool forwards) {
  switch (static_cast<Element>(p.element)) {
    case Element::f32: forwards ? forward<Largest, float>(p) : backward<Largest, float>(p); break;
    case Element::bf16: forwards ? forward<Largest, Bf16>(p) : backward<Largest, Bf16>(p); break;
    case Element::f16: forwards ? forward<Largest, F16>(p) : backward<Largest, F16>(p); break;
  }
}

}  // namespace

void masked_max_pool(const MaskedPool& p) { run<true>(p, true); }
void masked_max_pool_backward(const MaskedPool& p) { run<true>(p, false); }
void masked_avg_pool(const MaskedPool& p) { run<false>(p, true); }
void masked_avg_pool_backward(const MaskedPool& p) { run<false>(p, false); }

}  // namespace FASTMIM_ISA
}  // namespace fastmim
