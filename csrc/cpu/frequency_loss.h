#pragma once

#include <cstdint>

#include "isa.h"

namespace fastmim {

// An image tensor [B, C, H, W] wherever it lies; strides in elements.
struct Images {
  const void* data;
  int element;  // enum Element of cpu/element.h
  int64_t batch, channel, row, column;
};

struct Cells {
  int64_t batch, channels, height, width;  // B, C, H, W
  int64_t rows, columns;                   // P, Q of a cell
  const bool* mask;                        // [B, N], N = H/P * W/Q, true = removed
};

// error = prediction - image on removed pixels, factor * error + mean_weight * (mean - image) on visible ones
struct FrequencyError {
  Cells cells;
  Images prediction, image;
  const float* means;  // [B, C] mean of each plane of the image; read only if mean_weight is not 0
  float factor, mean_weight;
  bool average;    // one image: the mean over the batch
  float* error;    // [B or 1, C, H, W]
  float* scratch;  // [threads, 2, W]
};

enum class Weight : int { squared = 0, modulus = 1, log = 2, l1 = 3, focal_l1 = 4 };  // KINDS of the operation

// What the loss does with each frequency D: its value, and D times the derivative over |D|.
struct FrequencySpectrum {
  int64_t images, rows, columns;  // rows = C * H, columns = W/2 + 1
  Weight kind;
  float exponent;         // of |D| in the weight
  bool normalise;         // divide the weights by their maximum in each image
  double scale;           // of each image's sum in the loss
  const float* counts;    // [columns rounded up to 16] how often a column stands in the whole spectrum
  const float* spectrum;  // [images, rows, columns, 2]
  float* gradient;        // same, not yet times factor
  float* factor;          // [images] scale / maximum
  double* value;          // [images] share of the loss
  float* partial;         // [images, rows, 2] sum of values, maximum of |D|^2
};

// gradient = picture * factor * grad_loss * share, times visible_weight on visible pixels
struct FrequencyGradient {
  Cells cells;
  const float* picture;  // [B or 1, C, H, W] transformed back
  bool average;          // one picture for all images
  const float* factor;   // [B or 1]
  float grad_loss;       // times share
  float visible_weight;
  bool stream;     // store past the caches
  void* gradient;  // [B, C, H, W] contiguous
  int element;     // its type
  float* scratch;  // [threads, 2, W rounded up to 16]
};

}  // namespace fastmim

FASTMIM_DECLARE(void frequency_error(const FrequencyError& p))
FASTMIM_DECLARE(void frequency_spectrum(const FrequencySpectrum& p))
FASTMIM_DECLARE(void frequency_gradient(const FrequencyGradient& p))
