// Softmax and log-softmax along rows to second order on CPUs; the mathematics stands in mamlfast/ops/softmax.py, in
// the same names. Both directions are one kernel each with the second-order terms added where there are tangents.
#include "rows.h"
#include "simd.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace mamlfast {
namespace {

template <class T>
struct SoftmaxForward {
  const T *x, *x_dot;  // (R, D); those with tangents may be null
  T *y, *y_dot;
  int64_t D;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* xr = x + row * D;
      T* yr = y + row * D;
      exponentials<Isa>(xr, maximum(xr, D), T(1), D, yr);
      const T inverse = static_cast<T>(1 / sum_of(yr, D));
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) yr[i] *= inverse;
      if (x_dot) tangent(yr, x_dot + row * D, y_dot + row * D);
    }
  }

  MAMLFAST_INLINE void tangent(const T* yr, const T* xr_dot, T* yr_dot) const {
    const T mu = static_cast<T>(sum_of_product(yr, xr_dot, D));
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) yr_dot[i] = yr[i] * (xr_dot[i] - mu);
  }
};

template <class T>
struct SoftmaxBackward {
  const T *y, *y_dot, *y_bar, *y_bar_dot;  // (R, D); those with tangents may be null
  T *x_bar, *x_bar_dot;                    // each may be null
  int64_t D;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const T *yr = y + row * D, *yr_bar = y_bar + row * D;
      const T c = static_cast<T>(sum_of_product(yr, yr_bar, D));
      if (x_bar) {
        T* out = x_bar + row * D;
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) out[i] = yr[i] * (yr_bar[i] - c);
      }
      if (x_bar_dot) tangent(yr, y_dot + row * D, yr_bar, y_bar_dot + row * D, c, x_bar_dot + row * D);
    }
  }

  MAMLFAST_INLINE void tangent(const T* yr, const T* yr_dot, const T* yr_bar, const T* yr_bar_dot, T c, T* out) const {
    const T c_dot = static_cast<T>(sum_of_product(yr_dot, yr_bar, D) + sum_of_product(yr, yr_bar_dot, D));
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) out[i] = yr_dot[i] * (yr_bar[i] - c) + yr[i] * (yr_bar_dot[i] - c_dot);
  }
};

template <class T>
struct LogSoftmaxForward {
  const T *x, *x_dot;  // as in SoftmaxForward
  T *y, *y_dot;
  int64_t D;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const T *xr = x + row * D, *xr_dot = x_dot ? x_dot + row * D : nullptr;
      const LogSumExp<T> s = log_sum_exp<Isa>(xr, xr_dot, D);
      const T log_sum = static_cast<T>(s.log_sum), mu = static_cast<T>(s.mu);
      T* yr = y + row * D;
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) yr[i] = (xr[i] - s.max) - log_sum;
      if (xr_dot) subtract(xr_dot, mu, y_dot + row * D);
    }
  }

  MAMLFAST_INLINE void subtract(const T* xr_dot, T mu, T* yr_dot) const {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) yr_dot[i] = xr_dot[i] - mu;
  }
};

template <class T>
struct LogSoftmaxBackward {
  const T *y, *y_dot, *y_bar, *y_bar_dot;  // as in SoftmaxBackward
  T *x_bar, *x_bar_dot;
  int64_t D;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * D;
      const T s = static_cast<T>(sum_of(y_bar + at, D));
      const T s_dot = x_bar_dot ? static_cast<T>(sum_of(y_bar_dot + at, D)) : T(0);
      for (int64_t first = at; first < at + D; first += kBlock) {
        const int64_t n = std::min(kBlock, at + D - first);
        T p[kBlock];
        exponentials<Isa>(y + first, T(0), T(1), n, p);
        if (x_bar) primal(p, first, n, s);
        if (x_bar_dot) tangent(p, first, n, s, s_dot);
      }
    }
  }

  MAMLFAST_INLINE void primal(const T* p, int64_t first, int64_t n, T s) const {
    const T* bar = y_bar + first;
    T* out = x_bar + first;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = bar[i] - p[i] * s;
  }

  MAMLFAST_INLINE void tangent(const T* p, int64_t first, int64_t n, T s, T s_dot) const {
    const T *dot = y_dot + first, *bar_dot = y_bar_dot + first;
    T* out = x_bar_dot + first;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = bar_dot[i] - p[i] * (dot[i] * s + s_dot);
  }
};

template <template <class> class Kernel>
void fwd(Tensor x, MaybeTensor x_dot, Tensor y, MaybeTensor y_dot) {
  const int64_t N = x.numel(), D = x.dim() ? x.size(x.dim() - 1) : 1;
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{data<T>(x, x, N, "x"), data<T>(x_dot, x, N, "x_dot"), data<T>(y, x, N, "y"),
                           data<T>(y_dot, x, N, "y_dot"), D};
    STD_TORCH_CHECK(!kernel.x_dot == !kernel.y_dot, "softmax_fwd: x_dot and y_dot expected together");
    over(D ? N / D : 0, D, kernel);
  });
}

template <template <class> class Kernel>
void bwd(Tensor y, MaybeTensor y_dot, Tensor y_bar, MaybeTensor y_bar_dot, MaybeTensor x_bar, MaybeTensor x_bar_dot) {
  const int64_t N = y.numel(), D = y.dim() ? y.size(y.dim() - 1) : 1;
  for_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{data<T>(y, y, N, "y"),         data<T>(y_dot, y, N, "y_dot"),
                           data<T>(y_bar, y, N, "y_bar"), data<T>(y_bar_dot, y, N, "y_bar_dot"),
                           data<T>(x_bar, y, N, "x_bar"), data<T>(x_bar_dot, y, N, "x_bar_dot"), D};
    STD_TORCH_CHECK(!kernel.x_bar_dot || (kernel.y_dot && kernel.y_bar_dot),
                    "softmax_bwd: y_dot and y_bar_dot expected with x_bar_dot");
    over(D ? N / D : 0, D, kernel);
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def("softmax_fwd(Tensor x, Tensor? x_dot, Tensor(a!) y, Tensor(b!)? y_dot) -> ()");
  m.def("log_softmax_fwd(Tensor x, Tensor? x_dot, Tensor(a!) y, Tensor(b!)? y_dot) -> ()");
  m.def(
      "softmax_bwd(Tensor y, Tensor? y_dot, Tensor y_bar, Tensor? y_bar_dot, Tensor(a!)? x_bar, "
      "Tensor(b!)? x_bar_dot) -> ()");
  m.def(
      "log_softmax_bwd(Tensor y, Tensor? y_dot, Tensor y_bar, Tensor? y_bar_dot, Tensor(a!)? x_bar, "
      "Tensor(b!)? x_bar_dot) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&mamlfast::fwd<mamlfast::SoftmaxForward>));
  m.impl("log_softmax_fwd", TORCH_BOX(&mamlfast::fwd<mamlfast::LogSoftmaxForward>));
  m.impl("softmax_bwd", TORCH_BOX(&mamlfast::bwd<mamlfast::SoftmaxBackward>));
  m.impl("log_softmax_bwd", TORCH_BOX(&mamlfast::bwd<mamlfast::LogSoftmaxBackward>));
}
