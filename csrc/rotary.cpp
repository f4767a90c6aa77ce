// Rotary position embedding and its transpose on CPUs; the mathematics stands in mamlfast/ops/rotary.py, in the same
// names. One pass over memory; both tensors are visited where their strides put them.
#include "simd.h"
#include "strided.h"

#include <torch/csrc/stable/library.h>

namespace mamlfast {
namespace {

template <class T>
struct Rotation {
  Heads<T> x, y;         // (B, H, Tokens, D)
  const T *cos, *sin;    // (B or 1, Tokens, N)
  int64_t table_stride;  // from one sequence's table to the next, or 0
  int64_t H, Tokens, D, N;
  bool interleaved, transposed;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    // A token's heads one after the other, so that its tables are read once.
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (H * Tokens), t = row / H % Tokens, h = row % H;
      const int64_t angle = b * table_stride + t * N;
      const T* xr = x.at(b, h, t);
      T* yr = y.at(b, h, t);
      if (interleaved) {
        transposed ? rotate<2, true>(xr, cos + angle, sin + angle, 1, yr)
                   : rotate<2, false>(xr, cos + angle, sin + angle, 1, yr);
      } else {
        transposed ? rotate<1, true>(xr, cos + angle, sin + angle, N / 2, yr)
                   : rotate<1, false>(xr, cos + angle, sin + angle, N / 2, yr);
      }
#pragma omp simd
      for (int64_t i = N; i < D; ++i) yr[i] = xr[i];
    }
  }

  // Pairs begin `step` apart and their second elements lie `gap` behind the first.
  template <int64_t step, bool transpose>
  MAMLFAST_INLINE void rotate(const T* xr, const T* c, const T* s, int64_t gap, T* yr) const {
#pragma omp simd
    for (int64_t i = 0; i < N / 2; ++i) {
      const int64_t one = step * i, two = one + gap;
      if constexpr (transpose) {
        yr[one] = xr[one] * c[one] + xr[two] * s[two];
        yr[two] = xr[two] * c[two] - xr[one] * s[one];
      } else {
        yr[one] = xr[one] * c[one] - xr[two] * s[one];
        yr[two] = xr[two] * c[two] + xr[one] * s[two];
      }
    }
  }
};

void rotary(Tensor x, Tensor cos, Tensor sin, Tensor y, bool interleaved, bool transposed) {
  STD_TORCH_CHECK(cos.dim() == 3 && x.dim() == 4, "rotary: x [B, H, T, D] and cos [B or 1, T, N] expected");
  const int64_t B = x.size(0), H = x.size(1), Tokens = x.size(2), D = x.size(3), N = cos.size(2);
  const int64_t tables = cos.size(0);
  STD_TORCH_CHECK((tables == B || tables == 1) && cos.size(1) == Tokens && N % 2 == 0 && N <= D,
                  "rotary: cos does not fit x");
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t angles = tables * Tokens * N;
    const Rotation<T> kernel{heads<T>(x, x, "x"),
                             heads<T>(y, x, "y"),
                             data<T>(cos, x, angles, "cos"),
                             data<T>(sin, x, angles, "sin"),
                             tables == 1 ? 0 : Tokens * N,
                             H, Tokens, D, N, interleaved, transposed};
    over(B * H * Tokens, D, kernel);
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, Tensor(a!) y, bool interleaved, bool transposed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) { m.impl("rotary", TORCH_BOX(&mamlfast::rotary)); }
