// Weights of a dense convolution: from their tensor [O, C, k, k] into the order in which a product reads them, and their
// gradient's sums back.
#pragma once

#include <string.h>

#include "cpu/element.h"
#include "cpu/masked_dense.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int kRows = 6;                           // of the register tile
constexpr int kColumns = kRegisters > 16 ? 4 : 2;  // registers across it: 24 (12) sums, a row of weights, one value
constexpr int64_t kBlock = kColumns * kWidth;      // columns that one task handles
constexpr int64_t kDepth = kPanelDepth;            // of a product before its sums go back to memory

template <typename T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `count` elements, zeros after them. Where sixteen may be read, they are: a copy of fixed length.
template <typename T>
FASTMIM_INLINE void read_sixteen(const T* from, int64_t count, int64_t readable, float* to) {
  if (readable >= 16) {
    for (int i = 0; i < 16; ++i) to[i] = to_float(from[i]);
  } else {
    for (int64_t i = 0; i < 16; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

// Weights in the order of a product, for one block of columns.
struct Panel {
  float* data;           // [k * k, depth, width]
  int64_t first, depth;  // of the channels that the product sums over
  int64_t width;
  int64_t column;        // floats from one column to the same place of the next block's; for blocks below sixteen
};

// Sixteen columns of a row of a panel, or of as many blocks as they fill.
FASTMIM_INLINE void put_sixteen(const Panel& panel, int64_t tap, int64_t channel, int64_t column, const float* values) {
  constexpr int64_t piece = kBlock < 16 ? kBlock : 16;
  float* to = panel.data + (tap * panel.depth + channel - panel.first) * panel.width + column % kBlock;
  for (int64_t c = 0; c < 16; c += piece) memcpy(to + c * panel.column, values + c, sizeof(float) * piece);
}

// From the weights [O, C * k * k], columns being outputs: sixteen of them, from `output` on, and elements [from, to) of
// their rows. Outputs beyond the last are zero.
template <typename T>
void pack_outputs(const MaskedDense& p, const T* weight, int64_t output, int64_t from, int64_t to, const Panel& panel) {
  const int64_t taps = p.kernel * p.kernel, inner = p.in_channels * taps;
  for (int64_t first = from; first < to; first += 16) {
    const int64_t count = least(16, to - first);
    int64_t channel = first / taps, tap = first % taps;
    if constexpr (kIsFloat<T> && kBlock >= 16) {
      if (count == 16 && output + 16 <= p.out_channels) {
        const auto next = [&](int) FASTMIM_INLINE_LAMBDA {
          float* place = panel.data + (tap * panel.depth + channel - panel.first) * panel.width + output % kBlock;
          if (++tap == taps) tap = 0, ++channel;
          return place;
        };
        transpose_rows([&](int i) FASTMIM_INLINE_LAMBDA { return weight + (output + i) * inner + first; }, next);
        continue;
      }
    }
    Square square;
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t valid = output + i < p.out_channels ? count : 0;
      read_sixteen(weight + (output + i) * inner + first, valid, valid < 16 ? 0 : 16, square.row[i]);
    }
    transpose(square);
    for (int64_t j = 0; j < count; ++j) {
      put_sixteen(panel, tap, channel, output, square.row[j]);
      if (++tap == taps) tap = 0, ++channel;
    }
  }
}

// The same for the way back, columns being inputs: sixteen of them, from `input` on, of output `o`.
template <typename T>
void pack_inputs(const MaskedDense& p, const T* weight, int64_t input, int64_t o, const Panel& panel) {
  const int64_t taps = p.kernel * p.kernel, inner = p.in_channels * taps, end = p.out_channels * inner;
  const T* from = weight + o * inner + input * taps;
  if (taps == 1) {
    const int64_t valid = least(16, p.in_channels - input);
    float values[16];
    read_sixteen(from, valid, valid < 16 ? 0 : 16, values);
    put_sixteen(panel, 0, o, input, values);
    return;
  }
  if constexpr (kIsFloat<T> && kBlock >= 16) {
    if (taps <= 16 && input + 16 <= p.in_channels && (from - weight) + 15 * taps + 16 <= end) {
      float unused[16];
      float* place = panel.data + (o - panel.first) * panel.width + input % kBlock;
      const int64_t step = panel.depth * panel.width;
      transpose_rows([&](int i) FASTMIM_INLINE_LAMBDA { return from + i * taps; },
                     [&](int j) FASTMIM_INLINE_LAMBDA { return j < taps ? place + j * step : unused; });
      return;
    }
  }
  for (int64_t first = 0; first < taps; first += 16) {
    const int64_t count = least(16, taps - first);
    Square square;
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t at = i * taps + first;
      if (input + i < p.in_channels)
        read_sixteen(from + at, count, end - (from - weight) - at, square.row[i]);
      else
        memset(square.row[i], 0, sizeof(square.row[i]));
    }
    transpose(square);
    for (int64_t j = 0; j < count; ++j) put_sixteen(panel, first + j, o, input, square.row[j]);
  }
}

// The panel of the whole depth to which `column` belongs, in p.packed.
Panel panel_of(const MaskedDense& p, int64_t column, int64_t depth, int64_t columns) {
  const int64_t taps = p.kernel * p.kernel, first = column / kBlock * kBlock;
  return {p.packed + taps * depth * first, 0, depth, least(kBlock, dense_padded(columns) - first), taps * depth};
}

template <typename T>
void pack_all(const MaskedDense& p, const T* weight, bool transposed) {
  const int64_t inner = p.in_channels * p.kernel * p.kernel;
  if (transposed) {
    const int64_t padded = dense_padded(p.in_channels);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < p.out_channels; ++o)
      for (int64_t input = 0; input < padded; input += 16)
        pack_inputs(p, weight, input, o, panel_of(p, input, p.out_channels, p.in_channels));
  } else {
    const int64_t pieces = (inner + 255) / 256;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < dense_padded(p.out_channels) / 16 * pieces; ++task) {
      const int64_t from = task % pieces * 256, output = task / pieces * 16;
      pack_outputs(p, weight, output, from, least(from + 256, inner),
                   panel_of(p, output, p.in_channels, p.out_channels));
    }
  }
}

// One panel, by one thread: columns from `column` on.
template <typename T>
void pack_panel(const MaskedDense& p, const T* weight, bool transposed, int64_t column, const Panel& panel) {
  const int64_t taps = p.kernel * p.kernel, last = panel.first + panel.depth;
  if (transposed) {
    for (int64_t o = panel.first; o < last; ++o)
      for (int64_t c = 0; c < panel.width; c += 16) pack_inputs(p, weight, column + c, o, panel);
  } else {
    for (int64_t c = 0; c < panel.width; c += 16)
      pack_outputs(p, weight, column + c, panel.first * taps, last * taps, panel);
  }
}

void pack_panel(const MaskedDense& p, bool transposed, int64_t column, const Panel& panel) {
  switch (static_cast<Element>(p.weight_element)) {
    case Element::f32: pack_panel(p, static_cast<const float*>(p.weight), transposed, column, panel); break;
    case Element::bf16: pack_panel(p, static_cast<const Bf16*>(p.weight), transposed, column, panel); break;
    case Element::f16: pack_panel(p, static_cast<const F16*>(p.weight), transposed, column, panel); break;
  }
}

// Called by all threads of a team.
void pack(const MaskedDense& p, bool transposed) {
  switch (static_cast<Element>(p.weight_element)) {
    case Element::f32: pack_all(p, static_cast<const float*>(p.weight), transposed); break;
    case Element::bf16: pack_all(p, static_cast<const Bf16*>(p.weight), transposed); break;
    case Element::f16: pack_all(p, static_cast<const F16*>(p.weight), transposed); break;
  }
}

// Sums the parts for sixteen outputs and elements [from, to) of their weights, and puts them where weights lie.
template <typename T>
void sum_parts(const MaskedDense& p, int64_t parts, int64_t output, int64_t from, int64_t to, T* weight) {
  const int64_t taps = p.kernel * p.kernel, padded = dense_padded(p.out_channels), inner = taps * p.in_channels;
  for (int64_t first = from; first < to; first += 16) {
    const int64_t count = least(16, to - first);
    Square square;
    int64_t channel = first / taps, tap = first % taps;
    for (int64_t j = 0; j < count; ++j) {
      const float* part = p.partial + (tap * p.in_channels + channel) * padded + output;
      float* sums = square.row[j];
      memcpy(sums, part, sizeof(square.row[j]));
      for (int64_t i = 1; i < parts; ++i) {
        part += (inner + 1) * padded;
        for (int c = 0; c < 16; ++c) sums[c] += part[c];
      }
      if (++tap == taps) tap = 0, ++channel;
    }
    transpose(square);
    for (int64_t c = 0; c < least(16, p.out_channels - output); ++c) {
      T* row = weight + (output + c) * inner + first;
      if (count == 16)
        for (int j = 0; j < 16; ++j) from_float(square.row[c][j], row + j);
      else
        for (int64_t j = 0; j < count; ++j) from_float(square.row[c][j], row + j);
    }
  }
}

template <typename T>
void sum_all_parts(const MaskedDense& p, int64_t parts, T* weight, T* bias) {
  const int64_t inner = p.in_channels * p.kernel * p.kernel, pieces = (inner + 255) / 256;
  const int64_t padded = dense_padded(p.out_channels);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < padded / 16 * pieces; ++task) {
    const int64_t from = task % pieces * 256;
    sum_parts(p, parts, task / pieces * 16, from, least(from + 256, inner), weight);
  }
  if (bias == nullptr) return;
#pragma omp for schedule(static)
  for (int64_t o = 0; o < p.out_channels; ++o) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += p.partial[(part * (inner + 1) + inner) * padded + o];
    from_float(sum, bias + o);
  }
}

// Sums [k * k, channels, width] for `channels` inputs from `channel` on and outputs from `column` on, put where weights
// lie.
template <typename T>
void put_weights(const MaskedDense& p, const float* sums, int64_t channel, int64_t channels, int64_t column,
                 int64_t width, T* weight) {
  const int64_t taps = p.kernel * p.kernel, inner = taps * p.in_channels;
  for (int64_t output = 0; output < width && column + output < p.out_channels; output += 16)
    for (int64_t first = 0; first < channels * taps; first += 16) {
      const int64_t count = least(16, channels * taps - first);
      int64_t c = first / taps, tap = first % taps;
      T* corner = weight + (column + output) * inner + channel * taps + first;
      if constexpr (kIsFloat<T>) {
        if (count == 16 && column + output + 16 <= p.out_channels) {
          const auto next = [&](int) FASTMIM_INLINE_LAMBDA {
            const float* place = sums + (tap * channels + c) * width + output;
            if (++tap == taps) tap = 0, ++c;
            return place;
          };
          transpose_rows(next, [&](int o) FASTMIM_INLINE_LAMBDA { return corner + o * inner; });
          continue;
        }
      }
      Square square;
      for (int64_t j = 0; j < count; ++j) {
        memcpy(square.row[j], sums + (tap * channels + c) * width + output, sizeof(square.row[j]));
        if (++tap == taps) tap = 0, ++c;
      }
      transpose(square);
      for (int64_t o = 0; o < least(16, p.out_channels - column - output); ++o) {
        T* row = corner + o * inner;
        if (count == 16)
          for (int j = 0; j < 16; ++j) from_float(square.row[o][j], row + j);
        else
          for (int64_t j = 0; j < count; ++j) from_float(square.row[o][j], row + j);
      }
    }
}

template <typename T>
void put_bias(const float* sums, int64_t count, T* bias) {
  for (int64_t c = 0; c < count; ++c) from_float(sums[c], bias + c);
}

}  // namespace

}  // namespace FASTMIM_ISA
}  // namespace fastmim
