// What attention does to a tile of scores between the products; the layout stands in attention_visible.h, the
// mathematics in mamlfast/ops/attention.py, in the same names.
//
// Every pass is one straight loop over the lanes of a row. What only some calls need (soft-cap, masks, dropout) is a
// pass of its own, so that the others do not pay for it.
#pragma once

#include "activations.h"
#include "attention_visible.h"
#include "exp.h"
#include "simd.h"

#include <cmath>
#include <cstdint>

namespace mamlfast {

// Scores become cap tanh(s / cap); `slope` is the derivative f' of that, `bend` is f'' / f'.
template <class Isa, class T>
MAMLFAST_INLINE void soft_cap(T* s, T cap, int64_t keys, int64_t lanes, T* slope, T* bend) {
  const T inverse = T(1) / cap;
  for (int64_t c = 0; c < keys; ++c) {
    const int64_t at = c * kRows;
#pragma omp simd
    for (int64_t r = at; r < at + lanes; ++r) {
      const Slopes<T> f = Tanh::at<Isa>(s[r] * inverse);
      s[r] = cap * f.value;
      slope[r] = f.first;
      if (bend) bend[r] = T(-2) * inverse * f.value;
    }
  }
}

// x *= y over a tile.
template <class T>
MAMLFAST_INLINE void multiply_by(T* x, const T* y, int64_t keys, int64_t lanes) {
  for (int64_t at = 0; at < keys * kRows; at += kRows) {
#pragma omp simd
    for (int64_t r = at; r < at + lanes; ++r) x[r] *= y[r];
  }
}

// s += bias, and -inf where the bias says so, whatever s is.
template <class T>
MAMLFAST_INLINE void add_bias(T* s, const T* bias, int64_t keys, int64_t lanes) {
  for (int64_t at = 0; at < keys * kRows; at += kRows) {
#pragma omp simd
    for (int64_t r = at; r < at + lanes; ++r) s[r] = bias[r] == -kInf<T> ? bias[r] : s[r] + bias[r];
  }
}

// x = 0 where hidden, whatever x is.
template <class T>
MAMLFAST_INLINE void hide(T* x, const T* bias, int64_t keys, int64_t lanes) {
  for (int64_t at = 0; at < keys * kRows; at += kRows) {
#pragma omp simd
    for (int64_t r = at; r < at + lanes; ++r) x[r] = bias[r] == -kInf<T> ? T(0) : x[r];
  }
}

// The softmax of the rows of a query block as far as their keys have come by: sums are of exp(s - max).
template <class T>
struct Running {
  T *max, *sum, *sum_dot, *shrink;  // (kRows,)

  MAMLFAST_INLINE void start() const {
    for (int64_t r = 0; r < kRows; ++r) max[r] = -kInf<T>, sum[r] = 0, sum_dot[r] = 0;
  }

  // Takes in the maxima of s and sets `shrink`, what old sums are to be multiplied with; returns whether that is
  // anything but one. The maximum passes over NaN, which the exponential does not.
  MAMLFAST_INLINE bool raise(const T* s, int64_t keys, int64_t lanes) const {
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) shrink[r] = max[r];
    int64_t c = 0;
    for (; c + 4 <= keys; c += 4) {
      const T *s0 = s + c * kRows, *s1 = s0 + kRows, *s2 = s1 + kRows, *s3 = s2 + kRows;
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) {
        T m = max[r];
        m = s0[r] > m ? s0[r] : m;
        m = s1[r] > m ? s1[r] : m;
        m = s2[r] > m ? s2[r] : m;
        m = s3[r] > m ? s3[r] : m;
        max[r] = m;
      }
    }
    for (; c < keys; ++c) {
      const T* s0 = s + c * kRows;
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) max[r] = s0[r] > max[r] ? s0[r] : max[r];
    }
    int raised = 0;
#pragma omp simd reduction(| : raised)
    for (int64_t r = 0; r < lanes; ++r) raised |= shrink[r] != max[r];
    return raised != 0;
  }

  template <class Isa>
  MAMLFAST_INLINE void shrink_sums(int64_t lanes, bool tangent) const {
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) {
      shrink[r] = exp_flushed<Isa>(shrink[r] - shift(max[r]));
      sum[r] *= shrink[r];
    }
    if (!tangent) return;
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) sum_dot[r] *= shrink[r];
  }

  // s becomes exp(s - max).
  template <class Isa>
  MAMLFAST_INLINE void add(T* s, int64_t keys, int64_t lanes) const {
    int64_t c = 0;
    for (; c + 2 <= keys; c += 2) {
      T *s0 = s + c * kRows, *s1 = s0 + kRows;
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) {
        s0[r] = exp_flushed<Isa>(s0[r] - shift(max[r]));
        s1[r] = exp_flushed<Isa>(s1[r] - shift(max[r]));
        sum[r] += s0[r] + s1[r];
      }
    }
    if (c == keys) return;
    T* s0 = s + c * kRows;
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) {
      s0[r] = exp_flushed<Isa>(s0[r] - shift(max[r]));
      sum[r] += s0[r];
    }
  }

  // s_dot becomes e s_dot.
  MAMLFAST_INLINE void add_dot(const T* e, T* s_dot, int64_t keys, int64_t lanes) const {
    for (int64_t at = 0; at < keys * kRows; at += kRows) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) {
        s_dot[at + r] *= e[at + r];
        sum_dot[r] += s_dot[at + r];
      }
    }
  }

  // A row without any key yet has nothing to shift by.
  static MAMLFAST_INLINE T shift(T max) { return max == -kInf<T> ? T(0) : max; }
};

// What the backward knows of its rows, (kRows,) each.
template <class T>
struct Statistics {
  T *lse, *mu, *delta, *delta_dot;
};

// The four tiles of the backward, turned in place from scores and products into what the next products take:
//   s -> P, s_dot -> P_dot, p_bar -> z_bar = scale slope S_bar, p_bar_dot -> z_bar_dot.
template <class T>
struct Cotangents {
  T *s, *s_dot, *p_bar, *p_bar_dot;
  T *slope, *bend;  // of the soft-cap, or null
  T scale;

  template <class Isa>
  MAMLFAST_INLINE void primal(const Statistics<T>& of, int64_t keys, int64_t lanes) const {
    for (int64_t at = 0; at < keys * kRows; at += kRows) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) {
        const T p = exp_flushed<Isa>(s[at + r] - of.lse[r]);
        p_bar[at + r] = scale * (p * (p_bar[at + r] - of.delta[r]));
        s[at + r] = p;
      }
    }
    if (slope) multiply_by(p_bar, slope, keys, lanes);
  }

  template <class Isa>
  MAMLFAST_INLINE void tangent(const Statistics<T>& of, int64_t keys, int64_t lanes) const {
    if (slope) multiply_by(s_dot, slope, keys, lanes), multiply_by(bend, s_dot, keys, lanes);
    for (int64_t at = 0; at < keys * kRows; at += kRows) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) {
        const T p = exp_flushed<Isa>(s[at + r] - of.lse[r]), p_dot = p * (s_dot[at + r] - of.mu[r]);
        const T centred = p_bar[at + r] - of.delta[r], centred_dot = p_bar_dot[at + r] - of.delta_dot[r];
        p_bar[at + r] = scale * (p * centred);
        p_bar_dot[at + r] = scale * (p_dot * centred + p * centred_dot);
        s[at + r] = p;
        s_dot[at + r] = p_dot;
      }
    }
    if (slope) uncap(keys, lanes);
  }

  // z_bar_dot = slope S_bar_dot + slope_dot S_bar, where `bend` has become slope_dot.
  MAMLFAST_INLINE void uncap(int64_t keys, int64_t lanes) const {
    for (int64_t at = 0; at < keys * kRows; at += kRows) {
#pragma omp simd
      for (int64_t r = at; r < at + lanes; ++r) {
        p_bar_dot[r] = slope[r] * p_bar_dot[r] + bend[r] * p_bar[r];
        p_bar[r] *= slope[r];
      }
    }
  }
};

}  // namespace mamlfast
