#include "cpu/random_mask.h"

#include <memory>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

static void run(int64_t batch, int64_t cells, int64_t keep, std::uintptr_t rng, std::uintptr_t ids_keep,
                std::uintptr_t ids_restore, std::uintptr_t mask) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  const int64_t room = (cells + 63) / 64 * 64;
  std::unique_ptr<uint32_t[]> scratch(new uint32_t[threads * 3 * room]);
  const int64_t* state = pointer<const int64_t>(rng);  // [3]: seed, step, first
  const RandomMask p{batch, cells, keep, state[0], state[1], state[2], pointer<int64_t>(ids_keep),
                     pointer<int64_t>(ids_restore), pointer<bool>(mask), scratch.get()};
  FASTMIM_DISPATCH(random_mask, p);
}

void bind_random_mask(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("random_mask", &run, py::arg("batch"), py::arg("cells"), py::arg("keep"), py::arg("rng"), py::arg("ids_keep"),
        py::arg("ids_restore"), py::arg("mask"), NoGil());
}

}  // namespace fastmim
