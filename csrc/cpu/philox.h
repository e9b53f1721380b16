// Philox4x32-10 (Salmon et al., SC 2011), sixteen counters side by side so that the compiler can vectorise.
#pragma once

#include <stdint.h>

namespace fastmim {
namespace FASTMIM_ISA {

constexpr int kPhiloxLanes = 16;

// Words 0..3 of the counters (block0 + lane, c1, c2, c3), written as out[4 * lane + word].
static inline void philox_lanes(uint32_t block0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed, uint32_t* out) {
  uint32_t w0[kPhiloxLanes], w1[kPhiloxLanes], w2[kPhiloxLanes], w3[kPhiloxLanes];
  for (int i = 0; i < kPhiloxLanes; ++i) {
    w0[i] = block0 + static_cast<uint32_t>(i);
    w1[i] = c1;
    w2[i] = c2;
    w3[i] = c3;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * w0[i];
      const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * w2[i];
      w0[i] = static_cast<uint32_t>(b >> 32) ^ w1[i] ^ k0;
      w1[i] = static_cast<uint32_t>(b);
      w2[i] = static_cast<uint32_t>(a >> 32) ^ w3[i] ^ k1;
      w3[i] = static_cast<uint32_t>(a);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kPhiloxLanes; ++i) {
    out[4 * i] = w0[i];
    out[4 * i + 1] = w1[i];
    out[4 * i + 2] = w2[i];
    out[4 * i + 3] = w3[i];
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
