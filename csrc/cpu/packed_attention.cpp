// Attention of one head at a time, between the nearest caches: scores lie transposed, [keys, queries], so that softmax
// runs down the rows with queries side by side in registers, and every product is of the form that registers like.
#include "cpu/packed_attention.h"

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/attention_panels.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int64_t kBlock = kAttentionQueries;
constexpr float kInfinity = __builtin_inff();

int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What a thread works in; W is the head width padded to sixteen, Nq padded likewise.
struct Room {
  float *k, *v, *k_gradient, *v_gradient;                // [Nk, W]
  float *queries, *queries_down, *result;                // [block, W], [W, block], [block, W]
  float *out_gradient, *out_gradient_down;               // [block, W], [W, block]
  float *scores, *slopes;                                // [Nk, block]; slopes are gradients of scores
  float* added;                                          // [Nk] to the scores of a key
  float *bias, *bias_gradient;                           // [Nk, padded Nq]
  int64_t bias_head = -1;                                // whose bias is in `bias`, where images share it

  explicit Room(const PackedAttention& p) {
    const int64_t width = attention_padded(p.width);
    float* at = p.scratch + thread_index() * attention_scratch(p);
    const auto take = [&](int64_t count) {
      float* taken = at;
      at += count;
      return taken;
    };
    k = take(p.keys * width), v = take(p.keys * width);
    k_gradient = take(p.keys * width), v_gradient = take(p.keys * width);
    queries = take(kBlock * width), queries_down = take(kBlock * width), result = take(kBlock * width);
    out_gradient = take(kBlock * width), out_gradient_down = take(kBlock * width);
    scores = take(p.keys * kBlock), slopes = take(p.keys * kBlock);
    added = take(attention_padded(p.keys));
    const int64_t biases = p.bias == nullptr ? 0 : p.keys * attention_padded(p.queries);
    bias = take(biases), bias_gradient = take(biases);
  }
};

// Queries [first, first + count) of one head: at most kBlock of them, `lanes` of memory in whole sixteens.
struct Block {
  int64_t first, count, lanes;
};

// f(block) for blocks of nearly equal size.
template <typename F>
void in_blocks(int64_t queries, const F& f) {
  const int64_t groups = attention_padded(queries) / 16, blocks = (groups * 16 + kBlock - 1) / kBlock;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = groups * i / blocks * 16, last = groups * (i + 1) / blocks * 16;
    f(Block{first, least(last, queries) - first, last - first});
  }
}

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
      float square[256];
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
  float square[256];
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

FASTMIM_INLINE void reciprocal(const Lanes& sum, Lanes& out) {
  const Lanes zero = {};
  select(sum == 0.0f, zero, 1.0f / sum, out);
}

// One over the sums of the exponentials that `scores` then holds, [lanes]; and the logarithm of the sums, for a caller
// who wants it.
void softmax(const PackedAttention& p, const Block& block, const float* added, const float* bias, float* scores,
             float* reciprocals, float* lse) {
  const int64_t bias_pitch = attention_padded(p.queries);
  for (int64_t q = 0; q < block.lanes; q += 16) {
    Lanes largest, sum, x;
    exponentials(scores + q, p.keys, added, bias == nullptr ? nullptr : bias + block.first + q, bias_pitch, largest,
                 sum);
    reciprocal(sum, x);
    store(reciprocals + q, x);
    if (lse == nullptr) continue;
    log1p(sum - 1.0f, x);  // the largest adds 1
    x += largest;
    const Lanes infinite = Lanes{} + kInfinity;
    select(sum == 0.0f, infinite, x, x);
    memcpy(lse + block.first + q, &x, static_cast<size_t>(least(16, block.count - q)) * sizeof(float));
  }
}

// The queries of a block as rows and, times the scale, as columns.
void read_down(const PackedAttention& p, const Heads& from, int64_t b, int64_t h, const Block& block, float factor,
               bool keep_rows, float* rows, float* down) {
  const int64_t width = attention_padded(p.width);
  Matrix source = {static_cast<const float*>(from.data) + b * from.batch + block.first * from.token + h * from.head,
                   from.token};
  if (keep_rows || p.element != static_cast<int>(Element::f32) || width != p.width) {
    read_panel(from, p.element, b, h, block.first, block.count, p.width, rows, width);
    source = {rows, width};
  }
  transpose_panel(source, block.count, width, factor, down, kBlock);
}

void forward(const PackedAttention& p, int64_t b, int64_t h, Room& room) {
  const int64_t width = attention_padded(p.width);
  const Matrix k = rows_of(p.k, p.element, b, h, p.keys, p.width, room.k, width);
  read_panel(p.v, p.element, b, h, 0, p.keys, p.width, room.v, width);
  const float *added = key_terms(p, b, room), *bias = bias_terms(p, b, h, room);
  in_blocks(p.queries, [&](const Block& block) {
    float reciprocals[kBlock];
    read_down(p, p.q, b, h, block, p.scale, false, room.queries, room.queries_down);
    product<Left::across>(k, p.keys, {room.queries_down, kBlock}, p.width, block.lanes, false, room.scores, kBlock);
    softmax(p, block, added, bias, room.scores, reciprocals, p.lse + (b * p.heads + h) * p.queries);
    product<Left::down>({room.scores, kBlock}, block.count, {room.v, width}, p.keys, width, false, room.result, width);
    write_panel(room.result, width, reciprocals, 1.0f, p.out, p.element, b, h, block.first, block.count, p.width);
  });
}

// Exponentials to weights, and the gradients of weights to those of scores, for sixteen queries.
FASTMIM_INLINE void differentiate_softmax(float* scores, float* slopes, int64_t keys, const Lanes& reciprocals) {
  Lanes x, y, mean = {};
  for (int64_t first = 0; first < keys; first += 16) {
    Lanes some = {};
    for (int64_t k = first; k < least(first + 16, keys); ++k) {
      load(scores + k * kBlock, x);
      load(slopes + k * kBlock, y);
      x *= reciprocals;
      store(scores + k * kBlock, x);
      some += x * y;
    }
    mean += some;
  }
  for (int64_t k = 0; k < keys; ++k) {
    load(scores + k * kBlock, x);
    load(slopes + k * kBlock, y);
    y = x * (y - mean);
    store(slopes + k * kBlock, y);
  }
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
  const int64_t width = attention_padded(p.width);
  read_panel(p.k, p.element, b, h, 0, p.keys, p.width, room.k, width);
  const Matrix v = rows_of(p.v, p.element, b, h, p.keys, p.width, room.v, width);
  const float *added = key_terms(p, b, room), *bias = bias_terms(p, b, h, room);
  if (p.queries == 0) {
    memset(room.k_gradient, 0, static_cast<size_t>(p.keys * width) * sizeof(float));
    memset(room.v_gradient, 0, static_cast<size_t>(p.keys * width) * sizeof(float));
  }
  in_blocks(p.queries, [&](const Block& block) {
    float reciprocals[kBlock];
    const bool more = block.first > 0;
    read_down(p, p.q, b, h, block, p.scale, true, room.queries, room.queries_down);
    read_down(p, p.out_gradient, b, h, block, 1.0f, true, room.out_gradient, room.out_gradient_down);
    product<Left::across>({room.k, width}, p.keys, {room.queries_down, kBlock}, p.width, block.lanes, false,
                          room.scores, kBlock);
    product<Left::across>(v, p.keys, {room.out_gradient_down, kBlock}, p.width, block.lanes, false, room.slopes,
                          kBlock);
    softmax(p, block, added, bias, room.scores, reciprocals, nullptr);
    for (int64_t q = 0; q < block.lanes; q += 16) {
      Lanes some;
      load(reciprocals + q, some);
      differentiate_softmax(room.scores + q, room.slopes + q, p.keys, some);
    }
    if (bias_gradient != nullptr) add_bias_gradient(p, block, room.slopes, add, bias_gradient);
    product<Left::across>({room.scores, kBlock}, p.keys, {room.out_gradient, width}, block.count, width, more,
                          room.v_gradient, width);
    product<Left::across>({room.slopes, kBlock}, p.keys, {room.queries, width}, block.count, width, more,
                          room.k_gradient, width);
    product<Left::down>({room.slopes, kBlock}, block.count, {room.k, width}, p.keys, width, false, room.result, width);
    write_panel(room.result, width, nullptr, p.scale, p.q_gradient, p.element, b, h, block.first, block.count, p.width);
  });
  write_panel(room.k_gradient, width, nullptr, p.scale, p.k_gradient, p.element, b, h, 0, p.keys, p.width);
  write_panel(room.v_gradient, width, nullptr, 1.0f, p.v_gradient, p.element, b, h, 0, p.keys, p.width);
}

// Sixteen queries of a bias gradient: the sum of `parts` panels [Nk, padded Nq], `apart` from one another, to rows.
template <typename T>
void write_bias_gradient(const PackedAttention& p, const float* from, int64_t parts, int64_t apart, int64_t query,
                         T* to) {
  const int64_t pitch = attention_padded(p.queries);
  for (int64_t k = 0; k < p.keys; k += 16) {
    float sums[256], square[256];
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
