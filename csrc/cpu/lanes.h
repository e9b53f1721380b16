// Sixteen floats side by side: one register of AVX-512, two of AVX2, four of SSE; the same sums in the same order on each.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace fastmim {
namespace FASTMIM_ISA {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LanesInt __attribute__((vector_size(64)));

#define FASTMIM_INLINE static inline __attribute__((always_inline))

// By reference: a 64-byte vector passed by value would depend on the instruction set's calling convention.
FASTMIM_INLINE void load(const float* from, Lanes& x) { memcpy(&x, from, sizeof(Lanes)); }
FASTMIM_INLINE void store(float* to, const Lanes& x) { memcpy(to, &x, sizeof(Lanes)); }
// The first `count` lanes; the others are zero.
FASTMIM_INLINE void load_some(const float* from, int64_t count, Lanes& x) {
  x = Lanes{};
  memcpy(&x, from, static_cast<size_t>(count) * sizeof(float));
}

FASTMIM_INLINE float sum(const Lanes& x) {
  float parts[kLanes];
  store(parts, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

FASTMIM_INLINE void select(const LanesInt& condition, const Lanes& yes, const Lanes& no, Lanes& out) {
  out = (Lanes)((condition & (LanesInt)yes) | (~condition & (LanesInt)no));
}

FASTMIM_INLINE void absolute(const Lanes& x, Lanes& out) { out = (Lanes)((LanesInt)x & 0x7fffffff); }

// e^x for |x| <= 87, to 1 ulp (Cody and Waite's reduction, Cephes' polynomial).
FASTMIM_INLINE void exponential(const Lanes& x, Lanes& out) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes shifted = x * 1.44269504088896341f + shift;
  const Lanes n = shifted - shift;
  const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  out = p * (Lanes)(((LanesInt)shifted << 23) + 0x3f800000);
}

// tanh to about 2 ulp: a polynomial where |x| < 0.625, else 1 - 2 / (e^2x + 1).
FASTMIM_INLINE void tanh(const Lanes& x, Lanes& out) {
  Lanes a, e, far;
  absolute(x, a);
  const Lanes square = x * x;
  Lanes p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Lanes near = p * square * x + x;
  select(a < 9.1f, a, Lanes{} + 9.1f, far);  // tanh is 1 from there; NaN is restored below
  exponential(far + far, e);
  far = 1.0f - 2.0f / (e + 1.0f);
  far = (Lanes)((LanesInt)far | ((LanesInt)x & (int32_t)0x80000000));
  select(a < 0.625f, near, far, out);
  select(x != x, x, out, out);
}

// log(1 + x) for x >= 0, to about 2 ulp: Cephes' logarithm of 1 + x as rounded, plus what the rounding lost.
FASTMIM_INLINE void log1p(const Lanes& x, Lanes& out) {
  const Lanes u = x + 1.0f;
  const LanesInt shifted = (LanesInt)u - 0x3f3504f3;  // so that the mantissa is from sqrt(1/2) to sqrt(2)
  const LanesInt exponent = shifted >> 23;
  const Lanes e = __builtin_convertvector(exponent, Lanes);
  const Lanes m = (Lanes)((LanesInt)u - (exponent << 23)) - 1.0f;
  const Lanes square = m * m;
  Lanes p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * square - e * 2.12194440e-4f - 0.5f * square;
  p = m + p + (x - (u - 1.0f)) / u + e * 0.693359375f;
  select(x <= 3.4e38f, p, x, out);  // infinity and NaN stay
}

FASTMIM_INLINE void square_root(const Lanes& x, Lanes& out) {
  float values[kLanes];
  store(values, x);
  for (int i = 0; i < kLanes; ++i) values[i] = sqrtf(values[i]);
  load(values, out);
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
