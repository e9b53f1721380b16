// Kernels that test the emulation itself: what each should do is in test_emulation.py.
#include "cuda_emulation.h"

namespace {

__global__ void where_am_i(int* out) {  // [grid, threads, 6]
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int* to = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
  to[0] = threadIdx.x, to[1] = threadIdx.y, to[2] = threadIdx.z;
  to[3] = blockIdx.x, to[4] = blockIdx.y, to[5] = blockIdx.z;
}

__global__ void reverse(bool barrier, const float* from, float* to) {
  __shared__ float room[256];
  room[threadIdx.x] = from[threadIdx.x];
  if (barrier) __syncthreads();
  to[threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
}

__global__ void unwritten(float* to) {
  __shared__ float room[2];
  to[blockIdx.x] = room[1];
  room[1] = 1.0f;
}

__global__ void many_barriers(int* to) {  // every thread counts what all others have done so far
  __shared__ int done[8];
  for (int round = 0; round < 8; ++round) {
    if (threadIdx.x == 0) done[round] = 0;
    __syncthreads();
    done[round] += 1;
    __syncthreads();
    to[round * blockDim.x + threadIdx.x] = done[round];
    if (round == 3 && threadIdx.x >= 40) return;  // those left go on without
  }
}

__global__ void collectives(const double* from, double* sums, int* prefix, unsigned* words) {
  const unsigned all = 0xffffffffu;
  double sum = from[threadIdx.x], same = sum;
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(all, sum, delta);
  for (int lanes = 16; lanes > 0; lanes /= 2) same += __shfl_xor_sync(all, same, lanes);
  sums[threadIdx.x] = __shfl_sync(all, sum, 0) - same;
  int scan = 1;
  for (unsigned delta = 1; delta < 8; delta *= 2) {
    const int other = __shfl_up_sync(all, scan, delta, 8);
    if (threadIdx.x % 8 >= delta) scan += other;
  }
  prefix[threadIdx.x] = scan;
  const bool odd = threadIdx.x % 2;
  words[4 * threadIdx.x] = __ballot_sync(all, odd);
  words[4 * threadIdx.x + 1] = __any_sync(all, threadIdx.x % 32 == 31);
  words[4 * threadIdx.x + 2] = __all_sync(all, !odd);
  if (odd) words[4 * threadIdx.x + 3] = __popc(__ballot_sync(0xaaaaaaaau, threadIdx.x % 32 > 16));
  __syncwarp();
}

__global__ void barrier_for_some(int* out) {
  if (threadIdx.x < 32)
    __ballot_sync(0xffffffffu, threadIdx.x != 7 ? 1 : 0);
  else if (threadIdx.x < 64)
    __syncthreads();
  if (threadIdx.x < 31) __ballot_sync(0xffffffffu, 1);
  if (threadIdx.x == 31) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void not_in_its_mask(int* out) { out[threadIdx.x] = __ballot_sync(0x0000ffffu, 1); }

__global__ void two_words(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(0xffffffffu, 1, 0) : static_cast<int>(__ballot_sync(0xffffffffu, 1));
}

}  // namespace

using cuda_emulation::run;
using cuda_emulation::take_error;

extern "C" {

void set_reversed(int value) { cuda_emulation::reversed = value != 0; }

const char* where(int* out) {
  run(dim3(2, 3, 4), dim3(5, 2, 3), [=] { where_am_i(out); });
  return take_error();
}
const char* reversed_copy(int barrier, int count, const float* from, float* to) {
  run(dim3(1), dim3(count), [=] { reverse(barrier != 0, from, to); });
  return take_error();
}
const char* shared_at_start(float* to) {
  run(dim3(3), dim3(1), [=] { unwritten(to); });
  return take_error();
}
const char* barriers(int* to) {
  run(dim3(1), dim3(64), [=] { many_barriers(to); });
  return take_error();
}
const char* warps(const double* from, double* sums, int* prefix, unsigned* words) {
  run(dim3(1), dim3(64), [=] { collectives(from, sums, prefix, words); });
  return take_error();
}
const char* hang(int which, int* out) {
  run(dim3(2), dim3(96), [=] { which == 0 ? barrier_for_some(out) : which == 1 ? not_in_its_mask(out) : two_words(out); });
  return take_error();
}
}
