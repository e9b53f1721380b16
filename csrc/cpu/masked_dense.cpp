// Dense convolution over tiles as matrix products: for every tap, the rows of the input that it joins to rows of the
// output, and nothing else, go through a register-tiled product. A masked neighbour joins nothing.
#include "cpu/masked_dense.h"

#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/element.h"
#include "cpu/masked_dense_weights.h"
#include "cpu/tile_places.h"
#include "cpu/vec.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int64_t kTogether = 64;  // pairs of rows in a sum of the weight gradient before it is added to memory

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

int64_t most_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

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

// Rows of tiles [first, last) in one block of columns, with weights that are brought into order piece by piece, in the
// thread's own cache.
void stream(const MaskedDense& p, bool transposed, const Join& join, const Rows& source, int64_t depth, int64_t first,
            int64_t last, int64_t column, int64_t width, char* room, float* result) {
  const int64_t taps = p.kernel * p.kernel;
  Pair* pairs = reinterpret_cast<Pair*>(room);
  float* weights = result + kStreamedRows * kPanelWidth;
  int64_t counts[kMostOrdered];
  for (int64_t tap = 0; tap < taps; ++tap)
    counts[tap] = join.pairs(first, last, tap / p.kernel, tap % p.kernel, pairs + tap * kStreamedRows);
  for (int64_t d = 0; d < depth; d += kPanelDepth) {
    const Panel panel = {weights, d, least(kPanelDepth, depth - d), width, 0};
    pack_panel(p, transposed, column, panel);
    for (int64_t tap = 0; tap < taps; ++tap)
      product(pairs + tap * kStreamedRows, counts[tap], {source.data + d, source.pitch}, panel.depth,
              weights + tap * panel.depth * width, width, result, width);
  }
}

// Forward: x to out. Transposed: the gradient of out to that of x.
template <bool Transposed>
void convolve(const MaskedDense& p, const void* from, void* to) {
  const int64_t narrowed = p.side / p.stride, tiles = p.batch * p.count, taps = p.kernel * p.kernel;
  const Join join = {p, Transposed ? p.side : narrowed, Transposed ? narrowed : p.side};
  const int64_t columns = Transposed ? p.in_channels : p.out_channels;
  const int64_t depth = Transposed ? p.out_channels : p.in_channels;
  const int64_t padded = dense_padded(columns), column_tasks = (padded + kBlock - 1) / kBlock;
  const int64_t shares = (most_threads() + column_tasks - 1) / column_tasks;  // each row's sum is the same in all
  const int64_t per_task = p.streamed ? (tiles + shares - 1) / shares : dense_tiles(join.side);
  const int64_t row_tasks = per_task > 0 ? (tiles + per_task - 1) / per_task : 0;
  const bool patches = !Transposed && dense_in_patches(p);
  find_places(p.kernel, p.stride, Transposed, join.side, join.source_side, p.places);
#pragma omp parallel
  {
    if (!p.streamed) pack(p, Transposed);
    const Rows source = read_rows(p.element, from, tiles * join.source_side * join.source_side, depth, depth,
                                  Transposed ? p.wide_out : p.wide_x);
    char* room = p.scratch + thread_index() * dense_scratch(p);
    Pair* pairs = reinterpret_cast<Pair*>(room);
    const int64_t most = p.streamed ? taps * kStreamedRows : dense_max(kDenseRows, p.side * p.side);
    float* result = reinterpret_cast<float*>(pairs + most);
    float* copies = result + dense_max(kDenseRows, p.side * p.side) * 64;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < row_tasks * column_tasks; ++task) {
      const int64_t first = task % row_tasks * per_task, last = least(first + per_task, tiles);
      const int64_t column = task / row_tasks * kBlock, width = least(kBlock, padded - column);
      const int64_t rows = (last - first) * join.rows();
      const int64_t valid = column < columns ? least(width, columns - column) : 0;  // a block may be padding only
      memset(result, 0, static_cast<size_t>(rows * width) * sizeof(float));
      const float* weight = p.packed + taps * depth * column;
      if (p.streamed) {
        stream(p, Transposed, join, source, depth, first, last, column, width, room, result);
      } else if (patches) {
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

// The weight gradient where every block of 64 x 64 channels, with all its taps, is summed by one thread in its cache.
template <typename T>
void sum_whole(const MaskedDense& p, const Join& join, const Rows& x, const Rows& gradient, T* weight, T* bias) {
  const int64_t tiles = p.batch * p.count, taps = p.kernel * p.kernel, padded = dense_padded(p.out_channels);
  const int64_t per_block = dense_tiles(join.side), column_tasks = (padded + kBlock - 1) / kBlock;
  const int64_t channel_tasks = (p.in_channels + 63) / 64;
  char* room = p.scratch + thread_index() * dense_scratch(p);
  Pair* pairs = reinterpret_cast<Pair*>(room);
  float* sums = reinterpret_cast<float*>(pairs + dense_max(kDenseRows, p.side * p.side));
  float* bias_sums = sums + taps * 64 * kPanelWidth;
#pragma omp for schedule(dynamic)
  for (int64_t task = 0; task < column_tasks * channel_tasks; ++task) {
    const int64_t channel = task % channel_tasks * 64, channels = least(64, p.in_channels - channel);
    const int64_t column = task / channel_tasks * kBlock, width = least(kBlock, padded - column);
    const bool with_bias = bias != nullptr && channel == 0;
    memset(sums, 0, static_cast<size_t>(taps * channels * width) * sizeof(float));
    memset(bias_sums, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t first = 0; first < tiles; first += per_block) {
      const int64_t last = least(first + per_block, tiles);
      const Rows here = {gradient.data + first * join.rows() * padded, padded};
      if (with_bias) sum_rows(here, (last - first) * join.rows(), column, width, bias_sums);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t count = join.pairs(first, last, tap / p.kernel, tap % p.kernel, pairs);
        float* of_tap = sums + tap * channels * width;
        in_even_pieces(channels, [&](int64_t begin, int64_t size) FASTMIM_INLINE_LAMBDA {
          with_tile(size, width / kWidth, [&](auto m, auto n) FASTMIM_INLINE_LAMBDA {
            for (int64_t i = 0; i < count; i += kTogether)
              multiply_transposed<decltype(m)::value, decltype(n)::value>(pairs + i, least(kTogether, count - i), x,
                                                                          channel + begin, here, column,
                                                                          of_tap + begin * width, width);
          });
        });
      }
    }
    put_weights(p, sums, channel, channels, column, width, weight);
    if (with_bias) put_bias(bias_sums, least(width, p.out_channels - column), bias + column);
  }
}

void sum_whole(const MaskedDense& p, const Join& join, const Rows& x, const Rows& gradient) {
  switch (static_cast<Element>(p.weight_element)) {
    case Element::f32:
      return sum_whole(p, join, x, gradient, static_cast<float*>(p.weight_gradient),
                       static_cast<float*>(p.bias_gradient));
    case Element::bf16:
      return sum_whole(p, join, x, gradient, static_cast<Bf16*>(p.weight_gradient),
                       static_cast<Bf16*>(p.bias_gradient));
    case Element::f16:
      return sum_whole(p, join, x, gradient, static_cast<F16*>(p.weight_gradient),
                       static_cast<F16*>(p.bias_gradient));
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
    const int64_t tasks = p.whole ? 0 : parts * tap_tasks * column_tasks;
    if (p.whole) sum_whole(p, join, x, gradient);
    char* room = p.scratch + thread_index() * dense_scratch(p);
    Pair* pairs = reinterpret_cast<Pair*>(room);
    float* copies = reinterpret_cast<float*>(pairs + dense_max(kDenseRows, p.side * p.side));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
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
    if (!p.whole) switch (static_cast<Element>(p.weight_element)) {
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
