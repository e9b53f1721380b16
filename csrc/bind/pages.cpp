#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// For a large output that nobody has touched yet. Allocations above the allocator's limit (32 MB in glibc) arrive as
// unmapped pages at every call, and taking them one by one costs more than writing them: 15 of the 25 ms of a backward
// pass over 64 images. This is advice: without effect where the pages are there already or large pages are off.
static void prefer_large_pages(std::uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kLarge = 2 << 20;
  if (bytes < static_cast<int64_t>(16 * kLarge)) return;
  const std::uintptr_t first = (address + kLarge - 1) / kLarge * kLarge, last = (address + bytes) / kLarge * kLarge;
  madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

void bind_pages(pybind11::module_& m) {
  m.def("prefer_large_pages", &prefer_large_pages, pybind11::arg("address"), pybind11::arg("bytes"));
}

}  // namespace fastmim
