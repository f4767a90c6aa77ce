// Tensors that are views: the elements of a row are neighbours in memory, and rows lie wherever strides put them.
#pragma once

#include "simd.h"
#include "tensors.h"

namespace mamlfast {

// A matrix [R, F] whose rows are a stride apart, or null.
template <class T>
struct Rows {
  T* first;
  int64_t stride;

  MAMLFAST_INLINE T* at(int64_t row, int64_t column) const {
    return first ? first + row * stride + column : nullptr;
  }
};

// Heads [B, H, T, D], each dimension but the last with a stride of its own.
template <class T>
struct Heads {
  T* first;
  int64_t b_stride, h_stride, t_stride;

  MAMLFAST_INLINE T* at(int64_t b, int64_t h, int64_t t) const {
    return first + b * b_stride + h * h_stride + t * t_stride;
  }
};

// Checks that `t` is a view of the shape and dtype of `like` with neighbours along its last dimension.
inline void check_view(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == like.scalar_type(), name,
                  ": a CPU tensor with the dtype of the first argument expected");
  STD_TORCH_CHECK(t.dim() == like.dim(), name, ": ", like.dim(), " dimensions expected, got ", t.dim());
  for (int64_t i = 0; i < like.dim(); ++i) {
    STD_TORCH_CHECK(t.size(i) == like.size(i), name, ": ", like.size(i), " expected in dimension ", i, ", got ",
                    t.size(i));
  }
  const int64_t last = like.dim() - 1;
  STD_TORCH_CHECK(t.size(last) == 1 || t.stride(last) == 1, name, ": neighbours along the last dimension expected");
}

template <class T>
Rows<T> rows(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(like.dim() == 2, name, ": a matrix expected");
  check_view(t, like, name);
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0)};
}

template <class T>
Rows<T> rows(const MaybeTensor& t, const Tensor& like, const char* name) {
  return t.has_value() ? rows<T>(*t, like, name) : Rows<T>{nullptr, 0};
}

template <class T>
Heads<T> heads(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(like.dim() == 4, name, ": four dimensions expected");
  check_view(t, like, name);
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace mamlfast
