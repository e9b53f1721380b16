#include "cuda/device.h"

#include <cuda_runtime.h>

namespace fastmim {

CudaDevices cuda_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return {0, cudaGetErrorString(error)};
  return {count, ""};
}

}  // namespace fastmim
