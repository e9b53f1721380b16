// Depthwise convolution over tiles, and its gradients. Channels lie in the lanes. Whether a neighbour is visible is
// asked once for all that it gives: a masked one's taps are never issued. Three ways, by the side of a tile: rows of
// eight positions (depthwise_rows.h), whole cells (depthwise_cells.h), and lists of taps for everything else.
#include "cpu/masked_depthwise.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/depthwise_cells.h"
#include "cpu/depthwise_rows.h"
#include "cpu/element.h"
#include "cpu/transpose.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int64_t kSummedTogether = 64;  // summands of a weight gradient that make one sum

int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

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

// Where tap `tap` of the register of channels that holds `channel` lies, in `packed`, `partial` and sums.
int64_t tap_at(const MaskedDepthwise& p, int64_t channel, int64_t tap) {
  return (channel / kWidth * (p.kernel * p.kernel + 1) + tap) * kWidth;
}

// Sixteen channels from `from` on, from [C, taps] to the order of the kernels.
template <typename T>
void pack_channels(const MaskedDepthwise& p, const T* weight, const T* bias, bool flipped, int64_t from) {
  const int64_t taps = p.kernel * p.kernel, width = p.channels - from < 16 ? p.channels - from : 16;
  weight += from * taps;
  for (int64_t first = 0; first < taps; first += 16) {
    const int64_t some = taps - first < 16 ? taps - first : 16;
    Square square = {};
    for (int64_t c = 0; c < width; ++c) {
      const T* row = weight + c * taps + first;
      if (some == 16)
        for (int i = 0; i < 16; ++i) square.row[c][i] = to_float(row[i]);
      else
        for (int64_t i = 0; i < some; ++i) square.row[c][i] = to_float(row[i]);
    }
    transpose(square);
    for (int64_t i = 0; i < some; ++i) {
      const int64_t tap = flipped ? taps - 1 - first - i : first + i;
      for (int c = 0; c < 16; c += kWidth) store_vec(p.packed + tap_at(p, from + c, tap), load_vec(square.row[i] + c));
    }
  }
  for (int64_t c = 0; c < 16; ++c)
    p.packed[tap_at(p, from + c, taps) + c % kWidth] = bias != nullptr && c < width ? to_float(bias[from + c]) : 0.0f;
}

// Weight and bias in fp32 and in the order of the kernels. Called by all threads of a team.
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

int64_t taps_of(const MaskedDepthwise& p, const int32_t* near, int64_t y, int64_t x, int64_t side, DepthwiseTap* list) {
  const int64_t k = p.kernel;
  int64_t found = 0;
  const int32_t *up = p.places + 2 * y * k, *left = p.places + 2 * x * k;
  for (int64_t ky = 0; ky < k; ++ky) {
    if (up[2 * ky] > kReach) continue;
    const int32_t* row = near + (up[2 * ky] + kReach) * kWindow + kReach;
    for (int64_t kx = 0; kx < k; ++kx) {
      if (left[2 * kx] > kReach) continue;
      const int64_t tile = row[left[2 * kx]], at = (tile * side + up[2 * ky + 1]) * side + left[2 * kx + 1];
      list[found] = {static_cast<int32_t>(ky * k + kx), static_cast<int32_t>(at)};
      found += tile >= 0;
    }
  }
  return found;
}

// Tiles of one position have a list each, which all their channels share. Called by all threads of a team.
void list_single_positions(const MaskedDepthwise& p) {
#pragma omp for schedule(static)
  for (int64_t tile = 0; tile < p.batch * p.count; ++tile) {
    DepthwiseTap* list = p.lists + tile * (kMostTaps + 1);
    const int64_t found = taps_of(p, p.neighbours + tile * kWindow * kWindow, 0, 0, 1, list);
    list[kMostTaps].tap = static_cast<int32_t>(found);
  }
}

// Blocks registers of channels of one position.
template <int K, int Blocks>
FASTMIM_INLINE void sum_taps(const DepthwiseTap* list, int64_t count, const Rows& source, int64_t c,
                             const float* weight, float* out) {
  Vec sums[Blocks];
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { sums[b] = load_vec(weight + K * K * kWidth + b * kTaps<K>); });
  for (int64_t i = 0; i < count;) {
    Vec some[Blocks] = {};  // short sums of sums keep more digits than one long sum
    for (const int64_t end = i + 16 < count ? i + 16 : count; i < end; ++i) {
      const float *from = source.data + list[i].row * source.pitch + c, *tap = weight + list[i].tap * kWidth;
      unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
        some[b] += load_vec(from + b * kWidth) * load_vec(tap + b * kTaps<K>);
      });
    }
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { sums[b] += some[b]; });
  }
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { store_vec(out + c + b * kWidth, sums[b]); });
}

template <int K, int Blocks>
FASTMIM_INLINE void correlate_taps(const DepthwiseTap* list, int64_t count, const Rows& source, int64_t c,
                                   const float* own, float* sums) {
  Vec x[Blocks];
  unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA { x[b] = load_vec(own + c + b * kWidth); });
  for (int64_t i = 0; i < count; ++i) {
    const float* from = source.data + list[i].row * source.pitch + c;
    float* sum = sums + list[i].tap * kWidth;
    unroll<Blocks>([&](auto b) FASTMIM_INLINE_LAMBDA {
      store_vec(sum + b * kTaps<K>, load_vec(sum + b * kTaps<K>) + x[b] * load_vec(from + b * kWidth));
    });
  }
}

// Calls f(list, its length, position) for every position of a tile.
template <typename F>
FASTMIM_INLINE void for_positions(const MaskedDepthwise& p, int64_t index, int64_t side, int64_t source_side,
                                  const F& f) {
  if (side == 1 && source_side == 1) {
    const DepthwiseTap* list = p.lists + index * (kMostTaps + 1);
    return f(list, list[kMostTaps].tap, 0);
  }
  DepthwiseTap list[kMostTaps + 1];
  for (int64_t y = 0; y < side; ++y)
    for (int64_t x = 0; x < side; ++x)
      f(list, taps_of(p, p.neighbours + index * kWindow * kWindow, y, x, source_side, list), y * side + x);
}

// Calls f(how many registers of channels as a constant, channel) until all channels are done.
template <typename F>
FASTMIM_INLINE void for_blocks(int64_t width, const F& f) {
  int64_t c = 0;
  for (; c + 8 * kWidth <= width; c += 8 * kWidth) f(Index<8>(), c);
  for (; c + 4 * kWidth <= width; c += 4 * kWidth) f(Index<4>(), c);
  for (; c < width; c += kWidth) f(Index<1>(), c);
}

template <int K>
void convolve_lists(const MaskedDepthwise& p, const DepthwiseTile& tile, int64_t index, int64_t source_side) {
  const Rows source = tile.source;
  for_positions(p, index, tile.side, source_side, [&](const DepthwiseTap* list, int64_t count, int64_t position) {
    float* to = tile.out.data + position * tile.out.pitch;
    for_blocks(tile.width, [&](auto blocks, int64_t c) FASTMIM_INLINE_LAMBDA {
      sum_taps<K, decltype(blocks)::value>(list, count, source, c, tile.weight + c / kWidth * kTaps<K>, to);
    });
  });
}

template <int K>
void correlate_lists(const MaskedDepthwise& p, const DepthwiseTile& tile, int64_t index, int64_t source_side) {
  const Rows source = tile.source;
  for_positions(p, index, tile.side, source_side, [&](const DepthwiseTap* list, int64_t count, int64_t position) {
    const float* own = tile.x.data + position * tile.x.pitch;
    for_blocks(tile.width, [&](auto blocks, int64_t c) FASTMIM_INLINE_LAMBDA {
      correlate_taps<K, decltype(blocks)::value>(list, count, source, c, own, tile.sums + c / kWidth * kTaps<K>);
    });
  });
}

enum class Way { rows, cells, lists };

Way way_of(const MaskedDepthwise& p) {
  if (p.stride != 1) return Way::lists;
  if (p.side == 2 || p.side == 4) return Way::cells;
  return p.side % kSpan == 0 && p.side <= kLongestSide ? Way::rows : Way::lists;
}

// One tile's output, or the gradient of its input; `index` counts tiles of the batch, `source_side` is the side of the
// tiles that it reads.
template <int K>
void convolve_tile(const MaskedDepthwise& p, const DepthwiseTile& tile, int64_t index, int64_t source_side) {
  switch (way_of(p)) {
    case Way::rows: return convolve_rows<K>(tile);
    case Way::cells: return p.side == 2 ? convolve_cells<2, K>(tile) : convolve_cells<4, K>(tile);
    case Way::lists: return convolve_lists<K>(p, tile, index, source_side);
  }
}

// Adds to tile.sums what one tile's input gives to the gradient of the weight.
template <int K>
void correlate_tile(const MaskedDepthwise& p, const DepthwiseTile& tile, int64_t index, int64_t source_side) {
  switch (way_of(p)) {
    case Way::rows: return correlate_all_rows<K>(tile);
    case Way::cells: return p.side == 2 ? correlate_cells<2, K>(tile) : correlate_cells<4, K>(tile);
    case Way::lists: return correlate_lists<K>(p, tile, index, source_side);
  }
}

#define FASTMIM_BY_KERNEL(function, ...)       \
  (p.kernel == 3   ? function<3>(__VA_ARGS__)  \
   : p.kernel == 5 ? function<5>(__VA_ARGS__)  \
                   : function<7>(__VA_ARGS__))

// The sum of one tile's gradients, to every register's bias.
void add_rows_up(const Rows& gradient, int64_t side, int64_t width, int64_t step, float* sums) {
  for (int64_t c = 0; c < width; c += kWidth, sums += step) {
    Vec total = {};
    for (int64_t y = 0; y < side; ++y) {
      Vec row = {};
      for (int64_t x = 0; x < side; ++x) row += load_vec(gradient.data + (y * side + x) * gradient.pitch + c);
      total += row;
    }
    store_vec(sums, load_vec(sums) + total);
  }
}

// Adds the sums to others, and starts them anew.
void move_sums(float* sums, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += sums[i];
    sums[i] = 0.0f;
  }
}

// Sixteen channels from `channel` on, of all parts, to [C, taps].
template <typename T>
void sum_parts(const MaskedDepthwise& p, int64_t parts, int64_t channel, T* weight, T* bias) {
  const int64_t taps = p.kernel * p.kernel, width = p.channels - channel < 16 ? p.channels - channel : 16;
  for (int64_t first = 0; first <= taps; first += 16) {
    const int64_t some = taps + 1 - first < 16 ? taps + 1 - first : 16;
    Square square = {};
    for (int64_t part = 0; part < parts; ++part) {
      const float* from = p.partial + part * (taps + 1) * depthwise_padded(p);
      for (int64_t i = 0; i < some; ++i)
        for (int c = 0; c < 16; c += kWidth) {
          float* sum = square.row[i] + c;
          store_vec(sum, load_vec(sum) + load_vec(from + tap_at(p, channel + c, first + i)));
        }
    }
    transpose(square);
    const int64_t of_weight = taps - first < some ? taps - first : some;
    for (int64_t c = 0; c < width; ++c) {
      T* row = weight + (channel + c) * taps + first;
      if (of_weight == 16)
        for (int i = 0; i < 16; ++i) from_float(square.row[c][i], row + i);
      else
        for (int64_t i = 0; i < of_weight; ++i) from_float(square.row[c][i], row + i);
      if (of_weight < some && bias != nullptr) from_float(square.row[c][of_weight], bias + channel + c);
    }
  }
}

// Asks the memory for rows that are wanted soon. Rows are read and written in pieces that the processor does not
// foresee.
void fetch(const Rows& rows, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(rows.data + r * rows.pitch + c, 0, 2);
}

// Some channels of a tile in fp32, where the kernels take them in place.
Rows tile_rows(const MaskedDepthwise& p, const void* data, int64_t index, int64_t rows, int64_t channel) {
  return {const_cast<float*>(static_cast<const float*>(data)) + index * rows * p.channels + channel, p.channels};
}

}  // namespace

void masked_depthwise(const MaskedDepthwise& p) {
  const int64_t side = p.side / p.stride, chunk = depthwise_chunk(p), pitch = depthwise_pitch(p);
  const int64_t source_rows = p.count * p.side * p.side, rows = side * side;
  const int64_t chunks = (p.channels + chunk - 1) / chunk;
  find_places(p.kernel, p.stride, false, side, p.side, p.places);
#pragma omp parallel
  {
    if (p.side == 1) list_single_positions(p);
    pack(p, p.bias, false);
    float* room = p.scratch + thread_index() * depthwise_scratch(p);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.batch * chunks; ++task) {
      const int64_t b = task / chunks, channel = task % chunks * chunk;
      const int64_t width = p.channels - channel < chunk ? p.channels - channel : chunk;
      const bool direct = in_place(p.element, width);
      const int64_t next = task + 1, next_b = next / chunks, next_channel = next % chunks * chunk;
      DepthwiseTile tile{};
      tile.side = side, tile.width = (width + kWidth - 1) / kWidth * kWidth;
      tile.weight = p.packed + tap_at(p, channel, 0);
      tile.source =
          read_rows(p.element, p.x, p.channels, b * source_rows, source_rows, channel, width, {room, pitch});
      for (int64_t index = b * p.count; index < (b + 1) * p.count; ++index) {
        tile.near = p.neighbours + index * kWindow * kWindow;
        tile.out = direct ? tile_rows(p, p.out, index, rows, channel) : Rows{room + source_rows * pitch, pitch};
        if (direct && next_b < p.batch) {
          const int64_t ahead = next_b * p.count + index - b * p.count;
          fetch(tile_rows(p, p.x, ahead, p.side * p.side, next_channel), p.side * p.side, width);
          fetch(tile_rows(p, p.out, ahead, rows, next_channel), rows, width);
        }
        FASTMIM_BY_KERNEL(convolve_tile, p, tile, index, p.side);
        if (!direct) write_rows(p.element, p.out, p.channels, index * rows, rows, channel, width, tile.out);
      }
    }
  }
}

void masked_depthwise_gradients(const MaskedDepthwise& p) {
  const int64_t chunk = depthwise_chunk(p), pitch = depthwise_pitch(p), padded = depthwise_padded(p);
  const int64_t chunks = (p.channels + chunk - 1) / chunk, parts = depthwise_parts(p), taps = p.kernel * p.kernel;
  const int64_t side = p.side / p.stride, rows = p.side * p.side, out_rows = side * side;
  const bool to_x = p.x_gradient != nullptr, to_weight = p.weight_gradient != nullptr;
  find_places(p.kernel, p.stride, true, p.side, side, p.places);
#pragma omp parallel
  {
    if (p.side == 1) list_single_positions(p);
    // A list names taps by the forward pass, the other ways by where they lie: those want them in reverse order.
    if (to_x) pack(p, nullptr, way_of(p) != Way::lists);
    float* room = p.scratch + thread_index() * depthwise_scratch(p);
    float* gradient_room = room + (taps + 1) * chunk;
    float* x_room = gradient_room + p.count * out_rows * pitch;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts * chunks; ++task) {
      const int64_t part = task / chunks, channel = task % chunks * chunk;
      const int64_t width = p.channels - channel < chunk ? p.channels - channel : chunk;
      const int64_t first = p.batch * p.count * part / parts, last = p.batch * p.count * (part + 1) / parts;
      const int64_t next = task + 1, next_channel = next % chunks * chunk;
      const int64_t next_first = p.batch * p.count * (next / chunks) / parts;
      const bool direct = in_place(p.element, width);
      float* to = p.partial + part * (taps + 1) * padded + tap_at(p, channel, 0);
      DepthwiseTile tile{};
      tile.side = p.side, tile.width = (width + kWidth - 1) / kWidth * kWidth;
      tile.weight = p.packed + tap_at(p, channel, 0), tile.sums = room;
      const int64_t sums = (taps + 1) * tile.width;
      if (to_weight) {
        memset(room, 0, static_cast<size_t>(sums) * sizeof(float));
        memset(to, 0, static_cast<size_t>(sums) * sizeof(float));
      }
      int64_t summed = 0;  // summands in tile.sums that are not in `partial` yet
      Rows x{};            // of the image
      for (int64_t index = first; index < last; ++index) {
        const int64_t b = index / p.count, k = index % p.count;
        if (index == first || k == 0) {
          tile.source = read_rows(p.element, p.out, p.channels, b * p.count * out_rows, p.count * out_rows, channel,
                                  width, {gradient_room, pitch});
          if (to_weight)
            x = read_rows(p.element, p.x, p.channels, b * p.count * rows, p.count * rows, channel, width,
                          {x_room, pitch});
        }
        tile.near = p.neighbours + index * kWindow * kWindow;
        if (direct && next < parts * chunks && next_first + index - first < p.batch * p.count) {
          const int64_t ahead = next_first + index - first;
          fetch(tile_rows(p, p.out, ahead, out_rows, next_channel), out_rows, width);
          if (to_weight) fetch(tile_rows(p, p.x, ahead, rows, next_channel), rows, width);
          if (to_x) fetch(tile_rows(p, p.x_gradient, ahead, rows, next_channel), rows, width);
        }
        if (to_weight) {
          tile.x = {x.data + k * rows * x.pitch, x.pitch};
          FASTMIM_BY_KERNEL(correlate_tile, p, tile, index, side);
          if (p.bias_gradient != nullptr)
            add_rows_up({tile.source.data + k * out_rows * tile.source.pitch, tile.source.pitch}, side, tile.width,
                        (taps + 1) * kWidth, room + taps * kWidth);
          summed += way_of(p) == Way::lists ? rows : 1;
          if (summed >= kSummedTogether) {
            move_sums(tile.sums, sums, to);
            summed = 0;
          }
        }
        if (to_x) {
          tile.out = direct ? tile_rows(p, p.x_gradient, index, rows, channel)
                            : Rows{x_room + p.count * rows * pitch, pitch};
          FASTMIM_BY_KERNEL(convolve_tile, p, tile, index, side);
          if (!direct) write_rows(p.element, p.x_gradient, p.channels, index * rows, rows, channel, width, tile.out);
        }
      }
      if (to_weight) move_sums(tile.sums, sums, to);
    }
    if (to_weight) {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < padded / 16; ++block) {
        switch (static_cast<Element>(p.weight_element)) {
          case Element::f32:
            sum_parts(p, parts, block * 16, static_cast<float*>(p.weight_gradient),
                      static_cast<float*>(p.bias_gradient));
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
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
