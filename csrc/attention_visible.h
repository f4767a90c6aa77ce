// Which pairs of a tile of attention are visible, what is added to their scores, and which of them dropout keeps;
// the specification is mamlfast_kernels/attention_spec.py.
//
// A tile holds `keys` rows, one a key, of kRows lanes, one a query: element (c, r) belongs to key s0 + c and query
// t0 + r. So the vector runs along the queries, and row statistics are vectors that no sum ever crosses.
#pragma once

#include "rows.h"
#include "simd.h"
#include "transpose.h"

#include <algorithm>
#include <cstdint>

namespace mamlfast {

// Queries and keys of a tile at most: three tiles of floats fill the first-level cache, a product's worth.
constexpr int64_t kRows = 64, kKeys = 64;

struct Tile {
  int64_t b, h, t0, rows, s0, keys;
};

enum class Sight { kHidden, kPartial, kFull };

struct Ids {
  int64_t low, high;
};

MAMLFAST_INLINE Ids range_of(const int64_t* ids, int64_t count) {
  Ids range{ids[0], ids[0]};
  for (int64_t i = 1; i < count; ++i) range = {std::min(range.low, ids[i]), std::max(range.high, ids[i])};
  return range;
}

// The first word of Philox-4x32-10 at (s, t, head, 0) (Salmon et al., 2011, doi:10.1145/2063384.2063405).
MAMLFAST_INLINE uint32_t philox(uint32_t s, uint32_t t, uint32_t head, uint32_t low, uint32_t high) {
  uint32_t c0 = s, c1 = t, c2 = head, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ low;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ high;
    c3 = static_cast<uint32_t>(a);
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return c0;
}

template <class T>
struct Visible {
  int64_t H, queries, S;
  int64_t left, right;                // query t sees keys t - left to t + right
  const int64_t *query_ids, *key_ids;  // (B, T), (B, S), or null
  const bool* key_mask;                // (B, S), or null
  const bool* allowed;                 // at most one of these two; strides below, zero where broadcast
  const T* added;
  int64_t mask_batch, mask_head, mask_row, mask_key;
  uint32_t keep_from, seed_low, seed_high;
  T kept;  // what dropout multiplies a kept probability with; 0: there is no dropout

  MAMLFAST_INLINE int64_t first_key(int64_t t0) const { return std::clamp(t0 - left, int64_t{0}, S); }
  MAMLFAST_INLINE int64_t end_key(int64_t t_last) const { return std::clamp(t_last + right + 1, int64_t{0}, S); }

  // Fills `bias` with what is added to the scores, -inf where hidden, unless it returns that it would be all -inf or
  // all zero. Lanes without a query may hold anything. `spare` is another tile, of no content.
  MAMLFAST_INLINE Sight look(const Tile& tile, T* bias, T* spare) const {
    const bool reached = tile.s0 >= tile.t0 + tile.rows - 1 - left && tile.s0 + tile.keys - 1 <= tile.t0 + right;
    const Sight by_ids = query_ids ? look_at_ids(tile) : Sight::kFull;
    if (by_ids == Sight::kHidden) return by_ids;
    if (reached && by_ids == Sight::kFull && !key_mask && !allowed && !added) return Sight::kFull;
    for (int64_t c = 0; c < tile.keys; ++c) reach(tile, c, bias + c * kRows);
    if (by_ids == Sight::kPartial) hide_other_ids(tile, bias);
    if (key_mask) hide_keys(tile, bias);
    if (allowed) hide_disallowed(tile, bias);
    if (added) add_mask(tile, bias, spare);
    return judge(tile, bias);
  }

  MAMLFAST_INLINE Sight look_at_ids(const Tile& tile) const {
    const Ids q = range_of(query_ids + tile.b * queries + tile.t0, tile.rows);
    const Ids k = range_of(key_ids + tile.b * S + tile.s0, tile.keys);
    if (q.high < k.low || k.high < q.low) return Sight::kHidden;
    return q.low == q.high && k.low == k.high ? Sight::kFull : Sight::kPartial;
  }

  MAMLFAST_INLINE void reach(const Tile& tile, int64_t c, T* bias) const {
    // Within a tile the lanes that see the key are consecutive.
    const int64_t s = tile.s0 + c;
    const int32_t first = static_cast<int32_t>(std::clamp(s - right - tile.t0, int64_t{0}, kRows));
    const int32_t end = static_cast<int32_t>(std::clamp(s + left - tile.t0 + 1, int64_t{0}, kRows));
#pragma omp simd
    for (int32_t r = 0; r < static_cast<int32_t>(kRows); ++r) bias[r] = r >= first && r < end ? T(0) : -kInf<T>;
  }

  MAMLFAST_INLINE void hide_other_ids(const Tile& tile, T* bias) const {
    const int64_t* q = query_ids + tile.b * queries + tile.t0;
    const int64_t* k = key_ids + tile.b * S + tile.s0;
    for (int64_t c = 0; c < tile.keys; ++c) {
      T* row = bias + c * kRows;
      for (int64_t r = 0; r < tile.rows; ++r) row[r] = q[r] == k[c] ? row[r] : -kInf<T>;
    }
  }

  MAMLFAST_INLINE void hide_keys(const Tile& tile, T* bias) const {
    const bool* shown = key_mask + tile.b * S + tile.s0;
    for (int64_t c = 0; c < tile.keys; ++c) {
      if (shown[c]) continue;
#pragma omp simd
      for (int64_t r = 0; r < kRows; ++r) bias[c * kRows + r] = -kInf<T>;
    }
  }

  MAMLFAST_INLINE int64_t mask_at(const Tile& tile) const {
    return tile.b * mask_batch + tile.h * mask_head + tile.t0 * mask_row + tile.s0 * mask_key;
  }

  MAMLFAST_INLINE void hide_disallowed(const Tile& tile, T* bias) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const bool* row = allowed + mask_at(tile) + r * mask_row;
      for (int64_t c = 0; c < tile.keys; ++c) bias[c * kRows + r] = row[c * mask_key] ? bias[c * kRows + r] : -kInf<T>;
    }
  }

  // What another mask hides stays hidden, whatever is added, NaN included.
  MAMLFAST_INLINE void add_mask(const Tile& tile, T* bias, T* spare) const {
    const T* first = added + mask_at(tile);
    if (mask_key == 1) {
      transpose(first, mask_row, tile.rows, tile.rows, tile.keys, T(1), spare, kRows);
    } else {
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t c = 0; c < tile.keys; ++c) spare[c * kRows + r] = first[r * mask_row + c * mask_key];
    }
    for (int64_t c = 0; c < tile.keys; ++c) {
#pragma omp simd
      for (int64_t i = c * kRows; i < c * kRows + tile.rows; ++i) bias[i] = bias[i] == -kInf<T> ? bias[i] : spare[i];
    }
  }

  MAMLFAST_INLINE Sight judge(const Tile& tile, const T* bias) const {
    int some_visible = 0, some_added = 0;
    for (int64_t c = 0; c < tile.keys; ++c) {
#pragma omp simd reduction(| : some_visible, some_added)
      for (int64_t r = 0; r < tile.rows; ++r) {
        some_visible |= !(bias[c * kRows + r] == -kInf<T>);
        some_added |= !(bias[c * kRows + r] == T(0));
      }
    }
    if (!some_visible) return Sight::kHidden;
    return some_added ? Sight::kPartial : Sight::kFull;
  }

  // The factor of each pair under dropout: `kept` or zero.
  MAMLFAST_INLINE void draw(const Tile& tile, T* factor) const {
    const uint32_t head = static_cast<uint32_t>(tile.b * H + tile.h), t0 = static_cast<uint32_t>(tile.t0);
    for (int64_t c = 0; c < tile.keys; ++c) {
      const uint32_t s = static_cast<uint32_t>(tile.s0 + c);
      T* row = factor + c * kRows;
#pragma omp simd
      for (int32_t r = 0; r < static_cast<int32_t>(kRows); ++r)
        row[r] = philox(s, t0 + r, head, seed_low, seed_high) >= keep_from ? kept : T(0);
    }
  }
};

}  // namespace mamlfast
