// Cells of a feature map to tiles and back: whole rows of channels where they are dense, else element by element.
#include "cpu/tiles.h"

#include <string.h>

#include "cpu/element.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

// One row of positions of a cell, [t, C].
template <typename T>
void read_row(const Tiles& p, const T* from, T* to) {
  const int64_t channels = p.channels, side = p.side, over_c = p.stride[1], over_w = p.stride[3];
  if (over_c == 1 && over_w == channels) {
    memcpy(to, from, static_cast<size_t>(side * channels) * sizeof(T));
    return;
  }
  if (over_c == 1) {
    for (int64_t x = 0; x < side; ++x)
      memcpy(to + x * channels, from + x * over_w, static_cast<size_t>(channels) * sizeof(T));
    return;
  }
  if (channels == 3) {  // an image
    for (int64_t x = 0; x < side; ++x, to += 3)
      for (int64_t c = 0; c < 3; ++c) to[c] = from[c * over_c + x * over_w];
    return;
  }
  constexpr int64_t kTogether = 16;  // channels: few enough that their cache lines stay
  for (int64_t first = 0; first < channels; first += kTogether) {
    const int64_t last = first + kTogether < channels ? first + kTogether : channels;
    for (int64_t x = 0; x < side; ++x)
      for (int64_t c = first; c < last; ++c) to[x * channels + c] = from[c * over_c + x * over_w];
  }
}

template <typename T>
void gather(const Tiles& p) {
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < p.batch * p.count; ++tile) {
    const int64_t cell = p.ids_keep[tile], row = cell / p.columns * p.side, column = cell % p.columns * p.side;
    const T* from = static_cast<const T*>(p.dense) + tile / p.count * p.stride[0] + row * p.stride[2] +
                    column * p.stride[3];
    T* to = static_cast<T*>(p.x) + tile * p.side * p.side * p.channels;
    for (int64_t y = 0; y < p.side; ++y) read_row(p, from + y * p.stride[2], to + y * p.side * p.channels);
  }
}

template <typename T>
void scatter(const Tiles& p) {
  const int64_t cells = p.rows * p.columns, width = p.side * p.channels;
  // A row of a map's cells at a time, so that what is written lies together.
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < p.batch * p.rows; ++line) {
    const int64_t image = line / p.rows;
    T* to = static_cast<T*>(p.dense) + line * p.side * p.columns * width;
    for (int64_t y = 0; y < p.side; ++y)
      for (int64_t column = 0; column < p.columns; ++column, to += width) {
        const int64_t slot = p.slots[image * cells + line % p.rows * p.columns + column];
        if (slot >= 0) {
          const T* from = static_cast<const T*>(p.x) + ((image * p.count + slot) * p.side + y) * width;
          memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
        } else if (p.fill == nullptr) {
          memset(to, 0, static_cast<size_t>(width) * sizeof(T));
        } else {
          for (int64_t x = 0; x < p.side; ++x)
            memcpy(to + x * p.channels, p.fill, static_cast<size_t>(p.channels) * sizeof(T));
        }
      }
  }
}

static inline double widened(double x) { return x; }
template <typename T>
float widened(T x) {
  return to_float(x);
}
static inline void narrowed(double x, double* out) { *out = x; }
template <typename T>
void narrowed(float x, T* out) {
  from_float(x, out);
}

// Adds the masked cells of one row of cells to sums [C]; `slots` are the row's, `from` its first position.
template <typename T, typename Sum>
void add_line(const Tiles& p, const int32_t* slots, const T* from, Sum* sums) {
  const int64_t channels = p.channels, side = p.side, over_c = p.stride[1], over_h = p.stride[2], over_w = p.stride[3];
  if (over_c == 1) {
    for (int64_t column = 0; column < p.columns; ++column)
      for (int64_t i = 0; slots[column] < 0 && i < side * side; ++i) {
        const T* row = from + i / side * over_h + (column * side + i % side) * over_w;
        for (int64_t c = 0; c < channels; ++c) sums[c] += widened(row[c]);
      }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {  // outermost, so that a channel's memory is walked through in its order
    Sum sum = 0;
    for (int64_t y = 0; y < side; ++y)
      for (int64_t column = 0; column < p.columns; ++column)
        for (int64_t x = column * side; slots[column] < 0 && x < (column + 1) * side; ++x)
          sum += widened(from[c * over_c + y * over_h + x * over_w]);
    sums[c] += sum;
  }
}

template <typename T, typename Sum>
void sum_masked(const Tiles& p) {
  const int64_t parts = masked_sum_parts(p), lines = p.batch * p.rows;
  Sum* partial = static_cast<Sum*>(p.partial);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    Sum* sums = partial + part * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) sums[c] = 0;
    for (int64_t line = part * lines / parts; line < (part + 1) * lines / parts; ++line)
      add_line(p, p.slots + line * p.columns,
               static_cast<const T*>(p.dense) + line / p.rows * p.stride[0] + line % p.rows * p.side * p.stride[2],
               sums);
  }
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t c = 0; c < p.channels; ++c) partial[c] += partial[part * p.channels + c];
  for (int64_t c = 0; c < p.channels; ++c) narrowed(parts > 0 ? partial[c] : Sum(0), static_cast<T*>(p.sum) + c);
}

}  // namespace

void gather_tiles(const Tiles& p) {
  switch (p.bytes) {
    case 1: return gather<uint8_t>(p);
    case 2: return gather<uint16_t>(p);
    case 4: return gather<uint32_t>(p);
    default: return gather<uint64_t>(p);
  }
}

void scatter_tiles(const Tiles& p) {
  switch (p.bytes) {
    case 1: return scatter<uint8_t>(p);
    case 2: return scatter<uint16_t>(p);
    case 4: return scatter<uint32_t>(p);
    default: return scatter<uint64_t>(p);
  }
}

void masked_sum(const Tiles& p) {
  if (p.element == kFp64) return sum_masked<double, double>(p);
  switch (static_cast<Element>(p.element)) {
    case Element::f32: return sum_masked<float, float>(p);
    case Element::bf16: return sum_masked<Bf16, float>(p);
    case Element::f16: return sum_masked<F16, float>(p);
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
