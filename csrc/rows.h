// Sums and maxima over one row, for the kernels that visit rows.
//
// Long rows (a vocabulary) are added up a block at a time: within a block in the dtype of the row, the blocks in
// double. A float sum of a hundred thousand terms is then as good as one of a few dozen, and a buffer as long as
// a block stays in the first-level cache.
#pragma once

#include "exp.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace mamlfast {

constexpr int64_t kBlock = 1024;

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();

// The maximum, past any NaN; -inf of nothing.
template <class T>
MAMLFAST_INLINE T maximum(const T* x, int64_t count) {
  T m = -kInf<T>;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < count; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

template <class T>
MAMLFAST_INLINE void fill_zero(T* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

template <class T>
MAMLFAST_INLINE double sum_of(const T* x, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += x[i];
    total += sum;
  }
  return total;
}

template <class T>
MAMLFAST_INLINE double sum_of_product(const T* a, const T* b, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += a[i] * b[i];
    total += sum;
  }
  return total;
}

// e = factor exp(x - shift).
template <class Isa, class T>
MAMLFAST_INLINE void exponentials(const T* x, T shift, T factor, int64_t count, T* e) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) e[i] = factor * exp_flushed<Isa>(x[i] - shift);
}

// logsumexp(x) = max + log_sum, and its tangent mu = <softmax(x), x_dot>, zero where x_dot is null. In double,
// so that exp(x - logsumexp(x)) is rounded no more than exp is.
template <class T>
struct LogSumExp {
  T max;
  double log_sum, mu;
};

template <class Isa, class T>
MAMLFAST_INLINE LogSumExp<T> log_sum_exp(const T* x, const T* x_dot, int64_t count) {
  const T max = maximum(x, count);
  double sum = 0, sum_dot = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t n = std::min(kBlock, count - first);
    T e[kBlock];
    exponentials<Isa>(x + first, max, T(1), n, e);
    sum += sum_of(e, n);
    if (x_dot) sum_dot += sum_of_product(e, x_dot + first, n);
  }
  return {max, std::log(sum), sum_dot / sum};
}

}  // namespace mamlfast
