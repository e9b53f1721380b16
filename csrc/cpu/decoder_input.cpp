// The decoder's sequence. A masked row (token plus position, and its LayerNorm) is the same in all images: it is computed
// once and copied. Backward, the gradients of a masked row are added up over the batch before anything else is done with
// them, because LayerNorm's backward is linear in them: only visible rows go through it one by one.
#include "cpu/decoder_input.h"

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

constexpr int64_t kStreamBytes = 8 << 20;  // outputs larger than the caches go around them

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }
int64_t size_of(int element) { return element == static_cast<int>(Element::f32) ? 4 : 2; }

float* scratch_of(const DecoderInput& p) {
#if defined(_OPENMP)
  const int64_t thread = omp_get_thread_num();
#else
  const int64_t thread = 0;
#endif
  return p.scratch + thread * kDecoderInputScratchRows * padded(p.width);
}

void store_row(const float* from, int64_t count, void* to, int element) {
  switch (static_cast<Element>(element)) {
    case Element::f32: memcpy(to, from, static_cast<size_t>(count) * sizeof(float)); break;
    case Element::bf16:
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<Bf16*>(to) + i);
      break;
    case Element::f16:
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<F16*>(to) + i);
      break;
  }
}

// With `stream`, past the caches: aligned and a multiple of 64 bytes.
void copy_bytes(const char* from, int64_t bytes, char* to, bool stream) {
#if defined(FASTMIM_ISA_avx512)
  if (stream) {
    for (int64_t i = 0; i < bytes; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    return;
  }
#endif
  (void)stream;
  memcpy(to, from, static_cast<size_t>(bytes));
}

void add(const float* a, const float* b, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

void add_to(float* __restrict to, const float* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Row `index` of a contiguous tensor as fp32: in place, or converted into `room`.
const float* row_at(const void* data, int element, int64_t index, int64_t width, float* room) {
  return as_floats(data, element, index * width, 1, width, room);
}

struct Moments {
  float mean, scale;
};

// Two passes in fp32: the mean, then the squares around it.
Moments moments_of(const float* row, int64_t count, float eps) {
  const int64_t whole = count / kLanes * kLanes;
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
  load_some(row + whole, count - whole, x);
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
  return {mean, 1.0f / sqrtf(squares / static_cast<float>(count) + eps)};
}

void normalise(const float* row, const DecoderInput& p, float* out) {
  const Moments m = moments_of(row, p.width, p.eps);
  if (p.norm_bias != nullptr)
    for (int64_t i = 0; i < p.width; ++i) out[i] = (row[i] - m.mean) * m.scale * p.norm_weight[i] + p.norm_bias[i];
  else
    for (int64_t i = 0; i < p.width; ++i) out[i] = (row[i] - m.mean) * m.scale * p.norm_weight[i];
}

FASTMIM_INLINE void store_some(float* to, int64_t count, const Lanes& x) {
  memcpy(to, &x, static_cast<size_t>(count) * sizeof(float));
}

// Sums that LayerNorm's backward needs of a row, from its channels [i, i + some).
FASTMIM_INLINE void norm_sums(const float* x, const float* g, const float* weights, int64_t some, Moments m,
                              float* grad_weight, float* grad_bias, Lanes& slopes, Lanes& products) {
  Lanes row, slope, weight, sums;
  load_some(x, some, row);
  load_some(g, some, slope);
  load_some(weights, some, weight);
  row = (row - m.mean) * m.scale;  // beyond the end `slope` is zero
  load_some(grad_weight, some, sums);
  sums += slope * row;
  store_some(grad_weight, some, sums);
  load_some(grad_bias, some, sums);
  sums += slope;
  store_some(grad_bias, some, sums);
  slope *= weight;
  slopes += slope;
  products += slope * row;
}

// x: row of the sequence; g: gradient of its LayerNorm. Adds to the gradients of weight and bias, and to `gradient`,
// which holds that of the row itself.
void norm_gradient(const float* x, const float* g, const DecoderInput& p, float* grad_weight, float* grad_bias,
                   float* gradient) {
  const int64_t count = p.width, whole = count / kLanes * kLanes;
  const float* w = p.norm_weight;
  const Moments m = moments_of(x, count, p.eps);
  Lanes a = {}, b = {};
  for (int64_t i = 0; i < whole; i += kLanes)
    norm_sums(x + i, g + i, w + i, kLanes, m, grad_weight + i, grad_bias + i, a, b);
  if (whole < count)
    norm_sums(x + whole, g + whole, w + whole, count - whole, m, grad_weight + whole, grad_bias + whole, a, b);
  const float slopes = sum(a) / static_cast<float>(count), products = sum(b) / static_cast<float>(count);
  for (int64_t i = 0; i < count; ++i)
    gradient[i] += m.scale * (g[i] * w[i] - slopes - (x[i] - m.mean) * m.scale * products);
}

// Token plus position of patch l.
void masked_row(const DecoderInput& p, int64_t l, float* out) {
  const float* token = p.mask_token + (p.own_tokens ? l * p.width : 0);
  if (p.positions != nullptr)
    add(token, p.positions + (p.prefix + l) * p.width, p.width, out);
  else
    memcpy(out, token, static_cast<size_t>(p.width) * sizeof(float));
}

// Which visible token stands at place t of image b; -1 where the mask token does.
int64_t token_at(const DecoderInput& p, int64_t b, int64_t t) {
  if (t < p.prefix) return t;
  const uint64_t id = static_cast<uint64_t>(p.ids_restore[b * p.patches + t - p.prefix]);
  return id < static_cast<uint64_t>(p.kept) ? p.prefix + static_cast<int64_t>(id) : -1;
}

// Visible token plus position.
const float* visible_row(const DecoderInput& p, int64_t b, int64_t t, int64_t token, float* room) {
  const int64_t offset = b / p.group * p.visible_batch + token * p.visible_token;
  const float* row = as_floats(p.visible, p.visible_element, offset, 1, p.width, room);
  if (p.positions == nullptr) return row;
  add(row, p.positions + t * p.width, p.width, room);
  return room;
}

bool streams(const void* to, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// The rows of visible tokens that no place asks for get no gradient.
void clear_unused(const DecoderInput& p) {
  const int64_t row_bytes = p.width * size_of(p.visible_element);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < p.batch / p.group; ++i) {
    int64_t used = 0;
    for (int64_t b = i * p.group; b < (i + 1) * p.group; ++b)
      for (int64_t l = 0; l < p.patches; ++l) used += token_at(p, b, p.prefix + l) >= 0;
    if (used == p.kept) continue;
    char* rows = static_cast<char*>(p.grad_visible) + (i * (p.prefix + p.kept) + p.prefix) * row_bytes;
    memset(rows, 0, static_cast<size_t>(p.kept * row_bytes));
  }
}

void prefetch_row(const void* data, int element, int64_t index, int64_t width) {
  const char* from = static_cast<const char*>(data) + index * width * size_of(element);
  for (int64_t byte = 0; byte < width * size_of(element); byte += 64) __builtin_prefetch(from + byte);
}

// out[i] = sum over rows of partial [rows, width], in their order.
void sum_rows(const float* partial, int64_t rows, int64_t width, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < width; first += kLanes) {
    const int64_t some = width - first < kLanes ? width - first : kLanes;
    Lanes total = {}, x;
    for (int64_t row = 0; row < rows; ++row) {
      load_some(partial + row * width + first, some, x);
      total += x;
    }
    memcpy(out + first, &total, static_cast<size_t>(some) * sizeof(float));
  }
}

// Sums over the batch for positions [first, last), which one thread makes in the order of the images.
void backward_of_positions(const DecoderInput& p, int64_t task, int64_t first, int64_t last) {
  const int64_t E = p.width, step = padded(E), T = p.prefix + p.patches, tokens = p.prefix + p.kept;
  const int64_t tasks = (T + kPositionsOfTask - 1) / kPositionsOfTask;
  const bool norm = p.norm_weight != nullptr && p.grad_normed != nullptr;
  float* room = scratch_of(p);
  float* direct = room;                                   // [positions, E]: of the masked rows themselves
  float* through_norm = direct + kPositionsOfTask * step;  // [positions, E]: of their LayerNorm
  float* of_visible = through_norm + kPositionsOfTask * step;  // [positions, E]: of visible rows
  float* token = of_visible + kPositionsOfTask * step;
  float* x = token + step;
  float* g = x + step;
  float* row = g + step;
  float* shared = row + step;  // [positions, E]: of prefix tokens, over the images of a group
  bool masked[kPositionsOfTask] = {};
  memset(room, 0, static_cast<size_t>((3 * kPositionsOfTask + 1) * step) * sizeof(float));
  float* grad_weight = p.partial + (tasks + task) * E;
  float* grad_bias = p.partial + (2 * tasks + task) * E;
  if (norm) {
    memset(grad_weight, 0, static_cast<size_t>(E) * sizeof(float));
    memset(grad_bias, 0, static_cast<size_t>(E) * sizeof(float));
  }
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t t = first; t < last; ++t) {
      const int64_t index = b * T + t, from = token_at(p, b, t), local = (t - first) * step;
      if (b + 1 < p.batch) {
        if (p.grad_sequence != nullptr) prefetch_row(p.grad_sequence, p.grad_sequence_element, index + T, E);
        if (norm) prefetch_row(p.grad_normed, p.grad_normed_element, index + T, E);
      }
      const float* of_row =
          p.grad_sequence == nullptr ? nullptr : row_at(p.grad_sequence, p.grad_sequence_element, index, E, row);
      const float* of_norm = norm ? row_at(p.grad_normed, p.grad_normed_element, index, E, g) : nullptr;
      if (from < 0) {
        masked[t - first] = true;
        if (of_row != nullptr) add_to(direct + local, of_row, E);
        if (norm) add_to(through_norm + local, of_norm, E);
        continue;
      }
      if (norm || of_row == nullptr) {
        if (of_row == nullptr)
          memset(row, 0, static_cast<size_t>(E) * sizeof(float));
        else if (of_row != row)
          memcpy(row, of_row, static_cast<size_t>(E) * sizeof(float));
        if (norm) norm_gradient(visible_row(p, b, t, from, x), of_norm, p, grad_weight, grad_bias, row);
        of_row = row;
      }
      if (p.grad_positions != nullptr) add_to(of_visible + local, of_row, E);
      if (t < p.prefix && p.group > 1) {
        if (b % p.group == 0)
          memcpy(shared + local, of_row, static_cast<size_t>(E) * sizeof(float));
        else
          add_to(shared + local, of_row, E);
        if (b % p.group < p.group - 1) continue;
        of_row = shared + local;
      }
      char* to = static_cast<char*>(p.grad_visible) + (b / p.group * tokens + from) * E * size_of(p.visible_element);
      store_row(of_row, E, to, p.visible_element);
    }
  for (int64_t t = first; t < last; ++t) {
    const int64_t local = (t - first) * step, l = t - p.prefix;
    if (l >= 0) {
      if (norm && masked[t - first]) {
        masked_row(p, l, x);
        norm_gradient(x, through_norm + local, p, grad_weight, grad_bias, direct + local);
      }
      if (p.own_tokens)
        memcpy(p.grad_mask_token + l * E, direct + local, static_cast<size_t>(E) * sizeof(float));
      else
        add_to(token, direct + local, E);
    }
    if (p.grad_positions != nullptr) add(direct + local, of_visible + local, E, p.grad_positions + t * E);
  }
  if (!p.own_tokens) memcpy(p.partial + task * E, token, static_cast<size_t>(E) * sizeof(float));
}

}  // namespace

void decoder_input(const DecoderInput& p) {
  const int64_t E = p.width, T = p.prefix + p.patches, step = padded(E);
  const int64_t row_bytes = E * size_of(p.sequence_element), normed_bytes = E * size_of(p.normed_element);
  const bool norm = p.norm_weight != nullptr;
  const bool stream = streams(p.sequence, p.batch * T, row_bytes);
  const bool stream_normed = norm && streams(p.normed, p.batch * T, normed_bytes);
  char* const masked = p.table;
  char* const masked_normed = p.table + p.patches * E * static_cast<int64_t>(sizeof(float));
#pragma omp parallel
  {
    float* room = scratch_of(p);
    float* normed = room + step;
    char* packed = reinterpret_cast<char*>(normed + step);
#pragma omp for schedule(static)
    for (int64_t l = 0; l < p.patches; ++l) {
      masked_row(p, l, room);
      store_row(room, E, masked + l * row_bytes, p.sequence_element);
      if (norm) {
        normalise(room, p, normed);
        store_row(normed, E, masked_normed + l * normed_bytes, p.normed_element);
      }
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.batch * T; ++index) {
      const int64_t b = index / T, t = index % T, from = token_at(p, b, t);
      char* to = static_cast<char*>(p.sequence) + index * row_bytes;
      char* to_normed = static_cast<char*>(p.normed) + index * normed_bytes;
      if (from < 0) {
        copy_bytes(masked + (t - p.prefix) * row_bytes, row_bytes, to, stream);
        if (norm) copy_bytes(masked_normed + (t - p.prefix) * normed_bytes, normed_bytes, to_normed, stream_normed);
        continue;
      }
      const float* row = visible_row(p, b, t, from, room);
      store_row(row, E, packed, p.sequence_element);
      copy_bytes(packed, row_bytes, to, stream);
      if (norm) {
        normalise(row, p, normed);
        store_row(normed, E, packed, p.normed_element);
        copy_bytes(packed, normed_bytes, to_normed, stream_normed);
      }
    }
#if defined(FASTMIM_ISA_avx512)
    if (stream || stream_normed) _mm_sfence();
#endif
  }
}

void decoder_input_backward(const DecoderInput& p) {
  const int64_t T = p.prefix + p.patches, tasks = (T + kPositionsOfTask - 1) / kPositionsOfTask;
  clear_unused(p);
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first = task * kPositionsOfTask;
    backward_of_positions(p, task, first, first + kPositionsOfTask < T ? first + kPositionsOfTask : T);
  }
  if (!p.own_tokens) sum_rows(p.partial, tasks, p.width, p.grad_mask_token);
  if (p.norm_weight != nullptr) {
    const int64_t rows = p.grad_normed != nullptr ? tasks : 0;
    sum_rows(p.partial + tasks * p.width, rows, p.width, p.grad_norm_weight);
    sum_rows(p.partial + 2 * tasks * p.width, rows, p.width, p.grad_norm_bias);
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
