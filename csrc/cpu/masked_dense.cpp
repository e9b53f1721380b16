// Dense convolution over tiles as matrix products: for every tap, the rows of the input that it joins to rows of the
// output, and nothing else, go through a register-tiled product. A masked neighbour joins nothing.
#include "cpu/masked_dense.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/element.h"
#include "cpu/tile_places.h"
#include "cpu/transpose.h"
#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int kRows = 6;                           // of the register tile
constexpr int kColumns = kRegisters > 16 ? 4 : 2;  // registers across it: 24 (12) sums, a row of weights, one value
constexpr int64_t kBlock = kColumns * kWidth;      // columns that one task handles
constexpr int64_t kDepth = 128;                    // of a product before its sums go back to memory
constexpr int64_t kTogether = 64;                  // pairs of rows in a sum of the weight gradient, likewise

struct Pair {
  int64_t from, to;  // row of the source tensor; row within the block of results
};

int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of channels in fp32.
struct Rows {
  const float* data;
  int64_t pitch;
};

template <typename T>
void widen(const T* from, int64_t rows, int64_t channels, float* to, int64_t pitch) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < channels; ++c) to[r * pitch + c] = to_float(from[r * channels + c]);
    for (int64_t c = channels; c < pitch; ++c) to[r * pitch + c] = 0.0f;
  }
}

// The tensor [rows, channels] itself, or its copy in `room` with rows of `pitch`. Called by all threads of a team.
Rows read_rows(int element, const void* data, int64_t rows, int64_t channels, int64_t pitch, float* room) {
  switch (static_cast<Element>(element)) {
    case Element::f32:
      if (pitch == channels) return {static_cast<const float*>(data), channels};
      widen(static_cast<const float*>(data), rows, channels, room, pitch);
      break;
    case Element::bf16: widen(static_cast<const Bf16*>(data), rows, channels, room, pitch); break;
    case Element::f16: widen(static_cast<const F16*>(data), rows, channels, room, pitch); break;
  }
  return {room, pitch};
}

// How rows of a result meet rows of its source, tap by tap.
struct Join {
  const MaskedDense& p;
  int64_t side, source_side;  // of tiles of the result, of the source

  int64_t rows() const { return side * side; }

  // The pairs that tap (ky, kx) joins, for tiles [first, last) counted over the whole batch.
  int64_t pairs(int64_t first, int64_t last, int64_t ky, int64_t kx, Pair* to) const {
    Pair* const begin = to;
    for (int64_t tile = first; tile < last; ++tile) {
      const int32_t* near = p.neighbours + tile * kWindow * kWindow;
      const int64_t image = tile / p.count * p.count, result = (tile - first) * side * side;
      for (int64_t y = 0; y < side; ++y) {
        const int32_t* up = p.places + 2 * (y * p.kernel + ky);
        if (up[0] > kReach) continue;
        const int32_t* cells = near + (up[0] + kReach) * kWindow + kReach;
        for (int64_t x = 0; x < side; ++x) {
          const int32_t* left = p.places + 2 * (x * p.kernel + kx);
          if (left[0] > kReach) continue;
          const int64_t other = cells[left[0]];
          *to = {((image + other) * source_side + up[1]) * source_side + left[1], result + y * side + x};
          to += other >= 0;
        }
      }
    }
    return to - begin;
  }
};

// M rows of the source times `depth` rows of weights, added to M rows of the result; N registers across. Every product
// is summed by itself before it is added: short sums of sums keep more digits than one long sum.
template <int M, int N>
void multiply(const Pair* pairs, const Rows& source, int64_t channel, int64_t depth, const float* weight,
              int64_t weight_pitch, float* result, int64_t pitch) {
  const float* from[M];
  Vec sums[M][N];
  unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
    from[m] = source.data + pairs[m].from * source.pitch + channel;
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { sums[m][n] = Vec{}; });
  });
  for (int64_t d = 0; d < depth; ++d, weight += weight_pitch) {
    Vec w[N];
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { w[n] = load_vec(weight + n * kWidth); });
    unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
      const Vec x = Vec{} + from[m][d];
      unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { sums[m][n] += x * w[n]; });
    });
  }
  unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA {
      float* to = result + pairs[m].to * pitch + n * kWidth;
      store_vec(to, load_vec(to) + sums[m][n]);
    });
  });
}

// M channels of x times N registers of gradient, summed over pairs and added to the result: `from` is a row of x, `to` one of the gradient.
template <int M, int N>
void multiply_transposed(const Pair* pairs, int64_t count, const Rows& x, int64_t channel, const Rows& gradient,
                         int64_t column, float* result, int64_t pitch) {
  Vec sums[M][N];
  unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { sums[m][n] = Vec{}; });
  });
  for (int64_t i = 0; i < count; ++i) {
    const float* from = x.data + pairs[i].from * x.pitch + channel;
    const float* to = gradient.data + pairs[i].to * gradient.pitch + column;
    Vec g[N];
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { g[n] = load_vec(to + n * kWidth); });
    unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
      const Vec value = Vec{} + from[m];
      unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA { sums[m][n] += value * g[n]; });
    });
  }
  unroll<M>([&](auto m) FASTMIM_INLINE_LAMBDA {
    unroll<N>([&](auto n) FASTMIM_INLINE_LAMBDA {
      float* to = result + m * pitch + n * kWidth;
      store_vec(to, load_vec(to) + sums[m][n]);
    });
  });
}

// Adds the rows to `sums`, sixteen at a time.
void sum_rows(const Rows& from, int64_t rows, int64_t column, int64_t width, float* sums) {
  for (int64_t first = 0; first < rows; first += 16) {
    float some[kBlock] = {};
    for (int64_t r = first; r < least(first + 16, rows); ++r)
      for (int64_t c = 0; c < width; ++c) some[c] += from.data[r * from.pitch + column + c];
    for (int64_t c = 0; c < width; ++c) sums[c] += some[c];
  }
}

// f(Index<M>, Index<N>) for a register tile of m rows and n registers.
template <typename F, int M = kRows, int N = kColumns>
FASTMIM_INLINE void with_tile(int64_t m, int64_t n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_tile<F, M, N - 1>(m, n, f);
  }
  if constexpr (M > 1) {
    if (m < M) return with_tile<F, M - 1, N>(m, n, f);
  }
  f(Index<M>(), Index<N>());
}

// Splits `count` into pieces of at most kRows that differ by one at most: f(begin, size).
template <typename F>
FASTMIM_INLINE void in_even_pieces(int64_t count, const F& f) {
  const int64_t pieces = (count + kRows - 1) / kRows;
  for (int64_t i = 0, begin = 0; i < pieces; ++i) {
    const int64_t end = count * (i + 1) / pieces;
    f(begin, end - begin);
    begin = end;
  }
}

// Adds source rows times weight [depth, width] to the rows that they are joined to.
void product(const Pair* pairs, int64_t count, const Rows& source, int64_t depth, const float* weight, int64_t width,
             float* result, int64_t pitch) {
  for (int64_t d = 0; d < depth; d += kDepth)
    in_even_pieces(count, [&](int64_t begin, int64_t size) FASTMIM_INLINE_LAMBDA {
      with_tile(size, width / kWidth, [&](auto m, auto n) FASTMIM_INLINE_LAMBDA {
        multiply<decltype(m)::value, decltype(n)::value>(pairs + begin, source, d, least(kDepth, depth - d),
                                                         weight + d * width, width, result, pitch);
      });
    });
}

// Rows of tiles [first, last) as patches [rows, k * k * C], zero where a tap meets nothing.
void copy_patches(const Join& join, int64_t first, int64_t last, const Rows& x, Pair* pairs, float* to) {
  const int64_t channels = join.p.in_channels, k = join.p.kernel, depth = k * k * channels;
  memset(to, 0, static_cast<size_t>((last - first) * join.rows() * depth) * sizeof(float));
  for (int64_t tap = 0; tap < k * k; ++tap) {
    const int64_t count = join.pairs(first, last, tap / k, tap % k, pairs);
    for (int64_t i = 0; i < count; ++i) {
      const float* from = x.data + pairs[i].from * x.pitch;
      float* row = to + pairs[i].to * depth + tap * channels;
      for (int64_t c = 0; c < channels; ++c) row[c] = from[c];
    }
  }
}

int64_t pair_rows(int64_t rows, int64_t first, Pair* to) {
  for (int64_t r = 0; r < rows; ++r) to[r] = {r, first + r};
  return rows;
}

// `count` elements, zeros after them. Where sixteen may be read, they are: a copy of fixed length.
template <typename T>
FASTMIM_INLINE void read_sixteen(const T* from, int64_t count, int64_t readable, float* to) {
  if (readable >= 16) {
    for (int i = 0; i < 16; ++i) to[i] = to_float(from[i]);
  } else {
    for (int64_t i = 0; i < 16; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

// The weights [O, C * k * k] as blocks of columns [k * k, C, width], columns being outputs: sixteen of them, from
// `output` on, and elements [from, to) of their rows. Outputs beyond the last are zero.
template <typename T>
void pack_outputs(const MaskedDense& p, const T* weight, int64_t output, int64_t from, int64_t to) {
  const int64_t taps = p.kernel * p.kernel, inner = p.in_channels * taps, padded = dense_padded(p.out_channels);
  const int64_t column = output / kBlock * kBlock, width = least(kBlock, padded - column);
  float* block = p.packed + inner * column + output % kBlock;
  for (int64_t first = from; first < to; first += 16) {
    const int64_t count = least(16, to - first);
    Square square;
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t valid = output + i < p.out_channels ? count : 0;
      read_sixteen(weight + (output + i) * inner + first, valid, valid < 16 ? 0 : 16, square.row[i]);
    }
    transpose(square);
    int64_t channel = first / taps, tap = first % taps;
    for (int64_t j = 0; j < count; ++j) {
      float* row = block + (tap * p.in_channels + channel) * width;
      // A block may be narrower than sixteen: its columns then go to the blocks that follow.
      for (int64_t c = 0; c < 16; c += kBlock < 16 ? kBlock : 16)
        memcpy(row + c * inner, square.row[j] + c, sizeof(float) * (kBlock < 16 ? kBlock : 16));
      if (++tap == taps) tap = 0, ++channel;
    }
  }
}

// The same for the way back, [k * k, O, width], columns being inputs: sixteen of them, from `input` on, of output `o`.
template <typename T>
void pack_inputs(const MaskedDense& p, const T* weight, int64_t input, int64_t o) {
  const int64_t taps = p.kernel * p.kernel, inner = p.in_channels * taps, padded = dense_padded(p.in_channels);
  const int64_t column = input / kBlock * kBlock, width = least(kBlock, padded - column);
  const int64_t depth = p.out_channels * taps, end = p.out_channels * inner;
  float* block = p.packed + depth * column + input % kBlock;
  for (int64_t first = 0; first < taps; first += 16) {
    const int64_t count = least(16, taps - first);
    Square square;
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t at = o * inner + (input + i) * taps + first;
      if (input + i < p.in_channels)
        read_sixteen(weight + at, count, end - at, square.row[i]);
      else
        memset(square.row[i], 0, sizeof(square.row[i]));
    }
    transpose(square);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < 16; c += kBlock < 16 ? kBlock : 16)
        memcpy(block + ((first + j) * p.out_channels + o) * width + c * depth, square.row[j] + c,
               sizeof(float) * (kBlock < 16 ? kBlock : 16));
  }
}

template <typename T>
void pack_all(const MaskedDense& p, const T* weight, bool transposed) {
  const int64_t inner = p.in_channels * p.kernel * p.kernel;
  if (transposed) {
    const int64_t blocks = dense_padded(p.in_channels) / 16;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < p.out_channels; ++o)
      for (int64_t block = 0; block < blocks; ++block) pack_inputs(p, weight, block * 16, o);
  } else {
    const int64_t pieces = (inner + 255) / 256;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < dense_padded(p.out_channels) / 16 * pieces; ++task) {
      const int64_t from = task % pieces * 256;
      pack_outputs(p, weight, task / pieces * 16, from, least(from + 256, inner));
    }
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

float value_at(int element, const void* data, int64_t i) {
  switch (static_cast<Element>(element)) {
    case Element::bf16: return to_float(static_cast<const Bf16*>(data)[i]);
    case Element::f16: return to_float(static_cast<const F16*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

void add_bias(const MaskedDense& p, float* to, int64_t rows, int64_t pitch, int64_t width, int64_t column) {
  float bias[kBlock];
  for (int64_t c = 0; c < width; ++c) bias[c] = value_at(p.weight_element, p.bias, column + c);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) to[r * pitch + c] += bias[c];
}

template <typename T>
void write_block(const float* from, int64_t rows, int64_t pitch, int64_t width, T* to, int64_t to_pitch) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) from_float(from[r * pitch + c], to + r * to_pitch + c);
}

// `rows` rows of one block of columns into a tensor [..., channels], in its type.
void write_rows(int element, const float* from, int64_t rows, int64_t pitch, int64_t width, void* to, int64_t first,
                int64_t channels, int64_t column) {
  const int64_t at = first * channels + column;
  switch (static_cast<Element>(element)) {
    case Element::f32: write_block(from, rows, pitch, width, static_cast<float*>(to) + at, channels); break;
    case Element::bf16: write_block(from, rows, pitch, width, static_cast<Bf16*>(to) + at, channels); break;
    case Element::f16: write_block(from, rows, pitch, width, static_cast<F16*>(to) + at, channels); break;
  }
}

// Forward: x to out. Transposed: the gradient of out to that of x.
template <bool Transposed>
void convolve(const MaskedDense& p, const void* from, void* to) {
  const int64_t narrowed = p.side / p.stride, tiles = p.batch * p.count, taps = p.kernel * p.kernel;
  const Join join = {p, Transposed ? p.side : narrowed, Transposed ? narrowed : p.side};
  const int64_t columns = Transposed ? p.in_channels : p.out_channels;
  const int64_t depth = Transposed ? p.out_channels : p.in_channels;
  const int64_t padded = dense_padded(columns), per_task = dense_tiles(join.side);
  const int64_t row_tasks = (tiles + per_task - 1) / per_task, column_tasks = (padded + kBlock - 1) / kBlock;
  const bool patches = !Transposed && dense_in_patches(p);
  find_places(p.kernel, p.stride, Transposed, join.side, join.source_side, p.places);
#pragma omp parallel
  {
    pack(p, Transposed);
    const Rows source = read_rows(p.element, from, tiles * join.source_side * join.source_side, depth, depth,
                                  Transposed ? p.wide_out : p.wide_x);
    char* room = p.scratch + thread_index() * dense_scratch(p);
    Pair* pairs = reinterpret_cast<Pair*>(room);
    float* result = reinterpret_cast<float*>(pairs + dense_max(kDenseRows, p.side * p.side));
    float* copies = result + dense_max(kDenseRows, p.side * p.side) * 64;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < row_tasks * column_tasks; ++task) {
      const int64_t first = task % row_tasks * per_task, last = least(first + per_task, tiles);
      const int64_t column = task / row_tasks * kBlock, width = least(kBlock, padded - column);
      const int64_t rows = (last - first) * join.rows();
      const int64_t valid = column < columns ? least(width, columns - column) : 0;  // a block may be padding only
      memset(result, 0, static_cast<size_t>(rows * width) * sizeof(float));
      const float* weight = p.packed + taps * depth * column;
      if (patches) {
        copy_patches(join, first, last, source, pairs, copies);
        product(pairs, pair_rows(rows, 0, pairs), {copies, taps * depth}, taps * depth, weight, width, result, width);
      } else {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t count = join.pairs(first, last, tap / p.kernel, tap % p.kernel, pairs);
          product(pairs, count, source, depth, weight + tap * depth * width, width, result, width);
        }
      }
      if (!Transposed && p.bias != nullptr) add_bias(p, result, rows, width, valid, column);
      write_rows(p.element, result, rows, width, valid, to, first * join.rows(), columns, column);
    }
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

}  // namespace

void masked_dense(const MaskedDense& p) { convolve<false>(p, p.x, p.out); }

void masked_dense_input_gradient(const MaskedDense& p) { convolve<true>(p, p.out, p.x_gradient); }

void masked_dense_weight_gradient(const MaskedDense& p) {
  const Join join = {p, p.side / p.stride, p.side};
  const int64_t tiles = p.batch * p.count, taps = p.kernel * p.kernel, padded = dense_padded(p.out_channels);
  const int64_t parts = dense_parts(p), per_block = dense_tiles(join.side), blocks = (tiles + per_block - 1) / per_block;
  const bool patches = dense_in_patches(p);
  const int64_t column_tasks = (padded + kBlock - 1) / kBlock, tap_tasks = patches ? 1 : taps;
  const int64_t depth = patches ? taps * p.in_channels : p.in_channels;
  find_places(p.kernel, p.stride, false, join.side, join.source_side, p.places);
#pragma omp parallel
  {
    const Rows x = read_rows(p.element, p.x, tiles * p.side * p.side, p.in_channels, p.in_channels, p.wide_x);
    const Rows gradient = read_rows(p.element, p.out, tiles * join.rows(), p.out_channels, padded, p.wide_out);
    char* room = p.scratch + thread_index() * dense_scratch(p);
    Pair* pairs = reinterpret_cast<Pair*>(room);
    float* copies = reinterpret_cast<float*>(pairs + dense_max(kDenseRows, p.side * p.side));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * tap_tasks * column_tasks; ++task) {
      const int64_t part = task / (tap_tasks * column_tasks), tap = task / column_tasks % tap_tasks;
      const int64_t column = task % column_tasks * kBlock, width = least(kBlock, padded - column);
      float* sums = p.partial + part * (taps * p.in_channels + 1) * padded + column;
      float* bias = sums + taps * p.in_channels * padded;
      sums += tap * p.in_channels * padded;
      for (int64_t d = 0; d < depth; ++d) memset(sums + d * padded, 0, static_cast<size_t>(width) * sizeof(float));
      if (tap == 0) memset(bias, 0, static_cast<size_t>(width) * sizeof(float));
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
        const int64_t first = block * per_block, last = least(first + per_block, tiles);
        const int64_t rows = (last - first) * join.rows();
        const Rows here = {gradient.data + first * join.rows() * padded, padded};
        if (tap == 0) sum_rows(here, rows, column, width, bias);
        Rows source = x;
        int64_t count;
        if (patches) {
          copy_patches(join, first, last, x, pairs, copies);
          source = {copies, depth};
          count = pair_rows(rows, 0, pairs);
        } else {
          count = join.pairs(first, last, tap / p.kernel, tap % p.kernel, pairs);
        }
        in_even_pieces(depth, [&](int64_t begin, int64_t size) FASTMIM_INLINE_LAMBDA {
          with_tile(size, width / kWidth, [&](auto m, auto n) FASTMIM_INLINE_LAMBDA {
            for (int64_t i = 0; i < count; i += kTogether)
              multiply_transposed<decltype(m)::value, decltype(n)::value>(
                  pairs + i, least(kTogether, count - i), source, begin, here, column, sums + begin * padded, padded);
          });
        });
      }
    }
    switch (static_cast<Element>(p.weight_element)) {
      case Element::f32:
        sum_all_parts(p, parts, static_cast<float*>(p.weight_gradient), static_cast<float*>(p.bias_gradient));
        break;
      case Element::bf16:
        sum_all_parts(p, parts, static_cast<Bf16*>(p.weight_gradient), static_cast<Bf16*>(p.bias_gradient));
        break;
      case Element::f16:
        sum_all_parts(p, parts, static_cast<F16*>(p.weight_gradient), static_cast<F16*>(p.bias_gradient));
        break;
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
