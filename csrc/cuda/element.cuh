// Element types of tensors on the device, a few channels of a thread at a time, and their conversion to and from fp32.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#define FASTMIM_ISA emulation
#include "cpu/element.h"
#endif

namespace fastmim {
namespace cuda {

#if defined(__CUDACC__)
using Bf16 = __nv_bfloat16;
using F16 = __half;
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(F16 x) { return __half2float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, Bf16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, F16* out) { *out = __float2half_rn(x); }
#else
using emulation::Bf16;
using emulation::F16;
using emulation::from_float;
using emulation::to_float;
#endif

// Calls function(T{}) with the type that cpu/element.h gives the number `element`.
template <typename Function>
void by_element(int element, const Function& function) {
  if (element == 0)
    function(float{});
  else if (element == 1)
    function(Bf16{});
  else
    function(F16{});
}

// V neighbouring channels, read and written as one.
template <typename T, int V>
struct alignas(sizeof(T) * V) Channels {
  T value[V];
};

template <int V, typename T>
__device__ inline void load(const T* from, float (&to)[V]) {
  const Channels<T, V> all = *reinterpret_cast<const Channels<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_float(all.value[v]);
}

template <int V, typename T>
__device__ inline void store(T* to, const float (&from)[V]) {
  Channels<T, V> all;
#pragma unroll
  for (int v = 0; v < V; ++v) from_float(from[v], &all.value[v]);
  *reinterpret_cast<Channels<T, V>*>(to) = all;
}

}  // namespace cuda
}  // namespace fastmim
