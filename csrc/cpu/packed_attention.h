#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// A tensor [B, tokens, H, D] wherever it lies: D is dense, the rest are strides in elements.
struct Heads {
  void* data;
  int64_t batch, token, head;
};

// B batch, Nq queries, Nk keys, H heads, D head width.
struct PackedAttention {
  int64_t batch, queries, keys, heads, width;
  int element;  // enum Element of cpu/element.h, of everything but the bias
  Heads q, k, v;
  float scale;
  const void* bias;            // [B or 1, H, Nq, Nk], Nk dense, or null
  int bias_element;            // of the bias and its gradient
  int64_t bias_batch, bias_head, bias_row;  // strides in elements; bias_batch is 0 where all images share it
  const float* key_log_count;  // [B, Nk] or null
  const bool* key_mask;        // [B, Nk], true = may be attended to, or null
  Heads out;                   // forward only
  float* lse;                  // [B, H, Nq] log of the sum of exponentials, infinity where no key is left; forward only
  Heads out_gradient;          // this and the rest: backward only
  Heads q_gradient, k_gradient, v_gradient;
  void* bias_gradient;         // [B or 1, H, Nq, Nk] dense, or null
  float* bias_partial;         // [attention_parts(p), H, Nk, padded Nq]; where all images share the bias
  float* scratch;              // [threads, attention_scratch(p)]
};

static inline int64_t attention_padded(int64_t count) { return (count + 15) / 16 * 16; }
// Ranges of images whose bias gradients are summed one after the other. Depends on the shape alone.
static inline int64_t attention_parts(const PackedAttention& p) {
  const int64_t parts = (32 + p.heads - 1) / p.heads;
  return parts < p.batch ? parts : p.batch;
}
constexpr int64_t kAttentionQueries = 64;  // handled together
// Floats for one thread: see Room in attention_head.h.
static inline int64_t attention_scratch(const PackedAttention& p) {
  const int64_t width = attention_padded(p.width), block = kAttentionQueries;
  const int64_t biases = p.bias == nullptr ? 0 : p.keys * attention_padded(p.queries);
  return 4 * p.keys * width + 5 * block * width + 2 * p.keys * block + attention_padded(p.keys) + 2 * biases + 64;
}

}  // namespace fastmim

FASTMIM_DECLARE(void packed_attention(const PackedAttention& p))
FASTMIM_DECLARE(void packed_attention_backward(const PackedAttention& p))
