// What every kernel asks of the tensors that it is given: CPU, contiguous, float32 or float64, one dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace mamlfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check(const Tensor& t, ScalarType dtype, int64_t numel, const char* name,
                  const char* expected = "the dtype of the first argument") {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, ": a contiguous CPU tensor expected");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": ", expected, " expected");
  STD_TORCH_CHECK(t.numel() == numel, name, ": ", numel, " elements expected, got ", t.numel());
}

template <class T>
T* data(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check(t, like.scalar_type(), numel, name);
  return static_cast<T*>(t.mutable_data_ptr());
}

// A null pointer for an absent tensor.
template <class T>
T* data(const MaybeTensor& t, const Tensor& like, int64_t numel, const char* name) {
  return t.has_value() ? data<T>(*t, like, numel, name) : nullptr;
}

// Calls `f` with a float or a double, after the dtype of `t`.
template <class F>
void for_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "float32 or float64 expected");
  f(double{});
}

}  // namespace mamlfast
