#include "cpu/homologous_contrastive.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <tuple>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// (address, element, (sequence, token, value)), as TokenRows has them.
using TokensArgument = std::tuple<std::uintptr_t, int, std::array<int64_t, 3>>;

static TokenRows token_rows(const TokensArgument& from) {
  const auto& s = std::get<2>(from);
  return {pointer<void>(std::get<0>(from)), std::get<1>(from), s[0], s[1], s[2]};
}

static std::unique_ptr<float[]> make_scratch(int64_t values) {
#if defined(_OPENMP)
  values *= omp_get_max_threads();
#endif
  return std::unique_ptr<float[]>(new float[values]);
}

static void normalise(const std::array<int64_t, 3>& shape, const TokensArgument& tokens, std::uintptr_t unit,
                      std::uintptr_t inverse_norm) {
  const auto scratch = make_scratch(shape[2]);
  const ContrastiveNormalise p{shape[0],      shape[1], shape[2], token_rows(tokens), pointer<float>(unit),
                               pointer<float>(inverse_norm), nullptr, nullptr, scratch.get()};
  FASTMIM_DISPATCH(contrastive_normalise, p);
}

static void normalise_backward(const std::array<int64_t, 3>& shape, std::uintptr_t grad_loss, std::uintptr_t grad_unit,
                               std::uintptr_t unit, std::uintptr_t inverse_norm, const TokensArgument& gradient) {
  const auto scratch = make_scratch(shape[2]);
  const ContrastiveNormalise p{shape[0],
                               shape[1],
                               shape[2],
                               token_rows(gradient),
                               pointer<float>(unit),
                               pointer<float>(inverse_norm),
                               pointer<const float>(grad_unit),
                               pointer<const float>(grad_loss),
                               scratch.get()};
  FASTMIM_DISPATCH(contrastive_normalise_backward, p);
}

static void contrast(int64_t sequences, int64_t length, float temperature, std::uintptr_t slope,
                     std::uintptr_t segments, std::uintptr_t rows, std::uintptr_t loss) {
  const auto scratch = make_scratch(2 * ((length + 15) / 16 * 16));
  const HomologousContrastive p{sequences,
                                length,
                                temperature,
                                pointer<float>(slope),
                                pointer<const int64_t>(segments),
                                pointer<float>(rows),
                                pointer<float>(loss),
                                scratch.get()};
  FASTMIM_DISPATCH(homologous_contrastive, p);
}

void bind_homologous_contrastive(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("contrastive_normalise", &normalise, py::arg("shape"), py::arg("tokens"), py::arg("unit"),
        py::arg("inverse_norm"), NoGil());
  m.def("contrastive_normalise_backward", &normalise_backward, py::arg("shape"), py::arg("grad_loss"),
        py::arg("grad_unit"), py::arg("unit"), py::arg("inverse_norm"), py::arg("gradient"), NoGil());
  m.def("homologous_contrastive", &contrast, py::arg("sequences"), py::arg("length"), py::arg("temperature"),
        py::arg("slope"), py::arg("segments"), py::arg("rows"), py::arg("loss"), NoGil());
}

}  // namespace fastmim
