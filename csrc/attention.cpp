// Attention to second order on CPUs, fused: no score ever leaves the caches. The mathematics stands in
// mamlfast/ops/attention.py, in the same names.
//
// The work is cut into tiles of queries and keys. A tile's products run through gemm.h, what lies between them through
// attention_tiles.h, which keys are seen is the matter of attention_visible.h. Here is the forward sweep; the backward
// one is attention_backward.cpp. The rows of a query block are transposed once for all its keys.
//
// A null pointer is a tangent that does not exist or a result that nobody wants. Every sum has one order, whatever
// the number of threads and with or without tangents.
#include "attention_call.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

namespace mamlfast {
namespace {

template <class T>
struct Forward {
  Call<T> call;
  Heads<const T> q, k, v, q_dot, k_dot, v_dot;
  T *o, *o_dot, *lse, *mu;  // contiguous
  bool has_tangent;

  struct Scratch {
    T *q, *q_dot, *s, *s_dot, *bias, *factor, *slope, *o, *o_dot, *clean;
    T *k, *v, *k_dot, *v_dot;  // copies of the keys of one head, where its rows do not lie together
    Running<T> running;
  };

  struct Factors {
    Rows<T> k, v, k_dot, v_dot;
  };

  MAMLFAST_INLINE int64_t blocks() const { return (call.queries + kRows - 1) / kRows; }

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t D = call.D, E = call.E;
    Workspace<T> memory(18, kRows * 2 * (D + E) + 4 * kRows + kKeys * std::max(D, E) + 5 * kTile<T> +
                            copied(k, D) + copied(v, E) + copied(k_dot, D) + copied(v_dot, E));
    const auto lane = [&] { return memory.take(kRows); };
    const auto tile = [&] { return memory.take(kTile<T>); };
    const Scratch at{memory.take(kRows * D), memory.take(kRows * D), tile(), tile(), tile(), tile(), tile(),
                     memory.take(kRows * E), memory.take(kRows * E), memory.take(kKeys * std::max(D, E)),
                     memory.take(copied(k, D)), memory.take(copied(v, E)), memory.take(copied(k_dot, D)),
                     memory.take(copied(v_dot, E)),
                     {lane(), lane(), lane(), lane()}};
    Factors factors;
    int64_t gathered = -1;
    for (int64_t item = begin; item < end; ++item) {
      // Under a causal mask late blocks cost more than early ones; in this order neighbours cost the same together.
      const int64_t head = item / blocks(), b = head / call.H, h = head % call.H, i = item % blocks();
      const int64_t block = i % 2 ? blocks() - 1 - i / 2 : i / 2;
      if (gathered != head / call.group()) factors = gather(at, b, h / call.group());
      gathered = head / call.group();
      rows<Isa>(at, factors, b, h, block * kRows);
    }
  }

  // How many numbers of a tensor are copied: all of a head, if there are rows enough to visit them again.
  MAMLFAST_INLINE int64_t copied(const Heads<const T>& x, int64_t width) const {
    return x && x.row != width && call.queries > kRows ? call.keys * width : 0;
  }

  MAMLFAST_INLINE Factors gather(const Scratch& at, int64_t b, int64_t g) const {
    const auto of_keys = [&](const Heads<const T>& x, int64_t width, T* copy) {
      if (x && !copied(x, width)) return Rows<T>{x.at(b, g, 0), x.row};
      return together<T>(x, b, g, 0, call.keys, width, copy);
    };
    return {of_keys(k, call.D, at.k), of_keys(v, call.E, at.v), of_keys(k_dot, call.D, at.k_dot),
            of_keys(v_dot, call.E, at.v_dot)};
  }

  template <class Isa>
  MAMLFAST_INLINE void rows(const Scratch& at, const Factors& factors, int64_t b, int64_t h, int64_t t0) const {
    const int64_t count = std::min(kRows, call.queries - t0), lanes = rounded_up(count, kLine<T>);
    transpose(q.at(b, h, t0), q.row, count, lanes, call.D, call.scale, at.q, kRows);
    if (q_dot) transpose(q_dot.at(b, h, t0), q_dot.row, count, lanes, call.D, call.scale, at.q_dot, kRows);
    at.running.start();
    fill_zero(at.o, kRows * call.E);
    if (has_tangent) fill_zero(at.o_dot, kRows * call.E);
    const int64_t end = call.visible.end_key(t0 + count - 1);
    for (int64_t s0 = call.visible.first_key(t0); s0 < end; s0 += kKeys) {
      const Tile tile{b, h, t0, count, s0, std::min(kKeys, end - s0)};
      const Sight sight = call.visible.look(tile, at.bias, at.factor);
      if (sight != Sight::kHidden) visit<Isa>(at, factors, tile, sight, lanes);
    }
    finish(at, (b * call.H + h) * call.queries + t0, count);
  }

  template <class Isa>
  MAMLFAST_INLINE void visit(const Scratch& at, const Factors& of_head, const Tile& tile, Sight sight,
                             int64_t lanes) const {
    const int64_t keys = tile.keys;
    const Rows<T> none;
    const Factors f{of_head.k.from(tile.s0), of_head.v.from(tile.s0), of_head.k_dot.from(tile.s0),
                    of_head.v_dot.from(tile.s0)};
    scores<T>(call, keys, lanes, call.D, f.k, at.q, none, nullptr, at.s);
    if (call.cap != T(0)) soft_cap<Isa, T>(at.s, call.cap, keys, lanes, at.slope, nullptr);
    if (sight == Sight::kPartial) add_bias(at.s, at.bias, keys, lanes);
    if (at.running.raise(at.s, keys, lanes)) shrink<Isa>(at, tile.rows, lanes);
    at.running.template add<Isa>(at.s, keys, lanes);
    if (has_tangent) {
      scores<T>(call, keys, lanes, call.D, f.k, q_dot ? at.q_dot : nullptr, f.k_dot, at.q, at.s_dot);
      if (call.cap != T(0)) multiply_by(at.s_dot, at.slope, keys, lanes);
      if (sight == Sight::kPartial) hide(at.s_dot, at.bias, keys, lanes);
      at.running.add_dot(at.s, at.s_dot, keys, lanes);
    }
    if (call.visible.kept != T(0)) {
      call.visible.draw(tile, at.factor);
      multiply_by(at.s, at.factor, keys, lanes);
      if (has_tangent) multiply_by(at.s_dot, at.factor, keys, lanes);
    }
    const Accumulate<T, false> accumulate{call, sight, at.bias, at.clean};
    accumulate(tile.rows, keys, call.E, at.s, f.v, nullptr, none, at.o, call.E);
    if (has_tangent) accumulate(tile.rows, keys, call.E, at.s_dot, f.v, at.s, f.v_dot, at.o_dot, call.E);
  }

  template <class Isa>
  MAMLFAST_INLINE void shrink(const Scratch& at, int64_t count, int64_t lanes) const {
    at.running.template shrink_sums<Isa>(lanes, has_tangent);
    for (int64_t r = 0; r < count; ++r) {
      const T factor = at.running.shrink[r];
#pragma omp simd
      for (int64_t e = r * call.E; e < (r + 1) * call.E; ++e) at.o[e] *= factor;
      if (!has_tangent) continue;
#pragma omp simd
      for (int64_t e = r * call.E; e < (r + 1) * call.E; ++e) at.o_dot[e] *= factor;
    }
  }

  MAMLFAST_INLINE void finish(const Scratch& at, int64_t first, int64_t count) const {
    const int64_t E = call.E;
    for (int64_t r = 0; r < count; ++r) {
      const T sum = at.running.sum[r];
      const bool empty = sum == T(0);
      const T inverse = empty ? T(0) : T(1) / sum;
      lse[first + r] = empty ? -kInf<T> : at.running.max[r] + std::log(sum);
      T* out = o + (first + r) * E;
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) out[e] = inverse * at.o[r * E + e];
      if (!has_tangent) continue;
      const T row_mu = inverse * at.running.sum_dot[r];
      mu[first + r] = row_mu;
      T* out_dot = o_dot + (first + r) * E;
#pragma omp simd
      for (int64_t e = 0; e < E; ++e) out_dot[e] = inverse * at.o_dot[r * E + e] - row_mu * out[e];
    }
  }
};

void attention_fwd(Tensor q, Tensor k, Tensor v, MaybeTensor q_dot, MaybeTensor k_dot, MaybeTensor v_dot, Tensor o,
                   MaybeTensor o_dot, Tensor lse, MaybeTensor mu, MaybeTensor query_ids, MaybeTensor key_ids,
                   MaybeTensor key_mask, MaybeTensor mask, double scale, double softcap, int64_t left, int64_t right,
                   int64_t keep_from, double kept, int64_t seed) {
  const Spec spec{query_ids, key_ids, key_mask, mask, scale, softcap, left, right, keep_from, kept, seed};
  for_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const Call<T> c = call_of<T>(q, k, v, spec);
    const int64_t rows = c.B * c.H * c.queries;
    const Forward<T> kernel{c,
                            heads<const T>(q, q, c.H, c.queries, c.D, "q"),
                            heads<const T>(k, q, c.G, c.keys, c.D, "k"),
                            heads<const T>(v, q, c.G, c.keys, c.E, "v"),
                            heads<const T>(q_dot, q, c.H, c.queries, c.D, "q_dot"),
                            heads<const T>(k_dot, q, c.G, c.keys, c.D, "k_dot"),
                            heads<const T>(v_dot, q, c.G, c.keys, c.E, "v_dot"),
                            data<T>(o, q, rows * c.E, "o"),
                            data<T>(o_dot, q, rows * c.E, "o_dot"),
                            data<T>(lse, q, rows, "lse"),
                            data<T>(mu, q, rows, "mu"),
                            o_dot.has_value()};
    STD_TORCH_CHECK(o_dot.has_value() == mu.has_value(), "attention_fwd: o_dot and mu expected together");
    over(c.B * c.H * kernel.blocks(), kRows * c.keys, kernel);
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, Tensor(a!) o, "
      "Tensor(b!)? o_dot, Tensor(c!) lse, Tensor(d!)? mu, " MAMLFAST_ATTENTION_SPEC);
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) { m.impl("attention_fwd", TORCH_BOX(&mamlfast::attention_fwd)); }
