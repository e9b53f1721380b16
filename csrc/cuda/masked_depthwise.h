#pragma once

#include <cstdint>

namespace fastmim {
namespace cuda {

// Depthwise convolution over tiles on a device; t tile side of the input, s stride, k kernel side. Addresses are the
// device's; x, out and their gradients are contiguous.
struct MaskedDepthwise {
  int64_t batch, count;       // B, K
  int64_t side, channels;     // t, C
  int64_t kernel, stride;     // k in 3, 5, 7; s in 1, 2
  const int32_t* neighbours;  // [B, K, 7, 7] tile or -1
  int element;                // enum Element of x, out, and their gradients
  int weight_element;         // enum Element of weight, bias, and their gradients
  const void* x;              // [B, K, t, t, C]
  const void* weight;         // [C, k, k]
  const void* bias;           // [C] or null
  void* out;                  // [B, K, t/s, t/s, C]; its gradient in the backward passes
  void* x_gradient;           // [B, K, t, t, C]
  void* weight_gradient;      // [C, k, k]
  void* bias_gradient;        // [C] or null
  float* room;                // [depthwise_room(p, ...)]
  void* stream;               // cudaStream_t
};

// Floats that a call works in: [k * k + 1, C] taps and bias; for the weight gradient [parts, k * k + 1, C] sums.
int64_t depthwise_room(const MaskedDepthwise& p, bool weight_gradient);

// Each returns null, or what the runtime says is wrong.
const char* masked_depthwise(const MaskedDepthwise& p);
const char* masked_depthwise_input_gradient(const MaskedDepthwise& p);
const char* masked_depthwise_weight_gradient(const MaskedDepthwise& p);

}  // namespace cuda
}  // namespace fastmim
