// The passes around the Fourier transform of A²MIM's loss: the error before it, the spectrum after it, the gradient.
#include "cpu/frequency_loss.h"

#include <math.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(FASTMIM_ISA_avx512)
#include <immintrin.h>
#endif

#include "cpu/element.h"
#include "cpu/lanes.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int64_t kBlock = 4096;  // pixels that one task of the error holds in the first-level cache

int64_t this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// One row of pixels of one image, added to or stored into `out`. `mask` is the row of cells above it.
void error_row(const FrequencyError& p, const bool* mask, const float* prediction, const float* image, float mean,
               bool add, float* out) {
  const int64_t cells = p.cells.width / p.cells.columns;
  const float factor = p.factor, mean_weight = p.mean_weight;
  for (int64_t x = 0; x < cells;) {
    const bool removed = mask[x];
    const int64_t from = x * p.cells.columns;
    while (x < cells && mask[x] == removed) ++x;
    const int64_t to = x * p.cells.columns;
    if (!removed && factor == 0.0f && mean_weight == 0.0f) {  // not read at all
      if (!add) memset(out + from, 0, static_cast<size_t>(to - from) * sizeof(float));
    } else if (!removed && factor == 0.0f) {
      for (int64_t i = from; i < to; ++i) out[i] = (add ? out[i] : 0.0f) + mean_weight * (mean - image[i]);
    } else if (!removed && mean_weight != 0.0f) {
      for (int64_t i = from; i < to; ++i)
        out[i] = (add ? out[i] : 0.0f) + factor * (prediction[i] - image[i]) + mean_weight * (mean - image[i]);
    } else {
      const float scale = removed ? 1.0f : factor;
      for (int64_t i = from; i < to; ++i) out[i] = (add ? out[i] : 0.0f) + scale * (prediction[i] - image[i]);
    }
  }
}

const float* pixel_row(const Images& of, int64_t b, int64_t c, int64_t h, int64_t width, float* room) {
  return as_floats(of.data, of.element, b * of.batch + c * of.channel + h * of.row, of.column, width, room);
}

// The weight of the greatest |D|, in double: every frequency is divided by it, so its error would be everybody's.
template <Weight K>
double greatest_weight(double square, double exponent) {
  const double weight = pow(sqrt(square), exponent);
  return K == Weight::log ? ::log1p(weight) : weight;
}

template <Weight K>
FASTMIM_INLINE void weigh(float exponent, const Lanes& square, Lanes& weight, Lanes& value, Lanes& slope) {
  Lanes r;
  square_root(square, r);
  if (K == Weight::l1 || K == Weight::focal_l1) {
    weight = Lanes{} + 1.0f;
  } else if (exponent == 0.0f) {
    weight = Lanes{} + 1.0f;
  } else if (exponent == 1.0f) {
    weight = r;
  } else if (exponent == 2.0f) {
    weight = square;
  } else {
    float values[kLanes];
    store(values, r);
    for (int i = 0; i < kLanes; ++i) values[i] = powf(values[i], exponent);
    load(values, weight);
  }
  if (K == Weight::log) log1p(weight, weight);
  if (K == Weight::squared || K == Weight::log) {
    value = weight * square;
    slope = weight + weight;
    return;
  }
  Lanes derivative = weight;
  value = weight * r;
  if (K == Weight::focal_l1) {
    const Lanes x = r * 0.1f;
    Lanes t;
    tanh(x, t);
    value = r * t;
    derivative = t + x * (1.0f - t * t);
  }
  select(r != 0.0f, derivative / r, Lanes{}, slope);
}

template <Weight K>
void spectrum_row(const FrequencySpectrum& p, int64_t row) {
  const float* from = p.spectrum + 2 * row * p.columns;
  float* to = p.gradient + 2 * row * p.columns;
  Lanes total = {}, most = {};
  for (int64_t j = 0; j < p.columns; j += kLanes) {
    const int64_t count = p.columns - j < kLanes ? p.columns - j : kLanes;
    float parts[2 * kLanes] = {}, re[kLanes], im[kLanes];
    if (count == kLanes)
      memcpy(parts, from + 2 * j, sizeof(parts));
    else
      memcpy(parts, from + 2 * j, static_cast<size_t>(count) * 2 * sizeof(float));
    for (int i = 0; i < kLanes; ++i) re[i] = parts[2 * i], im[i] = parts[2 * i + 1];
    Lanes a, b, weight, value, slope, counts;
    load(re, a);
    load(im, b);
    const Lanes square = a * a + b * b;
    weigh<K>(p.exponent, square, weight, value, slope);
    load(p.counts + j, counts);
    total += value * counts;
    select(square > most, square, most, most);
    store(re, a * slope);
    store(im, b * slope);
    for (int i = 0; i < kLanes; ++i) parts[2 * i] = re[i], parts[2 * i + 1] = im[i];
    if (count == kLanes)
      memcpy(to + 2 * j, parts, sizeof(parts));
    else
      memcpy(to + 2 * j, parts, static_cast<size_t>(count) * 2 * sizeof(float));
  }
  float greatest = 0.0f, squares[kLanes];
  store(squares, most);
  for (int i = 0; i < kLanes; ++i) greatest = squares[i] > greatest ? squares[i] : greatest;
  p.partial[2 * row] = sum(total);
  p.partial[2 * row + 1] = greatest;
}

template <Weight K>
void spectrum(const FrequencySpectrum& p) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < p.images * p.rows; ++row) spectrum_row<K>(p, row);
  // One order whatever the number of threads.
  for (int64_t b = 0; b < p.images; ++b) {
    double total = 0.0;
    float most = 0.0f;
    for (int64_t row = b * p.rows; row < (b + 1) * p.rows; ++row) {
      total += p.partial[2 * row];
      most = p.partial[2 * row + 1] > most ? p.partial[2 * row + 1] : most;
    }
    double factor = p.scale;
    if (p.normalise) factor = most > 0.0f ? p.scale / greatest_weight<K>(most, p.exponent) : 0.0;
    p.factor[b] = static_cast<float>(factor);
    p.value[b] = total * factor;
  }
}

template <typename T>
void store_row(const float* from, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) from_float(from[i], out + i);
}

}  // namespace

void frequency_error(const FrequencyError& p) {
  const int64_t B = p.cells.batch, C = p.cells.channels, H = p.cells.height, W = p.cells.width;
  const int64_t grid_rows = H / p.cells.rows, grid_columns = W / p.cells.columns;
  const int64_t block = kBlock / W > 0 ? (kBlock / W < p.cells.rows ? kBlock / W : p.cells.rows) : 1;
  const int64_t blocks = (p.cells.rows + block - 1) / block;  // of a row of cells
  const int64_t images = p.average ? 1 : B, members = p.average ? B : 1;
#pragma omp parallel
  {
    float* room = p.scratch + this_thread() * 2 * W;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < images * C * grid_rows * blocks; ++task) {
      const int64_t y = task / blocks % grid_rows, c = task / (blocks * grid_rows) % C;
      const int64_t image = task / (blocks * grid_rows * C);
      const int64_t first = y * p.cells.rows + task % blocks * block;
      const int64_t last = first + block < (y + 1) * p.cells.rows ? first + block : (y + 1) * p.cells.rows;
      for (int64_t b = image; b < image + members; ++b) {
        const bool* mask = p.cells.mask + (b * grid_rows + y) * grid_columns;
        const float mean = p.mean_weight != 0.0f ? p.means[b * C + c] : 0.0f;
        for (int64_t h = first; h < last; ++h) {
          const float* prediction = pixel_row(p.prediction, b, c, h, W, room);
          const float* target = pixel_row(p.image, b, c, h, W, room + W);
          float* out = p.error + ((image * C + c) * H + h) * W;
          if (b == image)
            error_row(p, mask, prediction, target, mean, false, out);
          else
            error_row(p, mask, prediction, target, mean, true, out);
        }
      }
      if (!p.average) continue;
      const float count = static_cast<float>(B);
      float* out = p.error + (c * H + first) * W;
      for (int64_t i = 0; i < (last - first) * W; ++i) out[i] /= count;  // a rounded 1/B would shift all of them
    }
  }
}

void frequency_spectrum(const FrequencySpectrum& p) {
  switch (p.kind) {
    case Weight::squared: spectrum<Weight::squared>(p); break;
    case Weight::modulus: spectrum<Weight::modulus>(p); break;
    case Weight::log: spectrum<Weight::log>(p); break;
    case Weight::l1: spectrum<Weight::l1>(p); break;
    case Weight::focal_l1: spectrum<Weight::focal_l1>(p); break;
  }
}

void frequency_gradient(const FrequencyGradient& p) {
  const int64_t B = p.cells.batch, C = p.cells.channels, H = p.cells.height, W = p.cells.width;
  const int64_t grid_rows = H / p.cells.rows, grid_columns = W / p.cells.columns;
  const bool floats = p.element == static_cast<int>(Element::f32);
#if defined(FASTMIM_ISA_avx512)
  const bool stream = p.stream && floats && W % kLanes == 0 && reinterpret_cast<uintptr_t>(p.gradient) % 64 == 0;
#endif
#pragma omp parallel
  {
    float* weights = p.scratch + this_thread() * 2 * ((W + kLanes - 1) / kLanes * kLanes);
    float* room = weights + (W + kLanes - 1) / kLanes * kLanes;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * C * grid_rows; ++task) {
      const int64_t y = task % grid_rows, c = task / grid_rows % C, b = task / (grid_rows * C);
      const int64_t source = p.average ? 0 : b;
      const float all = p.grad_loss * p.factor[source];
      const bool* mask = p.cells.mask + (b * grid_rows + y) * grid_columns;
      for (int64_t x = 0; x < grid_columns; ++x)
        for (int64_t q = 0; q < p.cells.columns; ++q)
          weights[x * p.cells.columns + q] = mask[x] ? all : all * p.visible_weight;
      for (int64_t h = y * p.cells.rows; h < (y + 1) * p.cells.rows; ++h) {
        const float* picture = p.picture + ((source * C + c) * H + h) * W;
        const int64_t offset = ((b * C + c) * H + h) * W;
#if defined(FASTMIM_ISA_avx512)
        if (stream) {
          float* out = static_cast<float*>(p.gradient) + offset;
          for (int64_t i = 0; i < W; i += kLanes)
            _mm512_stream_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(picture + i), _mm512_loadu_ps(weights + i)));
          continue;
        }
#endif
        float* row = floats ? static_cast<float*>(p.gradient) + offset : room;
        for (int64_t i = 0; i < W; ++i) row[i] = picture[i] * weights[i];
        if (p.element == static_cast<int>(Element::bf16))
          store_row(row, W, static_cast<Bf16*>(p.gradient) + offset);
        else if (!floats)
          store_row(row, W, static_cast<F16*>(p.gradient) + offset);
      }
    }
#if defined(FASTMIM_ISA_avx512)
    if (stream) _mm_sfence();
#endif
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
