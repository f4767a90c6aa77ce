// The backward sweep of attention on CPUs; attention.cpp says how the work is cut up.
#include "attention_call.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace mamlfast {
namespace {

// Queries and keys are cut into as many chunks each. In step j every query chunk i meets the key chunk (i + j) mod n,
// so that within a step no two pairs write to the same gradients, and over the steps every sum has one order.
struct Pair {
  int64_t b, g, t0, t1, s0, s1;
};

template <class T>
struct Backward {
  Call<T> call;
  Heads<const T> q, k, v, q_dot, k_dot, v_dot, o, o_dot, o_bar, o_bar_dot;
  const T *lse, *mu;                                              // contiguous
  Heads<T> q_bar, k_bar, v_bar, q_bar_dot, k_bar_dot, v_bar_dot;  // zero at first, added to
  bool has_tangent;
  const Pair* pairs;
  int64_t chunk_keys;

  struct Scratch {
    T *q, *q_dot, *o_bar, *o_bar_dot, *s, *s_dot, *p_bar, *p_bar_dot, *bias, *factor, *slope, *bend, *clean;
    T* copies[8];  // of the rows of a query block, of the keys of a chunk, where they do not lie together
    Statistics<T> of;
  };

  // The rows of a query block, and those of the keys of a chunk or, where it is visited, a tile.
  struct Factors {
    Rows<T> q, q_dot, o_bar, o_bar_dot, k, k_dot, v, v_dot;

    MAMLFAST_INLINE Factors of_tile(int64_t key) const {
      return {q, q_dot, o_bar, o_bar_dot, k.from(key), k_dot.from(key), v.from(key), v_dot.from(key)};
    }
  };

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t D = call.D, E = call.E, most = std::max(kRows, kKeys) * std::max(D, E);
    const int64_t most_keys = chunk_keys * std::max(D, E);
    Workspace<T> memory(25, kRows * (2 * D + 2 * E + 4) + 5 * most + 4 * most_keys + 8 * kTile<T>);
    const auto lane = [&] { return memory.take(kRows); };
    const auto tile = [&] { return memory.take(kTile<T>); };
    const auto copy = [&] { return memory.take(most); };
    const auto copies = [&] { return memory.take(most_keys); };
    const Scratch at{memory.take(kRows * D), memory.take(kRows * D), memory.take(kRows * E), memory.take(kRows * E),
                     tile(), tile(), tile(), tile(), tile(), tile(), tile(), tile(), copy(),
                     {copy(), copy(), copy(), copy(), copies(), copies(), copies(), copies()},
                     {lane(), lane(), lane(), lane()}};
    for (int64_t i = begin; i < end; ++i) {
      const Pair pair = pairs[i];
      Factors factors = gather(at, pair);
      for (int64_t h = pair.g * call.group(); h < (pair.g + 1) * call.group(); ++h)
        for (int64_t t0 = pair.t0; t0 < pair.t1; t0 += kRows) rows<Isa>(at, factors, pair, h, t0);
    }
  }

  MAMLFAST_INLINE Factors gather(const Scratch& at, const Pair& pair) const {
    const auto of_keys = [&](const Heads<const T>& x, int64_t width, int slot) {
      return together<T>(x, pair.b, pair.g, pair.s0, pair.s1 - pair.s0, width, at.copies[slot]);
    };
    Factors factors;
    factors.k = of_keys(k, call.D, 4), factors.k_dot = of_keys(k_dot, call.D, 5);
    factors.v = of_keys(v, call.E, 6), factors.v_dot = of_keys(v_dot, call.E, 7);
    return factors;
  }

  template <class Isa>
  MAMLFAST_INLINE void rows(const Scratch& at, Factors& factors, const Pair& pair, int64_t h, int64_t t0) const {
    const int64_t count = std::min(kRows, pair.t1 - t0), lanes = rounded_up(count, kLine<T>);
    const int64_t first = std::max(pair.s0, call.visible.first_key(t0));
    const int64_t end = std::min(pair.s1, call.visible.end_key(t0 + count - 1));
    if (first >= end) return;
    load(at, pair.b, h, t0, count, lanes);
    const auto of_rows = [&](const Heads<const T>& x, int64_t width, int slot) {
      return together<T>(x, pair.b, h, t0, count, width, at.copies[slot]);
    };
    factors.q = of_rows(q, call.D, 0), factors.q_dot = of_rows(q_dot, call.D, 1);
    factors.o_bar = of_rows(o_bar, call.E, 2), factors.o_bar_dot = of_rows(o_bar_dot, call.E, 3);
    for (int64_t s0 = first; s0 < end; s0 += kKeys) {
      const Tile tile{pair.b, h, t0, count, s0, std::min(kKeys, end - s0)};
      const Sight sight = call.visible.look(tile, at.bias, at.factor);
      if (sight != Sight::kHidden) visit<Isa>(at, factors.of_tile(s0 - pair.s0), tile, sight, lanes);
    }
  }

  MAMLFAST_INLINE void load(const Scratch& at, int64_t b, int64_t h, int64_t t0, int64_t count, int64_t lanes) const {
    const int64_t E = call.E, first = (b * call.H + h) * call.queries + t0;
    transpose(q.at(b, h, t0), q.row, count, lanes, call.D, call.scale, at.q, kRows);
    if (q_dot) transpose(q_dot.at(b, h, t0), q_dot.row, count, lanes, call.D, call.scale, at.q_dot, kRows);
    transpose(o_bar.at(b, h, t0), o_bar.row, count, lanes, E, T(1), at.o_bar, kRows);
    if (o_bar_dot) transpose(o_bar_dot.at(b, h, t0), o_bar_dot.row, count, lanes, E, T(1), at.o_bar_dot, kRows);
    for (int64_t r = 0; r < lanes; ++r) {
      // Probabilities are zero in a row without keys and in a lane without a row.
      const bool empty = r >= count || lse[first + r] == -kInf<T>;
      at.of.lse[r] = empty ? kInf<T> : lse[first + r];
      at.of.mu[r] = empty || !has_tangent ? T(0) : mu[first + r];
      at.of.delta[r] = empty ? T(0) : dot(o_bar.at(b, h, t0 + r), o.at(b, h, t0 + r), E);
      at.of.delta_dot[r] = empty || !has_tangent ? T(0) : dot(o_bar.at(b, h, t0 + r), o_dot.at(b, h, t0 + r), E);
      if (!empty && o_bar_dot) at.of.delta_dot[r] += dot(o_bar_dot.at(b, h, t0 + r), o.at(b, h, t0 + r), E);
    }
  }

  // Halves are added until one lane is left: the rows' sums do not wait for each other.
  static MAMLFAST_INLINE T dot(const T* a, const T* b, int64_t width) {
    T sums[kLine<T>] = {};
    for (int64_t i = 0; i < width; i += kLine<T>) {
#pragma omp simd
      for (int64_t l = 0; l < kLine<T>; ++l) sums[l] += a[i + l] * b[i + l];
    }
    for (int64_t half = kLine<T> / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    return sums[0];
  }

  template <class Isa>
  MAMLFAST_INLINE void visit(const Scratch& at, const Factors& f, const Tile& tile, Sight sight, int64_t lanes) const {
    const int64_t keys = tile.keys, D = call.D, E = call.E;
    const Rows<T> none;
    // What shares factors follows each other, while they are in the first-level cache.
    scores<T>(call, keys, lanes, D, f.k, at.q, none, nullptr, at.s);
    if (has_tangent) scores<T>(call, keys, lanes, D, f.k, q_dot ? at.q_dot : nullptr, f.k_dot, at.q, at.s_dot);
    scores<T>(call, keys, lanes, E, f.v, at.o_bar, none, nullptr, at.p_bar);
    if (has_tangent)
      scores<T>(call, keys, lanes, E, f.v, o_bar_dot ? at.o_bar_dot : nullptr, f.v_dot, at.o_bar, at.p_bar_dot);
    between_products<Isa>(at, tile, sight, lanes);
    write(at, f, tile, sight);
  }

  template <class Isa>
  MAMLFAST_INLINE void between_products(const Scratch& at, const Tile& tile, Sight sight, int64_t lanes) const {
    const int64_t keys = tile.keys;
    const bool capped = call.cap != T(0), dropping = call.visible.kept != T(0);
    T* const tiles[] = {at.s, at.p_bar, at.s_dot, at.p_bar_dot};
    const int num_tiles = has_tangent ? 4 : 2;
    if (capped) soft_cap<Isa, T>(at.s, call.cap, keys, lanes, at.slope, at.bend);
    if (sight == Sight::kPartial) add_bias(at.s, at.bias, keys, lanes);
    if (dropping) {
      call.visible.draw(tile, at.factor);
      for (int i = 1; i < num_tiles; i += 2) multiply_by(tiles[i], at.factor, keys, lanes);
    }
    const Cotangents<T> cotangents{at.s,      at.s_dot, at.p_bar, at.p_bar_dot, capped ? at.slope : nullptr,
                                   at.bend, call.scale};
    if (has_tangent) {
      cotangents.template tangent<Isa>(at.of, keys, lanes);
    } else {
      cotangents.template primal<Isa>(at.of, keys, lanes);
    }
    if (dropping)
      for (int i = 0; i < num_tiles; i += 2) multiply_by(tiles[i], at.factor, keys, lanes);
    if (sight == Sight::kPartial)
      for (int i = 0; i < num_tiles; ++i) hide(tiles[i], at.bias, keys, lanes);
  }

  MAMLFAST_INLINE void write(const Scratch& at, const Factors& f, const Tile& tile, Sight sight) const {
    const int64_t b = tile.b, h = tile.h, g = h / call.group(), keys = tile.keys, count = tile.rows;
    const auto of_keys = [&](const Heads<T>& x) { return x ? x.at(b, g, tile.s0) : nullptr; };
    const auto of_rows = [&](const Heads<T>& x) { return x ? x.at(b, h, tile.t0) : nullptr; };
    const Rows<T> none;
    const Accumulate<T, true> to_keys{call, sight, at.bias, at.clean};
    const Accumulate<T, false> to_rows{call, sight, at.bias, at.clean};
    const T *P = at.s, *P_dot = at.s_dot, *z_bar = at.p_bar, *z_bar_dot = at.p_bar_dot;
    to_keys(keys, count, call.E, P, f.o_bar, nullptr, none, of_keys(v_bar), v_bar.row);
    if (has_tangent)
      to_keys(keys, count, call.E, P_dot, f.o_bar, P, f.o_bar_dot, of_keys(v_bar_dot), v_bar_dot.row);
    to_keys(keys, count, call.D, z_bar, f.q, nullptr, none, of_keys(k_bar), k_bar.row);
    if (has_tangent)
      to_keys(keys, count, call.D, z_bar_dot, f.q, z_bar, f.q_dot, of_keys(k_bar_dot), k_bar_dot.row);
    to_rows(count, keys, call.D, z_bar, f.k, nullptr, none, of_rows(q_bar), q_bar.row);
    if (has_tangent)
      to_rows(count, keys, call.D, z_bar_dot, f.k, z_bar, f.k_dot, of_rows(q_bar_dot), q_bar_dot.row);
  }

  // Rows of a chunk: enough that what is done once for a chunk of keys does not count.
  static constexpr int64_t kChunk = 256, kMostChunks = 16;

  void sweep() {
    const int64_t longest = std::max(call.queries, call.keys);
    const int64_t n = std::clamp((longest + kChunk - 1) / kChunk, int64_t{1}, kMostChunks);
    const int64_t t_step = rounded_up((call.queries + n - 1) / n, kRows);
    const int64_t s_step = rounded_up((call.keys + n - 1) / n, kKeys);
    chunk_keys = std::min(s_step, call.keys);
    std::vector<Pair> active;
    for (int64_t j = 0; j < n; ++j) {
      active.clear();
      for (int64_t bg = 0; bg < call.B * call.G; ++bg)
        for (int64_t i = 0; i < n; ++i) append(active, bg, i * t_step, t_step, (i + j) % n * s_step, s_step);
      pairs = active.data();
      over(static_cast<int64_t>(active.size()), call.group() * t_step * s_step, *this);
    }
  }

  // Only pairs of chunks that can see each other.
  void append(std::vector<Pair>& active, int64_t bg, int64_t t0, int64_t t_step, int64_t s0, int64_t s_step) const {
    const int64_t t1 = std::min(t0 + t_step, call.queries), s1 = std::min(s0 + s_step, call.keys);
    if (t0 >= t1 || s0 >= s1) return;
    if (call.visible.first_key(t0) >= s1 || call.visible.end_key(t1 - 1) <= s0) return;
    active.push_back({bg / call.G, bg % call.G, t0, t1, s0, s1});
  }
};

void attention_bwd(Tensor q, Tensor k, Tensor v, MaybeTensor q_dot, MaybeTensor k_dot, MaybeTensor v_dot, Tensor o,
                   MaybeTensor o_dot, Tensor lse, MaybeTensor mu, Tensor o_bar, MaybeTensor o_bar_dot,
                   MaybeTensor q_bar, MaybeTensor k_bar, MaybeTensor v_bar, MaybeTensor q_bar_dot,
                   MaybeTensor k_bar_dot, MaybeTensor v_bar_dot, MaybeTensor query_ids, MaybeTensor key_ids,
                   MaybeTensor key_mask, MaybeTensor mask, double scale, double softcap, int64_t left, int64_t right,
                   int64_t keep_from, double kept, int64_t seed) {
  const Spec spec{query_ids, key_ids, key_mask, mask, scale, softcap, left, right, keep_from, kept, seed};
  for_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const Call<T> c = call_of<T>(q, k, v, spec);
    const int64_t rows = c.B * c.H * c.queries;
    Backward<T> kernel{c,
                       heads<const T>(q, q, c.H, c.queries, c.D, "q"),
                       heads<const T>(k, q, c.G, c.keys, c.D, "k"),
                       heads<const T>(v, q, c.G, c.keys, c.E, "v"),
                       heads<const T>(q_dot, q, c.H, c.queries, c.D, "q_dot"),
                       heads<const T>(k_dot, q, c.G, c.keys, c.D, "k_dot"),
                       heads<const T>(v_dot, q, c.G, c.keys, c.E, "v_dot"),
                       heads<const T>(o, q, c.H, c.queries, c.E, "o"),
                       heads<const T>(o_dot, q, c.H, c.queries, c.E, "o_dot"),
                       heads<const T>(o_bar, q, c.H, c.queries, c.E, "o_bar"),
                       heads<const T>(o_bar_dot, q, c.H, c.queries, c.E, "o_bar_dot"),
                       data<T>(lse, q, rows, "lse"),
                       data<T>(mu, q, rows, "mu"),
                       heads<T>(q_bar, q, c.H, c.queries, c.D, "q_bar"),
                       heads<T>(k_bar, q, c.G, c.keys, c.D, "k_bar"),
                       heads<T>(v_bar, q, c.G, c.keys, c.E, "v_bar"),
                       heads<T>(q_bar_dot, q, c.H, c.queries, c.D, "q_bar_dot"),
                       heads<T>(k_bar_dot, q, c.G, c.keys, c.D, "k_bar_dot"),
                       heads<T>(v_bar_dot, q, c.G, c.keys, c.E, "v_bar_dot"),
                       o_dot.has_value(),
                       nullptr,
                       0};
    STD_TORCH_CHECK(o_dot.has_value() == mu.has_value(), "attention_bwd: o_dot and mu expected together");
    STD_TORCH_CHECK(o_dot.has_value() || (!q_bar_dot.has_value() && !k_bar_dot.has_value() && !v_bar_dot.has_value()),
                    "attention_bwd: tangents of the gradients need o_dot and mu");
    kernel.sweep();
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def(
      "attention_bwd(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, Tensor o, "
      "Tensor? o_dot, Tensor lse, Tensor? mu, Tensor o_bar, Tensor? o_bar_dot, Tensor(a!)? q_bar, "
      "Tensor(b!)? k_bar, Tensor(c!)? v_bar, Tensor(d!)? q_bar_dot, Tensor(e!)? k_bar_dot, "
      "Tensor(f!)? v_bar_dot, " MAMLFAST_ATTENTION_SPEC);
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) { m.impl("attention_bwd", TORCH_BOX(&mamlfast::attention_bwd)); }
