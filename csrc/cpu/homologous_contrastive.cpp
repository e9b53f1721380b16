// What stands around the two matrix products of the homologous contrastive loss: unit tokens before, rows of scores
// between (each sequence's matrix is read twice while it is in the cache), the projection off the unit sphere after.
#include "cpu/homologous_contrastive.h"

#include <math.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/element.h"
#include "cpu/lanes.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr float kNormEps = 1e-8f;
constexpr float kNever = -3e38f;  // a score that is not there; its exponential is zero

int64_t thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

float dot(const float* a, const float* b, int64_t count) {
  Lanes total[2] = {}, x, y;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    for (int half = 0; half < 2; ++half) {
      load(a + i + half * kLanes, x);
      load(b + i + half * kLanes, y);
      total[half] += x * y;
    }
  for (; i < count; i += kLanes) {
    const int64_t some = count - i < kLanes ? count - i : kLanes;
    load_some(a + i, some, x);
    load_some(b + i, some, y);
    total[0] += x * y;
  }
  total[0] += total[1];
  return sum(total[0]);
}

// e^(x - shift), 0 below e^-87; NaN stays.
FASTMIM_INLINE void shifted_exponential(const Lanes& x, const Lanes& shift, Lanes& out) {
  const Lanes least = Lanes{} - 87.0f, zero = {};
  const Lanes d = x - shift;
  Lanes bounded;
  select(d > least, d, least, bounded);
  exponential(bounded, out);
  select(d > least, out, zero, out);
  select(d != d, d, out, out);
}

template <typename T>
void write(const float* row, T* out, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(row[i], out + i * step);
}

// A row of scores with the places beyond the sequence and the position itself taken out.
FASTMIM_INLINE void load_scores(const float* row, int64_t from, int64_t length, int64_t self, float scale, Lanes& x) {
  const LanesInt place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Lanes never = Lanes{} + kNever;
  const int64_t some = length - from;
  if (some >= kLanes) load(row + from, x);
  else load_some(row + from, some, x);
  x *= scale;
  if (some < kLanes) select(place < (int32_t)some, x, never, x);
  if (self >= from && self < from + kLanes) select(place == (int32_t)(self - from), never, x, x);
}

}  // namespace

void contrastive_normalise(const ContrastiveNormalise& p) {
  const int64_t D = p.width;
#pragma omp parallel
  {
    float* room = p.scratch + thread_number() * D;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.sequences * p.length; ++index) {
      const int64_t at = index / p.length * p.tokens.sequence + index % p.length * p.tokens.token;
      const float* row = as_floats(p.tokens.data, p.tokens.element, at, p.tokens.value, D, room);
      const float norm = sqrtf(dot(row, row, D));
      const float inverse = 1.0f / (norm > kNormEps ? norm : norm <= kNormEps ? kNormEps : norm);  // NaN stays
      float* out = p.unit + index * D;
      for (int64_t d = 0; d < D; ++d) out[d] = row[d] * inverse;
      p.inverse_norm[index] = inverse;
    }
  }
}

void contrastive_normalise_backward(const ContrastiveNormalise& p) {
  const int64_t D = p.width;
  const float grad_loss = *p.grad_loss;
#pragma omp parallel
  {
    float* room = p.scratch + thread_number() * D;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < p.sequences * p.length; ++index) {
      const float* unit = p.unit + index * D;
      const float* grad = p.grad_unit + index * D;
      const float inverse = p.inverse_norm[index];
      // A token shorter than the bound was scaled by a constant: nothing to project off.
      const float along = inverse < 1.0f / kNormEps ? dot(unit, grad, D) : 0.0f;
      const float factor = inverse * grad_loss;
      const int64_t at = index / p.length * p.tokens.sequence + index % p.length * p.tokens.token;
      const bool direct = p.tokens.element == static_cast<int>(Element::f32) && p.tokens.value == 1;
      float* out = direct ? static_cast<float*>(p.tokens.data) + at : room;
      for (int64_t d = 0; d < D; ++d) out[d] = (grad[d] - along * unit[d]) * factor;
      if (direct) continue;
      switch (static_cast<Element>(p.tokens.element)) {
        case Element::f32: write(out, static_cast<float*>(p.tokens.data) + at, p.tokens.value, D); break;
        case Element::bf16: write(out, static_cast<Bf16*>(p.tokens.data) + at, p.tokens.value, D); break;
        case Element::f16: write(out, static_cast<F16*>(p.tokens.data) + at, p.tokens.value, D); break;
      }
    }
  }
}

void homologous_contrastive(const HomologousContrastive& p) {
  const int64_t L = p.length, room = (L + kLanes - 1) / kLanes * kLanes;
  const float scale = 1.0f / p.temperature;
  const float factor = static_cast<float>(1.0 / (static_cast<double>(p.sequences * L) * p.temperature));
#pragma omp parallel
  {
    int32_t* owner = reinterpret_cast<int32_t*>(p.scratch + thread_number() * 2 * room);
    float* lse = reinterpret_cast<float*>(owner) + room;
#pragma omp for schedule(static)
    for (int64_t s = 0; s < p.sequences; ++s) {
      float* pull = p.rows + (p.sequences + s) * L;
      for (int64_t l = 0; l < room; ++l) {
        owner[l] = l < L ? static_cast<int32_t>(p.segments[s * L + l]) : -1;
        lse[l] = 0.0f;
      }
      for (int64_t l = 0; l < L; ++l) {
        const float* row = p.slope + (s * L + l) * L;
        const LanesInt mine = LanesInt{} + owner[l];
        Lanes x, e, top = Lanes{} + kNever, attracted = {}, total = {};
        LanesInt partners = {};
        const Lanes zero = {};
        for (int64_t j = 0; j < L; j += kLanes) {
          load_scores(row, j, L, l, scale, x);
          LanesInt theirs;
          memcpy(&theirs, owner + j, sizeof(theirs));
          const LanesInt same = (theirs == mine) & (x > kNever);
          select(same, x, zero, e);
          attracted += e;
          partners -= same;
          select(x > top, x, top, top);
        }
        float tops[kLanes], highest = kNever;
        int32_t counts[kLanes], count = 0;
        store(tops, top);
        memcpy(counts, &partners, sizeof(counts));
        for (int i = 0; i < kLanes; ++i) {
          highest = tops[i] > highest ? tops[i] : highest;
          count += counts[i];
        }
        const Lanes shift = Lanes{} + highest;
        for (int64_t j = 0; j < L; j += kLanes) {
          load_scores(row, j, L, l, scale, x);
          shifted_exponential(x, shift, e);
          total += e;
        }
        const float denominator = highest + logf(sum(total));
        pull[l] = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
        lse[l] = count > 0 ? denominator : -kNever;  // no partner: no part of any gradient
        p.rows[s * L + l] = lse[l];
        p.rows[(2 * p.sequences + s) * L + l] = count > 0 ? denominator - sum(attracted) * pull[l] : 0.0f;
      }
      for (int64_t l = 0; l < L; ++l) {
        float* row = p.slope + (s * L + l) * L;
        const LanesInt mine = LanesInt{} + owner[l];
        const Lanes own = Lanes{} + lse[l], zero = {}, both = Lanes{} + 2.0f * pull[l];
        Lanes x, theirs_lse, a, b, same;
        for (int64_t j = 0; j < L; j += kLanes) {
          load_scores(row, j, L, l, scale, x);
          LanesInt theirs;
          memcpy(&theirs, owner + j, sizeof(theirs));
          load(lse + j, theirs_lse);
          shifted_exponential(x, own, a);
          shifted_exponential(x, theirs_lse, b);
          select((theirs == mine) & (x > kNever), both, zero, same);
          a = (a + b - same) * factor;
          if (L - j >= kLanes) store(row + j, a);
          else memcpy(row + j, &a, static_cast<size_t>(L - j) * sizeof(float));
        }
      }
    }
  }
  double total = 0.0;  // one order whatever the number of threads
  for (int64_t i = 0; i < p.sequences * L; ++i) total += p.rows[2 * p.sequences * L + i];
  *p.loss = p.sequences * L > 0 ? static_cast<float>(total / static_cast<double>(p.sequences * L)) : 0.0f;
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
