// Elementwise functions to second order on CPUs; the mathematics stands in mamlfast/ops/elementwise.py, in the same
// names. One pass over memory a direction, for every function of activations.h.
#include "activations.h"
#include "simd.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace mamlfast {
namespace {

template <class Phi, class T>
struct Forward {
  const T *x, *x_dot;  // (N,); those with tangents may be null
  T *y, *y_dot;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    if (!x_dot) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) y[i] = Phi::template at<Isa>(x[i]).value;
      return;
    }
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const auto phi = Phi::template at<Isa>(x[i]);
      y[i] = phi.value;
      y_dot[i] = phi.first * x_dot[i];
    }
  }
};

template <class Phi, class T>
struct Backward {
  const T *x, *x_dot, *y_bar, *y_bar_dot;  // (N,); those with tangents may be null
  T *x_bar, *x_bar_dot;                    // each may be null

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    if (!x_bar_dot) return primal<Isa>(begin, end);
    if (x_bar) return both<Isa>(begin, end);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const auto phi = Phi::template at<Isa>(x[i]);
      x_bar_dot[i] = phi.second * (x_dot[i] * y_bar[i]) + phi.first * y_bar_dot[i];
    }
  }

  template <class Isa>
  MAMLFAST_INLINE void primal(int64_t begin, int64_t end) const {
    if (!x_bar) return;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) x_bar[i] = Phi::template at<Isa>(x[i]).first * y_bar[i];
  }

  template <class Isa>
  MAMLFAST_INLINE void both(int64_t begin, int64_t end) const {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const auto phi = Phi::template at<Isa>(x[i]);
      x_bar[i] = phi.first * y_bar[i];
      x_bar_dot[i] = phi.second * (x_dot[i] * y_bar[i]) + phi.first * y_bar_dot[i];
    }
  }
};

template <class Phi>
void fwd(Tensor x, MaybeTensor x_dot, Tensor y, MaybeTensor y_dot) {
  const int64_t N = x.numel();
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Forward<Phi, T> kernel{data<T>(x, x, N, "x"), data<T>(x_dot, x, N, "x_dot"), data<T>(y, x, N, "y"),
                                 data<T>(y_dot, x, N, "y_dot")};
    STD_TORCH_CHECK(!kernel.x_dot == !kernel.y_dot, "elementwise fwd: x_dot and y_dot expected together");
    over(N, 1, kernel);
  });
}

template <class Phi>
void bwd(Tensor x, MaybeTensor x_dot, Tensor y_bar, MaybeTensor y_bar_dot, MaybeTensor x_bar, MaybeTensor x_bar_dot) {
  const int64_t N = x.numel();
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Backward<Phi, T> kernel{data<T>(x, x, N, "x"),         data<T>(x_dot, x, N, "x_dot"),
                                  data<T>(y_bar, x, N, "y_bar"), data<T>(y_bar_dot, x, N, "y_bar_dot"),
                                  data<T>(x_bar, x, N, "x_bar"), data<T>(x_bar_dot, x, N, "x_bar_dot")};
    STD_TORCH_CHECK(!kernel.x_bar_dot || (kernel.x_dot && kernel.y_bar_dot),
                    "elementwise bwd: x_dot and y_bar_dot expected with x_bar_dot");
    over(N, 1, kernel);
  });
}

template <class Library>
void define(Library& m, const std::string& name) {
  m.def((name + "_fwd(Tensor x, Tensor? x_dot, Tensor(a!) y, Tensor(b!)? y_dot) -> ()").c_str());
  m.def((name + "_bwd(Tensor x, Tensor? x_dot, Tensor y_bar, Tensor? y_bar_dot, Tensor(a!)? x_bar, "
                "Tensor(b!)? x_bar_dot) -> ()").c_str());
}

template <class Phi, class Library>
void implement(Library& m, const std::string& name) {
  m.impl((name + "_fwd").c_str(), TORCH_BOX(&fwd<Phi>));
  m.impl((name + "_bwd").c_str(), TORCH_BOX(&bwd<Phi>));
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  for (const char* name : {"silu", "gelu", "gelu_tanh", "relu", "relu2", "tanh", "sigmoid"}) mamlfast::define(m, name);
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  mamlfast::implement<mamlfast::Silu>(m, "silu");
  mamlfast::implement<mamlfast::Gelu>(m, "gelu");
  mamlfast::implement<mamlfast::GeluTanh>(m, "gelu_tanh");
  mamlfast::implement<mamlfast::Relu>(m, "relu");
  mamlfast::implement<mamlfast::Relu2>(m, "relu2");
  mamlfast::implement<mamlfast::Tanh>(m, "tanh");
  mamlfast::implement<mamlfast::Sigmoid>(m, "sigmoid");
}
