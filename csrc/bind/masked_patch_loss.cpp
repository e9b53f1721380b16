#include "cpu/masked_patch_loss.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <tuple>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// (address, element, (batch, grid_row, grid_column, row, column, channel)), as Patches has them.
using PatchesArgument = std::tuple<std::uintptr_t, int, std::array<int64_t, 6>>;
// B, H/P, W/Q, P, Q, C
using ShapeArgument = std::array<int64_t, 6>;

static Patches patches(const PatchesArgument& from) {
  const auto& s = std::get<2>(from);
  return {pointer<void>(std::get<0>(from)), std::get<1>(from), s[0], s[1], s[2], s[3], s[4], s[5]};
}

static std::unique_ptr<float[]> make_scratch(const ShapeArgument& shape) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  return std::unique_ptr<float[]>(new float[threads * 3 * ((shape[3] * shape[4] * shape[5] + 15) / 16 * 16)]);
}

static void forward(const ShapeArgument& shape, const PatchesArgument& prediction, const PatchesArgument& image,
                    std::uintptr_t mask, bool norm_pix, int loss, std::uintptr_t statistics, std::uintptr_t partial,
                    std::uintptr_t mean_loss, std::uintptr_t scale) {
  const auto scratch = make_scratch(shape);
  MaskedPatchLoss p{};
  p.batch = shape[0], p.grid_rows = shape[1], p.grid_columns = shape[2];
  p.patch_rows = shape[3], p.patch_columns = shape[4], p.channels = shape[5];
  p.prediction = patches(prediction), p.image = patches(image), p.mask = pointer<const bool>(mask);
  p.norm_pix = norm_pix, p.loss = static_cast<PixelLoss>(loss), p.statistics = pointer<float>(statistics);
  p.partial = pointer<float>(partial), p.mean_loss = pointer<float>(mean_loss), p.scale = pointer<float>(scale);
  p.scratch = scratch.get();
  FASTMIM_DISPATCH(masked_patch_loss, p);
}

static void backward(const ShapeArgument& shape, const PatchesArgument& prediction, const PatchesArgument& image,
                     std::uintptr_t mask, bool norm_pix, int loss, std::uintptr_t statistics, std::uintptr_t scale,
                     std::uintptr_t grad_loss, const PatchesArgument& gradient) {
  const auto scratch = make_scratch(shape);
  MaskedPatchLoss p{};
  p.batch = shape[0], p.grid_rows = shape[1], p.grid_columns = shape[2];
  p.patch_rows = shape[3], p.patch_columns = shape[4], p.channels = shape[5];
  p.prediction = patches(prediction), p.image = patches(image), p.mask = pointer<const bool>(mask);
  p.norm_pix = norm_pix, p.loss = static_cast<PixelLoss>(loss), p.statistics = pointer<float>(statistics);
  p.scale = pointer<float>(scale), p.grad_loss = pointer<const float>(grad_loss), p.gradient = patches(gradient);
  p.scratch = scratch.get();
  FASTMIM_DISPATCH(masked_patch_loss_backward, p);
}

void bind_masked_patch_loss(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("masked_patch_loss", &forward, py::arg("shape"), py::arg("prediction"), py::arg("image"), py::arg("mask"),
        py::arg("norm_pix"), py::arg("loss"), py::arg("statistics"), py::arg("partial"), py::arg("mean_loss"),
        py::arg("scale"), NoGil());
  m.def("masked_patch_loss_backward", &backward, py::arg("shape"), py::arg("prediction"), py::arg("image"),
        py::arg("mask"), py::arg("norm_pix"), py::arg("loss"), py::arg("statistics"), py::arg("scale"),
        py::arg("grad_loss"), py::arg("gradient"), NoGil());
}

}  // namespace fastmim
