// Layer normalisation to second order on CPUs; the mathematics stands in mamlfast/ops/layer_norm.py, in the same names.
//
// A row is read from memory once and then from the first-level cache: one loop a row sum, one loop a result.
// A null pointer is a tangent that does not exist or a result that nobody wants.
#include "rows.h"
#include "simd.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace mamlfast {
namespace {

// n = r (x - mean - rest), and the row sum a of its tangent n_dot = r (x_dot - mean_dot - n a). The mean comes in two
// parts because one far from zero has no digits left for a deviation: `rest` is the mean of what rounding left of it.
template <class T>
struct Statistics {
  T mean, rest, r;
  T mean_dot, a;

  MAMLFAST_INLINE T n(T x) const { return r * ((x - mean) - rest); }
  MAMLFAST_INLINE T n_dot(T n, T x_dot) const { return r * ((x_dot - mean_dot) - n * a); }
};

template <class T>
MAMLFAST_INLINE Statistics<T> statistics(const T* x, const T* x_dot, int64_t D, double eps) {
  const T mean = static_cast<T>(sum_of(x, D) / static_cast<double>(D));
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < D; ++i) {
    const T c = x[i] - mean;
    sum += c;
    squares += c * c;
  }
  const double rest = sum / static_cast<double>(D), variance = squares / static_cast<double>(D) - rest * rest;
  Statistics<T> s{mean, static_cast<T>(rest), static_cast<T>(1 / std::sqrt(variance + eps)), 0, 0};
  if (!x_dot) return s;
  s.mean_dot = static_cast<T>(sum_of(x_dot, D) / static_cast<double>(D));
  T sum_n = 0;
#pragma omp simd reduction(+ : sum_n)
  for (int64_t i = 0; i < D; ++i) sum_n += s.n(x[i]) * x_dot[i];
  s.a = sum_n / static_cast<T>(D);
  return s;
}

template <class T>
struct Forward {
  const T *x, *w, *b;              // (R, D), (D,), (D,)
  const T *x_dot, *w_dot, *b_dot;  // as above, or null
  T *y, *y_dot;                    // (R, D)
  int64_t D;
  double eps;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const T *xr = x + row * D, *xr_dot = x_dot ? x_dot + row * D : nullptr;
      const Statistics<T> s = statistics(xr, xr_dot, D, eps);
      T* yr = y + row * D;
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) yr[i] = w[i] * s.n(xr[i]) + b[i];
      if (xr_dot) tangent(xr, xr_dot, s, y_dot + row * D);
    }
  }

  MAMLFAST_INLINE void tangent(const T* xr, const T* xr_dot, const Statistics<T>& s, T* yr_dot) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      const T n = s.n(xr[i]), n_dot = s.n_dot(n, xr_dot[i]);
      yr_dot[i] = w_dot[i] * n + w[i] * n_dot + b_dot[i];
    }
  }
};

template <class T>
struct Backward {
  const T *x, *w, *y_bar;              // (R, D), (D,), (R, D)
  const T *x_dot, *w_dot, *y_bar_dot;  // as above, or null
  T *x_bar, *w_bar, *b_bar;            // (R, D), (P, D) and (P, D) partial sums; each may be null
  T *x_bar_dot, *w_bar_dot, *b_bar_dot;
  int64_t R, P, D;
  double eps;

  // The rows are cut into P pieces whatever the number of threads, so that the sums have one order.
  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < end; ++p) {
      for (T* sums : {w_bar, b_bar, w_bar_dot, b_bar_dot}) {
        if (sums) fill_zero(sums + p * D, D);
      }
      for (int64_t row = p * R / P; row < (p + 1) * R / P; ++row) visit(row, p * D);
    }
  }

  MAMLFAST_INLINE void visit(int64_t row, int64_t partial) const {
    const T *xr = x + row * D, *xr_dot = x_dot ? x_dot + row * D : nullptr, *yr_bar = y_bar + row * D;
    const Statistics<T> s = statistics(xr, xr_dot, D, eps);
    T sum_g = 0, sum_g_n = 0;
#pragma omp simd reduction(+ : sum_g, sum_g_n)
    for (int64_t i = 0; i < D; ++i) {
      const T g = w[i] * yr_bar[i];
      sum_g += g;
      sum_g_n += g * s.n(xr[i]);
    }
    const T p = sum_g / static_cast<T>(D), q = sum_g_n / static_cast<T>(D);
    if (x_bar) primal(xr, yr_bar, s, p, q, x_bar + row * D);
    if (w_bar) add_y_bar_n(xr, yr_bar, s, w_bar + partial);
    if (b_bar) add(yr_bar, b_bar + partial);
    if (!xr_dot) return;
    const T* yr_bar_dot = y_bar_dot + row * D;
    if (x_bar_dot) tangent(xr, xr_dot, yr_bar, yr_bar_dot, s, p, q, x_bar_dot + row * D);
    if (w_bar_dot) add_y_bar_n_dot(xr, xr_dot, yr_bar, yr_bar_dot, s, w_bar_dot + partial);
    if (b_bar_dot) add(yr_bar_dot, b_bar_dot + partial);
  }

  MAMLFAST_INLINE void primal(const T* xr, const T* yr_bar, const Statistics<T>& s, T p, T q, T* xr_bar) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) xr_bar[i] = s.r * ((w[i] * yr_bar[i] - p) - s.n(xr[i]) * q);
  }

  MAMLFAST_INLINE void tangent(const T* xr, const T* xr_dot, const T* yr_bar, const T* yr_bar_dot,
                               const Statistics<T>& s, T p, T q, T* xr_bar_dot) const {
    T sum = 0, sum_n = 0;
#pragma omp simd reduction(+ : sum, sum_n)
    for (int64_t i = 0; i < D; ++i) {
      const T n = s.n(xr[i]), n_dot = s.n_dot(n, xr_dot[i]);
      const T g = w[i] * yr_bar[i], g_dot = w_dot[i] * yr_bar[i] + w[i] * yr_bar_dot[i];
      sum += g_dot;
      sum_n += g_dot * n + g * n_dot;
    }
    const T p_dot = sum / static_cast<T>(D), q_dot = sum_n / static_cast<T>(D);
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      const T n = s.n(xr[i]), n_dot = s.n_dot(n, xr_dot[i]);
      const T g = w[i] * yr_bar[i], g_dot = w_dot[i] * yr_bar[i] + w[i] * yr_bar_dot[i];
      const T xr_bar = s.r * ((g - p) - n * q);
      xr_bar_dot[i] = s.r * (((g_dot - p_dot) - n_dot * q - n * q_dot) - s.a * xr_bar);
    }
  }

  MAMLFAST_INLINE void add(const T* values, T* sums) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) sums[i] += values[i];
  }

  MAMLFAST_INLINE void add_y_bar_n(const T* xr, const T* yr_bar, const Statistics<T>& s, T* sums) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) sums[i] += yr_bar[i] * s.n(xr[i]);
  }

  MAMLFAST_INLINE void add_y_bar_n_dot(const T* xr, const T* xr_dot, const T* yr_bar, const T* yr_bar_dot,
                                       const Statistics<T>& s, T* sums) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      const T n = s.n(xr[i]);
      sums[i] += yr_bar_dot[i] * n + yr_bar[i] * s.n_dot(n, xr_dot[i]);
    }
  }
};

void layer_norm_fwd(Tensor x, Tensor w, Tensor b, MaybeTensor x_dot, MaybeTensor w_dot, MaybeTensor b_dot, Tensor y,
                    MaybeTensor y_dot, double eps) {
  const int64_t D = w.numel(), RD = x.numel(), R = D ? RD / D : 0;
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> kernel{
        data<T>(x, x, R * D, "x"),       data<T>(w, x, D, "w"),          data<T>(b, x, D, "b"),
        data<T>(x_dot, x, RD, "x_dot"),  data<T>(w_dot, x, D, "w_dot"),  data<T>(b_dot, x, D, "b_dot"),
        data<T>(y, x, RD, "y"),          data<T>(y_dot, x, RD, "y_dot"), D, eps};
    STD_TORCH_CHECK(!kernel.x_dot == !kernel.w_dot && !kernel.x_dot == !kernel.b_dot && !kernel.x_dot == !kernel.y_dot,
                    "layer_norm_fwd: x_dot, w_dot, b_dot and y_dot expected together");
    over(R, D, kernel);
  });
}

void layer_norm_bwd(Tensor x, Tensor w, Tensor y_bar, MaybeTensor x_dot, MaybeTensor w_dot, MaybeTensor y_bar_dot,
                    MaybeTensor x_bar, MaybeTensor w_bar, MaybeTensor b_bar, MaybeTensor x_bar_dot,
                    MaybeTensor w_bar_dot, MaybeTensor b_bar_dot, int64_t P, double eps) {
  const int64_t D = w.numel(), RD = x.numel(), R = D ? RD / D : 0;
  STD_TORCH_CHECK(P > 0, "layer_norm_bwd: at least one partial sum expected");
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> kernel{
        data<T>(x, x, R * D, "x"),               data<T>(w, x, D, "w"),
        data<T>(y_bar, x, RD, "y_bar"),          data<T>(x_dot, x, RD, "x_dot"),
        data<T>(w_dot, x, D, "w_dot"),           data<T>(y_bar_dot, x, RD, "y_bar_dot"),
        data<T>(x_bar, x, RD, "x_bar"),          data<T>(w_bar, x, P * D, "w_bar"),
        data<T>(b_bar, x, P * D, "b_bar"),       data<T>(x_bar_dot, x, RD, "x_bar_dot"),
        data<T>(w_bar_dot, x, P * D, "w_bar_dot"), data<T>(b_bar_dot, x, P * D, "b_bar_dot"),
        R, P, D, eps};
    STD_TORCH_CHECK(!kernel.x_dot == !kernel.w_dot && !kernel.x_dot == !kernel.y_bar_dot,
                    "layer_norm_bwd: x_dot, w_dot and y_bar_dot expected together");
    STD_TORCH_CHECK(kernel.x_dot || (!kernel.x_bar_dot && !kernel.w_bar_dot && !kernel.b_bar_dot),
                    "layer_norm_bwd: no tangent of a result without the tangents of the arguments");
    over(P, R / P * D, kernel);
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor w, Tensor b, Tensor? x_dot, Tensor? w_dot, Tensor? b_dot, Tensor(a!) y, "
      "Tensor(b!)? y_dot, float eps) -> ()");
  m.def(
      "layer_norm_bwd(Tensor x, Tensor w, Tensor y_bar, Tensor? x_dot, Tensor? w_dot, Tensor? y_bar_dot, "
      "Tensor(a!)? x_bar, Tensor(b!)? w_bar, Tensor(c!)? b_bar, Tensor(d!)? x_bar_dot, Tensor(e!)? w_bar_dot, "
      "Tensor(f!)? b_bar_dot, int P, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&mamlfast::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&mamlfast::layer_norm_bwd));
}
