#include "cpu/visible_patch_embed.h"

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

// (address, element)
using RowsArgument = std::tuple<std::uintptr_t, int>;

static std::unique_ptr<float[]> two_rows_a_thread(int64_t width) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(threads * 2 * ((width + 15) / 16 * 16))]);
}

static void check_ids(const int64_t* ids, int64_t count, int64_t patches) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= patches)
      throw std::invalid_argument("visible_patch_embed: ids_keep holds " + std::to_string(ids[i]) +
                                  ", but an image has patches 0 to " + std::to_string(patches - 1));
}

// shape: B * K, E, N
static void add(const std::array<int64_t, 3>& shape, const RowsArgument& tokens, std::uintptr_t positions,
                std::uintptr_t ids_keep, const RowsArgument& out) {
  AddPositions p{};
  p.count = shape[0], p.width = shape[1], p.positions_count = shape[2];
  p.tokens = pointer<const void>(std::get<0>(tokens)), p.tokens_element = std::get<1>(tokens);
  p.positions = pointer<const float>(positions), p.ids_keep = pointer<const int64_t>(ids_keep);
  p.out = pointer<void>(std::get<0>(out)), p.out_element = std::get<1>(out);
  check_ids(p.ids_keep, p.count, p.positions_count);
  const auto scratch = two_rows_a_thread(p.width);
  p.scratch = scratch.get();
  FASTMIM_DISPATCH(add_positions, p);
}

static void sum(const std::array<int64_t, 3>& shape, const RowsArgument& gradient, std::uintptr_t ids_keep,
                std::uintptr_t grad_positions) {
  AddPositions p{};
  p.count = shape[0], p.width = shape[1], p.positions_count = shape[2];
  p.gradient = pointer<const void>(std::get<0>(gradient)), p.gradient_element = std::get<1>(gradient);
  p.ids_keep = pointer<const int64_t>(ids_keep), p.grad_positions = pointer<float>(grad_positions);
  check_ids(p.ids_keep, p.count, p.positions_count);
  std::vector<int64_t> offsets(static_cast<size_t>(p.positions_count) + 1, 0), order(static_cast<size_t>(p.count));
  for (int64_t i = 0; i < p.count; ++i) ++offsets[static_cast<size_t>(p.ids_keep[i]) + 1];
  for (size_t n = 1; n < offsets.size(); ++n) offsets[n] += offsets[n - 1];
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < p.count; ++i) order[static_cast<size_t>(next[static_cast<size_t>(p.ids_keep[i])]++)] = i;
  p.order = order.data(), p.offsets = offsets.data();
  const auto scratch = two_rows_a_thread(p.width);
  p.scratch = scratch.get();
  FASTMIM_DISPATCH(sum_by_position, p);
}

void bind_visible_patch_embed(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("add_positions", &add, py::arg("shape"), py::arg("tokens"), py::arg("positions"), py::arg("ids_keep"),
        py::arg("out"), NoGil());
  m.def("sum_by_position", &sum, py::arg("shape"), py::arg("gradient"), py::arg("ids_keep"),
        py::arg("grad_positions"), NoGil());
}

}  // namespace fastmim
