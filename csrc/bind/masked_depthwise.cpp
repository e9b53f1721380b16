#include "cpu/masked_depthwise.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// B, K, t, C, k, s
using DepthwiseShape = std::array<int64_t, 6>;

namespace {

struct Room {
  std::unique_ptr<float[]> packed, partial, scratch;
  std::unique_ptr<int32_t[]> places;
  std::unique_ptr<DepthwiseTap[]> lists;
};

MaskedDepthwise describe(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                         bool multiplies, bool sums, Room& room) {
  MaskedDepthwise p{};
  p.batch = shape[0], p.count = shape[1], p.side = shape[2], p.channels = shape[3];
  p.kernel = shape[4], p.stride = shape[5];
  p.neighbours = pointer<const int32_t>(neighbours), p.element = element, p.weight_element = weight_element;
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  const int64_t rows = (p.kernel * p.kernel + 1) * depthwise_padded(p);
  if (sums) room.partial.reset(new float[depthwise_parts(p) * rows]);
  if (multiplies) room.packed.reset(new float[rows]);
  room.scratch.reset(new float[threads * depthwise_scratch(p)]);
  room.places.reset(new int32_t[2 * p.side * p.kernel]);
  if (p.side == 1) room.lists.reset(new DepthwiseTap[p.batch * p.count * 50]);
  p.places = room.places.get(), p.lists = room.lists.get();
  p.packed = room.packed.get(), p.partial = room.partial.get(), p.scratch = room.scratch.get();
  return p;
}

void forward(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element, std::uintptr_t x,
             std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out) {
  Room room;
  MaskedDepthwise p = describe(shape, neighbours, element, weight_element, true, false, room);
  p.x = pointer<const void>(x), p.weight = pointer<const void>(weight), p.bias = pointer<const void>(bias);
  p.out = pointer<void>(out);
  FASTMIM_DISPATCH(masked_depthwise, p);
}

void input_gradient(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                    std::uintptr_t gradient, std::uintptr_t weight, std::uintptr_t x_gradient) {
  Room room;
  MaskedDepthwise p = describe(shape, neighbours, element, weight_element, true, false, room);
  p.out = pointer<void>(gradient), p.weight = pointer<const void>(weight), p.x_gradient = pointer<void>(x_gradient);
  FASTMIM_DISPATCH(masked_depthwise_gradients, p);
}

void weight_gradient(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                     std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t weight_gradient,
                     std::uintptr_t bias_gradient) {
  Room room;
  MaskedDepthwise p = describe(shape, neighbours, element, weight_element, false, true, room);
  p.out = pointer<void>(gradient), p.x = pointer<const void>(x);
  p.weight_gradient = pointer<void>(weight_gradient), p.bias_gradient = pointer<void>(bias_gradient);
  FASTMIM_DISPATCH(masked_depthwise_gradients, p);
}

void gradients(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
               std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t x_gradient,
               std::uintptr_t weight_gradient, std::uintptr_t bias_gradient) {
  Room room;
  MaskedDepthwise p = describe(shape, neighbours, element, weight_element, true, true, room);
  p.out = pointer<void>(gradient), p.x = pointer<const void>(x), p.weight = pointer<const void>(weight);
  p.x_gradient = pointer<void>(x_gradient), p.weight_gradient = pointer<void>(weight_gradient);
  p.bias_gradient = pointer<void>(bias_gradient);
  FASTMIM_DISPATCH(masked_depthwise_gradients, p);
}

}  // namespace

void bind_masked_depthwise(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("masked_depthwise", &forward, py::arg("shape"), py::arg("neighbours"), py::arg("element"),
        py::arg("weight_element"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), NoGil());
  m.def("masked_depthwise_input_gradient", &input_gradient, py::arg("shape"), py::arg("neighbours"),
        py::arg("element"), py::arg("weight_element"), py::arg("gradient"), py::arg("weight"), py::arg("x_gradient"),
        NoGil());
  m.def("masked_depthwise_weight_gradient", &weight_gradient, py::arg("shape"), py::arg("neighbours"),
        py::arg("element"), py::arg("weight_element"), py::arg("gradient"), py::arg("x"), py::arg("weight_gradient"),
        py::arg("bias_gradient"), NoGil());
  m.def("masked_depthwise_gradients", &gradients, py::arg("shape"), py::arg("neighbours"), py::arg("element"),
        py::arg("weight_element"), py::arg("gradient"), py::arg("x"), py::arg("weight"), py::arg("x_gradient"),
        py::arg("weight_gradient"), py::arg("bias_gradient"), NoGil());
}

}  // namespace fastmim
