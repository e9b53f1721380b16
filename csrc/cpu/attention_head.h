// What kernels of attention do for one head of one image, around a softmax of their own.
//
// Scores lie transposed, [keys, queries], so that softmax runs down the rows with queries side by side in registers, and
// every product is of the form that registers like.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/attention_panels.h"

namespace fastmim {
namespace FASTMIM_ISA {

constexpr int64_t kBlock = kAttentionQueries;
constexpr float kInfinity = __builtin_inff();

static inline int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What a thread works in; W is the head width padded to sixteen, Nq padded likewise.
struct Room {
  float *k, *v, *k_gradient, *v_gradient;   // [Nk, W]
  float *queries, *queries_down, *result;   // [block, W], [W, block], [block, W]
  float *out_gradient, *out_gradient_down;  // [block, W], [W, block]
  float *scores, *slopes;                   // [Nk, block]; slopes are gradients of scores
  float* added;                             // [Nk] to the scores of a key
  float *bias, *bias_gradient;              // [Nk, padded Nq]
  int64_t bias_head = -1;                   // whose bias is in `bias`, where images share it

  explicit Room(const PackedAttention& p) {
    const int64_t width = attention_padded(p.width);
    // Whole cache lines: a register read across two of them costs twice.
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(p.scratch) + 63) / 64 * 64;
    float* at = reinterpret_cast<float*>(aligned) + thread_index() * attention_scratch(p);
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

FASTMIM_INLINE void reciprocal(const Lanes& sum, Lanes& out) {
  const Lanes zero = {};
  select(sum == 0.0f, zero, 1.0f / sum, out);
}

// One over the sums, and for a caller who wants it (lse [queries] of the head) their logarithm.
FASTMIM_INLINE void finish_softmax(const Block& block, int64_t q, const Lanes& largest, const Lanes& sum,
                                   float* reciprocals, float* lse) {
  Lanes x;
  reciprocal(sum, x);
  store(reciprocals + q, x);
  if (lse == nullptr) return;
  log1p(sum - 1.0f, x);  // the largest adds 1
  x += largest;
  const Lanes infinite = Lanes{} + kInfinity;
  select(sum == 0.0f, infinite, x, x);
  memcpy(lse + block.first + q, &x, static_cast<size_t>(least(16, block.count - q)) * sizeof(float));
}

// The queries of a block as rows and, times the scale, as columns.
static inline void read_down(const PackedAttention& p, const Heads& from, int64_t b, int64_t h, const Block& block,
                             float factor, bool keep_rows, float* rows, float* down) {
  const int64_t width = attention_padded(p.width);
  Matrix source = {static_cast<const float*>(from.data) + b * from.batch + block.first * from.token + h * from.head,
                   from.token};
  if (keep_rows || p.element != static_cast<int>(Element::f32) || width != p.width) {
    read_panel(from, p.element, b, h, block.first, block.count, p.width, rows, width);
    source = {rows, width};
  }
  transpose_panel(source, block.count, width, factor, down, kBlock);
}

// softmax(block, scores, reciprocals) makes exponentials of scores [Nk, lanes] and gives one over their sums [lanes].
template <typename Softmax>
void forward_head(const PackedAttention& p, int64_t b, int64_t h, Room& room, const Softmax& softmax) {
  const int64_t width = attention_padded(p.width);
  const Matrix k = rows_of(p.k, p.element, b, h, p.keys, p.width, room.k, width);
  read_panel(p.v, p.element, b, h, 0, p.keys, p.width, room.v, width);
  in_blocks(p.queries, [&](const Block& block) {
    alignas(64) float reciprocals[kBlock];
    read_down(p, p.q, b, h, block, p.scale, false, room.queries, room.queries_down);
    product<Left::across>(k, p.keys, {room.queries_down, kBlock}, p.width, block.lanes, false, room.scores, kBlock);
    softmax(block, room.scores, reciprocals);
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

// after(block, slopes) sees the gradients of the scores [Nk, lanes].
template <typename Softmax, typename After>
void backward_head(const PackedAttention& p, int64_t b, int64_t h, Room& room, const Softmax& softmax,
                   const After& after) {
  const int64_t width = attention_padded(p.width);
  read_panel(p.k, p.element, b, h, 0, p.keys, p.width, room.k, width);
  const Matrix v = rows_of(p.v, p.element, b, h, p.keys, p.width, room.v, width);
  if (p.queries == 0) {
    memset(room.k_gradient, 0, static_cast<size_t>(p.keys * width) * sizeof(float));
    memset(room.v_gradient, 0, static_cast<size_t>(p.keys * width) * sizeof(float));
  }
  in_blocks(p.queries, [&](const Block& block) {
    alignas(64) float reciprocals[kBlock];
    const bool more = block.first > 0;
    read_down(p, p.q, b, h, block, p.scale, true, room.queries, room.queries_down);
    read_down(p, p.out_gradient, b, h, block, 1.0f, true, room.out_gradient, room.out_gradient_down);
    product<Left::across>({room.k, width}, p.keys, {room.queries_down, kBlock}, p.width, block.lanes, false,
                          room.scores, kBlock);
    product<Left::across>(v, p.keys, {room.out_gradient_down, kBlock}, p.width, block.lanes, false, room.slopes,
                          kBlock);
    softmax(block, room.scores, reciprocals);
    for (int64_t q = 0; q < block.lanes; q += 16) {
      Lanes some;
      load(reciprocals + q, some);
      differentiate_softmax(room.scores + q, room.slopes + q, p.keys, some);
    }
    after(block, room.slopes);
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

}  // namespace FASTMIM_ISA
}  // namespace fastmim
