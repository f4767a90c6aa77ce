// An exponential that compilers can vectorise: straight-line arithmetic, no table, no branch.
//
//     exp(x) = 2^n exp(r),   n = round(x / ln 2),   r = x - n ln 2,   |r| <= ln(2) / 2
//
// exp(r) is its Taylor series, to degree 7 for float and 13 for double (remainders 5e-9 and 4e-18), which leaves
// the rounding of the last steps: about one unit in the last place.
#pragma once

#include "simd.h"

#include <cstdint>
#include <cstring>

namespace mamlfast {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int kDegree = 7, kMantissa = 23;
  static constexpr Bits kBias = 127;
  // ln 2 in two parts, the first with so few bits that its product with n is exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
  static constexpr float kRound = 12582912.0f;
  // Below the first the result is not a normal number, above the second it is not finite.
  static constexpr float kLowest = -87.33654f, kHighest = 88.8f;
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kDegree = 13, kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLowest = -708.3964185322641, kHighest = 709.9;
};

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// r^0/k! + r^1/(k+1)! + ... up to the coefficient 1/degree!, by Horner's rule.
template <class Isa, int k, int degree, class T>
MAMLFAST_INLINE T taylor(T r) {
  constexpr T coefficient = static_cast<T>(inverse_factorial(k));
  if constexpr (k == degree) {
    return coefficient;
  } else {
    return Isa::madd(taylor<Isa, k + 1, degree>(r), r, coefficient);
  }
}

// The reduction above: returns 2^n and sets r, for x below the point where exp overflows.
template <class Isa, class T>
MAMLFAST_INLINE T power_of_two(T x, T& r) {
  using K = ExpConstants<T>;
  const T shifted = x * T(1.4426950408889634) + K::kRound;
  const T n = shifted - K::kRound;
  r = Isa::madd(n, -K::kLn2Low, Isa::madd(n, -K::kLn2High, x));
  typename K::Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + K::kBias) << K::kMantissa;
  T power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) where results below the smallest normal number are zero; exp(-inf) = 0, NaN stays NaN.
template <class Isa, class T>
MAMLFAST_INLINE T exp_flushed(T x) {
  using K = ExpConstants<T>;
  T r;
  const T power = power_of_two<Isa>(x > K::kHighest ? K::kHighest : x, r);
  const T value = taylor<Isa, 0, K::kDegree>(r) * power;
  return x < K::kLowest ? T(0) : value;
}

// exp(x) as above and exp(x) - 1 without cancellation, for x <= 0.
template <class T>
struct ExpAndExpm1 {
  T e, em1;
};

template <class Isa, class T>
MAMLFAST_INLINE ExpAndExpm1<T> exp_and_expm1(T x) {
  using K = ExpConstants<T>;
  T r;
  const T power = power_of_two<Isa>(x < K::kLowest ? K::kLowest : x, r);
  const T q = r * taylor<Isa, 1, K::kDegree>(r);
  return {x < K::kLowest ? T(0) : Isa::madd(q, power, power), Isa::madd(q, power, power - T(1))};
}

}  // namespace mamlfast
