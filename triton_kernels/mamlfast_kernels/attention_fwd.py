"""The forward of attention on GPUs; the mathematics stands in ``mamlfast/ops/attention.py``, in the same names.

A program owns a tile of queries and sweeps over the keys they see, carrying the softmax online (Milakov &
Gimelshein, 2018, arXiv:1805.02867): a maximum m and, rescaled whenever m grows, the sums

    l = sum exp(s - m)      o l = sum exp(s - m) v
    mu l = sum exp(s - m) s_dot      (o_dot + mu o) l = sum exp(s - m) (s_dot v + v_dot)

so the tangent, which is never exponentiated, costs no second sweep. m and the exponents are in units of log 2.
Dropout takes its pairs out of what is multiplied by v and v_dot, and not out of l and mu l.
"""

import triton
import triton.language as tl

from mamlfast_kernels.attention_masks import bound, kept, row_range, sweep, tile_at, visible
from mamlfast_kernels.attention_tiles import LN2, LOG2E, capped, capped_dot, dot, dot_dot, load_tile, store_tile


@triton.jit(do_not_specialize=["seed"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,  # (B, H, T, D), (B, G, S, D), (B, G, S, E), (B, H, T, E), (B, H, T)
    q_dot_ptr, k_dot_ptr, v_dot_ptr, o_dot_ptr, mu_ptr,  # as above, strides too; touched only if HAS_TANGENT
    query_ids_ptr, key_ids_ptr, key_first_ptr, key_end_ptr,  # (B, T), (B, S), (B, T); only if HAS_SEGMENTS
    q_b, q_h, k_b, k_h, v_b, v_h, o_b, o_h,  # strides
    H, T, S, left, right, seed: tl.int64,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, o_t: tl.constexpr,  # strides that a model fixes
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, KEEP_FROM: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, HAS_TANGENT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    # Under a causal mask the last tile has most to do, so it comes first.
    first = (tiles - 1 - pid % tiles) * BLOCK_T
    head = (pid // tiles).to(tl.int64)
    b, h = head // H, head % H
    q_at = b * q_b + h * q_h
    k_at, v_at = b * k_b + h // GROUP * k_h, b * v_b + h // GROUP * v_h
    rows = first + tl.arange(0, BLOCK_T)
    UNIT2: tl.constexpr = (SCALE if SOFTCAP == 0.0 else SOFTCAP) * LOG2E
    SWEEPS: tl.constexpr = 1 if HAS_SEGMENTS else 2

    q = load_tile(q_ptr + q_at, first, T, q_t, BLOCK_T, D, BLOCK_D, False)
    m = tl.full([BLOCK_T], float("-inf"), WIDE)
    l = tl.zeros([BLOCK_T], WIDE)  # noqa: E741
    acc = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
    if HAS_TANGENT:
        q_dot = load_tile(q_dot_ptr + q_at, first, T, q_t, BLOCK_T, D, BLOCK_D, False)
        l_dot = tl.zeros([BLOCK_T], WIDE)
        acc_dot = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
    low, high = 0, S
    query_ids = rows[:, None]
    if HAS_SEGMENTS:
        query_ids = tl.load(query_ids_ptr + b * T + rows, rows < T, -2)[:, None]
        low, high = row_range(key_first_ptr + b * T, key_end_ptr + b * T, rows, T, S)

    begin, end, full, full_end = sweep(
        first, BLOCK_T, S, left, right, low, high, HAS_LEFT, HAS_RIGHT, HAS_SEGMENTS, BLOCK_S
    )
    for FULL in tl.static_range(SWEEPS):
        from_step = full if FULL else begin
        to_step = full_end if FULL else end - (full_end - full)
        for step in range(bound(from_step), bound(to_step), BLOCK_S):
            start = tile_at(step, full, full_end, FULL)
            keys = start + tl.arange(0, BLOCK_S)
            k = load_tile(k_ptr + k_at, start, S, k_t, BLOCK_S, D, BLOCK_D, FULL)
            v = load_tile(v_ptr + v_at, start, S, v_t, BLOCK_S, E, BLOCK_E, FULL)
            t = capped(dot(q, tl.trans(k), WIDE, PRECISION), SCALE, SOFTCAP)
            if HAS_TANGENT:
                k_dot = load_tile(k_dot_ptr + k_at, start, S, k_t, BLOCK_S, D, BLOCK_D, FULL)
                v_dot = load_tile(v_dot_ptr + v_at, start, S, v_t, BLOCK_S, E, BLOCK_E, FULL)
                z_dot = dot_dot(q, q_dot, tl.trans(k), tl.trans(k_dot), WIDE, PRECISION)
            shown = t
            if not FULL:
                key_ids = keys[None, :]
                if HAS_SEGMENTS:
                    key_ids = tl.load(key_ids_ptr + b * S + keys, keys < S, -1)[None, :]
                keep = visible(
                    rows[:, None], keys[None, :], S, left, right, query_ids, key_ids, HAS_LEFT, HAS_RIGHT, HAS_SEGMENTS
                )
                shown = tl.where(keep, t, float("-inf"))

            m_new = tl.maximum(m, tl.max(shown, 1) * UNIT2)
            # A row that has seen no key yet keeps m = -inf, from which nothing can be subtracted.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            decay = tl.exp2(m - shift)
            p = tl.exp2(shown * UNIT2 - shift[:, None])
            m = m_new
            l = l * decay + tl.sum(p, 1)  # noqa: E741
            if HAS_TANGENT:
                weighted = p * capped_dot(t, z_dot, SCALE, SOFTCAP)
                l_dot = l_dot * decay + tl.sum(weighted, 1)
            if DROPOUT > 0.0:
                passed = kept(seed, rows[:, None], keys[None, :], head, KEEP_FROM)
                p = tl.where(passed, p, 0.0)
                if HAS_TANGENT:
                    weighted = tl.where(passed, weighted, 0.0)
            p_low = p.to(v.dtype)
            acc = tl.dot(p_low, v, acc * decay[:, None], input_precision=PRECISION, out_dtype=WIDE)
            if HAS_TANGENT:
                acc_dot = tl.dot(p_low, v_dot, acc_dot * decay[:, None], input_precision=PRECISION, out_dtype=WIDE)
                acc_dot = tl.dot(weighted.to(v.dtype), v, acc_dot, input_precision=PRECISION, out_dtype=WIDE)

    empty = l == 0.0
    l = tl.where(empty, 1.0, l)  # noqa: E741
    o = acc / (l * (1.0 - DROPOUT))[:, None]
    o_at, row_at = b * o_b + h * o_h, head * T
    store_tile(o_ptr + o_at, o, first, T, o_t, BLOCK_T, E, BLOCK_E)
    tl.store(lse_ptr + row_at + rows, (m + tl.log2(l)) * LN2, rows < T)
    if HAS_TANGENT:
        mu = l_dot / l
        o_dot = acc_dot / (l * (1.0 - DROPOUT))[:, None] - mu[:, None] * o
        store_tile(o_dot_ptr + o_at, o_dot, first, T, o_t, BLOCK_T, E, BLOCK_E)
        tl.store(mu_ptr + row_at + rows, mu, rows < T)
