#include "cpu/tile_index.h"

#include <memory>
#include <stdexcept>
#include <string>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

static void run(int64_t batch, int64_t count, int64_t grid_rows, int64_t grid_columns, std::uintptr_t ids_keep,
                std::uintptr_t slots, std::uintptr_t neighbours) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  std::unique_ptr<int32_t[]> scratch(new int32_t[threads * (grid_rows + 6) * (grid_columns + 6)]);
  const TileIndex p{batch, count, grid_rows, grid_columns, pointer<const int64_t>(ids_keep), pointer<int32_t>(slots),
                    pointer<int32_t>(neighbours), scratch.get()};
  const int64_t bad = FASTMIM_DISPATCH(tile_index, p);
  if (bad >= 0)
    throw std::invalid_argument("TileIndex: ids_keep[" + std::to_string(bad / count) + ", " +
                                std::to_string(bad % count) + "] is " + std::to_string(p.ids_keep[bad]) +
                                ", out of [0, " + std::to_string(grid_rows * grid_columns) +
                                ") or there twice in its image");
}

void bind_tile_index(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("tile_index", &run, py::arg("batch"), py::arg("count"), py::arg("grid_rows"), py::arg("grid_columns"),
        py::arg("ids_keep"), py::arg("slots"), py::arg("neighbours"), NoGil());
}

}  // namespace fastmim
