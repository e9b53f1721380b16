#include "cpu/decoder_input.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// B, P, K, N, E, G
using DecoderShape = std::array<int64_t, 6>;
// (address, element)
using RowsArgument = std::tuple<std::uintptr_t, int>;
// (address, element, (batch, token) strides)
using VisibleArgument = std::tuple<std::uintptr_t, int, std::array<int64_t, 2>>;
// mask token, whether each place has its own, positions, norm weight, norm bias, eps; 0 is none
using ParametersArgument =
    std::tuple<std::uintptr_t, bool, std::uintptr_t, std::uintptr_t, std::uintptr_t, double>;

static int64_t threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

static DecoderInput describe(const DecoderShape& shape, std::uintptr_t ids_restore, const VisibleArgument& visible,
                             const ParametersArgument& parameters) {
  DecoderInput p{};
  p.batch = shape[0], p.prefix = shape[1], p.kept = shape[2], p.patches = shape[3], p.width = shape[4], p.group = shape[5];
  p.ids_restore = pointer<const int64_t>(ids_restore);
  p.visible = pointer<const void>(std::get<0>(visible)), p.visible_element = std::get<1>(visible);
  p.visible_batch = std::get<2>(visible)[0], p.visible_token = std::get<2>(visible)[1];
  p.mask_token = pointer<const float>(std::get<0>(parameters)), p.own_tokens = std::get<1>(parameters);
  p.positions = pointer<const float>(std::get<2>(parameters));
  p.norm_weight = pointer<const float>(std::get<3>(parameters));
  p.norm_bias = pointer<const float>(std::get<4>(parameters));
  p.eps = static_cast<float>(std::get<5>(parameters));
  return p;
}

// Two places of a group's images that show the same token would both write its gradient.
static void check_distinct(const DecoderInput& p) {
  std::vector<int64_t> last(static_cast<size_t>(p.kept), -1);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t l = 0; l < p.patches; ++l) {
      const int64_t id = p.ids_restore[b * p.patches + l];
      if (id < 0 || id >= p.kept) continue;
      if (last[static_cast<size_t>(id)] == b / p.group)
        throw std::invalid_argument("decoder_input: ids_restore of image " + std::to_string(b) + " holds " +
                                    std::to_string(id) + " twice" + (p.group > 1 ? " in its group" : "") + "; it must be a permutation");
      last[static_cast<size_t>(id)] = b / p.group;
    }
}

static std::unique_ptr<float[]> rows(int64_t count, int64_t width) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(count * ((width + 15) / 16 * 16))]);
}

static void forward(const DecoderShape& shape, std::uintptr_t ids_restore, const VisibleArgument& visible,
                    const ParametersArgument& parameters, const RowsArgument& sequence, const RowsArgument& normed) {
  DecoderInput p = describe(shape, ids_restore, visible, parameters);
  check_distinct(p);
  p.sequence = pointer<void>(std::get<0>(sequence)), p.sequence_element = std::get<1>(sequence);
  p.normed = pointer<void>(std::get<0>(normed)), p.normed_element = std::get<1>(normed);
  const auto scratch = rows(threads() * kDecoderInputScratchRows, p.width), table = rows(2 * p.patches, p.width);
  p.scratch = scratch.get(), p.table = reinterpret_cast<char*>(table.get());
  FASTMIM_DISPATCH(decoder_input, p);
}

static void backward(const DecoderShape& shape, std::uintptr_t ids_restore, const VisibleArgument& visible,
                     const ParametersArgument& parameters, const RowsArgument& grad_sequence,
                     const RowsArgument& grad_normed, std::uintptr_t grad_visible, std::uintptr_t grad_mask_token,
                     std::uintptr_t grad_positions, std::uintptr_t grad_norm_weight, std::uintptr_t grad_norm_bias) {
  DecoderInput p = describe(shape, ids_restore, visible, parameters);
  p.grad_sequence = pointer<const void>(std::get<0>(grad_sequence));
  p.grad_sequence_element = std::get<1>(grad_sequence);
  p.grad_normed = pointer<const void>(std::get<0>(grad_normed)), p.grad_normed_element = std::get<1>(grad_normed);
  p.grad_visible = pointer<void>(grad_visible), p.grad_mask_token = pointer<float>(grad_mask_token);
  p.grad_positions = pointer<float>(grad_positions), p.grad_norm_weight = pointer<float>(grad_norm_weight);
  p.grad_norm_bias = pointer<float>(grad_norm_bias);
  const int64_t tasks = (p.prefix + p.patches + kPositionsOfTask - 1) / kPositionsOfTask;
  const auto scratch = rows(threads() * kDecoderInputScratchRows, p.width), partial = rows(3 * tasks, p.width);
  p.scratch = scratch.get(), p.partial = partial.get();
  FASTMIM_DISPATCH(decoder_input_backward, p);
}

void bind_decoder_input(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("decoder_input", &forward, py::arg("shape"), py::arg("ids_restore"), py::arg("visible"),
        py::arg("parameters"), py::arg("sequence"), py::arg("normed"), NoGil());
  m.def("decoder_input_backward", &backward, py::arg("shape"), py::arg("ids_restore"), py::arg("visible"),
        py::arg("parameters"), py::arg("grad_sequence"), py::arg("grad_normed"), py::arg("grad_visible"),
        py::arg("grad_mask_token"), py::arg("grad_positions"), py::arg("grad_norm_weight"),
        py::arg("grad_norm_bias"), NoGil());
}

}  // namespace fastmim
