// One function per operation adds its kernels to the module. Python hands over tensor.data_ptr(), sizes and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastmim {

// tensor.data_ptr() as Python gives it.
template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_decoder_input(pybind11::module_& m);
void bind_frequency_loss(pybind11::module_& m);
void bind_homologous_contrastive(pybind11::module_& m);
void bind_masked_patch_loss(pybind11::module_& m);
void bind_masked_dense(pybind11::module_& m);
void bind_masked_depthwise(pybind11::module_& m);
void bind_masked_depthwise_cuda(pybind11::module_& m);  // only in builds with CUDA kernels
void bind_mixing_map(pybind11::module_& m);
void bind_packed_attention(pybind11::module_& m);
void bind_masked_pool(pybind11::module_& m);
void bind_pages(pybind11::module_& m);
void bind_patch_rows(pybind11::module_& m);
void bind_random_mask(pybind11::module_& m);
void bind_rows_batch_norm(pybind11::module_& m);
void bind_tile_index(pybind11::module_& m);
void bind_tiles(pybind11::module_& m);
void bind_topk_attention(pybind11::module_& m);
void bind_visible_patch_embed(pybind11::module_& m);

}  // namespace fastmim
