#include "cpu/packed_attention.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <tuple>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/bind.h"

namespace fastmim {

// (address, (batch, token, head)): strides in elements, as Heads has them.
using HeadsArgument = std::tuple<std::uintptr_t, std::array<int64_t, 3>>;
// B, Nq, Nk, H, D
using ShapeArgument = std::array<int64_t, 5>;
// (address, element, (batch, head, query)), zeros where there is no bias
using BiasArgument = std::tuple<std::uintptr_t, int, std::array<int64_t, 3>>;
// q, k, v and their element, scale, bias, address of key_log_count, address of key_mask
using Inputs = std::tuple<HeadsArgument, HeadsArgument, HeadsArgument, int, double, BiasArgument, std::uintptr_t,
                          std::uintptr_t>;

static Heads heads(const HeadsArgument& from) {
  const auto& s = std::get<1>(from);
  return {pointer<void>(std::get<0>(from)), s[0], s[1], s[2]};
}

static PackedAttention problem(const ShapeArgument& shape, const Inputs& inputs) {
  PackedAttention p{};
  p.batch = shape[0], p.queries = shape[1], p.keys = shape[2], p.heads = shape[3], p.width = shape[4];
  p.q = heads(std::get<0>(inputs)), p.k = heads(std::get<1>(inputs)), p.v = heads(std::get<2>(inputs));
  p.element = std::get<3>(inputs), p.scale = static_cast<float>(std::get<4>(inputs));
  const BiasArgument& bias = std::get<5>(inputs);
  const auto& strides = std::get<2>(bias);
  p.bias = pointer<const void>(std::get<0>(bias)), p.bias_element = std::get<1>(bias);
  p.bias_batch = strides[0], p.bias_head = strides[1], p.bias_row = strides[2];
  p.key_log_count = pointer<const float>(std::get<6>(inputs)), p.key_mask = pointer<const bool>(std::get<7>(inputs));
  return p;
}

static std::unique_ptr<float[]> make_scratch(const PackedAttention& p) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  return std::unique_ptr<float[]>(new float[threads * attention_scratch(p)]);
}

static void forward(const ShapeArgument& shape, const Inputs& inputs, const HeadsArgument& out, std::uintptr_t lse) {
  PackedAttention p = problem(shape, inputs);
  p.out = heads(out), p.lse = pointer<float>(lse);
  const auto scratch = make_scratch(p);
  p.scratch = scratch.get();
  FASTMIM_DISPATCH(packed_attention, p);
}

static void backward(const ShapeArgument& shape, const Inputs& inputs, const HeadsArgument& out_gradient,
                     const HeadsArgument& q_gradient, const HeadsArgument& k_gradient, const HeadsArgument& v_gradient,
                     std::uintptr_t bias_gradient) {
  PackedAttention p = problem(shape, inputs);
  p.out_gradient = heads(out_gradient), p.q_gradient = heads(q_gradient);
  p.k_gradient = heads(k_gradient), p.v_gradient = heads(v_gradient), p.bias_gradient = pointer<void>(bias_gradient);
  const auto scratch = make_scratch(p);
  p.scratch = scratch.get();
  std::unique_ptr<float[]> partial;
  if (p.bias_gradient != nullptr && p.bias_batch == 0) {
    partial.reset(new float[attention_parts(p) * p.heads * p.keys * attention_padded(p.queries)]);
    p.bias_partial = partial.get();
  }
  FASTMIM_DISPATCH(packed_attention_backward, p);
}

void bind_packed_attention(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("packed_attention", &forward, py::arg("shape"), py::arg("inputs"), py::arg("out"), py::arg("lse"), NoGil());
  m.def("packed_attention_backward", &backward, py::arg("shape"), py::arg("inputs"), py::arg("out_gradient"),
        py::arg("q_gradient"), py::arg("k_gradient"), py::arg("v_gradient"), py::arg("bias_gradient"), NoGil());
}

}  // namespace fastmim
