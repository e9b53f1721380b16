#include <string>

#include "bind/bind.h"
#include "isa.h"
#if defined(FASTMIM_CUDA_BUILD)
#include "cuda/device.h"
#endif

namespace py = pybind11;

// What `python -m fastmim.info` prints of this build and this machine.
static py::dict build_info() {
  py::dict info;
#if defined(FASTMIM_X86)
  info["compiled_for"] = "portable avx2 avx512";
#else
  info["compiled_for"] = "portable";
#endif
  info["isa"] = fastmim::isa_name(fastmim::current_isa());
#if defined(FASTMIM_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["compiler"] = __VERSION__;
  info["cuda"] = FASTMIM_CUDA_STATE;
#if defined(FASTMIM_CUDA_BUILD)
  const fastmim::CudaDevices devices = fastmim::cuda_devices();
  info["cuda_devices"] = devices.count;
  info["cuda_error"] = devices.error;
#else
  info["cuda_devices"] = 0;
  info["cuda_error"] = "";
#endif
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastmim's compiled kernels over raw pointers; call them through fastmim.ops";
  m.def("build_info", &build_info);
  fastmim::bind_decoder_input(m);
  fastmim::bind_frequency_loss(m);
  fastmim::bind_homologous_contrastive(m);
  fastmim::bind_masked_patch_loss(m);
  fastmim::bind_masked_dense(m);
  fastmim::bind_masked_depthwise(m);
#if defined(FASTMIM_CUDA_BUILD)
  fastmim::bind_masked_depthwise_cuda(m);
#endif
  fastmim::bind_mixing_map(m);
  fastmim::bind_packed_attention(m);
  fastmim::bind_masked_pool(m);
  fastmim::bind_pages(m);
  fastmim::bind_patch_rows(m);
  fastmim::bind_random_mask(m);
  fastmim::bind_rows_batch_norm(m);
  fastmim::bind_tile_index(m);
  fastmim::bind_tiles(m);
  fastmim::bind_topk_attention(m);
  fastmim::bind_visible_patch_embed(m);
}
