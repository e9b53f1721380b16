// Which instruction set the CPU kernels run with: chosen when the program runs, never when it is built.
//
// A kernel file (csrc/cpu/*.cpp) is compiled once per instruction set with FASTMIM_ISA set to its name and puts its
// functions into `namespace fastmim::FASTMIM_ISA`. It may use C headers, csrc's own headers and intrinsics, but no
// templates of the C++ library: the linker keeps one copy of those for the whole program, and it might be the AVX-512 one.
#pragma once

#include <cstdint>

namespace fastmim {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

// The best set that this processor and this build have, or the one that FASTMIM_ISA names in the environment
// (portable, avx2, avx512). Throws std::runtime_error for an unknown or unsupported name.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace fastmim

// Declares a kernel in every instruction set's namespace.
#define FASTMIM_DECLARE(declaration)  \
  namespace fastmim::portable {       \
  declaration;                        \
  }                                   \
  namespace fastmim::avx2 {           \
  declaration;                        \
  }                                   \
  namespace fastmim::avx512 {         \
  declaration;                        \
  }

// Calls function(arguments...) of the current instruction set.
#if defined(FASTMIM_X86)
#define FASTMIM_DISPATCH(function, ...)                                                    \
  (::fastmim::current_isa() == ::fastmim::Isa::avx512 ? ::fastmim::avx512::function(__VA_ARGS__) \
   : ::fastmim::current_isa() == ::fastmim::Isa::avx2 ? ::fastmim::avx2::function(__VA_ARGS__)   \
                                                      : ::fastmim::portable::function(__VA_ARGS__))
#else
#define FASTMIM_DISPATCH(function, ...) (::fastmim::portable::function(__VA_ARGS__))
#endif
