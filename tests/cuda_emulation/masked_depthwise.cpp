// csrc/cuda/masked_depthwise.cu on the host, for ctypes.
#include "cuda_emulation.h"

#include "cuda/masked_depthwise.cu"

using fastmim::cuda::MaskedDepthwise;

extern "C" {

void set_reversed(int value) { cuda_emulation::reversed = value != 0; }
int64_t depthwise_room(const MaskedDepthwise* p, int weight_gradient) {
  return fastmim::cuda::depthwise_room(*p, weight_gradient != 0);
}
const char* masked_depthwise(const MaskedDepthwise* p) { return fastmim::cuda::masked_depthwise(*p); }
const char* masked_depthwise_input_gradient(const MaskedDepthwise* p) {
  return fastmim::cuda::masked_depthwise_input_gradient(*p);
}
const char* masked_depthwise_weight_gradient(const MaskedDepthwise* p) {
  return fastmim::cuda::masked_depthwise_weight_gradient(*p);
}
}
