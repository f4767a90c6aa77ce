// Products of blocks that lie in the caches: a strip of the result stays in registers while the sum runs.
//
// c = a b, or c += a b, and optionally with a second pair of factors in the same sum (the tangent of a product has
// two). The vector runs along the rows of b and c; every element of a is broadcast, so a may lie either way. One sum
// has one order, that of k, whatever the shape of the block that it is part of.
//
// The compiler does not keep such a strip in registers by itself, so each instruction set is spelled out; which one is
// chosen at run time, as for the loops of simd.h.
#pragma once

#include "simd.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace mamlfast {

// c [M, N] = sum over pairs of a [M, K] b [K, N]; N in whole lines of 64 bytes. Strides are those between rows, and
// of an `a` by columns that between columns. The second pair is absent where its a is null.
template <class T>
struct Product {
  int64_t M, N, K;
  const T* a[2];
  int64_t a_stride;
  const T* b[2];
  int64_t b_stride[2];
  T* c;
  int64_t c_stride;
  bool add;
};

template <class T>
struct Gemm {
  void (*a_by_rows)(const Product<T>&);
  void (*a_by_columns)(const Product<T>&);
};

// Numbers in 64 bytes, to which widths are rounded whatever the instruction set.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

namespace baseline {

template <class Scalar>
struct Sse {
  using T = Scalar;
  typedef T Vector __attribute__((vector_size(16)));
  static constexpr int kWidth = 16 / sizeof(T), kRows = 4, kVectors = 2;
  static MAMLFAST_INLINE Vector load(const T* x) {
    Vector v;
    std::memcpy(&v, x, sizeof v);
    return v;
  }
  static MAMLFAST_INLINE void store(T* x, Vector v) { std::memcpy(x, &v, sizeof v); }
  static MAMLFAST_INLINE Vector all(T x) { return x - Vector{}; }
  static MAMLFAST_INLINE Vector madd(Vector a, Vector b, Vector c) { return a * b + c; }
};
using Float = Sse<float>;
using Double = Sse<double>;
#include "gemm_kernel.h"

}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {

struct Float {
  using T = float;
  using Vector = __m256;
  static constexpr int kWidth = 8, kRows = 6, kVectors = 2;
  static MAMLFAST_INLINE Vector load(const T* x) { return _mm256_loadu_ps(x); }
  static MAMLFAST_INLINE void store(T* x, Vector v) { _mm256_storeu_ps(x, v); }
  static MAMLFAST_INLINE Vector all(T x) { return _mm256_set1_ps(x); }
  static MAMLFAST_INLINE Vector madd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
};

struct Double {
  using T = double;
  using Vector = __m256d;
  static constexpr int kWidth = 4, kRows = 6, kVectors = 2;
  static MAMLFAST_INLINE Vector load(const T* x) { return _mm256_loadu_pd(x); }
  static MAMLFAST_INLINE void store(T* x, Vector v) { _mm256_storeu_pd(x, v); }
  static MAMLFAST_INLINE Vector all(T x) { return _mm256_set1_pd(x); }
  static MAMLFAST_INLINE Vector madd(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
};
#include "gemm_kernel.h"

}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(MAMLFAST_AVX512))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif
namespace avx512 {

struct Float {
  using T = float;
  using Vector = __m512;
  static constexpr int kWidth = 16, kRows = 6, kVectors = 4;
  static MAMLFAST_INLINE Vector load(const T* x) { return _mm512_loadu_ps(x); }
  static MAMLFAST_INLINE void store(T* x, Vector v) { _mm512_storeu_ps(x, v); }
  static MAMLFAST_INLINE Vector all(T x) { return _mm512_set1_ps(x); }
  static MAMLFAST_INLINE Vector madd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Double {
  using T = double;
  using Vector = __m512d;
  static constexpr int kWidth = 8, kRows = 6, kVectors = 4;
  static MAMLFAST_INLINE Vector load(const T* x) { return _mm512_loadu_pd(x); }
  static MAMLFAST_INLINE void store(T* x, Vector v) { _mm512_storeu_pd(x, v); }
  static MAMLFAST_INLINE Vector all(T x) { return _mm512_set1_pd(x); }
  static MAMLFAST_INLINE Vector madd(Vector a, Vector b, Vector c) { return _mm512_fmadd_pd(a, b, c); }
};
#include "gemm_kernel.h"

}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

// The products for the processor at hand.
template <class T>
Gemm<T> gemm() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (width() == Width::kAvx512) return avx512::of(T{});
  if (width() == Width::kAvx2) return avx2::of(T{});
#endif
  return baseline::of(T{});
}

}  // namespace mamlfast
