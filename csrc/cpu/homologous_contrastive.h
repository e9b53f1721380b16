#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// Rows of D values of S * L tokens wherever they lie, in elements.
struct TokenRows {
  void* data;
  int element;  // enum Element of cpu/element.h
  int64_t sequence, token, value;  // strides
};

struct ContrastiveNormalise {
  int64_t sequences, length, width;  // S, L, D
  TokenRows tokens;     // read forward; the gradient, written, backward
  float* unit;          // [S, L, D] tokens / max(length of token, 1e-8)
  float* inverse_norm;  // [S, L] what they were multiplied by
  const float* grad_unit;  // [S, L, D]; backward only
  const float* grad_loss;  // scalar; backward only
  float* scratch;          // [threads, D]
};

struct HomologousContrastive {
  int64_t sequences, length;  // S, L
  float temperature;
  float* slope;             // [S, L, L] in: products of unit tokens; out: slope of the loss by them, W + W^T
  const int64_t* segments;  // [S, L]
  float* rows;              // [3, S, L] logarithm of the denominator, 1 / partners, loss of the position
  float* loss;              // scalar
  float* scratch;           // [threads, 2, L rounded up to 16]
};

}  // namespace fastmim

FASTMIM_DECLARE(void contrastive_normalise(const ContrastiveNormalise& p))
FASTMIM_DECLARE(void contrastive_normalise_backward(const ContrastiveNormalise& p))
FASTMIM_DECLARE(void homologous_contrastive(const HomologousContrastive& p))
