"""The backward of attention on GPUs; the mathematics stands in ``mamlfast/ops/attention.py``, in the same names.

Two kernels and no atomics, so that every sum has one order. The first owns queries, forms delta (and its tangent)
for the second and sums ``q_bar`` over keys. The second owns keys and sums ``k_bar`` and ``v_bar`` over the queries
of every head that shares them. It holds the scores transposed: keys are then the rows of all its products, which
on Hopper and Blackwell have to be 64 or more for the fast matrix instructions. ``WITH_K`` and ``WITH_V`` let two
launches do it in halves, each with half the accumulators, where all four do not fit into registers. ``WITH_Q`` off
leaves the first kernel with delta alone.

``lse`` is whatever the probabilities are to be normalised by, with further terms than those of the keys if it likes;
``o`` and the tangents have to go with it.
"""

import triton
import triton.language as tl

from mamlfast_kernels.attention_masks import bound, kept, row_range, sweep, tile_at, visible
from mamlfast_kernels.attention_tiles import (
    LOG2E,
    capped,
    capped_bar,
    capped_bar_dot,
    capped_dot,
    dot,
    dot_dot,
    load_lse2,
    load_tile,
    store_tile,
)


@triton.jit(do_not_specialize=["seed"])
def _attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, o_bar_ptr, lse_ptr,  # (B, H, T, D), (B, G, S, D), (B, G, S, E), (B, H, T, E), (B, H, T)
    q_bar_ptr, delta_ptr,  # (B, H, T, D), (B, H, T)
    q_dot_ptr, k_dot_ptr, v_dot_ptr, o_dot_ptr, o_bar_dot_ptr, mu_ptr, q_bar_dot_ptr, delta_dot_ptr,  # as above
    query_ids_ptr, key_ids_ptr, key_first_ptr, key_end_ptr,  # (B, T), (B, S), (B, T); only if HAS_SEGMENTS
    q_b, q_h, k_b, k_h, v_b, v_h, o_b, o_h, o_bar_b, o_bar_h, q_bar_b, q_bar_h,  # strides
    H, T, S, left, right, seed: tl.int64,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,  # strides that a model fixes
    o_t: tl.constexpr, o_bar_t: tl.constexpr, q_bar_t: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, KEEP_FROM: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, HAS_TANGENT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    WITH_Q: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    # Under a causal mask the last tile has most to do, so it comes first.
    first = (tiles - 1 - pid % tiles) * BLOCK_T
    head = (pid // tiles).to(tl.int64)
    b, h = head // H, head % H
    q_at, o_at, o_bar_at = b * q_b + h * q_h, b * o_b + h * o_h, b * o_bar_b + h * o_bar_h
    k_at, v_at = b * k_b + h // GROUP * k_h, b * v_b + h // GROUP * v_h
    rows, row_at = first + tl.arange(0, BLOCK_T), head * T
    UNIT2: tl.constexpr = (SCALE if SOFTCAP == 0.0 else SOFTCAP) * LOG2E
    SWEEPS: tl.constexpr = 0 if not WITH_Q else (1 if HAS_SEGMENTS else 2)

    q = load_tile(q_ptr + q_at, first, T, q_t, BLOCK_T, D, BLOCK_D, False)
    o = load_tile(o_ptr + o_at, first, T, o_t, BLOCK_T, E, BLOCK_E, False).to(WIDE)
    o_bar = load_tile(o_bar_ptr + o_bar_at, first, T, o_bar_t, BLOCK_T, E, BLOCK_E, False)
    delta = tl.sum(o_bar.to(WIDE) * o, 1)
    tl.store(delta_ptr + row_at + rows, delta, rows < T)
    lse2 = load_lse2(lse_ptr + row_at, rows, T)
    q_bar = tl.zeros([BLOCK_T, BLOCK_D], WIDE)
    if HAS_TANGENT:
        q_dot = load_tile(q_dot_ptr + q_at, first, T, q_t, BLOCK_T, D, BLOCK_D, False)
        o_dot = load_tile(o_dot_ptr + o_at, first, T, o_t, BLOCK_T, E, BLOCK_E, False).to(WIDE)
        o_bar_dot = load_tile(o_bar_dot_ptr + o_bar_at, first, T, o_bar_t, BLOCK_T, E, BLOCK_E, False)
        delta_dot = tl.sum(o_bar_dot.to(WIDE) * o + o_bar.to(WIDE) * o_dot, 1)
        tl.store(delta_dot_ptr + row_at + rows, delta_dot, rows < T)
        mu = tl.load(mu_ptr + row_at + rows, rows < T, 0.0)
        q_bar_dot = tl.zeros([BLOCK_T, BLOCK_D], WIDE)
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
            p_bar = dot(o_bar, tl.trans(v), WIDE, PRECISION)
            if HAS_TANGENT:
                k_dot = load_tile(k_dot_ptr + k_at, start, S, k_t, BLOCK_S, D, BLOCK_D, FULL)
                v_dot = load_tile(v_dot_ptr + v_at, start, S, v_t, BLOCK_S, E, BLOCK_E, FULL)
                z_dot = dot_dot(q, q_dot, tl.trans(k), tl.trans(k_dot), WIDE, PRECISION)
                p_bar_dot = dot_dot(o_bar, o_bar_dot, tl.trans(v), tl.trans(v_dot), WIDE, PRECISION)
            if DROPOUT > 0.0:
                passed = kept(seed, rows[:, None], keys[None, :], head, KEEP_FROM)
                p_bar = tl.where(passed, p_bar * (1.0 / (1.0 - DROPOUT)), 0.0)
                if HAS_TANGENT:
                    p_bar_dot = tl.where(passed, p_bar_dot * (1.0 / (1.0 - DROPOUT)), 0.0)
            shown = t
            if not FULL:
                key_ids = keys[None, :]
                if HAS_SEGMENTS:
                    key_ids = tl.load(key_ids_ptr + b * S + keys, keys < S, -1)[None, :]
                keep = visible(
                    rows[:, None], keys[None, :], S, left, right, query_ids, key_ids, HAS_LEFT, HAS_RIGHT, HAS_SEGMENTS
                )
                shown = tl.where(keep, t, float("-inf"))
            p = tl.exp2(shown * UNIT2 - lse2[:, None])
            centred = p_bar - delta[:, None]
            s_bar = p * centred
            if HAS_TANGENT:
                s_dot = capped_dot(t, z_dot, SCALE, SOFTCAP)
                s_bar_dot = p * ((s_dot - mu[:, None]) * centred + (p_bar_dot - delta_dot[:, None]))
                z_bar_dot = capped_bar_dot(t, s_dot, s_bar, s_bar_dot, SOFTCAP).to(k.dtype)
            z_bar = capped_bar(t, s_bar, SOFTCAP).to(k.dtype)
            q_bar = tl.dot(z_bar, k, q_bar, input_precision=PRECISION, out_dtype=WIDE)
            if HAS_TANGENT:
                q_bar_dot = tl.dot(z_bar, k_dot, q_bar_dot, input_precision=PRECISION, out_dtype=WIDE)
                q_bar_dot = tl.dot(z_bar_dot, k, q_bar_dot, input_precision=PRECISION, out_dtype=WIDE)

    q_bar_at = b * q_bar_b + h * q_bar_h
    if WITH_Q:
        store_tile(q_bar_ptr + q_bar_at, SCALE * q_bar, first, T, q_bar_t, BLOCK_T, D, BLOCK_D)
    if WITH_Q and HAS_TANGENT:
        store_tile(q_bar_dot_ptr + q_bar_at, SCALE * q_bar_dot, first, T, q_bar_t, BLOCK_T, D, BLOCK_D)


@triton.jit(do_not_specialize=["seed"])
def _attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, o_bar_ptr, lse_ptr, delta_ptr,  # shapes and strides as above
    k_bar_ptr, v_bar_ptr,  # (B, G, S, D), (B, G, S, E); touched only if WITH_K, WITH_V
    q_dot_ptr, k_dot_ptr, v_dot_ptr, o_bar_dot_ptr, mu_ptr, delta_dot_ptr, k_bar_dot_ptr, v_bar_dot_ptr,
    query_ids_ptr, key_ids_ptr, query_first_ptr, query_end_ptr,  # (B, T), (B, S), (B, S); only if HAS_SEGMENTS
    q_b, q_h, k_b, k_h, v_b, v_h, o_bar_b, o_bar_h, k_bar_b, k_bar_h, v_bar_b, v_bar_h,
    H, T, S, left, right, seed: tl.int64,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    o_bar_t: tl.constexpr, k_bar_t: tl.constexpr, v_bar_t: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, KEEP_FROM: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, HAS_TANGENT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    # Under a causal mask the first tile has most to do, and it comes first.
    first = pid % tiles * BLOCK_S
    G = H // GROUP
    key_head = (pid // tiles).to(tl.int64)
    b, g = key_head // G, key_head % G
    k_at, v_at = b * k_b + g * k_h, b * v_b + g * v_h
    keys = first + tl.arange(0, BLOCK_S)
    UNIT2: tl.constexpr = (SCALE if SOFTCAP == 0.0 else SOFTCAP) * LOG2E
    SWEEPS: tl.constexpr = 1 if HAS_SEGMENTS else 2

    k = load_tile(k_ptr + k_at, first, S, k_t, BLOCK_S, D, BLOCK_D, False)
    if HAS_TANGENT:
        k_dot = load_tile(k_dot_ptr + k_at, first, S, k_t, BLOCK_S, D, BLOCK_D, False)
    if WITH_K:
        v = load_tile(v_ptr + v_at, first, S, v_t, BLOCK_S, E, BLOCK_E, False)
        k_bar = tl.zeros([BLOCK_S, BLOCK_D], WIDE)
        if HAS_TANGENT:
            v_dot = load_tile(v_dot_ptr + v_at, first, S, v_t, BLOCK_S, E, BLOCK_E, False)
            k_bar_dot = tl.zeros([BLOCK_S, BLOCK_D], WIDE)
    if WITH_V:
        v_bar = tl.zeros([BLOCK_S, BLOCK_E], WIDE)
        if HAS_TANGENT:
            v_bar_dot = tl.zeros([BLOCK_S, BLOCK_E], WIDE)
    low, high = 0, T
    key_ids = keys[:, None]
    if HAS_SEGMENTS:
        key_ids = tl.load(key_ids_ptr + b * S + keys, keys < S, -1)[:, None]
        low, high = row_range(query_first_ptr + b * S, query_end_ptr + b * S, keys, S, T)

    # Seen from a key, queries reach as far to the left as keys do to the right of a query.
    begin, end, full, full_end = sweep(
        first, BLOCK_S, T, right, left, low, high, HAS_RIGHT, HAS_LEFT, HAS_SEGMENTS, BLOCK_T
    )

    for FULL in tl.static_range(SWEEPS):
        from_step = full if FULL else begin
        to_step = full_end if FULL else end - (full_end - full)
        count = tl.cdiv(tl.maximum(to_step - from_step, 0), BLOCK_T)
        for i in range(0, bound(GROUP * count)):
            member = i // count if GROUP > 1 else 0
            start = tile_at(from_step + (i - member * count) * BLOCK_T, full, full_end, FULL)
            h = g * GROUP + member
            q_at, o_bar_at, row_at = b * q_b + h * q_h, b * o_bar_b + h * o_bar_h, (b * H + h) * T
            rows = start + tl.arange(0, BLOCK_T)
            q = load_tile(q_ptr + q_at, start, T, q_t, BLOCK_T, D, BLOCK_D, FULL)
            o_bar = load_tile(o_bar_ptr + o_bar_at, start, T, o_bar_t, BLOCK_T, E, BLOCK_E, FULL)
            t = capped(dot(k, tl.trans(q), WIDE, PRECISION), SCALE, SOFTCAP)
            if WITH_K:
                p_bar = dot(v, tl.trans(o_bar), WIDE, PRECISION)
            if HAS_TANGENT:
                q_dot = load_tile(q_dot_ptr + q_at, start, T, q_t, BLOCK_T, D, BLOCK_D, FULL)
                o_bar_dot = load_tile(o_bar_dot_ptr + o_bar_at, start, T, o_bar_t, BLOCK_T, E, BLOCK_E, FULL)
                z_dot = dot_dot(k, k_dot, tl.trans(q), tl.trans(q_dot), WIDE, PRECISION)
                if WITH_K:
                    p_bar_dot = dot_dot(v, v_dot, tl.trans(o_bar), tl.trans(o_bar_dot), WIDE, PRECISION)

            shown = t
            if not FULL:
                query_ids = rows[None, :]
                if HAS_SEGMENTS:
                    query_ids = tl.load(query_ids_ptr + b * T + rows, rows < T, -2)[None, :]
                keep = visible(
                    rows[None, :], keys[:, None], S, left, right, query_ids, key_ids,
                    HAS_LEFT, HAS_RIGHT, HAS_SEGMENTS,
                )  # fmt: skip
                shown = tl.where(keep, t, float("-inf"))
            # Rows beyond T are zeros in all that p multiplies.
            p = tl.exp2(shown * UNIT2 - load_lse2(lse_ptr + row_at, rows, T)[None, :])
            p_kept = p
            if DROPOUT > 0.0:
                passed = kept(seed, rows[None, :], keys[:, None], b * H + h, KEEP_FROM)
                p_kept = tl.where(passed, p, 0.0)
                if WITH_K:
                    p_bar = tl.where(passed, p_bar * (1.0 / (1.0 - DROPOUT)), 0.0)
                    if HAS_TANGENT:
                        p_bar_dot = tl.where(passed, p_bar_dot * (1.0 / (1.0 - DROPOUT)), 0.0)
            if HAS_TANGENT:
                s_dot = capped_dot(t, z_dot, SCALE, SOFTCAP)
                log_p_dot = s_dot - tl.load(mu_ptr + row_at + rows, rows < T, 0.0)[None, :]
            if WITH_V:
                p_low = p_kept.to(o_bar.dtype)
                v_bar = tl.dot(p_low, o_bar, v_bar, input_precision=PRECISION, out_dtype=WIDE)
                if HAS_TANGENT:
                    p_dot = (p_kept * log_p_dot).to(o_bar.dtype)
                    v_bar_dot = tl.dot(p_low, o_bar_dot, v_bar_dot, input_precision=PRECISION, out_dtype=WIDE)
                    v_bar_dot = tl.dot(p_dot, o_bar, v_bar_dot, input_precision=PRECISION, out_dtype=WIDE)
            if WITH_K:
                centred = p_bar - tl.load(delta_ptr + row_at + rows, rows < T, 0.0)[None, :]
                s_bar = p * centred
                if HAS_TANGENT:
                    delta_dot = tl.load(delta_dot_ptr + row_at + rows, rows < T, 0.0)
                    s_bar_dot = p * (log_p_dot * centred + (p_bar_dot - delta_dot[None, :]))
                    z_bar_dot = capped_bar_dot(t, s_dot, s_bar, s_bar_dot, SOFTCAP).to(q.dtype)
                z_bar = capped_bar(t, s_bar, SOFTCAP).to(q.dtype)
                k_bar = tl.dot(z_bar, q, k_bar, input_precision=PRECISION, out_dtype=WIDE)
                if HAS_TANGENT:
                    k_bar_dot = tl.dot(z_bar, q_dot, k_bar_dot, input_precision=PRECISION, out_dtype=WIDE)
                    k_bar_dot = tl.dot(z_bar_dot, q, k_bar_dot, input_precision=PRECISION, out_dtype=WIDE)

    if WITH_K:
        at = b * k_bar_b + g * k_bar_h
        store_tile(k_bar_ptr + at, SCALE * k_bar, first, S, k_bar_t, BLOCK_S, D, BLOCK_D)
        if HAS_TANGENT:
            store_tile(k_bar_dot_ptr + at, SCALE * k_bar_dot, first, S, k_bar_t, BLOCK_S, D, BLOCK_D)
    if WITH_V:
        at = b * v_bar_b + g * v_bar_h
        store_tile(v_bar_ptr + at, v_bar / (1.0 - DROPOUT), first, S, v_bar_t, BLOCK_S, E, BLOCK_E)
        if HAS_TANGENT:
            store_tile(v_bar_dot_ptr + at, v_bar_dot / (1.0 - DROPOUT), first, S, v_bar_t, BLOCK_S, E, BLOCK_E)
