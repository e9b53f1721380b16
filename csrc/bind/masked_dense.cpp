#include "cpu/masked_dense.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// B, K, t, C, O, k, s
using DenseShape = std::array<int64_t, 7>;

namespace {

struct Room {
  std::unique_ptr<float[]> packed, partial, wide_x, wide_out;
  std::unique_ptr<int32_t[]> places;
  std::unique_ptr<char[]> scratch;
};

enum class Direction { forward, input_gradient, weight_gradient };

MaskedDense describe(const DenseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                     Direction direction, Room& room) {
  MaskedDense p{};
  p.batch = shape[0], p.count = shape[1], p.side = shape[2], p.in_channels = shape[3], p.out_channels = shape[4];
  p.kernel = shape[5], p.stride = shape[6];
  p.neighbours = pointer<const int32_t>(neighbours), p.element = element, p.weight_element = weight_element;
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  const bool sums = direction == Direction::weight_gradient, narrow = element != 0;
  const int64_t taps = p.kernel * p.kernel, rows = p.batch * p.count * p.side * p.side;
  const int64_t out_rows = rows / (p.stride * p.stride), padded = dense_padded(p.out_channels);
  if (current_isa() != Isa::portable) {  // whose blocks of columns are too narrow
    p.streamed = direction != Direction::weight_gradient &&
                 dense_streams(p, direction == Direction::forward ? out_rows : rows);
    p.whole = sums && dense_owns_weights(p);
  }
  if (direction == Direction::forward && !p.streamed) room.packed.reset(new float[taps * p.in_channels * padded]);
  if (direction == Direction::input_gradient && !p.streamed)
    room.packed.reset(new float[taps * p.out_channels * dense_padded(p.in_channels)]);
  if (sums && !p.whole) room.partial.reset(new float[dense_parts(p) * (taps * p.in_channels + 1) * padded]);
  if (narrow && direction != Direction::input_gradient) room.wide_x.reset(new float[rows * p.in_channels]);
  if ((narrow && direction == Direction::input_gradient) || (sums && (narrow || padded != p.out_channels)))
    room.wide_out.reset(new float[out_rows * padded]);
  room.places.reset(new int32_t[2 * p.side * p.kernel]);
  room.scratch.reset(new char[threads * dense_scratch(p)]);
  p.places = room.places.get(), p.packed = room.packed.get(), p.partial = room.partial.get();
  p.wide_x = room.wide_x.get(), p.wide_out = room.wide_out.get(), p.scratch = room.scratch.get();
  return p;
}

void forward(const DenseShape& shape, std::uintptr_t neighbours, int element, int weight_element, std::uintptr_t x,
             std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out) {
  Room room;
  MaskedDense p = describe(shape, neighbours, element, weight_element, Direction::forward, room);
  p.x = pointer<const void>(x), p.weight = pointer<const void>(weight), p.bias = pointer<const void>(bias);
  p.out = pointer<void>(out);
  FASTMIM_DISPATCH(masked_dense, p);
}

void input_gradient(const DenseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                    std::uintptr_t gradient, std::uintptr_t weight, std::uintptr_t x_gradient) {
  Room room;
  MaskedDense p = describe(shape, neighbours, element, weight_element, Direction::input_gradient, room);
  p.out = pointer<void>(gradient), p.weight = pointer<const void>(weight), p.x_gradient = pointer<void>(x_gradient);
  FASTMIM_DISPATCH(masked_dense_input_gradient, p);
}

void weight_gradient(const DenseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                     std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t weight_gradient,
                     std::uintptr_t bias_gradient) {
  Room room;
  MaskedDense p = describe(shape, neighbours, element, weight_element, Direction::weight_gradient, room);
  p.out = pointer<void>(gradient), p.x = pointer<const void>(x);
  p.weight_gradient = pointer<void>(weight_gradient), p.bias_gradient = pointer<void>(bias_gradient);
  FASTMIM_DISPATCH(masked_dense_weight_gradient, p);
}

}  // namespace

void bind_masked_dense(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("masked_dense", &forward, py::arg("shape"), py::arg("neighbours"), py::arg("element"),
        py::arg("weight_element"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), NoGil());
  m.def("masked_dense_input_gradient", &input_gradient, py::arg("shape"), py::arg("neighbours"),
        py::arg("element"), py::arg("weight_element"), py::arg("gradient"), py::arg("weight"), py::arg("x_gradient"),
        NoGil());
  m.def("masked_dense_weight_gradient", &weight_gradient, py::arg("shape"), py::arg("neighbours"),
        py::arg("element"), py::arg("weight_element"), py::arg("gradient"), py::arg("x"), py::arg("weight_gradient"),
        py::arg("bias_gradient"), NoGil());
}

}  // namespace fastmim
