#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

constexpr int64_t kPositionsOfTask = 4;  // neighbours whose gradients are summed together, whatever the number of threads

// Legend: B batch, in groups of G with the same visible tokens, P prefix tokens, K visible patches, N patches, T = P + N,
// E width. Sequences are contiguous.
struct DecoderInput {
  int64_t batch, prefix, kept, patches, width;  // B, P, K, N, E
  int64_t group;                                // G
  const int64_t* ids_restore;                   // [B, N]; 0 to K - 1 is a visible patch, all else a masked one
  const void* visible;                          // [B / G, P + K, E], last dimension contiguous
  int visible_element;                          // enum Element of cpu/element.h
  int64_t visible_batch, visible_token;         // strides, in elements
  const float* mask_token;                      // [N, E], or [E] with own_tokens false
  bool own_tokens;
  const float* positions;    // [T, E], or nullptr: none
  const float* norm_weight;  // [E], or nullptr: no LayerNorm
  const float* norm_bias;    // [E], or nullptr
  float eps;
  // Forward
  void* sequence;  // [B, T, E]
  int sequence_element;
  void* normed;  // [B, T, E]; only with norm_weight
  int normed_element;
  // Backward
  const void* grad_sequence;  // [B, T, E], or nullptr: zero
  int grad_sequence_element;
  const void* grad_normed;  // [B, T, E], or nullptr: zero; only with norm_weight
  int grad_normed_element;
  void* grad_visible;        // [B / G, P + K, E] contiguous, of visible_element
  float* grad_mask_token;    // as mask_token
  float* grad_positions;     // [T, E], or nullptr: not wanted
  float* grad_norm_weight;   // [E]; only with norm_weight
  float* grad_norm_bias;     // [E]; only with norm_weight
  float* partial;            // [3, tasks, E]: of mask token, norm weight, norm bias; tasks of kPositionsOfTask positions
  char* table;               // forward: [2, N, E] floats, the masked rows of sequence and normed, equal for all images
  float* scratch;            // [threads, scratch_rows, E rounded up to 16]
};

constexpr int64_t kDecoderInputScratchRows = 4 * kPositionsOfTask + 4;

}  // namespace fastmim

FASTMIM_DECLARE(void decoder_input(const DecoderInput& p))
FASTMIM_DECLARE(void decoder_input_backward(const DecoderInput& p))
