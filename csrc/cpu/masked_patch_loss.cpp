// Loss over removed patches: each masked row of the prediction and its pixels are read once, nothing else is.
#include "cpu/masked_patch_loss.h"

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

constexpr float kVarianceEps = 1e-6f;
constexpr int64_t kStreamBytes = 8 << 20;  // a gradient larger than the caches goes around them

// In what order the values of a patch stand in a row buffer: (p, q, c), or (c, p, q) for a planar prediction.
// A loss is a sum over the patch, so any order serves, as long as prediction and target share it.
struct Shape {
  int64_t rows, columns, channels;
  bool planar;
  int64_t values() const { return rows * columns * channels; }
};

// Three planes into RGBRGB...
template <typename T>
void interleave(const T* r, const T* g, const T* b, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[3 * i] = to_float(r[i]);
    out[3 * i + 1] = to_float(g[i]);
    out[3 * i + 2] = to_float(b[i]);
  }
}

#if defined(FASTMIM_ISA_avx512)
void interleave(const float* r, const float* g, const float* b, int64_t count, float* out) {
  // Value j of the 48 is pixel j / 3 of plane j % 3: red and green first, then blue into the third places.
  const __m512i rg0 = _mm512_setr_epi32(0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5);
  const __m512i rg1 = _mm512_setr_epi32(21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26);
  const __m512i rg2 = _mm512_setr_epi32(0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0);
  const __m512i b0 = _mm512_setr_epi32(0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 4, 0);
  const __m512i b1 = _mm512_setr_epi32(0, 5, 0, 0, 6, 0, 0, 7, 0, 0, 8, 0, 0, 9, 0, 0);
  const __m512i b2 = _mm512_setr_epi32(10, 0, 0, 11, 0, 0, 12, 0, 0, 13, 0, 0, 14, 0, 0, 15);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 red = _mm512_loadu_ps(r + i), green = _mm512_loadu_ps(g + i), blue = _mm512_loadu_ps(b + i);
    float* to = out + 3 * i;
    _mm512_storeu_ps(to, _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(red, rg0, green), 0x4924, b0, blue));
    _mm512_storeu_ps(to + 16, _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(red, rg1, green), 0x2492, b1, blue));
    _mm512_storeu_ps(to + 32, _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(red, rg2, green), 0x9249, b2, blue));
  }
  interleave<float>(r + i, g + i, b + i, count - i, out + 3 * i);
}
#endif

template <typename T>
void gather(const T* from, const Patches& at, const Shape& shape, float* out) {
  const int64_t P = shape.rows, Q = shape.columns, C = shape.channels;
  if (shape.planar) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t p = 0; p < P; ++p, out += Q) convert(from + c * at.channel + p * at.row, at.column, Q, out);
    return;
  }
  for (int64_t p = 0; p < P; ++p, from += at.row, out += Q * C) {
    if ((at.channel == 1 || C == 1) && at.column == C)
      convert(from, 1, Q * C, out);
    else if (C == 3 && at.column == 1)
      interleave(from, from + at.channel, from + 2 * at.channel, Q, out);
    else
      for (int64_t q = 0; q < Q; ++q) convert(from + q * at.column, at.channel, C, out + q * C);
  }
}

template <typename T>
void scatter(const float* from, const Patches& at, const Shape& shape, T* out) {
  const int64_t P = shape.rows, Q = shape.columns, C = shape.channels;
  if (shape.planar) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t p = 0; p < P; ++p, from += Q) {
        T* row = out + c * at.channel + p * at.row;
        if (at.column == 1)
          for (int64_t q = 0; q < Q; ++q) from_float(from[q], row + q);
        else
          for (int64_t q = 0; q < Q; ++q) from_float(from[q], row + q * at.column);
      }
    return;
  }
  for (int64_t p = 0; p < P; ++p, out += at.row, from += Q * C) {
    if ((at.channel == 1 || C == 1) && at.column == C)
      for (int64_t i = 0; i < Q * C; ++i) from_float(from[i], out + i);
    else
      for (int64_t q = 0; q < Q; ++q)
        for (int64_t c = 0; c < C; ++c) from_float(from[q * C + c], out + q * at.column + c * at.channel);
  }
}

int64_t offset_of(const Patches& at, int64_t b, int64_t y, int64_t x) {
  return b * at.batch + y * at.grid_row + x * at.grid_column;
}

bool is_row(const Patches& at, const Shape& shape) {
  if (at.element != static_cast<int>(Element::f32)) return false;
  const int64_t P = shape.rows, Q = shape.columns, C = shape.channels;
  if (shape.planar) return at.column == 1 && at.row == Q && (C == 1 || at.channel == P * Q);
  return (C == 1 || at.channel == 1) && at.column == C && (P == 1 || at.row == Q * C);
}

// The fp32 row of one patch: in place where it already is one, else gathered into `room`.
const float* row_of(const Patches& at, int64_t offset, const Shape& shape, float* room) {
  if (is_row(at, shape)) return static_cast<const float*>(at.data) + offset;
  switch (static_cast<Element>(at.element)) {
    case Element::f32: gather(static_cast<const float*>(at.data) + offset, at, shape, room); break;
    case Element::bf16: gather(static_cast<const Bf16*>(at.data) + offset, at, shape, room); break;
    case Element::f16: gather(static_cast<const F16*>(at.data) + offset, at, shape, room); break;
  }
  return room;
}

// The lines of a patch, asked for while the one before it is worked on: they are too short and too far apart for the
// processor to see a pattern.
void prefetch(const Patches& at, int64_t offset, const Shape& shape) {
  const int64_t size = at.element == static_cast<int>(Element::f32) ? 4 : 2;
  const bool planes = at.column == 1 && shape.channels > 1;
  const int64_t count = planes ? shape.channels : 1, run = (planes ? 1 : shape.channels) * shape.columns * size;
  const char* from = static_cast<const char*>(at.data) + offset * size;
  for (int64_t p = 0; p < shape.rows; ++p)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t byte = 0; byte < run; byte += 64)
        __builtin_prefetch(from + (p * at.row + c * at.channel) * size + byte);
}

struct Statistics {
  float mean, scale;
};

// Two passes in fp32: the mean, then the squares around it.
Statistics statistics_of(const float* row, int64_t count) {
  const int64_t whole = count / kLanes * kLanes, rest = count - whole;
  Lanes a = {}, b = {}, x;
  int64_t i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    load(row + i, x);
    a += x;
    load(row + i + kLanes, x);
    b += x;
  }
  if (i < whole) {
    load(row + i, x);
    a += x;
  }
  load_some(row + whole, rest, x);
  b += x;
  a += b;
  const float mean = sum(a) / static_cast<float>(count);
  a = b = Lanes{};
  for (i = 0; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    load(row + i, x);
    x -= mean;
    a += x * x;
    load(row + i + kLanes, x);
    x -= mean;
    b += x * x;
  }
  if (i < whole) {
    load(row + i, x);
    x -= mean;
    a += x * x;
  }
  a += b;
  float squares = sum(a);
  for (i = whole; i < count; ++i) squares += (row[i] - mean) * (row[i] - mean);
  const float variance = squares / static_cast<float>(count > 1 ? count - 1 : 1);
  return {mean, 1.0f / sqrtf(variance + kVarianceEps)};
}

template <PixelLoss L>
FASTMIM_INLINE void loss_of(const Lanes& e, Lanes& out) {
  if (L == PixelLoss::l2) {
    out = e * e;
  } else if (L == PixelLoss::l1) {
    absolute(e, out);
  } else {
    tanh(e * 0.1f, out);
    out *= e;
  }
}

// Its derivative.
template <PixelLoss L>
FASTMIM_INLINE void slope_of(const Lanes& e, Lanes& out) {
  if (L == PixelLoss::l2) {
    out = e + e;
  } else if (L == PixelLoss::l1) {
    const Lanes one = Lanes{} + 1.0f, zero = {};
    select(e > 0.0f, one, zero, out);
    select(e < 0.0f, -one, out, out);
    select(e != e, e, out, out);
  } else {
    const Lanes x = e * 0.1f;
    tanh(x, out);
    out += x * (1.0f - out * out);
  }
}

template <PixelLoss L>
float row_loss(const float* prediction, const float* target, int64_t count, Statistics s) {
  const int64_t whole = count / kLanes * kLanes, rest = count - whole;
  Lanes a = {}, b = {}, x, t;
  int64_t i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    load(prediction + i, x);
    load(target + i, t);
    loss_of<L>(x - (t - s.mean) * s.scale, x);
    a += x;
    load(prediction + i + kLanes, x);
    load(target + i + kLanes, t);
    loss_of<L>(x - (t - s.mean) * s.scale, x);
    b += x;
  }
  if (i < whole) {
    load(prediction + i, x);
    load(target + i, t);
    loss_of<L>(x - (t - s.mean) * s.scale, x);
    a += x;
  }
  if (rest) {
    load_some(prediction + whole, rest, x);
    load_some(target + whole, rest, t);
    loss_of<L>(x - (t - s.mean) * s.scale, x);
    float values[kLanes];
    store(values, x);
    load_some(values, rest, x);  // the lanes beyond the row are nobody's error
    b += x;
  }
  a += b;
  return sum(a);
}

template <PixelLoss L, bool Stream>
void row_gradient(const float* prediction, const float* target, int64_t count, Statistics s, float factor, float* out) {
  const int64_t whole = count / kLanes * kLanes, rest = count - whole;
  Lanes x, t;
  for (int64_t i = 0; i < whole; i += kLanes) {
    load(prediction + i, x);
    load(target + i, t);
    slope_of<L>(x - (t - s.mean) * s.scale, x);
    x *= factor;
#if defined(FASTMIM_ISA_avx512)
    if (Stream) {
      _mm512_stream_ps(out + i, (__m512)x);
      continue;
    }
#endif
    store(out + i, x);
  }
  if (rest) {
    load_some(prediction + whole, rest, x);
    load_some(target + whole, rest, t);
    slope_of<L>(x - (t - s.mean) * s.scale, x);
    x *= factor;
    memcpy(out + whole, &x, static_cast<size_t>(rest) * sizeof(float));
  }
}

void write_row(const float* row, const Patches& at, int64_t offset, const Shape& shape) {
  switch (static_cast<Element>(at.element)) {
    case Element::f32: scatter(row, at, shape, static_cast<float*>(at.data) + offset); break;
    case Element::bf16: scatter(row, at, shape, static_cast<Bf16*>(at.data) + offset); break;
    case Element::f16: scatter(row, at, shape, static_cast<F16*>(at.data) + offset); break;
  }
}

void zero_row(float* out, int64_t count, bool stream) {
#if defined(FASTMIM_ISA_avx512)
  if (stream) {
    for (int64_t i = 0; i < count; i += kLanes) _mm512_stream_ps(out + i, _mm512_setzero_ps());
    return;
  }
#endif
  (void)stream;
  memset(out, 0, static_cast<size_t>(count) * sizeof(float));
}

// Rows that may be written past the caches: large, aligned, whole registers.
bool streams(const MaskedPatchLoss& p, const Shape& shape) {
  const int64_t count = shape.values(), cells = p.grid_rows * p.grid_columns;
  return is_row(p.gradient, shape) && count % kLanes == 0 && p.batch * cells * count * 4 >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(p.gradient.data) % 64 == 0 && p.gradient.batch % kLanes == 0 &&
         p.gradient.grid_row % kLanes == 0 && p.gradient.grid_column % kLanes == 0;
}

Shape shape_of(const MaskedPatchLoss& p) {
  const bool planar = p.channels > 1 && p.prediction.channel != 1;
  return {p.patch_rows, p.patch_columns, p.channels, planar};
}

float* scratch_of(const MaskedPatchLoss& p) {
#if defined(_OPENMP)
  const int64_t thread = omp_get_thread_num();
#else
  const int64_t thread = 0;
#endif
  return p.scratch + thread * 3 * ((p.patch_rows * p.patch_columns * p.channels + kLanes - 1) / kLanes * kLanes);
}

void prefetch_next(const MaskedPatchLoss& p, const Shape& shape, int64_t index) {
  const int64_t cells = p.grid_rows * p.grid_columns;
  if (index >= p.batch * cells || !p.mask[index]) return;
  const int64_t b = index / cells, y = index % cells / p.grid_columns, x = index % p.grid_columns;
  prefetch(p.image, offset_of(p.image, b, y, x), shape);
  prefetch(p.prediction, offset_of(p.prediction, b, y, x), shape);
}

template <PixelLoss L>
void forward(const MaskedPatchLoss& p) {
  const Shape shape = shape_of(p);
  const int64_t cells = p.grid_rows * p.grid_columns, count = shape.values();
#pragma omp parallel
  {
    float* room = scratch_of(p);
    float* spare = room + (count + kLanes - 1) / kLanes * kLanes;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.batch * cells; ++index) {
      prefetch_next(p, shape, index + 1);
      Statistics s = {0.0f, 1.0f};
      float value = 0.0f;
      if (p.mask[index]) {
        const int64_t b = index / cells, y = index % cells / p.grid_columns, x = index % p.grid_columns;
        const float* target = row_of(p.image, offset_of(p.image, b, y, x), shape, room);
        const float* row = row_of(p.prediction, offset_of(p.prediction, b, y, x), shape, spare);
        if (p.norm_pix) s = statistics_of(target, count);
        value = row_loss<L>(row, target, count, s);
      } else {
        s.scale = 0.0f;
      }
      p.partial[index] = value;
      if (p.norm_pix) {
        p.statistics[2 * index] = s.mean;
        p.statistics[2 * index + 1] = s.scale;
      }
    }
  }
  // One order whatever the number of threads.
  double total = 0.0;
  int64_t removed = 0;
  for (int64_t index = 0; index < p.batch * cells; ++index) {
    total += p.partial[index];
    removed += p.mask[index];
  }
  const double values = static_cast<double>(removed > 0 ? removed : 1) * static_cast<double>(count);
  *p.mean_loss = static_cast<float>(total / values);
  *p.scale = static_cast<float>(1.0 / values);
}

template <PixelLoss L>
void backward(const MaskedPatchLoss& p) {
  const Shape shape = shape_of(p);
  const int64_t cells = p.grid_rows * p.grid_columns, count = shape.values();
  const bool direct = is_row(p.gradient, shape), stream = streams(p, shape);
  const float factor = *p.grad_loss * *p.scale;
#pragma omp parallel
  {
    float* room = scratch_of(p);
    float* spare = room + (count + kLanes - 1) / kLanes * kLanes;
    float* result = spare + (count + kLanes - 1) / kLanes * kLanes;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.batch * cells; ++index) {
      prefetch_next(p, shape, index + 1);
      const int64_t b = index / cells, y = index % cells / p.grid_columns, x = index % p.grid_columns;
      const int64_t to = offset_of(p.gradient, b, y, x);
      float* out = direct ? static_cast<float*>(p.gradient.data) + to : result;
      if (p.mask[index]) {
        Statistics s = {0.0f, 1.0f};
        if (p.norm_pix) s = {p.statistics[2 * index], p.statistics[2 * index + 1]};
        const float* target = row_of(p.image, offset_of(p.image, b, y, x), shape, room);
        const float* row = row_of(p.prediction, offset_of(p.prediction, b, y, x), shape, spare);
        if (stream)
          row_gradient<L, true>(row, target, count, s, factor, out);
        else
          row_gradient<L, false>(row, target, count, s, factor, out);
      } else {
        zero_row(out, count, stream);
      }
      if (!direct) write_row(out, p.gradient, to, shape);
    }
#if defined(FASTMIM_ISA_avx512)
    if (stream) _mm_sfence();
#endif
  }
}

}  // namespace

void masked_patch_loss(const MaskedPatchLoss& p) {
  switch (p.loss) {
    case PixelLoss::l2: forward<PixelLoss::l2>(p); break;
    case PixelLoss::l1: forward<PixelLoss::l1>(p); break;
    case PixelLoss::focal_l1: forward<PixelLoss::focal_l1>(p); break;
  }
}

void masked_patch_loss_backward(const MaskedPatchLoss& p) {
  switch (p.loss) {
    case PixelLoss::l2: backward<PixelLoss::l2>(p); break;
    case PixelLoss::l1: backward<PixelLoss::l1>(p); break;
    case PixelLoss::focal_l1: backward<PixelLoss::focal_l1>(p); break;
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
