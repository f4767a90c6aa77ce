// RMSNorm to second order on CPUs; the mathematics stands in mamlfast/ops/rms_norm.py, in the same names.
//
// A row is read from memory once and then from the first-level cache: one loop a row sum, one loop a result.
// A null pointer is a tangent that does not exist or a result that nobody wants.
#include "simd.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace mamlfast {
namespace {

template <class T>
MAMLFAST_INLINE T mean_of_product(const T* a, const T* b, int64_t D) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < D; ++i) sum += a[i] * b[i];
  return sum / static_cast<T>(D);
}

template <class T>
MAMLFAST_INLINE T inverse_rms(const T* x, int64_t D, T eps) {
  return T(1) / std::sqrt(mean_of_product(x, x, D) + eps);
}

template <class T>
struct Forward {
  const T *x, *w;          // (R, D), (D,)
  const T *x_dot, *w_dot;  // as above, or null
  T *y, *y_dot;            // (R, D)
  int64_t D;
  T eps, offset;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* xr = x + row * D;
      const T s = inverse_rms(xr, D, eps);
      T* yr = y + row * D;
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) yr[i] = (offset + w[i]) * (s * xr[i]);
      if (x_dot) tangent(xr, x_dot + row * D, s, y_dot + row * D);
    }
  }

  MAMLFAST_INLINE void tangent(const T* xr, const T* xr_dot, T s, T* yr_dot) const {
    const T s_dot = -s * s * (s * mean_of_product(xr, xr_dot, D));
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      const T n = s * xr[i], n_dot = s * xr_dot[i] + s_dot * xr[i];
      yr_dot[i] = w_dot[i] * n + (offset + w[i]) * n_dot;
    }
  }
};

template <class T>
struct Backward {
  const T *x, *w, *y_bar;              // (R, D), (D,), (R, D)
  const T *x_dot, *w_dot, *y_bar_dot;  // as above, or null
  T *x_bar, *w_bar;                    // (R, D), (P, D) partial sums; each may be null
  T *x_bar_dot, *w_bar_dot;            // as above
  int64_t R, P, D;
  T eps, offset;

  // The rows are cut into P pieces whatever the number of threads, so that the sums have one order.
  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < end; ++p) {
      T* w_bar_p = zeroed(w_bar, p);
      T* w_bar_dot_p = zeroed(w_bar_dot, p);
      for (int64_t row = p * R / P; row < (p + 1) * R / P; ++row) {
        const T* xr = x + row * D;
        const T s = inverse_rms(xr, D, eps);
        const T c = mean_of_g_n(xr, y_bar + row * D, s);
        if (x_bar) primal(xr, y_bar + row * D, s, c, x_bar + row * D);
        if (w_bar) add_y_bar_n(xr, y_bar + row * D, s, w_bar_p);
        if (x_dot) tangent(row, s, c, w_bar_dot_p);
      }
    }
  }

  MAMLFAST_INLINE T* zeroed(T* partials, int64_t p) const {
    if (!partials) return nullptr;
    T* sums = partials + p * D;
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) sums[i] = 0;
    return sums;
  }

  MAMLFAST_INLINE T mean_of_g_n(const T* xr, const T* yr_bar, T s) const {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; ++i) sum += ((offset + w[i]) * yr_bar[i]) * (s * xr[i]);
    return sum / static_cast<T>(D);
  }

  MAMLFAST_INLINE void primal(const T* xr, const T* yr_bar, T s, T c, T* xr_bar) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) xr_bar[i] = s * ((offset + w[i]) * yr_bar[i] - c * (s * xr[i]));
  }

  MAMLFAST_INLINE void add_y_bar_n(const T* xr, const T* yr_bar, T s, T* sums) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) sums[i] += yr_bar[i] * (s * xr[i]);
  }

  MAMLFAST_INLINE void tangent(int64_t row, T s, T c, T* w_bar_dot_p) const {
    const T *xr = x + row * D, *xr_dot = x_dot + row * D;
    const T *yr_bar = y_bar + row * D, *yr_bar_dot = y_bar_dot + row * D;
    const T s_dot = -s * s * (s * mean_of_product(xr, xr_dot, D));
    if (w_bar_dot) {
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) {
        const T n = s * xr[i], n_dot = s * xr_dot[i] + s_dot * xr[i];
        w_bar_dot_p[i] += yr_bar_dot[i] * n + yr_bar[i] * n_dot;
      }
    }
    if (!x_bar_dot) return;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; ++i) {
      const T n = s * xr[i], n_dot = s * xr_dot[i] + s_dot * xr[i];
      const T g = (offset + w[i]) * yr_bar[i];
      const T g_dot = w_dot[i] * yr_bar[i] + (offset + w[i]) * yr_bar_dot[i];
      sum += g_dot * n + g * n_dot;
    }
    const T c_dot = sum / static_cast<T>(D);
    T* xr_bar_dot = x_bar_dot + row * D;
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      const T n = s * xr[i], n_dot = s * xr_dot[i] + s_dot * xr[i];
      const T g = (offset + w[i]) * yr_bar[i];
      const T g_dot = w_dot[i] * yr_bar[i] + (offset + w[i]) * yr_bar_dot[i];
      xr_bar_dot[i] = s_dot * (g - c * n) + s * (g_dot - c_dot * n - c * n_dot);
    }
  }
};

void rms_norm_fwd(Tensor x, Tensor w, MaybeTensor x_dot, MaybeTensor w_dot, Tensor y, MaybeTensor y_dot,
                  double eps, double offset) {
  const int64_t D = w.numel(), RD = x.numel(), R = D ? RD / D : 0;
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> kernel{
        data<T>(x, x, R * D, "x"),         data<T>(w, x, D, "w"),
        data<T>(x_dot, x, RD, "x_dot"),    data<T>(w_dot, x, D, "w_dot"),
        data<T>(y, x, RD, "y"),            data<T>(y_dot, x, RD, "y_dot"),
        D, static_cast<T>(eps), static_cast<T>(offset)};
    STD_TORCH_CHECK(!kernel.x_dot == !kernel.w_dot && !kernel.x_dot == !kernel.y_dot,
                    "rms_norm_fwd: x_dot, w_dot and y_dot expected together");
    over(R, D, kernel);
  });
}

void rms_norm_bwd(Tensor x, Tensor w, Tensor y_bar, MaybeTensor x_dot, MaybeTensor w_dot, MaybeTensor y_bar_dot,
                  MaybeTensor x_bar, MaybeTensor w_bar, MaybeTensor x_bar_dot, MaybeTensor w_bar_dot, int64_t P,
                  double eps, double offset) {
  const int64_t D = w.numel(), RD = x.numel(), R = D ? RD / D : 0;
  STD_TORCH_CHECK(P > 0, "rms_norm_bwd: at least one partial sum expected");
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> kernel{
        data<T>(x, x, R * D, "x"),                   data<T>(w, x, D, "w"),
        data<T>(y_bar, x, RD, "y_bar"),              data<T>(x_dot, x, RD, "x_dot"),
        data<T>(w_dot, x, D, "w_dot"),               data<T>(y_bar_dot, x, RD, "y_bar_dot"),
        data<T>(x_bar, x, RD, "x_bar"),              data<T>(w_bar, x, P * D, "w_bar"),
        data<T>(x_bar_dot, x, RD, "x_bar_dot"),      data<T>(w_bar_dot, x, P * D, "w_bar_dot"),
        R, P, D, static_cast<T>(eps), static_cast<T>(offset)};
    STD_TORCH_CHECK(!kernel.x_dot == !kernel.w_dot && !kernel.x_dot == !kernel.y_bar_dot,
                    "rms_norm_bwd: x_dot, w_dot and y_bar_dot expected together");
    STD_TORCH_CHECK(kernel.x_dot || (!kernel.x_bar_dot && !kernel.w_bar_dot),
                    "rms_norm_bwd: tangents of the cotangents need the tangents");
    over(P, R / P * D, kernel);
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def(
      "rms_norm_fwd(Tensor x, Tensor w, Tensor? x_dot, Tensor? w_dot, Tensor(a!) y, Tensor(b!)? y_dot, "
      "float eps, float offset) -> ()");
  m.def(
      "rms_norm_bwd(Tensor x, Tensor w, Tensor y_bar, Tensor? x_dot, Tensor? w_dot, Tensor? y_bar_dot, "
      "Tensor(a!)? x_bar, Tensor(b!)? w_bar, Tensor(c!)? x_bar_dot, Tensor(d!)? w_bar_dot, "
      "int P, float eps, float offset) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&mamlfast::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&mamlfast::rms_norm_bwd));
}
