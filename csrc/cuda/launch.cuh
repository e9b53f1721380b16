// Starting a kernel. Compiled by nvcc the kernel runs on a stream; compiled by a C++ compiler, with the words of CUDA
// defined by tests/cuda_emulation, it runs on the host. So kernels here use CUDA C++ only, no inline PTX.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"
#endif

namespace fastmim {
namespace cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
#if defined(__CUDACC__)
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  (void)stream;
  cuda_emulation::run(grid, dim3(threads), [&] { kernel(arguments...); });
#endif
}

// What is wrong with the kernels launched since the last call; null when nothing is.
inline const char* launch_error() {
#if defined(__CUDACC__)
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  return cuda_emulation::take_error();
#endif
}

}  // namespace cuda
}  // namespace fastmim
