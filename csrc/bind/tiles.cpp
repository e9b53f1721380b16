#include "cpu/tiles.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "bind/bind.h"

namespace fastmim {

// B, K, rows, columns of cells, t, C
using TilesShape = std::array<int64_t, 6>;

namespace {

Tiles describe(const TilesShape& shape, std::uintptr_t dense) {
  Tiles p{};
  p.batch = shape[0], p.count = shape[1], p.rows = shape[2], p.columns = shape[3];
  p.side = shape[4], p.channels = shape[5];
  p.dense = pointer<void>(dense);
  return p;
}

void gather(const TilesShape& shape, int64_t bytes, std::uintptr_t dense, const std::array<int64_t, 4>& stride,
            std::uintptr_t ids_keep, std::uintptr_t x) {
  Tiles p = describe(shape, dense);
  p.bytes = bytes, p.ids_keep = pointer<const int64_t>(ids_keep), p.x = pointer<void>(x);
  for (int i = 0; i < 4; ++i) p.stride[i] = stride[i];
  FASTMIM_DISPATCH(gather_tiles, p);
}

void scatter(const TilesShape& shape, int64_t bytes, std::uintptr_t x, std::uintptr_t fill, std::uintptr_t slots,
             std::uintptr_t dense) {
  Tiles p = describe(shape, dense);
  p.bytes = bytes, p.slots = pointer<const int32_t>(slots), p.x = pointer<void>(x);
  p.fill = pointer<const void>(fill);
  FASTMIM_DISPATCH(scatter_tiles, p);
}

void sum(const TilesShape& shape, int element, std::uintptr_t dense, const std::array<int64_t, 4>& stride,
         std::uintptr_t slots, std::uintptr_t out) {
  Tiles p = describe(shape, dense);
  p.element = element, p.slots = pointer<const int32_t>(slots), p.sum = pointer<void>(out);
  for (int i = 0; i < 4; ++i) p.stride[i] = stride[i];
  std::unique_ptr<double[]> partial(new double[masked_sum_parts(p) * p.channels]);  // room for either type
  p.partial = partial.get();
  FASTMIM_DISPATCH(masked_sum, p);
}

}  // namespace

void bind_tiles(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("gather_tiles", &gather, py::arg("shape"), py::arg("bytes"), py::arg("dense"), py::arg("stride"),
        py::arg("ids_keep"), py::arg("x"), NoGil());
  m.def("scatter_tiles", &scatter, py::arg("shape"), py::arg("bytes"), py::arg("x"), py::arg("fill"),
        py::arg("slots"), py::arg("dense"), NoGil());
  m.def("masked_sum", &sum, py::arg("shape"), py::arg("element"), py::arg("dense"), py::arg("stride"),
        py::arg("slots"), py::arg("out"), NoGil());
}

}  // namespace fastmim
