// Batch norm over rows with what follows it, in two passes over memory each way. A block of rows is summed by itself,
// in the cache, and the blocks are joined in their order, so nothing depends on the number of threads.
#include "cpu/rows_batch_norm.h"

#include <math.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/element.h"
#include "cpu/lanes.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int64_t kTogether = 16;  // rows in a sum before it is added to that of its block

struct Team {
  int64_t thread, threads;
};

Team team() {
#if defined(_OPENMP)
  return {omp_get_thread_num(), omp_get_num_threads()};
#else
  return {0, 1};
#endif
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

FASTMIM_INLINE void read(const float* from, int64_t count, Lanes& x) {
  if (count == kLanes)
    load(from, x);
  else
    load_some(from, count, x);
}

template <typename T>
FASTMIM_INLINE void read(const T* from, int64_t count, Lanes& x) {
  float values[kLanes] = {};
  if (count == kLanes)
    for (int i = 0; i < kLanes; ++i) values[i] = to_float(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(from[i]);
  load(values, x);
}

FASTMIM_INLINE void write(const Lanes& x, int64_t count, float* to) {
  if (count == kLanes)
    store(to, x);
  else
    memcpy(to, &x, static_cast<size_t>(count) * sizeof(float));
}

template <typename T>
FASTMIM_INLINE void write(const Lanes& x, int64_t count, T* to) {
  float values[kLanes];
  store(values, x);
  if (count == kLanes)
    for (int i = 0; i < kLanes; ++i) from_float(values[i], to + i);
  else
    for (int64_t i = 0; i < count; ++i) from_float(values[i], to + i);
}

// Where x is not negative; NaN is passed on, as torch's relu does.
FASTMIM_INLINE void where_positive(const Lanes& x, const Lanes& value, Lanes& out) {
  select(x <= 0.0f, Lanes{}, value, out);
}

// f(channel, how many from there on), sixteen at a time; the number is a constant where it is sixteen.
template <typename F>
FASTMIM_INLINE void over_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c < channels) f(c, channels - c);
}

// Channels of `sums` += `x`.
FASTMIM_INLINE void accumulate(const Lanes& x, int64_t count, float* sums) {
  Lanes before;
  read(sums, count, before);
  write(before + x, count, sums);
}

// Scale, bias and their like of every channel, padded with zeros: what normalising needs.
struct Affine {
  const float *mean, *scale, *bias;
};

float inverse_deviation(const RowsBatchNorm& p, int64_t c) { return 1.0f / sqrtf(p.variance[c] + p.eps); }

Affine affine(const RowsBatchNorm& p, float* room) {
  float *scale = room, *bias = room + p.channels;
  for (int64_t c = 0; c < p.channels; ++c) {
    scale[c] = (p.weight == nullptr ? 1.0f : p.weight[c]) * inverse_deviation(p, c);
    bias[c] = p.bias == nullptr ? 0.0f : p.bias[c];
  }
  return {p.mean, scale, bias};
}

FASTMIM_INLINE void normalise(const Affine& by, int64_t c, int64_t count, const Lanes& x, float factor, Lanes& out) {
  Lanes mean, scale, bias;
  read(by.mean + c, count, mean), read(by.scale + c, count, scale), read(by.bias + c, count, bias);
  out = ((x - mean) * scale + bias) * factor;
}

FASTMIM_INLINE float factor_of(const RowsBatchNorm& p, int64_t row) {
  return p.factor == nullptr ? 1.0f : p.factor[row / p.rows_per_image];
}

// f(first row, last row, block) for this thread's share of the blocks; the same blocks in every pass, from the last to
// the first where that is asked for, because a pass finds in the cache what the one before it touched last.
template <typename F>
FASTMIM_INLINE void over_blocks(const RowsBatchNorm& p, bool backwards, const F& f) {
  const Team who = team();
  const int64_t blocks = norm_blocks(p), size = norm_block_rows(p);
  const int64_t begin = blocks * who.thread / who.threads, end = blocks * (who.thread + 1) / who.threads;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = backwards ? begin + end - 1 - i : i;
    f(block * size, least((block + 1) * size, p.rows), block);
  }
}

template <typename T>
void block_moments(const RowsBatchNorm& p, const T* x, int64_t first, int64_t last, float* mean, float* squares) {
  const int64_t channels = p.channels;
  const float share = 1.0f / static_cast<float>(last - first);
  memset(mean, 0, static_cast<size_t>(channels) * sizeof(float));
  memset(squares, 0, static_cast<size_t>(channels) * sizeof(float));
  for (int64_t r = first; r < last; r += kTogether)
    over_channels(channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      Lanes sum = {};
      for (int64_t i = r; i < least(r + kTogether, last); ++i) {
        Lanes value;
        read(x + i * channels + c, count, value);
        sum += value;
      }
      accumulate(sum * share, count, mean + c);
    });
  for (int64_t r = first; r < last; r += kTogether)
    over_channels(channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      Lanes sum = {}, centre;
      read(mean + c, count, centre);
      for (int64_t i = r; i < least(r + kTogether, last); ++i) {
        Lanes value;
        read(x + i * channels + c, count, value);
        value -= centre;
        sum += value * value;
      }
      accumulate(sum, count, squares + c);
    });
}

// Joins means and sums of squares of blocks (Chan, Golub and LeVeque).
void join_moments(const RowsBatchNorm& p) {
  const int64_t blocks = norm_blocks(p), size = norm_block_rows(p);
#pragma omp for schedule(static)
  for (int64_t c = 0; c < p.channels; ++c) {
    double mean = 0.0, squares = 0.0, rows = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* part = p.partial + 2 * block * p.channels + c;
      const double more = static_cast<double>(least((block + 1) * size, p.rows) - block * size);
      const double apart = static_cast<double>(part[0]) - mean, all = rows + more;
      mean += apart * (more / all);
      squares += static_cast<double>(part[p.channels]) + apart * apart * (rows * more / all);
      rows = all;
    }
    p.mean[c] = static_cast<float>(mean);
    p.variance[c] = static_cast<float>(squares / rows);
  }
}

template <typename T, bool Relu, bool Residual>
void norm_block(const RowsBatchNorm& p, const Affine& by, int64_t first, int64_t last) {
  const int64_t channels = p.channels;
  for (int64_t r = first; r < last; ++r) {
    const float factor = factor_of(p, r);
    const T* x = static_cast<const T*>(p.x) + r * channels;
    const T* residual = static_cast<const T*>(p.residual) + (Residual ? r * channels : 0);
    T* out = static_cast<T*>(p.out) + r * channels;
    over_channels(channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      Lanes value, more;
      read(x + c, count, value);
      normalise(by, c, count, value, factor, value);
      if constexpr (Residual) {
        read(residual + c, count, more);
        value += more;
      }
      if constexpr (Relu) where_positive(value, value, value);
      write(value, count, out + c);
    });
  }
}

// The gradient where the relu let it through. `out` tells where, or without it x, of which the result is made again.
template <typename T, bool Relu, bool Out>
FASTMIM_INLINE void let_through(const Affine& by, int64_t c, int64_t count, const Lanes& x, float factor, const T* out,
                                Lanes& gradient) {
  if constexpr (Relu) {
    Lanes result;
    if constexpr (Out)
      read(out, count, result);
    else
      normalise(by, c, count, x, factor, result);
    where_positive(result, gradient, gradient);
  }
}

template <typename T, bool Relu, bool Out>
void gradient_block(const RowsBatchNorm& p, const Affine& by, int64_t first, int64_t last, float* sums) {
  const int64_t channels = p.channels;
  memset(sums, 0, static_cast<size_t>(2 * channels) * sizeof(float));
  for (int64_t r = first; r < last; r += kTogether)
    over_channels(channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      Lanes steady = {}, along = {}, mean;
      read(by.mean + c, count, mean);
      for (int64_t i = r; i < least(r + kTogether, last); ++i) {
        const int64_t at = i * channels + c;
        const float factor = factor_of(p, i);
        Lanes x, gradient;
        read(static_cast<const T*>(p.x) + at, count, x);
        read(static_cast<const T*>(p.gradient) + at, count, gradient);
        let_through<T, Relu, Out>(by, c, count, x, factor, static_cast<const T*>(p.out) + (Out ? at : 0), gradient);
        if constexpr (Out) write(gradient, count, static_cast<T*>(p.masked) + at);
        gradient *= factor;
        steady += gradient;
        along += gradient * (x - mean);
      }
      accumulate(steady, count, sums + c);
      accumulate(along, count, sums + channels + c);
    });
}

void join_sums(const RowsBatchNorm& p) {
  const int64_t blocks = norm_blocks(p);
#pragma omp for schedule(static)
  for (int64_t c = 0; c < p.channels; ++c) {
    double steady = 0.0, along = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* part = p.partial + 2 * block * p.channels + c;
      steady += static_cast<double>(part[0]);
      along += static_cast<double>(part[p.channels]);
    }
    p.sums[c] = static_cast<float>(steady);
    p.sums[p.channels + c] = static_cast<float>(along * static_cast<double>(inverse_deviation(p, c)));
  }
}

// `steady` and `along` are what a channel's gradient loses, as it is and times x - mean.
template <typename T, bool Relu>
void input_block(const RowsBatchNorm& p, const Affine& by, const float* steady, const float* along, int64_t first,
                 int64_t last) {
  const int64_t channels = p.channels;
  const T* from = static_cast<const T*>(p.masked != nullptr ? p.masked : p.gradient);
  for (int64_t r = first; r < last; ++r) {
    const float factor = factor_of(p, r);
    over_channels(channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const int64_t at = r * channels + c;
      Lanes x, gradient, mean, scale, less, slope;
      read(static_cast<const T*>(p.x) + at, count, x);
      read(from + at, count, gradient);
      let_through<T, Relu, false>(by, c, count, x, factor, nullptr, gradient);
      read(by.mean + c, count, mean), read(by.scale + c, count, scale);
      read(steady + c, count, less), read(along + c, count, slope);
      gradient = (gradient * factor - less - (x - mean) * slope) * scale;
      write(gradient, count, static_cast<T*>(p.x_gradient) + at);
    });
  }
}

// f(T()) for the type of x.
template <typename F>
void with_element(int element, const F& f) {
  switch (static_cast<Element>(element)) {
    case Element::f32: return f(float());
    case Element::bf16: return f(Bf16());
    case Element::f16: return f(F16());
  }
}

template <typename T>
void moments(const RowsBatchNorm& p) {
#pragma omp parallel
  {
    over_blocks(p, false, [&](int64_t first, int64_t last, int64_t block) {
      float* part = p.partial + 2 * block * p.channels;
      block_moments(p, static_cast<const T*>(p.x), first, last, part, part + p.channels);
    });
#pragma omp barrier
    join_moments(p);
  }
}

template <typename T>
void norm(const RowsBatchNorm& p) {
#pragma omp parallel
  {
    const Affine by = affine(p, p.scratch + team().thread * 4 * p.channels);
    over_blocks(p, true, [&](int64_t first, int64_t last, int64_t) {
      if (p.residual != nullptr)
        p.relu ? norm_block<T, true, true>(p, by, first, last) : norm_block<T, false, true>(p, by, first, last);
      else
        p.relu ? norm_block<T, true, false>(p, by, first, last) : norm_block<T, false, false>(p, by, first, last);
    });
  }
}

template <typename T>
void gradient_sums(const RowsBatchNorm& p) {
#pragma omp parallel
  {
    const Affine by = affine(p, p.scratch + team().thread * 4 * p.channels);
    over_blocks(p, false, [&](int64_t first, int64_t last, int64_t block) {
      float* part = p.partial + 2 * block * p.channels;
      if (p.masked != nullptr)
        gradient_block<T, true, true>(p, by, first, last, part);
      else if (p.relu)
        gradient_block<T, true, false>(p, by, first, last, part);
      else
        gradient_block<T, false, false>(p, by, first, last, part);
    });
#pragma omp barrier
    join_sums(p);
  }
}

template <typename T>
void input_gradient(const RowsBatchNorm& p) {
#pragma omp parallel
  {
    float* room = p.scratch + team().thread * 4 * p.channels;
    float *steady = room + 2 * p.channels, *along = room + 3 * p.channels;
    const Affine by = affine(p, room);
    for (int64_t c = 0; c < p.channels; ++c) {
      steady[c] = p.means == nullptr ? 0.0f : p.means[c];
      along[c] = p.means == nullptr ? 0.0f : p.means[p.channels + c] * inverse_deviation(p, c);
    }
    over_blocks(p, true, [&](int64_t first, int64_t last, int64_t) {
      if (p.relu && p.masked == nullptr)
        input_block<T, true>(p, by, steady, along, first, last);
      else
        input_block<T, false>(p, by, steady, along, first, last);
    });
  }
}

}  // namespace

void rows_moments(const RowsBatchNorm& p) {
  with_element(p.element, [&](auto type) { moments<decltype(type)>(p); });
}
void rows_batch_norm(const RowsBatchNorm& p) {
  with_element(p.element, [&](auto type) { norm<decltype(type)>(p); });
}
void rows_gradient_sums(const RowsBatchNorm& p) {
  with_element(p.element, [&](auto type) { gradient_sums<decltype(type)>(p); });
}
void rows_input_gradient(const RowsBatchNorm& p) {
  with_element(p.element, [&](auto type) { input_gradient<decltype(type)>(p); });
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
