// Element types of tensors, and their conversion to and from fp32 in forms that a compiler vectorises.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastmim {

enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace fastmim

namespace fastmim {
namespace FASTMIM_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

static inline float to_float(float x) { return x; }
static inline float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
// Exponent moved by a multiplication, which also takes subnormals; infinity and NaN get theirs set afterwards.
static inline float to_float(F16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * float_of(0x77800000u));  // times 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of(scaled | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

// Round to nearest even.
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, Bf16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
static inline void from_float(float x, F16* out) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // exponent bias 127 to 15
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the adder rounds at 2^-24
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  out->bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? large : finite));
}

template <typename T>
void convert(const T* from, int64_t step, int64_t count, float* out) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i * step]);
}

// `count` elements from `offset` on, `step` apart, as fp32: in place where they are that, else in `room`.
static inline const float* as_floats(const void* data, int element, int64_t offset, int64_t step, int64_t count,
                                     float* room) {
  switch (static_cast<Element>(element)) {
    case Element::f32:
      if (step == 1) return static_cast<const float*>(data) + offset;
      convert(static_cast<const float*>(data) + offset, step, count, room);
      break;
    case Element::bf16: convert(static_cast<const Bf16*>(data) + offset, step, count, room); break;
    case Element::f16: convert(static_cast<const F16*>(data) + offset, step, count, room); break;
  }
  return room;
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
