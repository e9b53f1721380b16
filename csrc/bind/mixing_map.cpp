#include "cpu/mixing_map.h"

#include <memory>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

static void run(int64_t groups, int64_t group_size, int64_t cells, std::uintptr_t rng, std::uintptr_t segments,
                std::uintptr_t mask) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  const int64_t room = (cells + group_size + 63) / 64 * 64;
  std::unique_ptr<uint32_t[]> scratch(new uint32_t[threads * 3 * room]);
  const int64_t* state = pointer<const int64_t>(rng);  // [3]: seed, step, first
  const MixingMap p{groups,   group_size, cells, state[0], state[1], state[2], pointer<int64_t>(segments),
                    pointer<bool>(mask), scratch.get()};
  FASTMIM_DISPATCH(mixing_map, p);
}

void bind_mixing_map(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("mixing_map", &run, py::arg("groups"), py::arg("group_size"), py::arg("cells"), py::arg("rng"),
        py::arg("segments"), py::arg("mask"), NoGil());
}

}  // namespace fastmim
