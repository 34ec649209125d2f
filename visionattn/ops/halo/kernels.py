"""Triton kernels of halo attention: forward, queries' gradient, keys' and values' gradient.

All three stream over tiles of keys and queries; no window is ever written to memory. A query's relative logits
``q.Th[.]`` and ``q.Tw[.]`` are one small product with the whole table, then a shift of each row (``tl.gather``). They
reach the logits through the matrix unit: with ``qh[query, R]`` and ``qw[query, S]`` in registers,

    q.k + qh[., R] + qw[., S]  =  [q | qh | qw] @ [k | onehot(R) | onehot(S)]^T

Masks travel the same way, as large negative entries of qh and qw, so that no logit is compared with anything.
Logits are kept as ``logit / scale``; the scale, and log2(e) for exp2, ride in one fused multiply-add.
"""

import triton
import triton.language as tl


@triton.jit
def _table(ptr, D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, LP: tl.constexpr, dtype: tl.constexpr):
    """A relative table, transposed and padded: (DP, LP)."""
    d = tl.arange(0, DP)[:, None]
    j = tl.arange(0, LP)[None, :]
    return tl.load(ptr + j * D + d, mask=(d < D) & (j < 2 * WIN - 1), other=0.0).to(dtype)


@triton.jit
def _relative(
    q, table, shift, ratio, lo, hi, WIN: tl.constexpr, WP: tl.constexpr, LP: tl.constexpr,
    BIG: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Relative logits over scale, (BM, WP): ``q . table[R - shift + win - 1]``, -BIG for R outside [lo, hi)."""
    full = tl.dot(q, table, input_precision=PREC)
    R = tl.arange(0, WP)[None, :]
    index = tl.minimum(tl.maximum(R - shift[:, None] + (WIN - 1), 0), LP - 1)
    rel = tl.gather(full, index, 1) * ratio
    if BIG < 1e5:  # float16: stay finite
        rel = tl.minimum(tl.maximum(rel, -0.5 * BIG), 0.5 * BIG)
    return tl.where((R >= lo) & (R < hi), rel, -BIG).to(q.dtype)  # noqa: SIM300


@triton.jit
def _unshift(grad, shift, WIN: tl.constexpr, WP: tl.constexpr, LP: tl.constexpr):
    """The transpose of the shift in `_relative`: (BM, WP) -> (BM, LP)."""
    R = tl.arange(0, LP)[None, :] + shift[:, None] - (WIN - 1)
    moved = tl.gather(grad, tl.minimum(tl.maximum(R, 0), WP - 1), 1)
    return tl.where((R >= 0) & (R < WIN), moved, 0.0)


@triton.jit
def _window_range(origin, size, WIN: tl.constexpr, MASK: tl.constexpr):
    """The window positions [lo, hi) that take part in the softmax, for a window that starts at `origin`."""
    lo = 0
    hi = WIN
    if MASK:
        lo = tl.maximum(0, -origin)
        hi = tl.minimum(WIN, size - origin)
    return lo, hi


@triton.jit
def _keys(n, y0, x0, H, W, WIN: tl.constexpr):
    """Window positions and map coordinates of the keys n; those beyond the window get R = WIN, which is masked."""
    R = tl.minimum(n // WIN, WIN)
    S = n % WIN
    y = y0 + R
    x = x0 + S
    ok = (n < WIN * WIN) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return R, S, y.to(tl.int64), x.to(tl.int64), ok


@triton.jit
def _logits(
    q, qh, qw, k_ptr, R, S, y, x, ok, sky, skx, skd,
    D: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Logits over scale (BM, BN), the keys (DP, BN), and the one-hot rows and columns (WP, BN)."""
    d = tl.arange(0, DP)[:, None]
    mask = ok[None, :]
    if D < DP:
        mask = mask & (d < D)
    k = tl.load(k_ptr + (y * sky + x * skx)[None, :] + d * skd, mask=mask, other=0.0)
    w = tl.arange(0, WP)[:, None]
    eh = tl.where(w == R[None, :], 1.0, 0.0).to(q.dtype)
    ew = tl.where(w == S[None, :], 1.0, 0.0).to(q.dtype)
    s = tl.dot(q, k, input_precision=PREC)
    s = tl.dot(qh, eh, s, input_precision=PREC)
    s = tl.dot(qw, ew, s, input_precision=PREC)
    return s, k, eh, ew


@triton.jit
def _forward_tile(
    n0, acc, top, total, q, qh, qw, k_ptr, v_ptr, y0, x0, H, W, sky, skx, skd, svy, svx, svd, qk_scale,
    WIN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, WP: tl.constexpr,
    BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    R, S, y, x, ok = _keys(n0 + tl.arange(0, BN), y0, x0, H, W, WIN)
    e = tl.arange(0, DVP)[None, :]
    mask = ok[:, None]
    if DV < DVP:
        mask = mask & (e < DV)
    v = tl.load(v_ptr + (y * svy + x * svx)[:, None] + e * svd, mask=mask, other=0.0)
    s, _, _, _ = _logits(q, qh, qw, k_ptr, R, S, y, x, ok, sky, skx, skd, D, DP, WP, PREC)
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * qk_scale - (new_top * qk_scale)[:, None])
    fade = tl.exp2((top - new_top) * qk_scale)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PREC)
    return acc, new_top, total


@triton.jit(do_not_specialize=["H", "W", "HQ", "WQ", "heads", "rows", "cols"])
def halo_forward(
    q_ptr, k_ptr, v_ptr, th_ptr, tw_ptr, o_ptr, lse_ptr,
    sqb, sqy, sqx, sqh, sqd, skb, sky, skx, skh, skd, svb, svy, svx, svh, svd, sob, soy, sox, soh, sod,
    H, W, HQ, WQ, heads, rows, cols, qk_scale, ratio,
    B: tl.constexpr, HALO: tl.constexpr, BQ: tl.constexpr, WIN: tl.constexpr, STEP: tl.constexpr,
    MASK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    WP: tl.constexpr, LP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    BIG: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one block and head. lse (base 2) lies as (batch, row, column, head, query)."""
    NQ: tl.constexpr = BQ * BQ
    CHUNKS: tl.constexpr = (NQ + BM - 1) // BM
    FULL: tl.constexpr = (WIN * WIN // BN) * BN
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    chunk = pid // heads % CHUNKS
    block = pid // heads // CHUNKS
    bx = block % cols
    by = block // cols % rows
    batch = (block // cols // rows).to(tl.int64)

    m = chunk * BM + tl.arange(0, BM)
    r = m // BQ
    c = m % BQ
    qy = (by * BQ + r).to(tl.int64)
    qx = (bx * BQ + c).to(tl.int64)
    q_ok = (m < NQ) & (qy < HQ) & (qx < WQ)
    d = tl.arange(0, DP)[None, :]
    q = tl.load(
        q_ptr + batch * sqb + head * sqh + (qy * sqy + qx * sqx)[:, None] + d * sqd,
        mask=q_ok[:, None] & (d < D), other=0.0,
    )  # fmt: skip
    y0 = by * B - HALO
    x0 = bx * B - HALO
    lo, hi = _window_range(y0, H, WIN, MASK)
    table = _table(th_ptr, D, DP, WIN, LP, q.dtype)
    qh = _relative(q, table, r * STEP, ratio, lo, hi, WIN, WP, LP, BIG, PREC)
    lo, hi = _window_range(x0, W, WIN, MASK)
    table = _table(tw_ptr, D, DP, WIN, LP, q.dtype)
    qw = _relative(q, table, c * STEP, ratio, lo, hi, WIN, WP, LP, BIG, PREC)

    k_ptr += batch * skb + head * skh
    v_ptr += batch * svb + head * svh
    acc = tl.zeros([BM, DVP], tl.float32)
    # No query has all its logits below this. A tile that is masked throughout must not raise it to the masks' level:
    # there, float32 is too coarse for differences of logits.
    top = tl.full([BM], -0.5 * BIG, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for n0 in tl.range(0, FULL, BN):
        acc, top, total = _forward_tile(
            n0, acc, top, total, q, qh, qw, k_ptr, v_ptr, y0, x0, H, W, sky, skx, skd, svy, svx, svd, qk_scale,
            WIN, D, DV, DP, DVP, WP, BN, PREC,
        )  # fmt: skip
    if BT > 0:
        acc, top, total = _forward_tile(
            FULL, acc, top, total, q, qh, qw, k_ptr, v_ptr, y0, x0, H, W, sky, skx, skd, svy, svx, svd, qk_scale,
            WIN, D, DV, DP, DVP, WP, BT, PREC,
        )  # fmt: skip

    e = tl.arange(0, DVP)[None, :]
    tl.store(
        o_ptr + batch * sob + head * soh + (qy * soy + qx * sox)[:, None] + e * sod,
        (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=q_ok[:, None] & (e < DV),
    )  # fmt: skip
    lse = tl.where(q_ok, top * qk_scale + tl.log2(total), float("inf"))
    tl.store(lse_ptr + (block.to(tl.int64) * heads + head) * NQ + m, lse, mask=m < NQ)


@triton.jit
def _query_grad_tile(
    n0, dq, dqh, dqw, q, qh, qw, do, lse, delta, k_ptr, v_ptr, y0, x0, H, W, sky, skx, skd, svy, svx, svd, qk_scale,
    WIN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, WP: tl.constexpr,
    BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    R, S, y, x, ok = _keys(n0 + tl.arange(0, BN), y0, x0, H, W, WIN)
    e = tl.arange(0, DVP)[:, None]
    mask = ok[None, :]
    if DV < DVP:
        mask = mask & (e < DV)
    v = tl.load(v_ptr + (y * svy + x * svx)[None, :] + e * svd, mask=mask, other=0.0)
    s, k, eh, ew = _logits(q, qh, qw, k_ptr, R, S, y, x, ok, sky, skx, skd, D, DP, WP, PREC)
    p = tl.exp2(s * qk_scale - lse[:, None])
    ds = (p * (tl.dot(do, v, input_precision=PREC) - delta[:, None])).to(q.dtype)
    dq = tl.dot(ds, tl.trans(k), dq, input_precision=PREC)
    dqh = tl.dot(ds, tl.trans(eh), dqh, input_precision=PREC)
    dqw = tl.dot(ds, tl.trans(ew), dqw, input_precision=PREC)
    return dq, dqh, dqw


@triton.jit(do_not_specialize=["H", "W", "HQ", "WQ", "heads", "rows", "cols", "items", "per_program"])
def halo_query_grad(
    q_ptr, k_ptr, v_ptr, th_ptr, tw_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, rel_ptr, dq_ptr, dt_ptr,
    sqb, sqy, sqx, sqh, sqd, skb, sky, skx, skh, skd, svb, svy, svx, svh, svd,
    sob, soy, sox, soh, sod, sgb, sgy, sgx, sgh, sgd, sdb, sdy, sdx, sdh, sdd,
    H, W, HQ, WQ, heads, rows, cols, items, per_program, qk_scale, ratio, scale, rel_scale,
    B: tl.constexpr, HALO: tl.constexpr, BQ: tl.constexpr, WIN: tl.constexpr, STEP: tl.constexpr,
    MASK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    WP: tl.constexpr, LP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    BIG: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: `per_program` items, an item being BM queries of one block and head, as in the forward kernel.

    Writes dq, and for the key kernel delta = sum(o * do) and the relative logits; a program's share of the tables'
    gradients goes to its own slot of dt (program, 2, LP, DP), so that no order of atomics shows in the result.
    """
    NQ: tl.constexpr = BQ * BQ
    CHUNKS: tl.constexpr = (NQ + BM - 1) // BM
    FULL: tl.constexpr = (WIN * WIN // BN) * BN
    pid = tl.program_id(0)
    d = tl.arange(0, DP)[None, :]
    e = tl.arange(0, DVP)[None, :]
    w = tl.arange(0, WP)[None, :]
    dth = tl.zeros([LP, DP], tl.float32)
    dtw = tl.zeros([LP, DP], tl.float32)
    for item in tl.range(pid * per_program, tl.minimum((pid + 1) * per_program, items), num_stages=1):
        head = (item % heads).to(tl.int64)
        chunk = item // heads % CHUNKS
        block = item // heads // CHUNKS
        bx = block % cols
        by = block // cols % rows
        batch = (block // cols // rows).to(tl.int64)
        m = chunk * BM + tl.arange(0, BM)
        r = m // BQ
        c = m % BQ
        qy = (by * BQ + r).to(tl.int64)
        qx = (bx * BQ + c).to(tl.int64)
        q_ok = (m < NQ) & (qy < HQ) & (qx < WQ)
        q_mask = q_ok[:, None] & (d < D)
        o_mask = q_ok[:, None] & (e < DV)
        q = tl.load(q_ptr + batch * sqb + head * sqh + (qy * sqy + qx * sqx)[:, None] + d * sqd, mask=q_mask, other=0.0)
        do = tl.load(
            do_ptr + batch * sgb + head * sgh + (qy * sgy + qx * sgx)[:, None] + e * sgd, mask=o_mask, other=0.0
        )
        o = tl.load(o_ptr + batch * sob + head * soh + (qy * soy + qx * sox)[:, None] + e * sod, mask=o_mask, other=0.0)
        flat = (block.to(tl.int64) * heads + head) * NQ + m
        lse = tl.load(lse_ptr + flat, mask=m < NQ, other=float("inf"))
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta_ptr + flat, delta, mask=m < NQ)

        y0 = by * B - HALO
        x0 = bx * B - HALO
        lo, hi = _window_range(y0, H, WIN, MASK)
        th = _table(th_ptr, D, DP, WIN, LP, q.dtype)
        qh = _relative(q, th, r * STEP, ratio, lo, hi, WIN, WP, LP, BIG, PREC)
        lo, hi = _window_range(x0, W, WIN, MASK)
        tw = _table(tw_ptr, D, DP, WIN, LP, q.dtype)
        qw = _relative(q, tw, c * STEP, ratio, lo, hi, WIN, WP, LP, BIG, PREC)
        rel = rel_ptr + flat[:, None] * (2 * WP) + w
        tl.store(rel, qh, mask=m[:, None] < NQ)
        tl.store(rel + WP, qw, mask=m[:, None] < NQ)

        k_base = k_ptr + batch * skb + head * skh
        v_base = v_ptr + batch * svb + head * svh
        dq = tl.zeros([BM, DP], tl.float32)
        dqh = tl.zeros([BM, WP], tl.float32)
        dqw = tl.zeros([BM, WP], tl.float32)
        for n0 in tl.range(0, FULL, BN):
            dq, dqh, dqw = _query_grad_tile(
                n0, dq, dqh, dqw, q, qh, qw, do, lse, delta, k_base, v_base, y0, x0, H, W,
                sky, skx, skd, svy, svx, svd, qk_scale, WIN, D, DV, DP, DVP, WP, BN, PREC,
            )  # fmt: skip
        if BT > 0:
            dq, dqh, dqw = _query_grad_tile(
                FULL, dq, dqh, dqw, q, qh, qw, do, lse, delta, k_base, v_base, y0, x0, H, W,
                sky, skx, skd, svy, svx, svd, qk_scale, WIN, D, DV, DP, DVP, WP, BT, PREC,
            )  # fmt: skip

        dfh = _unshift(dqh, r * STEP, WIN, WP, LP).to(q.dtype)
        dfw = _unshift(dqw, c * STEP, WIN, WP, LP).to(q.dtype)
        drel = tl.dot(dfh, tl.trans(th), input_precision=PREC)
        drel = tl.dot(dfw, tl.trans(tw), drel, input_precision=PREC)
        dth = tl.dot(tl.trans(dfh), q, dth, input_precision=PREC)
        dtw = tl.dot(tl.trans(dfw), q, dtw, input_precision=PREC)
        tl.store(
            dq_ptr + batch * sdb + head * sdh + (qy * sdy + qx * sdx)[:, None] + d * sdd,
            (dq * scale + drel * rel_scale).to(dq_ptr.dtype.element_ty), mask=q_mask,
        )  # fmt: skip
    slot = dt_ptr + pid.to(tl.int64) * (2 * LP * DP) + tl.arange(0, LP)[:, None] * DP + d
    tl.store(slot, dth * rel_scale)
    tl.store(slot + LP * DP, dtw * rel_scale)


@triton.jit
def _strip(
    dy: tl.constexpr, dx: tl.constexpr, dk, dv, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, rel_ptr,
    batch, by, bx, head, first_row, H, W, HQ, WQ, heads, rows, cols,
    sqy, sqx, sqd, sky, skx, skd, svy, svx, svd, sgy, sgx, sgd, qk_scale,
    B: tl.constexpr, HALO: tl.constexpr, BQ: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, WP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds what the query block at (by + dy, bx + dx) sends to the keys of block (by, bx) that its window covers.

    These keys are a rectangle; only they are visited. A one-hot product puts their sums where they belong.
    Positions beyond the rectangle, or the map, repeat its last row or column, so that every number stays finite.
    """
    NQ: tl.constexpr = BQ * BQ
    y_lo: tl.constexpr = dy * B - HALO if dy * B - HALO > 0 else 0
    x_lo: tl.constexpr = dx * B - HALO if dx * B - HALO > 0 else 0
    y_hi: tl.constexpr = (dy + 1) * B + HALO if (dy + 1) * B + HALO < B else B
    x_hi: tl.constexpr = (dx + 1) * B + HALO if (dx + 1) * B + HALO < B else B
    NX: tl.constexpr = x_hi - x_lo
    NY: tl.constexpr = KR if KR < y_hi - y_lo else y_hi - y_lo  # noqa: SIM300
    N: tl.constexpr = NX * NY
    NP: tl.constexpr = 16 if N <= 16 else (32 if N <= 32 else (64 if N <= 64 else (128 if N <= 128 else 256)))
    start = tl.maximum(first_row, y_lo)
    stop = tl.minimum(first_row + KR, y_hi)
    there = (by + dy >= 0) & (by + dy < rows) & (bx + dx >= 0) & (bx + dx < cols)
    if there & (start < stop):
        n = tl.arange(0, NP)
        y = start + n // NX
        x = x_lo + n % NX
        ky = tl.minimum(tl.minimum(y, stop - 1), H - 1 - by * B)
        kx = tl.minimum(x, W - 1 - bx * B)
        w = tl.arange(0, WP)[None, :]
        eh = tl.where(w == (ky - (dy * B - HALO))[:, None], 1.0, 0.0).to(k_ptr.dtype.element_ty)
        ew = tl.where(w == (kx - (dx * B - HALO))[:, None], 1.0, 0.0).to(k_ptr.dtype.element_ty)
        ky = (ky + by * B).to(tl.int64)
        kx = (kx + bx * B).to(tl.int64)
        d = tl.arange(0, DP)[None, :]
        e = tl.arange(0, DVP)[None, :]
        k = tl.load(k_ptr + (ky * sky + kx * skx)[:, None] + d * skd, mask=d < D, other=0.0)
        v = tl.load(v_ptr + (ky * svy + kx * svx)[:, None] + e * svd, mask=e < DV, other=0.0)

        block = ((batch * rows + by + dy) * cols + bx + dx) * heads + head
        dk_part = tl.zeros([NP, DP], tl.float32)
        dv_part = tl.zeros([NP, DVP], tl.float32)
        for m0 in tl.range(0, NQ, BM):
            m = m0 + tl.arange(0, BM)
            qy = ((by + dy) * BQ + m // BQ).to(tl.int64)
            qx = ((bx + dx) * BQ + m % BQ).to(tl.int64)
            q_ok = (m < NQ) & (qy < HQ) & (qx < WQ)
            q = tl.load(q_ptr + (qy * sqy + qx * sqx)[:, None] + d * sqd, mask=q_ok[:, None] & (d < D), other=0.0)
            do = tl.load(do_ptr + (qy * sgy + qx * sgx)[:, None] + e * sgd, mask=q_ok[:, None] & (e < DV), other=0.0)
            flat = block * NQ + m
            lse = tl.load(lse_ptr + flat, mask=m < NQ, other=float("inf"))
            delta = tl.load(delta_ptr + flat, mask=m < NQ, other=0.0)
            rel = rel_ptr + flat[:, None] * (2 * WP) + w
            qh = tl.load(rel, mask=m[:, None] < NQ, other=0.0)
            qw = tl.load(rel + WP, mask=m[:, None] < NQ, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PREC)
            s = tl.dot(eh, tl.trans(qh), s, input_precision=PREC)
            s = tl.dot(ew, tl.trans(qw), s, input_precision=PREC)
            p = tl.exp2(s * qk_scale - lse[None, :])
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PREC) - delta[None, :])
            dv_part = tl.dot(p.to(do.dtype), do, dv_part, input_precision=PREC)
            dk_part = tl.dot(ds.to(q.dtype), q, dk_part, input_precision=PREC)

        if dy == 0 and dx == 0 and NP == BK:  # the whole tile, in its own order
            dk += dk_part
            dv += dv_part
        else:
            a = tl.arange(0, BK)[:, None]
            here = (a // B == (y - first_row)[None, :]) & (a % B == x[None, :])
            here = here & ((n < N) & (y < stop))[None, :]
            place = tl.where(here, 1.0, 0.0).to(k.dtype)
            dk = tl.dot(place, dk_part.to(k.dtype), dk, input_precision=PREC)
            dv = tl.dot(place, dv_part.to(v.dtype), dv, input_precision=PREC)
    return dk, dv


@triton.jit(do_not_specialize=["H", "W", "HQ", "WQ", "heads", "rows", "cols"])
def halo_key_grad(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, rel_ptr, dk_ptr, dv_ptr,
    sqb, sqy, sqx, sqh, sqd, skb, sky, skx, skh, skd, svb, svy, svx, svh, svd,
    sgb, sgy, sgx, sgh, sgd, sdb, sdy, sdx, sdh, sdd,
    H, W, HQ, WQ, heads, rows, cols, qk_scale, scale,
    B: tl.constexpr, HALO: tl.constexpr, BQ: tl.constexpr, NEAR: tl.constexpr, KR: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, WP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: KR rows of one block's keys, one head; all query blocks whose windows reach them. No atomics."""
    CHUNKS: tl.constexpr = (B + KR - 1) // KR
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    first_row = pid // heads % CHUNKS * KR
    block = pid // heads // CHUNKS
    bx = block % cols
    by = block // cols % rows
    batch = (block // cols // rows).to(tl.int64)
    q_ptr += batch * sqb + head * sqh
    k_ptr += batch * skb + head * skh
    v_ptr += batch * svb + head * svh
    do_ptr += batch * sgb + head * sgh
    dk = tl.zeros([BK, DP], tl.float32)
    dv = tl.zeros([BK, DVP], tl.float32)
    if by * B + first_row < H:
        for dy in tl.static_range(-NEAR, NEAR + 1):
            for dx in tl.static_range(-NEAR, NEAR + 1):
                dk, dv = _strip(
                    dy, dx, dk, dv, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, rel_ptr,
                    batch, by, bx, head, first_row, H, W, HQ, WQ, heads, rows, cols,
                    sqy, sqx, sqd, sky, skx, skd, svy, svx, svd, sgy, sgx, sgd, qk_scale,
                    B, HALO, BQ, KR, D, DV, DP, DVP, WP, BM, BK, PREC,
                )  # fmt: skip
    a = tl.arange(0, BK)
    y = (by * B + first_row + a // B).to(tl.int64)
    x = (bx * B + a % B).to(tl.int64)
    ok = (a // B < KR) & (first_row + a // B < B) & (y < H) & (x < W)
    d = tl.arange(0, DP)[None, :]
    e = tl.arange(0, DVP)[None, :]
    base = batch * sdb + head * sdh + (y * sdy + x * sdx)[:, None]
    tl.store(dk_ptr + base + d * sdd, (dk * scale).to(dk_ptr.dtype.element_ty), mask=ok[:, None] & (d < D))
    tl.store(dv_ptr + base + e * sdd, dv.to(dv_ptr.dtype.element_ty), mask=ok[:, None] & (e < DV))
