#pragma once

#include <cstdint>

#include "cpu/packed_attention.h"
#include "isa.h"

namespace fastmim {

// Attention of each query from `prefix` on to the `kept` keys of largest score from there on, of equal ones to the first,
// and to all keys before; queries before attend everywhere.
struct TopkAttention {
  PackedAttention heads;    // queries = keys = N; no bias, counts or mask
  int64_t prefix, kept;     // P, k
  const int32_t* segments;  // [B, N - P] image of each patch, or null; forward only
  uint32_t* chosen;         // [B, H, N, topk_words(N)] bit j of word i: key 32 * i + j; written forward, read backward
  int32_t* tally;           // [B, H, N, 2] chosen keys of the query's image, and of any, without itself; with segments
};

static inline int64_t topk_words(int64_t tokens) { return (tokens + 31) / 32; }

}  // namespace fastmim

FASTMIM_DECLARE(void topk_attention(const TopkAttention& p))
FASTMIM_DECLARE(void topk_attention_backward(const TopkAttention& p))
