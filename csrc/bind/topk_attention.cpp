#include "cpu/topk_attention.h"

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
// B, N, H, D, P, k
using ShapeArgument = std::array<int64_t, 6>;
// q, k, v, their element, scale
using Inputs = std::tuple<HeadsArgument, HeadsArgument, HeadsArgument, int, double>;

static Heads heads(const HeadsArgument& from) {
  const auto& s = std::get<1>(from);
  return {pointer<void>(std::get<0>(from)), s[0], s[1], s[2]};
}

static TopkAttention problem(const ShapeArgument& shape, const Inputs& inputs, std::uintptr_t chosen) {
  TopkAttention p{};
  p.heads.batch = shape[0], p.heads.queries = p.heads.keys = shape[1];
  p.heads.heads = shape[2], p.heads.width = shape[3], p.prefix = shape[4], p.kept = shape[5];
  p.heads.q = heads(std::get<0>(inputs)), p.heads.k = heads(std::get<1>(inputs));
  p.heads.v = heads(std::get<2>(inputs)), p.heads.element = std::get<3>(inputs);
  p.heads.scale = static_cast<float>(std::get<4>(inputs)), p.chosen = pointer<uint32_t>(chosen);
  return p;
}

static std::unique_ptr<float[]> make_scratch(const TopkAttention& p) {
#if defined(_OPENMP)
  const int64_t threads = omp_get_max_threads();
#else
  const int64_t threads = 1;
#endif
  return std::unique_ptr<float[]>(new float[threads * attention_scratch(p.heads)]);
}

static void forward(const ShapeArgument& shape, const Inputs& inputs, std::uintptr_t segments, const HeadsArgument& out,
                    std::uintptr_t lse, std::uintptr_t chosen, std::uintptr_t tally) {
  TopkAttention p = problem(shape, inputs, chosen);
  p.segments = pointer<const int32_t>(segments), p.tally = pointer<int32_t>(tally);
  p.heads.out = heads(out), p.heads.lse = pointer<float>(lse);
  const auto scratch = make_scratch(p);
  p.heads.scratch = scratch.get();
  FASTMIM_DISPATCH(topk_attention, p);
}

static void backward(const ShapeArgument& shape, const Inputs& inputs, std::uintptr_t chosen,
                     const HeadsArgument& out_gradient, const HeadsArgument& q_gradient,
                     const HeadsArgument& k_gradient, const HeadsArgument& v_gradient) {
  TopkAttention p = problem(shape, inputs, chosen);
  p.heads.out_gradient = heads(out_gradient), p.heads.q_gradient = heads(q_gradient);
  p.heads.k_gradient = heads(k_gradient), p.heads.v_gradient = heads(v_gradient);
  const auto scratch = make_scratch(p);
  p.heads.scratch = scratch.get();
  FASTMIM_DISPATCH(topk_attention_backward, p);
}

void bind_topk_attention(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("topk_attention", &forward, py::arg("shape"), py::arg("inputs"), py::arg("segments"), py::arg("out"),
        py::arg("lse"), py::arg("chosen"), py::arg("tally"), NoGil());
  m.def("topk_attention_backward", &backward, py::arg("shape"), py::arg("inputs"), py::arg("chosen"),
        py::arg("out_gradient"), py::arg("q_gradient"), py::arg("k_gradient"), py::arg("v_gradient"), NoGil());
}

}  // namespace fastmim
