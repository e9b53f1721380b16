#include "cpu/masked_pool.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "bind/bind.h"

namespace fastmim {

// B, K, t, C, k, s, padding
using PoolShape = std::array<int64_t, 7>;

namespace {

using Places = std::unique_ptr<int32_t[]>;

MaskedPool describe(const PoolShape& shape, std::uintptr_t neighbours, int element, Places& places) {
  MaskedPool p{};
  p.batch = shape[0], p.count = shape[1], p.side = shape[2], p.channels = shape[3];
  p.kernel = shape[4], p.stride = shape[5], p.padding = shape[6];
  p.neighbours = pointer<const int32_t>(neighbours), p.element = element;
  places.reset(new int32_t[2 * p.side * p.kernel]);
  p.places = places.get();
  return p;
}

void max_pool(const PoolShape& shape, std::uintptr_t neighbours, int element, std::uintptr_t x, std::uintptr_t out,
              std::uintptr_t chosen) {
  Places places;
  MaskedPool p = describe(shape, neighbours, element, places);
  p.x = pointer<const void>(x), p.out = pointer<void>(out), p.chosen = pointer<uint8_t>(chosen);
  FASTMIM_DISPATCH(masked_max_pool, p);
}

void max_pool_backward(const PoolShape& shape, std::uintptr_t neighbours, int element, std::uintptr_t gradient,
                       std::uintptr_t chosen, std::uintptr_t x_gradient) {
  Places places;
  MaskedPool p = describe(shape, neighbours, element, places);
  p.out = pointer<void>(gradient), p.chosen = pointer<uint8_t>(chosen), p.x_gradient = pointer<void>(x_gradient);
  FASTMIM_DISPATCH(masked_max_pool_backward, p);
}

void avg_pool(const PoolShape& shape, std::uintptr_t neighbours, int element, bool visible, std::uintptr_t x,
              std::uintptr_t out, std::uintptr_t share) {
  Places places;
  MaskedPool p = describe(shape, neighbours, element, places);
  p.visible = visible, p.x = pointer<const void>(x), p.out = pointer<void>(out), p.share = pointer<float>(share);
  FASTMIM_DISPATCH(masked_avg_pool, p);
}

void avg_pool_backward(const PoolShape& shape, std::uintptr_t neighbours, int element, std::uintptr_t gradient,
                       std::uintptr_t share, std::uintptr_t x_gradient) {
  Places places;
  MaskedPool p = describe(shape, neighbours, element, places);
  p.out = pointer<void>(gradient), p.share = pointer<float>(share), p.x_gradient = pointer<void>(x_gradient);
  FASTMIM_DISPATCH(masked_avg_pool_backward, p);
}

}  // namespace

void bind_masked_pool(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("masked_max_pool", &max_pool, py::arg("shape"), py::arg("neighbours"), py::arg("element"), py::arg("x"),
        py::arg("out"), py::arg("chosen"), NoGil());
  m.def("masked_max_pool_backward", &max_pool_backward, py::arg("shape"), py::arg("neighbours"), py::arg("element"),
        py::arg("gradient"), py::arg("chosen"), py::arg("x_gradient"), NoGil());
  m.def("masked_avg_pool", &avg_pool, py::arg("shape"), py::arg("neighbours"), py::arg("element"), py::arg("visible"),
        py::arg("x"), py::arg("out"), py::arg("share"), NoGil());
  m.def("masked_avg_pool_backward", &avg_pool_backward, py::arg("shape"), py::arg("neighbours"), py::arg("element"),
        py::arg("gradient"), py::arg("share"), py::arg("x_gradient"), NoGil());
}

}  // namespace fastmim
