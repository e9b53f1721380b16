// One register of floats, as wide as the instruction set has it, and loops that are unrolled for certain.
//
// Unlike cpu/lanes.h, whose sixteen lanes give the same sums everywhere, this is for kernels whose lanes never meet
// (channels side by side): the width then changes nothing in the result.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/lanes.h"  // FASTMIM_INLINE

namespace fastmim {
namespace FASTMIM_ISA {

#if defined(FASTMIM_ISA_avx512)
constexpr int kWidth = 16;
constexpr int kRegisters = 32;
#elif defined(FASTMIM_ISA_avx2)
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
#else
constexpr int kWidth = 4;
constexpr int kRegisters = 16;
#endif
typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));

FASTMIM_INLINE Vec load_vec(const float* from) {
  Vec x;
  memcpy(&x, from, sizeof(Vec));
  return x;
}
FASTMIM_INLINE void store_vec(float* to, const Vec& x) { memcpy(to, &x, sizeof(Vec)); }

template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};

// f(Index<0>), ..., f(Index<N - 1>): the index is a constant in the body, so arrays indexed by it live in registers.
template <int N, int I = 0, typename F>
FASTMIM_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Index<I>());
    unroll<N, I + 1>(f);
  }
}

// Before the body of a lambda given to unroll.
#define FASTMIM_INLINE_LAMBDA __attribute__((always_inline))

}  // namespace FASTMIM_ISA
}  // namespace fastmim
