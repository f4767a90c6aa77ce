// Activations with their first two derivatives, in arithmetic that compilers can vectorise: no table, no branch.
//
// Every function offers `at<Isa>(x)`, the Slopes {phi, phi', phi''} at x; what a caller does not use is not computed.
// The formulas stand in mamlfast/ops/elementwise.py. Where those subtract nearly equal numbers (1 - s, 1 - t^2,
// 1 + erf) the ones here do not, so that tails are as exact as the middle.
#pragma once

#include "exp.h"
#include "simd.h"

#include <cmath>

namespace mamlfast {

template <class T>
struct Slopes {
  T value, first, second;
};

// s = sigmoid(x) and c = 1 - s, neither from the other.
template <class T>
struct SigmoidPair {
  T s, c;
};

template <class Isa, class T>
MAMLFAST_INLINE SigmoidPair<T> sigmoid_pair(T x) {
  const T e = exp_flushed<Isa>(-std::abs(x));
  const T large = T(1) / (T(1) + e), small = e * large;
  return x < 0 ? SigmoidPair<T>{small, large} : SigmoidPair<T>{large, small};
}

struct Sigmoid {
  template <class Isa, class T>
  static MAMLFAST_INLINE Slopes<T> at(T x) {
    const auto [s, c] = sigmoid_pair<Isa>(x);
    return {s, s * c, s * c * (c - s)};
  }
};

struct Silu {
  template <class Isa, class T>
  static MAMLFAST_INLINE Slopes<T> at(T x) {
    const auto [s, c] = sigmoid_pair<Isa>(x);
    return {x * s, s * (T(1) + x * c), s * c * (T(2) + x * (c - s))};
  }
};

// Beyond it the normal density and its like underflow, but x and its powers would yet meet infinity.
template <class T>
constexpr T kFar = sizeof(T) == sizeof(float) ? T(14) : T(38);

template <class T>
MAMLFAST_INLINE T distance(T x) {
  return std::abs(x) > kFar<T> ? kFar<T> : std::abs(x);
}

// (1 + tanh(u)) / 2 = sigmoid(v) with v = 2 u: phi = x s, and s' = s c v', s'' = s c ((c - s) v'^2 + v'').
struct GeluTanh {
  template <class Isa, class T>
  static MAMLFAST_INLINE Slopes<T> at(T x) {
    constexpr T k = static_cast<T>(1.5957691216057308), a = static_cast<T>(0.044715);  // k = 2 sqrt(2 / pi)
    const T d = std::copysign(distance(x), x);
    const T v = k * (d + a * d * d * d), v_1 = k * (T(1) + T(3) * a * d * d), v_2 = T(6) * k * a * d;
    const auto [s, c] = sigmoid_pair<Isa>(v);
    const T s_1 = s * c * v_1, s_2 = s * c * ((c - s) * (v_1 * v_1) + v_2);
    return {x * s, s + d * s_1, T(2) * s_1 + d * s_2};
  }
};

// With e = exp(-2 |x|): |t| = (1 - e) / (1 + e) and 1 - t^2 = 4 e / (1 + e)^2.
struct Tanh {
  template <class Isa, class T>
  static MAMLFAST_INLINE Slopes<T> at(T x) {
    const auto [e, em1] = exp_and_expm1<Isa>(T(-2) * std::abs(x));
    const T inverse = T(1) / (T(2) + em1);
    const T t = std::copysign(-em1 * inverse, x), t_1 = T(4) * e * inverse * inverse;
    return {t, t_1, T(-2) * t * t_1};
  }
};

// The kink has the slope 0.
struct Relu {
  template <class Isa, class T>
  static MAMLFAST_INLINE Slopes<T> at(T x) {
    return {x < 0 ? T(0) : x, x > 0 ? T(1) : T(0), T(0)};
  }
};

// relu(x)^2: the second derivative at the kink is 0.
struct Relu2 {
  template <class Isa, class T>
  static MAMLFAST_INLINE Slopes<T> at(T x) {
    const T r = x < 0 ? T(0) : x;
    return {r * r, T(2) * r, x > 0 ? T(2) : T(0)};
  }
};

// Mills's ratio of the normal distribution, (1 - Phi(x)) / density(x) for x >= 0, as P(t) / (x + 4) with
// t = (x - 4) / (x + 4): the Chebyshev series of (x + 4) M(x) on -1 <= t <= 1, cut where its remainder is 2e-9 for
// float and 2e-17 for double, of a value between 1 and 5, and rewritten in powers of t.
template <class T>
struct Mills;

template <>
struct Mills<float> {
  static constexpr int kDegree = 11;
  static constexpr float kSeries[] = {1.893219064f,     -1.523770884f,     0.9704095376f,   -0.4675417197f,
                                      0.1513919463f,    -0.01889425496f,   -0.008722952689f, 0.004065851591f,
                                      0.0003350193591f, -0.0005403633229f, -4.339179843e-6f, 5.309786728e-5f};
};

template <>
struct Mills<double> {
  static constexpr int kDegree = 24;
  static constexpr double kSeries[] = {
      1.89321906330848536,     -1.52377091081998344,    0.970409554867588392,    -0.467540962998332469,
      0.151391762312443473,    -0.0189004508617112580,  -0.00872229527426012425, 0.00408785568120007137,
      3.34244616232844091e-4,  -5.79269304647871942e-4, -4.78326425941720810e-6, 8.80957312107233808e-5,
      1.79639712140407778e-6,  -1.48432776790802936e-5, -1.57876656546773738e-6, 2.56875531122972230e-6,
      6.82963383167346667e-7,  -4.00493929251171007e-7, -2.17741950220393269e-7, 4.47306005145032296e-8,
      5.37110376515895738e-8,  -1.47229989237463069e-9, -9.35134044482434061e-9, -3.00739796723987650e-10,
      8.53083886026052982e-10};
};

template <class Isa, int k, class T>
MAMLFAST_INLINE T mills_series(T t) {
  if constexpr (k == Mills<T>::kDegree) {
    return Mills<T>::kSeries[k];
  } else {
    return Isa::madd(mills_series<Isa, k + 1>(t), t, Mills<T>::kSeries[k]);
  }
}

// Phi(-|x|) = density(x) M(|x|): one exponential serves the distribution and its density.
struct Gelu {
  template <class Isa, class T>
  static MAMLFAST_INLINE Slopes<T> at(T x) {
    const T d = distance(x), square = d * d;
    // What rounding took from the square, where an instruction tells: little, but exp makes it grow.
    const T lost = Isa::madd(d, d, -square);
    const T e = exp_flushed<Isa>(T(-0.5) * square);
    const T density = T(0.3989422804014327) * (e - T(0.5) * lost * e);
    const T inverse = T(1) / (d + T(4));
    const T tail = density * (mills_series<Isa, 0>((d - T(4)) * inverse) * inverse);
    const T Phi = x < 0 ? tail : T(1) - tail;
    return {x * Phi, Phi + std::copysign(d, x) * density, density * (T(2) - square)};
  }
};

}  // namespace mamlfast
