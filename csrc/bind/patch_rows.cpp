#include "cpu/patch_rows.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bind/bind.h"

namespace fastmim {

// Indices come from the user; one beyond the images would read other memory.
static void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t limit) {
  if (ids == nullptr) return;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= limit)
      throw std::out_of_range(std::string("patch_rows: ") + name + " holds " + std::to_string(ids[i]) +
                              ", outside of 0 .. " + std::to_string(limit - 1));
}

static void run(const std::array<int64_t, 4>& shape, const std::array<int64_t, 2>& patch, std::uintptr_t images,
                int element, const std::array<int64_t, 4>& strides, int64_t sequences, int64_t length,
                std::uintptr_t image_ids, std::uintptr_t patch_ids, std::uintptr_t scale_shift, std::uintptr_t rows,
                int rows_element) {
  PatchRows p{};
  p.images = pointer<const void>(images), p.element = element;
  p.image = strides[0], p.channel = strides[1], p.row = strides[2], p.column = strides[3];
  p.channels = shape[1], p.patch_rows = patch[0], p.patch_columns = patch[1], p.grid_columns = shape[3] / patch[1];
  p.sequences = sequences, p.length = length;
  p.image_ids = pointer<const int64_t>(image_ids), p.patch_ids = pointer<const int64_t>(patch_ids);
  p.scale_shift = pointer<const float>(scale_shift), p.rows = pointer<void>(rows), p.rows_element = rows_element;
  check_ids("image_ids", p.image_ids, sequences * length, shape[0]);
  check_ids("patch_ids", p.patch_ids, sequences * length, shape[2] / patch[0] * p.grid_columns);
  FASTMIM_DISPATCH(patch_rows, p);
}

void bind_patch_rows(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("patch_rows", &run, py::arg("shape"), py::arg("patch"), py::arg("images"), py::arg("element"),
        py::arg("strides"), py::arg("sequences"), py::arg("length"), py::arg("image_ids"), py::arg("patch_ids"),
        py::arg("scale_shift"), py::arg("rows"), py::arg("rows_element"), NoGil());
}

}  // namespace fastmim
