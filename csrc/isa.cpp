#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastmim {

namespace {

bool supported(Isa isa) {
#if defined(FASTMIM_X86)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::portable;
}

Isa best() {
  if (supported(Isa::avx512)) return Isa::avx512;
  if (supported(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

Isa current_isa() {
  static const Isa automatic = best();
  // Read at every call (a few nanoseconds): tests compare the sets within one process.
  const char* wanted = std::getenv("FASTMIM_ISA");
  if (wanted == nullptr || *wanted == '\0') return automatic;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (!supported(isa))
      throw std::runtime_error("FASTMIM_ISA=" + std::string(wanted) + ": this processor has only " +
                               isa_name(automatic) + " and below");
    return isa;
  }
  throw std::runtime_error("FASTMIM_ISA is '" + std::string(wanted) + "': expected portable, avx2 or avx512");
}

}  // namespace fastmim
