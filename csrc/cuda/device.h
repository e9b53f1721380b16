#pragma once

#include <string>

namespace fastmim {

struct CudaDevices {
  int count;          // 0 where there is no driver or no device
  std::string error;  // the runtime's own words when count is 0
};

CudaDevices cuda_devices();

}  // namespace fastmim
