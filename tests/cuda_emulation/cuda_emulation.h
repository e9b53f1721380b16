// The words of CUDA C++ for a C++ compiler, so that kernels run on the host: blocks one after the other, each thread of
// a block a fiber that runs until it waits for others. Slow, exact, and it sees what a GPU hangs on: a barrier that
// some threads never reach is reported with who waits where, not waited for.
//
// Shared memory is full of NaN when a block starts (except a template's, which GCC before 14 leaves out of the section).
// Threads and blocks run in their order, or backwards when `reversed` is set: results that differ show a race. Only what
// kernels here use is defined; __shared__ wants kernels in an unnamed namespace.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

namespace cuda_emulation {

enum class Wait { no, barrier, warp, ended };

struct Thread {
  ucontext_t context;
  uint3 index;
  Wait wait = Wait::no;
  const char* word = "";    // of the collective waited for
  unsigned mask = 0;        // lanes that take part in it
  uint64_t given = 0;       // this lane's value
  uint64_t taken[32] = {};  // everybody's, once all are there
};

struct Block {
  std::vector<Thread> threads;
  std::vector<char*> stacks;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  size_t current = 0;
  std::string error;
};

constexpr size_t kStack = 256 << 10;

static Block block;
static bool reversed = false;
static std::string reported;  // the string that take_error gave

static void entry() {
  (*block.body)();
  block.threads[block.current].wait = Wait::ended;
  swapcontext(&block.threads[block.current].context, &block.scheduler);
}

static std::string name(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

static void fail(const std::string& what) {
  if (block.error.empty()) block.error = "block " + name(blockIdx) + ": " + what;
}

// Leaves the current thread until the scheduler comes back to it.
static void pause() {
  Thread& me = block.threads[block.current];
  swapcontext(&me.context, &block.scheduler);
  threadIdx = me.index;
}

static void release_barrier() {
  for (const Thread& t : block.threads)
    if (t.wait != Wait::barrier && t.wait != Wait::ended) return;
  for (Thread& t : block.threads)
    if (t.wait == Wait::barrier) t.wait = Wait::no;
}

// The lanes of `mask` exchange a value each.
static const uint64_t* exchange(const char* word, unsigned mask, uint64_t given) {
  Thread& me = block.threads[block.current];
  const size_t warp = block.current / 32 * 32, lane = block.current - warp;
  if (!(mask >> lane & 1)) fail(std::string(word) + ": lane " + std::to_string(lane) + " calls it but is not in its mask");
  me.wait = Wait::warp, me.word = word, me.mask = mask, me.given = given;
  bool all = true;
  for (size_t l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (warp + l >= block.threads.size()) {
      fail(std::string(word) + ": lane " + std::to_string(l) + " of its mask is not in the block");
      continue;
    }
    const Thread& other = block.threads[warp + l];
    // A lane that waits elsewhere may come here later.
    all = all && other.wait == Wait::warp && strcmp(other.word, word) == 0 && other.mask == mask;
  }
  if (all && block.error.empty())
    for (size_t l = 0; l < 32; ++l)
      if (mask >> l & 1) {
        Thread& other = block.threads[warp + l];
        for (size_t from = 0; from < 32; ++from)
          if (mask >> from & 1) other.taken[from] = block.threads[warp + from].given;
        other.wait = Wait::no;
      }
  pause();
  return block.threads[block.current].taken;
}

static std::string who_waits() {
  std::map<std::string, std::pair<size_t, uint3>> places;
  size_t ended = 0;
  for (const Thread& t : block.threads) {
    ended += t.wait == Wait::ended;
    if (t.wait != Wait::barrier && t.wait != Wait::warp) continue;
    char mask[32] = "";
    if (t.wait == Wait::warp) snprintf(mask, sizeof(mask), " of lanes %08x", t.mask);
    const std::string place = (t.wait == Wait::barrier ? "__syncthreads" : t.word) + std::string(mask);
    ++places.try_emplace(place, size_t{0}, t.index).first->second.first;
  }
  std::string text = "deadlock: " + std::to_string(ended) + " threads have ended";
  for (const auto& [place, who] : places)
    text += ", " + std::to_string(who.first) + " wait at " + place + " (first: " + name(who.second) + ")";
  return text;
}

static void run_block() {
  const size_t count = static_cast<size_t>(blockDim.x) * blockDim.y * blockDim.z;
  memset(__start_cuda_shared, 0xff, static_cast<size_t>(__stop_cuda_shared - __start_cuda_shared));
  block.threads.assign(count, Thread());
  while (block.stacks.size() < count)
    block.stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  for (size_t i = 0; i < count; ++i) {
    Thread& t = block.threads[i];
    t.index = {static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x % blockDim.y),
               static_cast<unsigned>(i / blockDim.x / blockDim.y)};
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = block.stacks[i], t.context.uc_stack.ss_size = kStack, t.context.uc_link = nullptr;
    makecontext(&t.context, entry, 0);
  }
  size_t ended = 0;
  while (ended < count && block.error.empty()) {
    bool progress = false;
    for (size_t step = 0; step < count && block.error.empty(); ++step) {
      const size_t i = reversed ? count - 1 - step : step;
      if (block.threads[i].wait != Wait::no) continue;
      progress = true;
      block.current = i, threadIdx = block.threads[i].index;
      swapcontext(&block.scheduler, &block.threads[i].context);
      ended += block.threads[i].wait == Wait::ended;
      release_barrier();
    }
    if (!progress && ended < count) fail(who_waits());
  }
}

inline void run(dim3 grid, dim3 threads, const std::function<void()>& body) {
  if (!block.error.empty()) return;  // as a device refuses work after an error
  gridDim = grid, blockDim = threads, block.body = &body;
  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t step = 0; step < count && block.error.empty(); ++step) {
    const uint64_t i = reversed ? count - 1 - step : step;
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block();
  }
}

inline const char* take_error() {
  reported.swap(block.error);
  block.error.clear();
  return reported.empty() ? nullptr : reported.c_str();
}

template <typename T>
uint64_t bits(T value) {
  static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
  uint64_t u = 0;
  memcpy(&u, &value, sizeof(T));
  return u;
}
template <typename T>
T value_of(uint64_t u) {
  T value;
  memcpy(&value, &u, sizeof(T));
  return value;
}

// What lane `from` gave; a lane beyond its group of `width`, or out of the mask, gives the caller's own value.
template <typename T, typename From>
T shuffle(const char* word, unsigned mask, T value, int width, From from) {
  const int lane = static_cast<int>(block.current % 32), first = lane / width * width;
  const uint64_t* all = exchange(word, mask, bits(value));
  const int other = from(lane, first);
  return other < first || other >= first + width ? value : value_of<T>(all[other]);
}

}  // namespace cuda_emulation

inline void __syncthreads() {
  cuda_emulation::block.threads[cuda_emulation::block.current].wait = cuda_emulation::Wait::barrier;
  cuda_emulation::pause();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulation::exchange("__syncwarp", mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = cuda_emulation::exchange("__ballot_sync", mask, predicate != 0);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= static_cast<unsigned>(all[lane]) << lane;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_emulation::shuffle("__shfl_sync", mask, value, width,
                                 [=](int, int first) { return first + (source & (width - 1)); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_emulation::shuffle("__shfl_up_sync", mask, value, width,
                                 [=](int lane, int) { return lane - static_cast<int>(delta); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_emulation::shuffle("__shfl_down_sync", mask, value, width,
                                 [=](int lane, int) { return lane + static_cast<int>(delta); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return cuda_emulation::shuffle("__shfl_xor_sync", mask, value, width, [=](int lane, int) { return lane ^ lanes; });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
