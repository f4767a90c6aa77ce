// The score-sized arithmetic of attention on CPUs, in place; the mathematics stands in
// mamlfast/ops/attention_scores.py, in the same names.
//
// A row of scores is a few kilobytes: it comes from memory once, and all further loops over it run in the
// first-level cache. Every kernel first scales and masks the row, so that no later loop knows of masks.
#include "exp.h"
#include "rows.h"
#include "simd.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace mamlfast {
namespace {

// Which keys a row may see: the first `limit(row)` of them, and among these those that the mask allows.
template <class T>
struct Visible {
  int64_t R, C, causal_offset;
  T scale;
  const bool* allowed;  // at most one of the two masks is there
  const T* added;
  int64_t head_stride, row_stride, repeat;

  MAMLFAST_INLINE int64_t limit(int64_t row) const {
    return std::clamp(row % R + causal_offset + 1, int64_t{0}, C);
  }

  // s becomes S on the first `limit` keys, -inf where the mask hides one.
  MAMLFAST_INLINE void scale_and_mask(T* s, int64_t row, int64_t limit) const {
    const int64_t at = row / R / repeat * head_stride + row % R * row_stride;
    if (allowed) {
      const bool* a = allowed + at;
#pragma omp simd
      for (int64_t c = 0; c < limit; ++c) s[c] = a[c] ? scale * s[c] : -kInf<T>;
    } else if (added) {
      const T* a = added + at;
#pragma omp simd
      for (int64_t c = 0; c < limit; ++c) s[c] = a[c] == -kInf<T> ? a[c] : scale * s[c] + a[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < limit; ++c) s[c] = scale * s[c];
    }
  }
};

template <class T>
MAMLFAST_INLINE void zero(T* s, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t c = begin; c < end; ++c) s[c] = 0;
}

template <class T>
MAMLFAST_INLINE bool has_nan(const T* s, int64_t count) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t c = 0; c < count; ++c) found |= s[c] != s[c];
  return found != 0;
}

// s becomes exp(s - shift); returns the sum.
template <class Isa, class T>
MAMLFAST_INLINE T exponentials(T* s, T shift, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; ++c) {
    s[c] = exp_flushed<Isa>(s[c] - shift);
    sum += s[c];
  }
  return sum;
}

template <class T>
struct Softmax {
  T *s, *s_dot;  // (N, R, C); s_dot and mu may be null
  T *lse, *mu;   // (N, R)
  Visible<T> visible;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t C = visible.C, limit = visible.limit(row);
      T* p = s + row * C;
      T* p_dot = s_dot ? s_dot + row * C : nullptr;
      visible.scale_and_mask(p, row, limit);
      T m = maximum(p, limit);
      // The maximum passes over NaN; a row of nothing else must not be taken for one without visible keys.
      if (m == -kInf<T> && has_nan(p, limit)) m = std::numeric_limits<T>::quiet_NaN();
      const bool empty = m == -kInf<T>;
      const T sum = empty ? T(0) : exponentials<Isa>(p, m, limit);
      lse[row] = empty ? m : m + std::log(sum);
      normalize(p, empty ? 0 : limit, sum);
      zero(p, empty ? 0 : limit, C);
      if (s_dot) mu[row] = tangent(p, p_dot, empty ? 0 : limit);
    }
  }

  MAMLFAST_INLINE void normalize(T* p, int64_t limit, T sum) const {
    const T inverse = T(1) / sum;
#pragma omp simd
    for (int64_t c = 0; c < limit; ++c) p[c] *= inverse;
  }

  // p_dot holds s_dot and becomes P_dot; returns mu.
  MAMLFAST_INLINE T tangent(const T* p, T* p_dot, int64_t limit) const {
    const T scale = visible.scale;
    T row_mu = 0;
#pragma omp simd reduction(+ : row_mu)
    for (int64_t c = 0; c < limit; ++c) row_mu += p[c] * (scale * p_dot[c]);
#pragma omp simd
    for (int64_t c = 0; c < limit; ++c) p_dot[c] = p[c] * (scale * p_dot[c] - row_mu);
    zero(p_dot, limit, visible.C);
    return row_mu;
  }
};

template <class T>
struct Backward {
  T *s, *s_dot, *p_bar, *p_bar_dot;            // (N, R, C); the _dot ones may be null, together
  const T *lse, *mu, *delta, *delta_dot;       // (N, R)
  Visible<T> visible;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t C = visible.C, at = row * C;
      // A row without visible keys is zero throughout.
      const int64_t limit = lse[row] == -kInf<T> ? 0 : visible.limit(row);
      T* p = s + at;
      visible.scale_and_mask(p, row, limit);
      exponentials<Isa>(p, lse[row], limit);
      zero(p, limit, C);
      zero(p_bar + at, limit, C);
      if (!s_dot) {
        primal(p, p_bar + at, delta[row], limit);
        continue;
      }
      tangent(p, s_dot + at, p_bar + at, p_bar_dot + at, row, limit);
      zero(s_dot + at, limit, C);
      zero(p_bar_dot + at, limit, C);
    }
  }

  MAMLFAST_INLINE void primal(const T* p, T* bar, T row_delta, int64_t limit) const {
    const T scale = visible.scale;
#pragma omp simd
    for (int64_t c = 0; c < limit; ++c) bar[c] = scale * p[c] * (bar[c] - row_delta);
  }

  MAMLFAST_INLINE void tangent(const T* p, T* dot, T* bar, T* bar_dot, int64_t row, int64_t limit) const {
    const T scale = visible.scale;
    const T row_mu = mu[row], row_delta = delta[row], row_delta_dot = delta_dot[row];
#pragma omp simd
    for (int64_t c = 0; c < limit; ++c) {
      const T p_dot = p[c] * (scale * dot[c] - row_mu);
      const T centred = bar[c] - row_delta, centred_dot = bar_dot[c] - row_delta_dot;
      dot[c] = p_dot;
      bar[c] = scale * p[c] * centred;
      bar_dot[c] = scale * (p_dot * centred + p[c] * centred_dot);
    }
  }
};

template <class T>
Visible<T> visible_to(const Tensor& s, double scale, int64_t causal_offset, const MaybeTensor& mask,
                      int64_t repeat) {
  STD_TORCH_CHECK(s.dim() == 3 && repeat > 0, "attention_scores: [N, R, C] scores expected");
  const int64_t N = s.size(0), R = s.size(1), C = s.size(2);
  Visible<T> visible{R, C, causal_offset, static_cast<T>(scale), nullptr, nullptr, 0, 0, repeat};
  if (!mask.has_value()) return visible;
  const bool one_head = mask->size(0) == 1, one_row = mask->size(1) == 1;
  STD_TORCH_CHECK(mask->is_cpu() && mask->size(2) == C && (C == 1 || mask->stride(2) == 1) &&
                      (one_head || mask->size(0) * repeat == N) && (one_row || mask->size(1) == R),
                  "attention_scores: the mask does not fit the scores");
  visible.head_stride = one_head ? 0 : mask->stride(0);
  visible.row_stride = one_row ? 0 : mask->stride(1);
  if (mask->scalar_type() == ScalarType::Bool) {
    visible.allowed = static_cast<const bool*>(mask->const_data_ptr());
  } else {
    STD_TORCH_CHECK(mask->scalar_type() == s.scalar_type(), "attention_scores: a mask of the scores' dtype expected");
    visible.added = static_cast<const T*>(mask->const_data_ptr());
  }
  return visible;
}

void softmax(const Tensor& s, const MaybeTensor& s_dot, const Tensor& lse, const MaybeTensor& mu, double scale,
             int64_t causal_offset, const MaybeTensor& mask, int64_t repeat) {
  for_dtype(s, [&](auto zero) {
    using T = decltype(zero);
    const auto visible = visible_to<T>(s, scale, causal_offset, mask, repeat);
    const int64_t scores = s.numel(), rows = s.size(0) * s.size(1);
    over(rows, visible.C,
         Softmax<T>{data<T>(s, s, scores, "s"), data<T>(s_dot, s, scores, "s_dot"), data<T>(lse, s, rows, "lse"),
                    data<T>(mu, s, rows, "mu"), visible});
  });
}

void backward(const Tensor& s, const MaybeTensor& s_dot, const Tensor& p_bar, const MaybeTensor& p_bar_dot,
              const Tensor& lse, const MaybeTensor& mu, const Tensor& delta, const MaybeTensor& delta_dot,
              double scale, int64_t causal_offset, const MaybeTensor& mask, int64_t repeat) {
  for_dtype(s, [&](auto zero) {
    using T = decltype(zero);
    const auto visible = visible_to<T>(s, scale, causal_offset, mask, repeat);
    const int64_t scores = s.numel(), rows = s.size(0) * s.size(1);
    over(rows, visible.C,
         Backward<T>{data<T>(s, s, scores, "s"), data<T>(s_dot, s, scores, "s_dot"),
                     data<T>(p_bar, s, scores, "p_bar"), data<T>(p_bar_dot, s, scores, "p_bar_dot"),
                     data<T>(lse, s, rows, "lse"), data<T>(mu, s, rows, "mu"),
                     data<T>(delta, s, rows, "delta"), data<T>(delta_dot, s, rows, "delta_dot"), visible});
  });
}

void softmax_scores(Tensor s, Tensor lse, double scale, int64_t causal_offset, MaybeTensor mask, int64_t repeat) {
  softmax(s, std::nullopt, lse, std::nullopt, scale, causal_offset, mask, repeat);
}

void softmax_scores_jvp(Tensor s, Tensor s_dot, Tensor lse, Tensor mu, double scale, int64_t causal_offset,
                        MaybeTensor mask, int64_t repeat) {
  softmax(s, s_dot, lse, mu, scale, causal_offset, mask, repeat);
}

void scores_bwd(Tensor s, Tensor p_bar, Tensor lse, Tensor delta, double scale, int64_t causal_offset,
                MaybeTensor mask, int64_t repeat) {
  backward(s, std::nullopt, p_bar, std::nullopt, lse, std::nullopt, delta, std::nullopt, scale, causal_offset, mask,
           repeat);
}

void scores_bwd_jvp(Tensor s, Tensor s_dot, Tensor p_bar, Tensor p_bar_dot, Tensor lse, Tensor mu, Tensor delta,
                    Tensor delta_dot, double scale, int64_t causal_offset, MaybeTensor mask, int64_t repeat) {
  backward(s, s_dot, p_bar, p_bar_dot, lse, mu, delta, delta_dot, scale, causal_offset, mask, repeat);
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def(
      "softmax_scores(Tensor(a!) s, Tensor(b!) lse, float scale, int causal_offset, Tensor? mask, int repeat) -> ()");
  m.def(
      "softmax_scores_jvp(Tensor(a!) s, Tensor(b!) s_dot, Tensor(c!) lse, Tensor(d!) mu, float scale, "
      "int causal_offset, Tensor? mask, int repeat) -> ()");
  m.def(
      "scores_bwd(Tensor(a!) s, Tensor(b!) p_bar, Tensor lse, Tensor delta, float scale, int causal_offset, "
      "Tensor? mask, int repeat) -> ()");
  m.def(
      "scores_bwd_jvp(Tensor(a!) s, Tensor(b!) s_dot, Tensor(c!) p_bar, Tensor(d!) p_bar_dot, Tensor lse, Tensor mu, "
      "Tensor delta, Tensor delta_dot, float scale, int causal_offset, Tensor? mask, int repeat) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  m.impl("softmax_scores", TORCH_BOX(&mamlfast::softmax_scores));
  m.impl("softmax_scores_jvp", TORCH_BOX(&mamlfast::softmax_scores_jvp));
  m.impl("scores_bwd", TORCH_BOX(&mamlfast::scores_bwd));
  m.impl("scores_bwd_jvp", TORCH_BOX(&mamlfast::scores_bwd_jvp));
}
