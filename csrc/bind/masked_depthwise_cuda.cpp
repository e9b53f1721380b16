// The CUDA kernels of the depthwise convolution; room and stream come from Python, which knows the allocator.
#if defined(FASTMIM_CUDA_BUILD)
#include "cuda/masked_depthwise.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "bind/bind.h"

namespace fastmim {

// B, K, t, C, k, s
using DepthwiseShape = std::array<int64_t, 6>;

namespace {

cuda::MaskedDepthwise describe(const DepthwiseShape& shape, std::uintptr_t neighbours = 0, int element = 0,
                               int weight_element = 0, std::uintptr_t room = 0, std::uintptr_t stream = 0) {
  cuda::MaskedDepthwise p{};
  p.batch = shape[0], p.count = shape[1], p.side = shape[2], p.channels = shape[3];
  p.kernel = shape[4], p.stride = shape[5];
  p.neighbours = pointer<const int32_t>(neighbours), p.element = element, p.weight_element = weight_element;
  p.room = pointer<float>(room), p.stream = pointer<void>(stream);
  return p;
}

void check(const char* wrong) {
  if (wrong != nullptr) throw std::runtime_error(std::string("masked_depthwise on CUDA: ") + wrong);
}

int64_t room(const DepthwiseShape& shape, bool weight_gradient) {
  return cuda::depthwise_room(describe(shape), weight_gradient);
}

void forward(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element, std::uintptr_t x,
             std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out, std::uintptr_t room,
             std::uintptr_t stream) {
  cuda::MaskedDepthwise p = describe(shape, neighbours, element, weight_element, room, stream);
  p.x = pointer<const void>(x), p.weight = pointer<const void>(weight), p.bias = pointer<const void>(bias);
  p.out = pointer<void>(out);
  check(cuda::masked_depthwise(p));
}

void input_gradient(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                    std::uintptr_t gradient, std::uintptr_t weight, std::uintptr_t x_gradient, std::uintptr_t room,
                    std::uintptr_t stream) {
  cuda::MaskedDepthwise p = describe(shape, neighbours, element, weight_element, room, stream);
  p.out = pointer<void>(gradient), p.weight = pointer<const void>(weight), p.x_gradient = pointer<void>(x_gradient);
  check(cuda::masked_depthwise_input_gradient(p));
}

void weight_gradient(const DepthwiseShape& shape, std::uintptr_t neighbours, int element, int weight_element,
                     std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t weight_gradient,
                     std::uintptr_t bias_gradient, std::uintptr_t room, std::uintptr_t stream) {
  cuda::MaskedDepthwise p = describe(shape, neighbours, element, weight_element, room, stream);
  p.out = pointer<void>(gradient), p.x = pointer<const void>(x);
  p.weight_gradient = pointer<void>(weight_gradient), p.bias_gradient = pointer<void>(bias_gradient);
  check(cuda::masked_depthwise_weight_gradient(p));
}

}  // namespace

void bind_masked_depthwise_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("masked_depthwise_cuda_room", &room, py::arg("shape"), py::arg("weight_gradient"));
  m.def("masked_depthwise_cuda", &forward, py::arg("shape"), py::arg("neighbours"), py::arg("element"),
        py::arg("weight_element"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("room"),
        py::arg("stream"), NoGil());
  m.def("masked_depthwise_input_gradient_cuda", &input_gradient, py::arg("shape"), py::arg("neighbours"),
        py::arg("element"), py::arg("weight_element"), py::arg("gradient"), py::arg("weight"), py::arg("x_gradient"),
        py::arg("room"), py::arg("stream"), NoGil());
  m.def("masked_depthwise_weight_gradient_cuda", &weight_gradient, py::arg("shape"), py::arg("neighbours"),
        py::arg("element"), py::arg("weight_element"), py::arg("gradient"), py::arg("x"), py::arg("weight_gradient"),
        py::arg("bias_gradient"), py::arg("room"), py::arg("stream"), NoGil());
}

}  // namespace fastmim
#endif
