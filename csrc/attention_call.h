// What the two sweeps of attention share: how their tensors are read, and the products over a tile.
#pragma once

#include "attention_tiles.h"
#include "attention_visible.h"
#include "gemm.h"
#include "simd.h"
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <utility>

namespace mamlfast {

template <class T>
constexpr int64_t kTile = kRows * kKeys;

MAMLFAST_INLINE int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Memory of one thread for the length of one call, cut into pieces that begin at a line of the cache. Between them
// lies a gap, for pieces at equal distance from a page would get in each other's way.
template <class T>
class Workspace {
 public:
  Workspace(int64_t pieces, int64_t size)
      : memory_(static_cast<T*>(operator new[]((size + pieces * (kGap + 1) * kLine<T>) * sizeof(T), kAlign))) {}
  T* take(int64_t size) {
    T* const piece = memory_.get() + used_;
    used_ += rounded_up(size, kLine<T>) + kGap * kLine<T>;
    return piece;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  static constexpr int64_t kGap = 5;
  struct Free {
    void operator()(T* p) const { operator delete[](p, kAlign); }
  };
  std::unique_ptr<T[], Free> memory_;
  int64_t used_ = 0;
};

// [B, heads, rows, width] in any layout whose rows are contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, row;

  explicit operator bool() const { return data != nullptr; }
  MAMLFAST_INLINE T* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * row; }
};

// One factor of a product, as rows.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;

  MAMLFAST_INLINE Rows from(int64_t row) const { return data ? Rows{data + row * stride, stride} : *this; }
};

// Rows of one head, from where they lie if they lie together. Rows at a distance of a power of two, with those of other
// heads between them, share few sets of the caches: one copy costs less than many visits.
template <class T>
MAMLFAST_INLINE Rows<T> together(const Heads<const T>& x, int64_t b, int64_t h, int64_t first, int64_t count,
                                 int64_t width, T* copy) {
  if (!x) return {};
  const T* from = x.at(b, h, first);
  if (x.row == width) return {from, width};
  for (int64_t r = 0; r < count; ++r) {
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) copy[r * width + d] = from[r * x.row + d];
  }
  return {copy, width};
}

template <class T>
struct Call {
  int64_t B, H, G, queries, keys, D, E;
  T scale, cap;  // cap is 0 without a soft-cap
  Visible<T> visible;
  Gemm<T> gemm;

  MAMLFAST_INLINE int64_t group() const { return H / G; }
};

// out += a' b over the keys or the queries of a tile, pair after pair, where a hidden pair adds nothing even if its row
// of b is not finite. `kByRows`: a's rows belong to out's rows, as a tile's do to keys.
template <class T, bool kByRows>
struct Accumulate {
  const Call<T>& call;
  Sight sight;
  const T* bias;
  T* clean;  // (kRows or kKeys, width), scratch

  MAMLFAST_INLINE void operator()(int64_t M, int64_t K, int64_t width, const T* a, Rows<T> b, const T* a_2, Rows<T> b_2,
                                  T* out, int64_t stride) const {
    if (!out) return;
    if (!b.data) std::swap(a, a_2), std::swap(b, b_2);
    if (!b.data) return;
    if (!b_2.data) a_2 = nullptr;
    if (sight == Sight::kPartial && !(finite(b, K, width) && (!a_2 || finite(b_2, K, width)))) {
      spare_hidden(M, K, width, a, b, out, stride);
      if (a_2) spare_hidden(M, K, width, a_2, b_2, out, stride);
      return;
    }
    const Product<T> product{M,   width,  K,   {a, a_2}, kRows, {b.data, b_2.data}, {b.stride, b_2.stride},
                             out, stride, true};
    (kByRows ? call.gemm.a_by_rows : call.gemm.a_by_columns)(product);
  }

  MAMLFAST_INLINE static bool finite(const T* row, int64_t width) {
    int bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t d = 0; d < width; ++d) bad |= !(std::abs(row[d]) <= std::numeric_limits<T>::max());
    return bad == 0;
  }

  MAMLFAST_INLINE static bool finite(Rows<T> b, int64_t K, int64_t width) {
    bool all = true;
    for (int64_t k = 0; k < K; ++k) all &= finite(b.data + k * b.stride, width);
    return all;
  }

  // The rare path: rows of b that are not finite leave the product and are added pair by pair.
  __attribute__((noinline)) void spare_hidden(int64_t M, int64_t K, int64_t width, const T* a, Rows<T> b, T* out,
                                              int64_t stride) const {
    for (int64_t k = 0; k < K; ++k) {
      const T* row = b.data + k * b.stride;
      const bool good = finite(row, width);
      for (int64_t d = 0; d < width; ++d) clean[k * width + d] = good ? row[d] : T(0);
      for (int64_t m = 0; !good && m < M; ++m) {
        const int64_t at = kByRows ? m * kRows + k : k * kRows + m;
        if (bias[at] == -kInf<T>) continue;
        for (int64_t d = 0; d < width; ++d) out[m * stride + d] += a[at] * row[d];
      }
    }
    const Product<T> product{M, width, K, {a, nullptr}, kRows, {clean, nullptr}, {width, 0}, out, stride, true};
    (kByRows ? call.gemm.a_by_rows : call.gemm.a_by_columns)(product);
  }
};

// out [keys, lanes] = x y' + x_2 y_2', the y transposed already.
template <class T>
MAMLFAST_INLINE void scores(const Call<T>& call, int64_t keys, int64_t lanes, int64_t width, Rows<T> x, const T* y,
                            Rows<T> x_2, const T* y_2, T* out) {
  if (!y) x.data = nullptr;
  if (!y_2) x_2.data = nullptr;
  if (!x.data) std::swap(x, x_2), std::swap(y, y_2);
  if (!x.data) {
    for (int64_t c = 0; c < keys; ++c) fill_zero(out + c * kRows, lanes);
    return;
  }
  Product<T> product{keys, lanes, width, {x.data, nullptr}, x.stride, {y, nullptr}, {kRows, 0}, out, kRows, false};
  call.gemm.a_by_rows(product);
  if (!x_2.data) return;
  product.a[0] = x_2.data, product.a_stride = x_2.stride, product.b[0] = y_2, product.add = true;
  call.gemm.a_by_rows(product);
}

inline void check_heads(const Tensor& x, const Tensor& like, int64_t heads, int64_t rows, int64_t width,
                        const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == like.scalar_type(), name, ": a CPU tensor of q's dtype expected");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == like.size(0) && x.size(1) == heads && x.size(2) == rows &&
                      x.size(3) == width,
                  name, ": expected [", like.size(0), ", ", heads, ", ", rows, ", ", width, "]");
  STD_TORCH_CHECK(width == 0 || x.stride(3) == 1, name, ": the last dimension must be contiguous");
}

template <class T>
Heads<T> heads(const MaybeTensor& x, const Tensor& like, int64_t heads, int64_t rows, int64_t width,
               const char* name) {
  if (!x.has_value()) return {};
  check_heads(*x, like, heads, rows, width, name);
  return {static_cast<T*>(x->mutable_data_ptr()), x->stride(0), x->stride(1), x->stride(2)};
}

template <class P>
const P* array(const MaybeTensor& x, ScalarType dtype, int64_t rows, int64_t columns, const char* name) {
  if (!x.has_value()) return nullptr;
  check(*x, dtype, rows * columns, name, "another dtype");
  return static_cast<const P*>(x->const_data_ptr());
}

// What every operator takes besides its tensors; the numbers of attention_spec.py, spelled out.
struct Spec {
  MaybeTensor query_ids, key_ids, key_mask, mask;
  double scale, softcap;
  int64_t left, right, keep_from;
  double kept;
  int64_t seed;
};

template <class T>
Call<T> call_of(const Tensor& q, const Tensor& k, const Tensor& v, const Spec& spec) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: [B, heads, rows, width] expected");
  const int64_t B = q.size(0), H = q.size(1), G = k.size(1), queries = q.size(2), keys = k.size(2);
  const int64_t D = q.size(3), E = v.size(3);
  STD_TORCH_CHECK(G > 0 && H % G == 0, "attention: query heads in groups of equal size expected");
  STD_TORCH_CHECK(D % kLine<T> == 0 && E % kLine<T> == 0, "attention: widths must be multiples of ", kLine<T>);
  Visible<T> visible{H, queries, keys, spec.left, spec.right};
  STD_TORCH_CHECK(spec.query_ids.has_value() == spec.key_ids.has_value(), "attention: ids come together");
  visible.query_ids = array<int64_t>(spec.query_ids, ScalarType::Long, B, queries, "query ids");
  visible.key_ids = array<int64_t>(spec.key_ids, ScalarType::Long, B, keys, "key ids");
  visible.key_mask = array<bool>(spec.key_mask, ScalarType::Bool, B, keys, "key_mask");
  if (spec.mask.has_value()) {
    const Tensor& mask = *spec.mask;
    const bool boolean = mask.scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(mask.is_cpu() && (boolean || mask.scalar_type() == q.scalar_type()),
                    "mask: a CPU tensor, bool or of q's dtype, expected");
    STD_TORCH_CHECK(mask.dim() == 4 && mask.size(0) == B && mask.size(1) == H && mask.size(2) == queries &&
                        mask.size(3) == keys,
                    "mask: expected [B, H, T, S]");
    if (boolean) {
      visible.allowed = static_cast<const bool*>(mask.const_data_ptr());
    } else {
      visible.added = static_cast<const T*>(mask.const_data_ptr());
    }
    visible.mask_batch = mask.stride(0), visible.mask_head = mask.stride(1);
    visible.mask_row = mask.stride(2), visible.mask_key = mask.stride(3);
  }
  visible.keep_from = static_cast<uint32_t>(spec.keep_from), visible.kept = static_cast<T>(spec.kept);
  visible.seed_low = static_cast<uint32_t>(spec.seed), visible.seed_high = static_cast<uint32_t>(spec.seed >> 32);
  return {B, H, G, queries, keys, D, E, static_cast<T>(spec.scale), static_cast<T>(spec.softcap), visible,
          gemm<T>()};
}

}  // namespace mamlfast

// How an operator's schema names `Spec`, after its tensors.
#define MAMLFAST_ATTENTION_SPEC                                                                                \
  "Tensor? query_ids, Tensor? key_ids, Tensor? key_mask, Tensor? mask, float scale, float softcap, int left, " \
  "int right, int keep_from, float kept, int seed) -> ()"
