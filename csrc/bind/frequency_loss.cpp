#include "cpu/frequency_loss.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <tuple>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// (address, element, (batch, channel, row, column)), as Images has them.
using ImagesArgument = std::tuple<std::uintptr_t, int, std::array<int64_t, 4>>;
// B, C, H, W, P, Q
using ShapeArgument = std::array<int64_t, 6>;

static Images images(const ImagesArgument& from) {
  const auto& s = std::get<2>(from);
  return {pointer<const void>(std::get<0>(from)), std::get<1>(from), s[0], s[1], s[2], s[3]};
}

static Cells cells(const ShapeArgument& s, std::uintptr_t mask) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], pointer<const bool>(mask)};
}

static std::unique_ptr<float[]> two_rows_a_thread(int64_t width) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  return std::unique_ptr<float[]>(new float[threads * 2 * ((width + 15) / 16 * 16)]);
}

static void error(const ShapeArgument& shape, const ImagesArgument& prediction, const ImagesArgument& image,
                  std::uintptr_t mask, std::uintptr_t means, float factor, float mean_weight, bool average,
                  std::uintptr_t out) {
  const auto scratch = two_rows_a_thread(shape[3]);
  const FrequencyError p{cells(shape, mask), images(prediction),     images(image),       pointer<const float>(means),
                         factor,             mean_weight,            average,             pointer<float>(out),
                         scratch.get()};
  FASTMIM_DISPATCH(frequency_error, p);
}

static void spectrum(int64_t count, int64_t rows, int64_t width, int kind, float exponent, bool normalise, double scale,
                     std::uintptr_t from, std::uintptr_t gradient, std::uintptr_t factor, std::uintptr_t value) {
  const int64_t columns = width / 2 + 1;
  std::unique_ptr<float[]> counts(new float[(columns + 15) / 16 * 16]());
  for (int64_t j = 0; j < columns; ++j) counts[j] = j == 0 || 2 * j == width ? 1.0f : 2.0f;
  std::unique_ptr<float[]> partial(new float[count * rows * 2]);
  const FrequencySpectrum p{count, rows, columns, static_cast<Weight>(kind), exponent, normalise, scale, counts.get(),
                            pointer<const float>(from), pointer<float>(gradient), pointer<float>(factor),
                            pointer<double>(value), partial.get()};
  FASTMIM_DISPATCH(frequency_spectrum, p);
}

static void gradient(const ShapeArgument& shape, std::uintptr_t mask, std::uintptr_t picture, bool average,
                     std::uintptr_t factor, std::uintptr_t grad_loss, float share, float visible_weight, bool stream,
                     std::uintptr_t out, int element) {
  const auto scratch = two_rows_a_thread(shape[3]);
  const FrequencyGradient p{cells(shape, mask), pointer<const float>(picture), average, pointer<const float>(factor),
                            *pointer<const float>(grad_loss) * share, visible_weight, stream, pointer<void>(out),
                            element, scratch.get()};
  FASTMIM_DISPATCH(frequency_gradient, p);
}

void bind_frequency_loss(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("frequency_error", &error, py::arg("shape"), py::arg("prediction"), py::arg("image"), py::arg("mask"),
        py::arg("means"), py::arg("factor"), py::arg("mean_weight"), py::arg("average"), py::arg("error"), NoGil());
  m.def("frequency_spectrum", &spectrum, py::arg("images"), py::arg("rows"), py::arg("width"), py::arg("kind"),
        py::arg("exponent"), py::arg("normalise"), py::arg("scale"), py::arg("spectrum"), py::arg("gradient"),
        py::arg("factor"), py::arg("value"), NoGil());
  m.def("frequency_gradient", &gradient, py::arg("shape"), py::arg("mask"), py::arg("picture"), py::arg("average"),
        py::arg("factor"), py::arg("grad_loss"), py::arg("share"), py::arg("visible_weight"), py::arg("stream"),
        py::arg("gradient"), py::arg("element"), NoGil());
}

}  // namespace fastmim
