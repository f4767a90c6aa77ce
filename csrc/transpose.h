// Rows into columns, in squares that fit the registers.
#pragma once

#include "simd.h"

#include <cstdint>
#include <cstring>

namespace mamlfast {

// Elements of two vectors in a new order, those of the second counted on from the first.
template <int... order, class V>
MAMLFAST_INLINE V pick(const V& a, const V& b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, order...);
#else
  typedef int32_t Order __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Order{order...});
#endif
}

// A square of four floats or two doubles a side, transposed in registers of 16 bytes, which every processor has.
MAMLFAST_INLINE void transpose_square(const float* x, int64_t stride, float factor, float* y, int64_t y_stride) {
  typedef float Four __attribute__((vector_size(16)));
  Four a, b, c, d;
  std::memcpy(&a, x, sizeof a), std::memcpy(&b, x + stride, sizeof b);
  std::memcpy(&c, x + 2 * stride, sizeof c), std::memcpy(&d, x + 3 * stride, sizeof d);
  const Four ac_low = pick<0, 4, 1, 5>(a, c), ac_high = pick<2, 6, 3, 7>(a, c);
  const Four bd_low = pick<0, 4, 1, 5>(b, d), bd_high = pick<2, 6, 3, 7>(b, d);
  const Four columns[] = {pick<0, 4, 1, 5>(ac_low, bd_low), pick<2, 6, 3, 7>(ac_low, bd_low),
                          pick<0, 4, 1, 5>(ac_high, bd_high), pick<2, 6, 3, 7>(ac_high, bd_high)};
  for (int i = 0; i < 4; ++i) {
    const Four column = factor * columns[i];
    std::memcpy(y + i * y_stride, &column, sizeof column);
  }
}

MAMLFAST_INLINE void transpose_square(const double* x, int64_t stride, double factor, double* y, int64_t y_stride) {
  y[0] = factor * x[0], y[1] = factor * x[stride];
  y[y_stride] = factor * x[1], y[y_stride + 1] = factor * x[stride + 1];
}

// y [width, lanes] = factor x' of x [rows, width]; lanes without a row are zero. Strides are those between rows.
template <class T>
MAMLFAST_INLINE void transpose(const T* x, int64_t stride, int64_t rows, int64_t lanes, int64_t width, T factor, T* y,
                               int64_t y_stride) {
  constexpr int64_t kSide = 16 / sizeof(T);
  const int64_t whole_rows = rows / kSide * kSide, whole_width = width / kSide * kSide;
  for (int64_t r = 0; r < whole_rows; r += kSide)
    for (int64_t d = 0; d < whole_width; d += kSide)
      transpose_square(x + r * stride + d, stride, factor, y + d * y_stride + r, y_stride);
  for (int64_t d = 0; d < width; ++d)
    for (int64_t r = d < whole_width ? whole_rows : 0; r < lanes; ++r)
      y[d * y_stride + r] = r < rows ? factor * x[r * stride + d] : T(0);
}

}  // namespace mamlfast
