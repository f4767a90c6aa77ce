// Gated activations h = phi(a) b to second order on CPUs; the mathematics stands in mamlfast/ops/gated.py, in the same
// names. One pass over memory a direction, for every gate of activations.h; halves of a fused projection are read where
// they lie.
#include "activations.h"
#include "simd.h"
#include "strided.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

namespace mamlfast {
namespace {

template <class Gate, class T>
struct Forward {
  Rows<T> a, b, a_dot, b_dot;  // (R, F); those with tangents may be null
  Rows<T> y, y_dot;
  int64_t F;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin, n; i < end; i += n) {
      const int64_t row = i / F, column = i % F;
      n = std::min(F - column, end - i);
      y_dot.first ? piece<Isa, true>(row, column, n) : piece<Isa, false>(row, column, n);
    }
  }

  template <class Isa, bool has_tangent>
  MAMLFAST_INLINE void piece(int64_t row, int64_t column, int64_t n) const {
    const T *ar = a.at(row, column), *ar_dot = a_dot.at(row, column);
    const T *br = b.at(row, column), *br_dot = b_dot.at(row, column);
    T *yr = y.at(row, column), *yr_dot = y_dot.at(row, column);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const auto phi = Gate::template at<Isa>(ar[i]);
      yr[i] = phi.value * br[i];
      if constexpr (has_tangent) yr_dot[i] = phi.first * ar_dot[i] * br[i] + phi.value * br_dot[i];
    }
  }
};

template <class Gate, class T>
struct Backward {
  Rows<T> a, b, y_bar;              // (R, F)
  Rows<T> a_dot, b_dot, y_bar_dot;  // as above, or null
  Rows<T> a_bar, b_bar;             // as above; both or neither
  Rows<T> a_bar_dot, b_bar_dot;     // as above; both or neither
  int64_t F;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin, n; i < end; i += n) {
      const int64_t row = i / F, column = i % F;
      n = std::min(F - column, end - i);
      if (!a_bar_dot.first) {
        piece<Isa, true, false>(row, column, n);
      } else if (!a_bar.first) {
        piece<Isa, false, true>(row, column, n);
      } else {
        piece<Isa, true, true>(row, column, n);
      }
    }
  }

  template <class Isa, bool primal, bool tangent>
  MAMLFAST_INLINE void piece(int64_t row, int64_t column, int64_t n) const {
    const T *ar = a.at(row, column), *ar_dot = a_dot.at(row, column);
    const T *br = b.at(row, column), *br_dot = b_dot.at(row, column);
    const T *yr_bar = y_bar.at(row, column), *yr_bar_dot = y_bar_dot.at(row, column);
    T *ar_bar = a_bar.at(row, column), *ar_bar_dot = a_bar_dot.at(row, column);
    T *br_bar = b_bar.at(row, column), *br_bar_dot = b_bar_dot.at(row, column);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const auto phi = Gate::template at<Isa>(ar[i]);
      const T g = yr_bar[i] * br[i];
      if constexpr (primal) {
        ar_bar[i] = phi.first * g;
        br_bar[i] = phi.value * yr_bar[i];
      }
      if constexpr (tangent) {
        const T g_dot = yr_bar_dot[i] * br[i] + yr_bar[i] * br_dot[i];
        ar_bar_dot[i] = phi.second * (ar_dot[i] * g) + phi.first * g_dot;
        br_bar_dot[i] = phi.first * ar_dot[i] * yr_bar[i] + phi.value * yr_bar_dot[i];
      }
    }
  }
};

template <class Gate>
void fwd(Tensor a, Tensor b, MaybeTensor a_dot, MaybeTensor b_dot, Tensor y, MaybeTensor y_dot) {
  for_dtype(a, [&](auto zero) {
    using T = decltype(zero);
    const Forward<Gate, T> kernel{rows<T>(a, a, "a"),         rows<T>(b, a, "b"), rows<T>(a_dot, a, "a_dot"),
                                  rows<T>(b_dot, a, "b_dot"), rows<T>(y, a, "y"), rows<T>(y_dot, a, "y_dot"),
                                  a.size(1)};
    STD_TORCH_CHECK(!kernel.a_dot.first == !kernel.b_dot.first && !kernel.a_dot.first == !kernel.y_dot.first,
                    "gated fwd: a_dot, b_dot and y_dot expected together");
    over(a.numel(), 1, kernel);
  });
}

template <class Gate>
void bwd(Tensor a, Tensor b, Tensor y_bar, MaybeTensor a_dot, MaybeTensor b_dot, MaybeTensor y_bar_dot,
         MaybeTensor a_bar, MaybeTensor b_bar, MaybeTensor a_bar_dot, MaybeTensor b_bar_dot) {
  for_dtype(a, [&](auto zero) {
    using T = decltype(zero);
    const Backward<Gate, T> kernel{
        rows<T>(a, a, "a"),                 rows<T>(b, a, "b"),         rows<T>(y_bar, a, "y_bar"),
        rows<T>(a_dot, a, "a_dot"),         rows<T>(b_dot, a, "b_dot"), rows<T>(y_bar_dot, a, "y_bar_dot"),
        rows<T>(a_bar, a, "a_bar"),         rows<T>(b_bar, a, "b_bar"), rows<T>(a_bar_dot, a, "a_bar_dot"),
        rows<T>(b_bar_dot, a, "b_bar_dot"), a.size(1)};
    STD_TORCH_CHECK(!kernel.a_bar.first == !kernel.b_bar.first && !kernel.a_bar_dot.first == !kernel.b_bar_dot.first &&
                        (kernel.a_bar.first || kernel.a_bar_dot.first),
                    "gated bwd: a_bar with b_bar, a_bar_dot with b_bar_dot, or all four expected");
    STD_TORCH_CHECK(!kernel.a_bar_dot.first ||
                        (kernel.a_dot.first && kernel.b_dot.first && kernel.y_bar_dot.first),
                    "gated bwd: a_dot, b_dot and y_bar_dot expected with a_bar_dot");
    over(a.numel(), 1, kernel);
  });
}

template <class Library>
void define(Library& m, const std::string& name) {
  m.def((name + "_fwd(Tensor a, Tensor b, Tensor? a_dot, Tensor? b_dot, Tensor(a!) y, Tensor(b!)? y_dot) -> ()")
            .c_str());
  m.def((name + "_bwd(Tensor a, Tensor b, Tensor y_bar, Tensor? a_dot, Tensor? b_dot, Tensor? y_bar_dot, "
                "Tensor(a!)? a_bar, Tensor(b!)? b_bar, Tensor(c!)? a_bar_dot, Tensor(d!)? b_bar_dot) -> ()").c_str());
}

template <class Gate, class Library>
void implement(Library& m, const std::string& name) {
  m.impl((name + "_fwd").c_str(), TORCH_BOX(&fwd<Gate>));
  m.impl((name + "_bwd").c_str(), TORCH_BOX(&bwd<Gate>));
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  for (const char* name : {"swiglu", "geglu", "geglu_tanh", "reglu"}) mamlfast::define(m, name);
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  mamlfast::implement<mamlfast::Silu>(m, "swiglu");
  mamlfast::implement<mamlfast::Gelu>(m, "geglu");
  mamlfast::implement<mamlfast::GeluTanh>(m, "geglu_tanh");
  mamlfast::implement<mamlfast::Relu>(m, "reglu");
}
