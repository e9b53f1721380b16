// Attention with an optional bias, log counts and masks of keys.
#include "cpu/packed_attention.h"

#include <stdint.h>
#include <string.h>

#include "cpu/attention_head.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

// Log counts and masked keys of one image as numbers to add to scores; null where there are none.
const float* key_terms(const PackedAttention& p, int64_t b, Room& room) {
  if (p.key_log_count == nullptr && p.key_mask == nullptr) return nullptr;
  for (int64_t k = 0; k < p.keys; ++k) {
    const float count = p.key_log_count == nullptr ? 0.0f : p.key_log_count[b * p.keys + k];
    room.added[k] = p.key_mask != nullptr && !p.key_mask[b * p.keys + k] ? -kInfinity : count;
  }
  return room.added;
}

template <typename T>
void read_bias(const PackedAttention& p, const T* from, float* room, float* to) {
  const int64_t lanes = attention_padded(p.queries);
  for (int64_t q = 0; q < p.queries; q += 16)
    for (int64_t k = 0; k < p.keys; k += 16) {
      const int64_t rows = least(16, p.queries - q), columns = least(16, p.keys - k);
      alignas(64) float square[256];
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) square[16 * i + j] = to_float(from[(q + i) * p.bias_row + k + j]);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = columns; j < 16; ++j) square[16 * i + j] = 0.0f;
      if (columns == 16) {
        transpose_square(square, 16, rows, 1.0f, to + k * lanes + q, lanes);
      } else {
        transpose_square(square, 16, rows, 1.0f, room, 16);
        for (int64_t j = 0; j < columns; ++j) memcpy(to + (k + j) * lanes + q, room + 16 * j, 16 * sizeof(float));
      }
    }
}

// The bias of a head, [Nk, padded Nq].
const float* bias_terms(const PackedAttention& p, int64_t b, int64_t h, Room& room) {
  if (p.bias == nullptr) return nullptr;
  if (p.bias_batch == 0 && room.bias_head == h) return room.bias;
  room.bias_head = h;
  alignas(64) float square[256];
  const int64_t offset = b * p.bias_batch + h * p.bias_head;
  switch (static_cast<Element>(p.bias_element)) {
    case Element::f32: read_bias(p, static_cast<const float*>(p.bias) + offset, square, room.bias); break;
    case Element::bf16: read_bias(p, static_cast<const Bf16*>(p.bias) + offset, square, room.bias); break;
    case Element::f16: read_bias(p, static_cast<const F16*>(p.bias) + offset, square, room.bias); break;
  }
  return room.bias;
}

// Scores [Nk, lanes] to exponentials of their distance from the largest, for sixteen queries. Gives that largest score
// and one over the sum, which is 0 where no key is left.
FASTMIM_INLINE void exponentials(float* scores, int64_t keys, const float* added, const float* bias,
                                 int64_t bias_pitch, Lanes& largest, Lanes& sum) {
  largest = Lanes{} - kInfinity;
  Lanes x, b;
  for (int64_t k = 0; k < keys; ++k) {
    float* at = scores + k * kBlock;
    load(at, x);
    if (bias != nullptr) {
      load(bias + k * bias_pitch, b);
      x += b;
    }
    if (added != nullptr) x += added[k];
    if (bias != nullptr || added != nullptr) store(at, x);
    select(largest < x, x, largest, largest);
  }
  const Lanes zero = {};
  select(largest == -kInfinity, zero, largest, largest);
  sum = zero;
  for (int64_t first = 0; first < keys; first += 16) {
    Lanes some = {};  // short sums of sums keep more digits
    for (int64_t k = first; k < least(first + 16, keys); ++k) {
      float* at = scores + k * kBlock;
      load(at, x);
      x -= largest;
      exponential(x, b);
      select(x < -87.0f, zero, b, b);
      store(at, b);
      some += b;
    }
    sum += some;
  }
}

// Softmax of one head's scores, as forward_head and backward_head want it.
struct Softmax {
  const PackedAttention& p;
  const float* added;  // [Nk] or null
  const float* bias;   // [Nk, padded Nq] or null
  float* lse;          // [Nq] of the head, or null

  void operator()(const Block& block, float* scores, float* reciprocals) const {
    const int64_t pitch = attention_padded(p.queries);
    for (int64_t q = 0; q < block.lanes; q += 16) {
      Lanes largest, sum;
      exponentials(scores + q, p.keys, added, bias == nullptr ? nullptr : bias + block.first + q, pitch, largest, sum);
      finish_softmax(block, q, largest, sum, reciprocals, lse);
    }
  }
};

void forward(const PackedAttention& p, int64_t b, int64_t h, Room& room) {
  const Softmax softmax = {p, key_terms(p, b, room), bias_terms(p, b, h, room), p.lse + (b * p.heads + h) * p.queries};
  forward_head(p, b, h, room, softmax);
}

void add_bias_gradient(const PackedAttention& p, const Block& block, const float* slopes, bool add, float* to) {
  const int64_t pitch = attention_padded(p.queries);
  for (int64_t k = 0; k < p.keys; ++k)
    for (int64_t q = 0; q < block.lanes; q += 16) {
      float* at = to + k * pitch + block.first + q;
      Lanes x, sum = {};
      load(slopes + k * kBlock + q, x);
      if (add) load(at, sum);
      sum += x;
      store(at, sum);
    }
}

// `bias_gradient` [Nk, padded Nq] or null; the gradient of this head of this image is added to it or put there.
void backward(const PackedAttention& p, int64_t b, int64_t h, float* bias_gradient, bool add, Room& room) {
  const Softmax softmax = {p, key_terms(p, b, room), bias_terms(p, b, h, room), nullptr};
  backward_head(p, b, h, room, softmax, [&](const Block& block, const float* slopes) {
    if (bias_gradient != nullptr) add_bias_gradient(p, block, slopes, add, bias_gradient);
  });
}

// Sixteen queries of a bias gradient: the sum of `parts` panels [Nk, padded Nq], `apart` from one another, to rows.
template <typename T>
void write_bias_gradient(const PackedAttention& p, const float* from, int64_t parts, int64_t apart, int64_t query,
                         T* to) {
  const int64_t pitch = attention_padded(p.queries);
  for (int64_t k = 0; k < p.keys; k += 16) {
    alignas(64) float sums[256];
    alignas(64) float square[256];
    const int64_t columns = least(16, p.keys - k);
    for (int64_t j = 0; j < columns; ++j) {
      const float* at = from + (k + j) * pitch + query;
      Lanes sum = {}, x;
      for (int64_t part = 0; part < parts; ++part) {
        load(at + part * apart, x);
        sum += x;
      }
      store(sums + 16 * j, sum);
    }
    transpose_square(sums, 16, columns, 1.0f, square, 16);
    for (int64_t i = 0; i < least(16, p.queries - query); ++i)
      for (int64_t j = 0; j < columns; ++j) from_float(square[16 * i + j], to + (query + i) * p.keys + k + j);
  }
}

void write_bias_gradient(const PackedAttention& p, const float* from, int64_t parts, int64_t apart, int64_t query,
                         int64_t head) {
  const int64_t offset = head * p.queries * p.keys;
  switch (static_cast<Element>(p.bias_element)) {
    case Element::f32:
      return write_bias_gradient(p, from, parts, apart, query, static_cast<float*>(p.bias_gradient) + offset);
    case Element::bf16:
      return write_bias_gradient(p, from, parts, apart, query, static_cast<Bf16*>(p.bias_gradient) + offset);
    case Element::f16:
      return write_bias_gradient(p, from, parts, apart, query, static_cast<F16*>(p.bias_gradient) + offset);
  }
}

// Images are innermost where they share a bias, so that a thread transposes it once.
void place(const PackedAttention& p, int64_t task, int64_t& b, int64_t& h) {
  const bool shared = p.bias != nullptr && p.bias_batch == 0;
  b = shared ? task % p.batch : task / p.heads;
  h = shared ? task / p.batch : task % p.heads;
}

}  // namespace

void packed_attention(const PackedAttention& p) {
#pragma omp parallel
  {
    Room room(p);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.batch * p.heads; ++task) {
      int64_t b, h;
      place(p, task, b, h);
      forward(p, b, h, room);
    }
  }
}

void packed_attention_backward(const PackedAttention& p) {
  const bool shared = p.bias_gradient != nullptr && p.bias_batch == 0;
  const int64_t parts = attention_parts(p), size = p.keys * attention_padded(p.queries);
#pragma omp parallel
  {
    Room room(p);
    if (shared) {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < p.heads * parts; ++task) {
        const int64_t h = task / parts, part = task % parts, first = p.batch * part / parts;
        float* sum = p.bias_partial + (part * p.heads + h) * size;
        for (int64_t b = first; b < p.batch * (part + 1) / parts; ++b) backward(p, b, h, sum, b > first, room);
      }
      const int64_t groups = attention_padded(p.queries) / 16;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < p.heads * groups; ++task) {
        const int64_t h = task / groups;
        write_bias_gradient(p, p.bias_partial + h * size, parts, p.heads * size, task % groups * 16, h);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < p.batch * p.heads; ++task) {
        int64_t b, h;
        place(p, task, b, h);
        float* own = p.bias_gradient == nullptr ? nullptr : room.bias_gradient;
        backward(p, b, h, own, false, room);
        for (int64_t q = 0; own != nullptr && q < p.queries; q += 16)
          write_bias_gradient(p, own, 1, 0, q, b * p.heads + h);
      }
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
