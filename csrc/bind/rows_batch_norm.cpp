#include "cpu/rows_batch_norm.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// M, C, rows of an image
using NormShape = std::array<int64_t, 3>;
// weight, bias, factor, mean, variance; 0 where there is none
using NormChannels = std::array<std::uintptr_t, 5>;

namespace {

struct NormRoom {
  std::unique_ptr<float[]> partial, scratch;
};

RowsBatchNorm describe(const NormShape& shape, int element, double eps, bool relu, const NormChannels& channels,
                       std::uintptr_t x, NormRoom& room) {
  RowsBatchNorm p{};
  p.rows = shape[0], p.channels = shape[1], p.rows_per_image = shape[2];
  p.element = element, p.eps = static_cast<float>(eps), p.relu = relu;
  p.weight = pointer<const float>(channels[0]), p.bias = pointer<const float>(channels[1]);
  p.factor = pointer<const float>(channels[2]);
  p.mean = pointer<float>(channels[3]), p.variance = pointer<float>(channels[4]);
  p.x = pointer<const void>(x);
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  room.partial.reset(new float[2 * norm_blocks(p) * p.channels]);
  room.scratch.reset(new float[4 * threads * p.channels]);
  p.partial = room.partial.get(), p.scratch = room.scratch.get();
  return p;
}

void moments(const NormShape& shape, int element, double eps, bool relu, const NormChannels& channels,
             std::uintptr_t x) {
  NormRoom room;
  const RowsBatchNorm p = describe(shape, element, eps, relu, channels, x, room);
  FASTMIM_DISPATCH(rows_moments, p);
}

void batch_norm(const NormShape& shape, int element, double eps, bool relu, const NormChannels& channels,
                std::uintptr_t x, std::uintptr_t residual, std::uintptr_t out) {
  NormRoom room;
  RowsBatchNorm p = describe(shape, element, eps, relu, channels, x, room);
  p.residual = pointer<const void>(residual), p.out = pointer<void>(out);
  FASTMIM_DISPATCH(rows_batch_norm, p);
}

void gradient_sums(const NormShape& shape, int element, double eps, bool relu, const NormChannels& channels,
                   std::uintptr_t x, std::uintptr_t gradient, std::uintptr_t out, std::uintptr_t masked,
                   std::uintptr_t sums) {
  NormRoom room;
  RowsBatchNorm p = describe(shape, element, eps, relu, channels, x, room);
  p.gradient = pointer<const void>(gradient), p.out = pointer<void>(out), p.masked = pointer<void>(masked);
  p.sums = pointer<float>(sums);
  FASTMIM_DISPATCH(rows_gradient_sums, p);
}

void input_gradient(const NormShape& shape, int element, double eps, bool relu, const NormChannels& channels,
                    std::uintptr_t x, std::uintptr_t gradient, std::uintptr_t masked, std::uintptr_t means,
                    std::uintptr_t x_gradient) {
  NormRoom room;
  RowsBatchNorm p = describe(shape, element, eps, relu, channels, x, room);
  p.gradient = pointer<const void>(gradient), p.masked = pointer<void>(masked);
  p.means = pointer<const float>(means), p.x_gradient = pointer<void>(x_gradient);
  FASTMIM_DISPATCH(rows_input_gradient, p);
}

}  // namespace

void bind_rows_batch_norm(pybind11::module_& m) {
  namespace py = pybind11;
  const auto define = [&](const char* name, auto function, auto... more) {
    m.def(name, function, py::arg("shape"), py::arg("element"), py::arg("eps"), py::arg("relu"), py::arg("channels"),
          py::arg("x"), more..., NoGil());
  };
  define("rows_moments", &moments);
  define("rows_batch_norm", &batch_norm, py::arg("residual"), py::arg("out"));
  define("rows_gradient_sums", &gradient_sums, py::arg("gradient"), py::arg("out"), py::arg("masked"),
         py::arg("sums"));
  define("rows_input_gradient", &input_gradient, py::arg("gradient"), py::arg("masked"), py::arg("means"),
         py::arg("x_gradient"));
}

}  // namespace fastmim
