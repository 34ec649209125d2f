"""Triton: the backward kernels of local attention. Nothing is added atomically; results are the same bits every time.

delta = sum(out * grad) - grad of the log-sum-exp; p = exp(logit - lse); ds = p * (grad . v - delta).
"""

import triton
import triton.language as tl

from .kernels import (
    NUMBERS,
    full_visit,
    load_rows,
    load_run,
    load_tile,
    masked_visit,
    query_bounds,
    sees,
    table_range,
    table_visit,
    tile_of_axis,
    visit_keys,
    visit_queries,
)


@triton.jit(do_not_specialize=["heads", "N", "tiles"])
def delta_kernel(
    o_ptr, g_ptr, dlse_ptr, delta_ptr, sob, son, soh, sgb, sgn, sgh, heads, N, tiles,
    BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """delta (B, heads, N), float32."""
    pid = tl.program_id(0)
    tile = pid % tiles
    rest = pid // tiles
    head = (rest % heads).to(tl.int64)
    batch = (rest // heads).to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    ok = m < N
    o = load_rows(o_ptr + batch * sob + head * soh, m, ok, son, D, DP, True)
    g = load_rows(g_ptr + batch * sgb + head * sgh, m, ok, sgn, D, DP, True)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    row = (batch * heads + head) * N + m
    if DLSE:
        delta -= tl.load(dlse_ptr + row, mask=ok, other=0.0)
    tl.store(delta_ptr + row, delta, mask=ok)


@triton.jit
def probabilities(s, lse2, qk_scale):
    """exp(scaled logit - lse); a query that saw nothing has lse2 = +inf here."""
    return tl.exp2(s * qk_scale - lse2)


@triton.jit
def load_lse(ptr, at, ok):
    """Log-sum-exp in base 2; +inf for rows that do not exist or saw no key, so that their p is 0."""
    lse = tl.load(ptr + at, mask=ok, other=float("inf")) * 1.4426950408889634
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def query_step(dq, q, g, k, v, s, lse2, delta, qk_scale, PREC: tl.constexpr):
    """Adds a tile's share to dq. Hidden logits of s are -inf."""
    p = probabilities(s, lse2[:, None], qk_scale)
    ds = p * (tl.dot(g, tl.trans(v), input_precision=PREC) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC)


@triton.jit
def key_step(dk, dv, q, g, k, v, st, lse2, delta, qk_scale, PREC: tl.constexpr):
    """Adds a tile of queries' share to dk and dv; st is (keys, queries)."""
    p = probabilities(st, lse2[None, :], qk_scale)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PREC)
    ds = p * (tl.dot(v, tl.trans(g), input_precision=PREC) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PREC)
    return dk, dv


@triton.jit(do_not_specialize=NUMBERS)
def grid_query_grad(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, dq_ptr, ek_ptr, ev_ptr, bias_ptr, len_ptr, table,
    k_desc, v_desc, kt_desc, vt_desc, ke_desc, ve_desc,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sgb, sgn, sgh, sdb, sdn, sdh, seb, sen, seh, sfb, sfn, sfh,
    batch0, T, H, W, heads, group, text, text_at, first, extra, N,
    wz, wy, wx, tz, ty, tx, ez, ey, ex, radius_sq, tiles_z, tiles_y, tiles_x, classes_x, qk_scale, scale,
    KIND: tl.constexpr, THREE: tl.constexpr, CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    QZ: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr, KZ: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, TEXT: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr,
    LENGTHS: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: dq of a tile of grid queries, one head, over the visits of the forward kernel."""
    M: tl.constexpr = QZ * QH * QW
    NK: tl.constexpr = KZ * KH * KW
    pid = tl.program_id(0)
    tile_x = pid % tiles_x
    rest = pid // tiles_x
    tile_y = rest % tiles_y
    rest = rest // tiles_y
    tile_z = rest % tiles_z
    rest = rest // tiles_z
    head = rest % heads
    batch = batch0 + rest // heads
    kv_head = head // group
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    gz, az, nz = tile_of_axis(tile_z, T, ez, QZ)
    gy, ay, ny = tile_of_axis(tile_y, H, ey, QH)
    gx, ax, nx = tile_of_axis(tile_x, W, ex, QW)

    m = tl.arange(0, M)
    qz, qy, qx = az + m // (QH * QW), ay + m // QW % QH, ax + m % QW
    q_ok = (qz < nz) & (qy < ny) & (qx < nx)
    q_token = first + ((gz + qz * ez) * H + gy + qy * ey) * W + gx + qx * ex
    q = load_rows(q_ptr + b64 * sqb + h64 * sqh, q_token, q_ok, sqn, D, DP, True)
    g = load_rows(g_ptr + b64 * sgb + h64 * sgh, q_token, q_ok, sgn, D, DP, True)
    row = (b64 * heads + h64) * N + q_token
    lse2 = load_lse(lse_ptr, row, q_ok)
    delta = tl.load(delta_ptr + row, mask=q_ok, other=0.0)
    k_base, v_base = k_ptr + b64 * skb + g64 * skh, v_ptr + b64 * svb + g64 * svh
    dq = tl.zeros([M, DP], tl.float32)
    n = tl.arange(0, NK)

    if TEXT:
        limit = text
        if LENGTHS:
            limit = tl.minimum(tl.maximum(tl.load(len_ptr + batch).to(tl.int32), 0), text)
        whole = limit // NK * NK
        for t in tl.range(0, whole, NK):
            k = load_run(k_base, kt_desc, batch, t, kv_head, text_at + t + n, n < NK, skn, NK, D, DP, TMA, False)
            v = load_run(v_base, vt_desc, batch, t, kv_head, text_at + t + n, n < NK, svn, NK, D, DP, TMA, False)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
            dq = query_step(dq, q, g, k, v, s, lse2, delta, qk_scale, PREC)
        if whole < limit:
            ok = whole + n < limit
            k = load_rows(k_base, text_at + whole + n, ok, skn, D, DP, True)
            v = load_rows(v_base, text_at + whole + n, ok, svn, D, DP, True)
            s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision=PREC), -float("inf"))
            dq = query_step(dq, q, g, k, v, s, lse2, delta, qk_scale, PREC)
    if EXTRA:
        ek_base, ev_base = ek_ptr + b64 * seb + g64 * seh, ev_ptr + b64 * sfb + g64 * sfh
        whole = extra // NK * NK
        for t in tl.range(0, whole, NK):
            k = load_run(ek_base, ke_desc, batch, t, kv_head, t + n, n < NK, sen, NK, D, DP, TMA, False)
            v = load_run(ev_base, ve_desc, batch, t, kv_head, t + n, n < NK, sfn, NK, D, DP, TMA, False)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
            dq = query_step(dq, q, g, k, v, s, lse2, delta, qk_scale, PREC)
        if whole < extra:
            ok = whole + n < extra
            k = load_rows(ek_base, whole + n, ok, sen, D, DP, True)
            v = load_rows(ev_base, whole + n, ok, sfn, D, DP, True)
            s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision=PREC), -float("inf"))
            dq = query_step(dq, q, g, k, v, s, lse2, delta, qk_scale, PREC)

    if KIND == 0:
        oz, cz, fz, Fz = visit_keys(az, nz, wz, tz, CZ, QZ, KZ)
        oy, cy, fy, Fy = visit_keys(ay, ny, wy, ty, CY, QH, KH)
        ox, cx, fx, Fx = visit_keys(ax, nx, wx, tx, CX, QW, KW)
        begin, end, stop = 0, cz * cy * cx - Fz * Fy * Fx, cz * cy * cx
    else:
        begin, end, stop = table_range(table, tile_y, tile_x, tiles_y, tiles_x, classes_x)
    lz, wide_z = query_bounds(qz, nz, wz, tz, CZ)
    ly, wide_y = query_bounds(qy, ny, wy, ty, CY)
    lx, wide_x = query_bounds(qx, nx, wx, tx, CX)
    nkz, nky, nkx = n // (KH * KW), n // KW % KH, n % KW
    if BIAS:
        by, bx = 2 * wy - 1, 2 * wx - 1
        bias = bias_ptr + head * (2 * wz - 1) * by * bx + ((wz - 1) * by + wy - 1) * bx + wx - 1
        q_at = (tl.minimum(qz, nz - 1) * by + tl.minimum(qy, ny - 1)) * bx + tl.minimum(qx, nx - 1)
        step_scale = 1.0
    else:
        step_scale = qk_scale

    for i in tl.range(begin, end):
        if KIND == 0:
            vz, vy, vx = masked_visit(i, cz, cy, cx, fz, fy, fx, Fz, Fy, Fx)
            z0, y0, x0 = oz + vz * KZ, oy + vy * KH, ox + vx * KW
        else:
            dy, dx = table_visit(table, i)
            z0, y0, x0 = 0, ay + dy, ax + dx
        kz, ky, kx = z0 + nkz, y0 + nky, x0 + nkx
        ok = (kz < nz) & (ky >= 0) & (ky < ny) & (kx >= 0) & (kx < nx)
        token = first + ((gz + kz * ez) * H + gy + ky * ey) * W + gx + kx * ex
        at_z = z0 if THREE else batch
        k = load_tile(k_base, k_desc, at_z, y0, x0, kv_head, token, ok, skn, KZ, KH, KW, D, DP, TMA, True)
        v = load_tile(v_base, v_desc, at_z, y0, x0, kv_head, token, ok, svn, KZ, KH, KW, D, DP, TMA, True)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        seen = sees(
            KIND, THREE, qz[:, None], qy[:, None], qx[:, None], kz[None, :], ky[None, :], kx[None, :], lz[:, None],
            ly[:, None], lx[:, None], wide_z[:, None], wide_y[:, None], wide_x[:, None], H, W, radius_sq,
        )  # fmt: skip
        if BIAS:
            at = bias + (((kz * by + ky) * bx + kx)[None, :] - q_at[:, None])
            s = s * qk_scale + tl.load(at, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
        s = tl.where(seen, s, -float("inf"))
        dq = query_step(dq, q, g, k, v, s, lse2, delta, step_scale, PREC)

    for i in tl.range(end, stop):
        if KIND == 0:
            vz, vy, vx = full_visit(i - end, fy, fx, Fy, Fx, fz)
            z0, y0, x0 = oz + vz * KZ, oy + vy * KH, ox + vx * KW
        else:
            dy, dx = table_visit(table, i)
            z0, y0, x0 = 0, ay + dy, ax + dx
        kz, ky, kx = z0 + nkz, y0 + nky, x0 + nkx
        token = first + ((gz + kz * ez) * H + gy + ky * ey) * W + gx + kx * ex
        at_z = z0 if THREE else batch
        k = load_tile(k_base, k_desc, at_z, y0, x0, kv_head, token, n < NK, skn, KZ, KH, KW, D, DP, TMA, False)
        v = load_tile(v_base, v_desc, at_z, y0, x0, kv_head, token, n < NK, svn, KZ, KH, KW, D, DP, TMA, False)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        if BIAS:
            at = bias + (((kz * by + ky) * bx + kx)[None, :] - q_at[:, None])
            s = s * qk_scale + tl.load(at).to(tl.float32) * 1.4426950408889634
        dq = query_step(dq, q, g, k, v, s, lse2, delta, step_scale, PREC)

    d = tl.arange(0, DP)[None, :]
    out = dq_ptr + b64 * sdb + h64 * sdh + q_token.to(tl.int64)[:, None] * sdn + d
    tl.store(out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=q_ok[:, None] & (d < D))


@triton.jit(do_not_specialize=NUMBERS)
def grid_key_grad(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, table,
    q_desc, g_desc, qt_desc, gt_desc,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sgb, sgn, sgh, sdb, sdn, sdh,
    batch0, T, H, W, heads, group, text, text_at, first, extra, N,
    wz, wy, wx, tz, ty, tx, ez, ey, ex, radius_sq, tiles_z, tiles_y, tiles_x, classes_x, qk_scale, scale,
    KIND: tl.constexpr, THREE: tl.constexpr, CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    QZ: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr, KZ: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, TEXT: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of a tile of grid keys (K*), one key head, over the tiles of queries (Q*) that see it."""
    M: tl.constexpr = QZ * QH * QW
    NK: tl.constexpr = KZ * KH * KW
    pid = tl.program_id(0)
    tile_x = pid % tiles_x
    rest = pid // tiles_x
    tile_y = rest % tiles_y
    rest = rest // tiles_y
    tile_z = rest % tiles_z
    rest = rest // tiles_z
    kv_heads = heads // group
    kv_head = rest % kv_heads
    batch = batch0 + rest // kv_heads
    b64, g64 = batch.to(tl.int64), kv_head.to(tl.int64)
    gz, az, nz = tile_of_axis(tile_z, T, ez, KZ)
    gy, ay, ny = tile_of_axis(tile_y, H, ey, KH)
    gx, ax, nx = tile_of_axis(tile_x, W, ex, KW)

    n = tl.arange(0, NK)
    kz, ky, kx = az + n // (KH * KW), ay + n // KW % KH, ax + n % KW
    k_ok = (kz < nz) & (ky < ny) & (kx < nx)
    k_token = first + ((gz + kz * ez) * H + gy + ky * ey) * W + gx + kx * ex
    k = load_rows(k_ptr + b64 * skb + g64 * skh, k_token, k_ok, skn, D, DP, True)
    v = load_rows(v_ptr + b64 * svb + g64 * svh, k_token, k_ok, svn, D, DP, True)
    dk = tl.zeros([NK, DP], tl.float32)
    dv = tl.zeros([NK, DP], tl.float32)
    m = tl.arange(0, M)
    nqz, nqy, nqx = m // (QH * QW), m // QW % QH, m % QW
    if KIND == 0:
        oz, cz, fz, Fz = visit_queries(az, nz, wz, tz, CZ, KZ, QZ)
        oy, cy, fy, Fy = visit_queries(ay, ny, wy, ty, CY, KH, QH)
        ox, cx, fx, Fx = visit_queries(ax, nx, wx, tx, CX, KW, QW)
        begin, end, stop = 0, cz * cy * cx - Fz * Fy * Fx, cz * cy * cx
    else:
        begin, end, stop = table_range(table, tile_y, tile_x, tiles_y, tiles_x, classes_x)

    for member in tl.range(0, group, num_stages=1):
        head = kv_head * group + member
        h64 = head.to(tl.int64)
        q_base, g_base = q_ptr + b64 * sqb + h64 * sqh, g_ptr + b64 * sgb + h64 * sgh
        row = (b64 * heads + h64) * N
        if BIAS:
            by, bx = 2 * wy - 1, 2 * wx - 1
            bias = bias_ptr + head * (2 * wz - 1) * by * bx + ((wz - 1) * by + wy - 1) * bx + wx - 1
            k_at = (tl.minimum(kz, nz - 1) * by + tl.minimum(ky, ny - 1)) * bx + tl.minimum(kx, nx - 1)
            step_scale = 1.0
        else:
            step_scale = qk_scale

        if TEXT:
            whole = text // M * M
            for t in tl.range(0, whole, M):
                token = text_at + t + m
                q = load_run(q_base, qt_desc, batch, t, head, token, m < M, sqn, M, D, DP, TMA, False)
                g = load_run(g_base, gt_desc, batch, t, head, token, m < M, sgn, M, D, DP, TMA, False)
                lse2 = load_lse(lse_ptr, row + token, m < M)
                delta = tl.load(delta_ptr + row + token)
                st = tl.dot(k, tl.trans(q), input_precision=PREC)
                dk, dv = key_step(dk, dv, q, g, k, v, st, lse2, delta, qk_scale, PREC)
            if whole < text:
                ok = whole + m < text
                token = text_at + whole + m
                q = load_rows(q_base, token, ok, sqn, D, DP, True)
                g = load_rows(g_base, token, ok, sgn, D, DP, True)
                lse2 = load_lse(lse_ptr, row + token, ok)
                delta = tl.load(delta_ptr + row + token, mask=ok, other=0.0)
                st = tl.dot(k, tl.trans(q), input_precision=PREC)
                dk, dv = key_step(dk, dv, q, g, k, v, st, lse2, delta, qk_scale, PREC)

        for i in tl.range(begin, end):
            if KIND == 0:
                vz, vy, vx = masked_visit(i, cz, cy, cx, fz, fy, fx, Fz, Fy, Fx)
                z0, y0, x0 = oz + vz * QZ, oy + vy * QH, ox + vx * QW
            else:
                dy, dx = table_visit(table, i)
                z0, y0, x0 = 0, ay + dy, ax + dx
            qz, qy, qx = z0 + nqz, y0 + nqy, x0 + nqx
            ok = (qz < nz) & (qy >= 0) & (qy < ny) & (qx >= 0) & (qx < nx)
            token = first + ((gz + qz * ez) * H + gy + qy * ey) * W + gx + qx * ex
            at_z = z0 if THREE else batch
            q = load_tile(q_base, q_desc, at_z, y0, x0, head, token, ok, sqn, QZ, QH, QW, D, DP, TMA, True)
            g = load_tile(g_base, g_desc, at_z, y0, x0, head, token, ok, sgn, QZ, QH, QW, D, DP, TMA, True)
            lse2 = load_lse(lse_ptr, row + token, ok)
            delta = tl.load(delta_ptr + row + token, mask=ok, other=0.0)
            lz, wide_z = query_bounds(tl.maximum(qz, 0), nz, wz, tz, CZ)
            ly, wide_y = query_bounds(tl.maximum(qy, 0), ny, wy, ty, CY)
            lx, wide_x = query_bounds(tl.maximum(qx, 0), nx, wx, tx, CX)
            st = tl.dot(k, tl.trans(q), input_precision=PREC)
            seen = sees(
                KIND, THREE, qz[None, :], qy[None, :], qx[None, :], kz[:, None], ky[:, None], kx[:, None], lz[None, :],
                ly[None, :], lx[None, :], wide_z[None, :], wide_y[None, :], wide_x[None, :], H, W, radius_sq,
            )  # fmt: skip
            if BIAS:
                seen = seen & ok[None, :]
                at = bias + (k_at[:, None] - ((qz * by + qy) * bx + qx)[None, :])
                st = st * qk_scale + tl.load(at, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
            st = tl.where(seen, st, -float("inf"))
            dk, dv = key_step(dk, dv, q, g, k, v, st, lse2, delta, step_scale, PREC)

        for i in tl.range(end, stop):
            if KIND == 0:
                vz, vy, vx = full_visit(i - end, fy, fx, Fy, Fx, fz)
                z0, y0, x0 = oz + vz * QZ, oy + vy * QH, ox + vx * QW
            else:
                dy, dx = table_visit(table, i)
                z0, y0, x0 = 0, ay + dy, ax + dx
            qz, qy, qx = z0 + nqz, y0 + nqy, x0 + nqx
            token = first + ((gz + qz * ez) * H + gy + qy * ey) * W + gx + qx * ex
            at_z = z0 if THREE else batch
            q = load_tile(q_base, q_desc, at_z, y0, x0, head, token, m < M, sqn, QZ, QH, QW, D, DP, TMA, False)
            g = load_tile(g_base, g_desc, at_z, y0, x0, head, token, m < M, sgn, QZ, QH, QW, D, DP, TMA, False)
            lse2 = load_lse(lse_ptr, row + token, m < M)
            delta = tl.load(delta_ptr + row + token)
            st = tl.dot(k, tl.trans(q), input_precision=PREC)
            if BIAS:
                at = bias + (k_at[:, None] - ((qz * by + qy) * bx + qx)[None, :])
                st = st * qk_scale + tl.load(at).to(tl.float32) * 1.4426950408889634
            dk, dv = key_step(dk, dv, q, g, k, v, st, lse2, delta, step_scale, PREC)

    d = tl.arange(0, DP)[None, :]
    out = b64 * sdb + g64 * sdh + k_token.to(tl.int64)[:, None] * sdn + d
    ok = k_ok[:, None] & (d < D)
    tl.store(dk_ptr + out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=ok)
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["heads", "group", "text", "text_at", "N", "chunk", "tiles", "chunks"])
def dense_query_grad(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, part_ptr, len_ptr, k_desc, v_desc,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sgb, sgn, sgh,
    heads, group, text, text_at, N, chunk, tiles, chunks, qk_scale, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LENGTHS: tl.constexpr,
    TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of keys' share of BM text queries' gradient; part (chunks, B, text, heads, D), float32."""
    pid = tl.program_id(0)
    tile = pid % tiles
    rest = pid // tiles
    part = rest % chunks
    rest = rest // chunks
    head = rest % heads
    batch = rest // heads
    kv_head = head // group
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    q_ok = m < text
    q = load_rows(q_ptr + b64 * sqb + h64 * sqh, text_at + m, q_ok, sqn, D, DP, True)
    g = load_rows(g_ptr + b64 * sgb + h64 * sgh, text_at + m, q_ok, sgn, D, DP, True)
    row = (b64 * heads + h64) * N + text_at + m
    lse2 = load_lse(lse_ptr, row, q_ok)
    delta = tl.load(delta_ptr + row, mask=q_ok, other=0.0)
    k_base, v_base = k_ptr + b64 * skb + g64 * skh, v_ptr + b64 * svb + g64 * svh
    limit = text
    if LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(len_ptr + batch).to(tl.int32), 0), text)
    dq = tl.zeros([BM, DP], tl.float32)
    n = tl.arange(0, BN)
    begin = part * chunk
    end = tl.minimum(begin + chunk, N)
    whole = begin + tl.maximum(end - begin, 0) // BN * BN
    for t in tl.range(begin, whole, BN):
        k = load_run(k_base, k_desc, batch, t, kv_head, t + n, n < BN, skn, BN, D, DP, TMA, False)
        v = load_run(v_base, v_desc, batch, t, kv_head, t + n, n < BN, svn, BN, D, DP, TMA, False)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        if LENGTHS:
            s = tl.where(((t + n < text_at + limit) | (t + n >= text_at + text))[None, :], s, -float("inf"))
        dq = query_step(dq, q, g, k, v, s, lse2, delta, qk_scale, PREC)
    if whole < end:
        inside = whole + n < end
        ok = inside & ((whole + n < text_at + limit) | (whole + n >= text_at + text))
        k = load_rows(k_base, whole + n, inside, skn, D, DP, True)
        v = load_rows(v_base, whole + n, inside, svn, D, DP, True)
        s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision=PREC), -float("inf"))
        dq = query_step(dq, q, g, k, v, s, lse2, delta, qk_scale, PREC)
    batches = tl.num_programs(0) // (tiles * chunks * heads)
    at = ((part * batches + batch).to(tl.int64) * text + m) * heads + head
    d = tl.arange(0, DP)[None, :]
    tl.store(part_ptr + at[:, None] * D + d, dq * scale, mask=q_ok[:, None] & (d < D))


@triton.jit(
    do_not_specialize=["heads", "group", "keys", "keys_at", "q_from", "q_to", "N", "chunk", "tiles",
                       "chunks"]
)  # fmt: skip
def dense_key_grad(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, len_ptr, q_desc, g_desc,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sgb, sgn, sgh,
    heads, group, keys, keys_at, q_from, q_to, N, chunk, tiles, chunks, qk_scale, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LENGTHS: tl.constexpr,
    TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: BN of the `keys` keys from keys_at on that all queries [q_from, q_to) see; one chunk of these.

    dk, dv: (chunks, B, keys, key heads, D), float32. With LENGTHS, keys from a batch's length on are hidden.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    rest = pid // tiles
    part = rest % chunks
    rest = rest // chunks
    kv_heads = heads // group
    kv_head = rest % kv_heads
    batch = rest // kv_heads
    b64, g64 = batch.to(tl.int64), kv_head.to(tl.int64)
    n = tile * BN + tl.arange(0, BN)
    k_ok = n < keys
    k = load_rows(k_ptr + b64 * skb + g64 * skh, keys_at + n, k_ok, skn, D, DP, True)
    v = load_rows(v_ptr + b64 * svb + g64 * svh, keys_at + n, k_ok, svn, D, DP, True)
    shown = k_ok
    if LENGTHS:
        shown = n < tl.load(len_ptr + batch).to(tl.int32)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    m = tl.arange(0, BM)
    begin = q_from + part * chunk
    end = tl.minimum(begin + chunk, q_to)
    whole = begin + tl.maximum(end - begin, 0) // BM * BM
    for member in tl.range(0, group, num_stages=1):
        head = kv_head * group + member
        h64 = head.to(tl.int64)
        q_base, g_base = q_ptr + b64 * sqb + h64 * sqh, g_ptr + b64 * sgb + h64 * sgh
        row = (b64 * heads + h64) * N
        for t in tl.range(begin, whole, BM):
            q = load_run(q_base, q_desc, batch, t, head, t + m, m < BM, sqn, BM, D, DP, TMA, False)
            g = load_run(g_base, g_desc, batch, t, head, t + m, m < BM, sgn, BM, D, DP, TMA, False)
            lse2 = load_lse(lse_ptr, row + t + m, m < BM)
            delta = tl.load(delta_ptr + row + t + m)
            st = tl.dot(k, tl.trans(q), input_precision=PREC)
            dk, dv = key_step(dk, dv, q, g, k, v, st, lse2, delta, qk_scale, PREC)
        if whole < end:
            ok = whole + m < end
            q = load_rows(q_base, whole + m, ok, sqn, D, DP, True)
            g = load_rows(g_base, whole + m, ok, sgn, D, DP, True)
            lse2 = load_lse(lse_ptr, row + whole + m, ok)
            delta = tl.load(delta_ptr + row + whole + m, mask=ok, other=0.0)
            st = tl.dot(k, tl.trans(q), input_precision=PREC)
            dk, dv = key_step(dk, dv, q, g, k, v, st, lse2, delta, qk_scale, PREC)
    # rows of dk and dv belong to one key: a hidden one's are dropped whole
    dk = tl.where(shown[:, None], dk, 0.0)
    dv = tl.where(shown[:, None], dv, 0.0)
    batches = tl.num_programs(0) // (tiles * chunks * kv_heads)
    at = ((part * batches + batch).to(tl.int64) * keys + n) * kv_heads + kv_head
    d = tl.arange(0, DP)[None, :]
    ok = k_ok[:, None] & (d < D)
    tl.store(dk_ptr + at[:, None] * D + d, dk * scale, mask=ok)
    tl.store(dv_ptr + at[:, None] * D + d, dv, mask=ok)


@triton.jit(
    do_not_specialize=["H", "W", "heads", "group", "first", "N", "wy", "wx", "ty", "tx", "ey", "ex", "tiles"]
)  # fmt: skip
def bias_grad(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, bias_ptr, slots_ptr,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sgb, sgn, sgh,
    H, W, heads, group, first, N, wy, wx, ty, tx, ey, ex, tiles, qk_scale,
    CY: tl.constexpr, CX: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """One program: BM grid queries in a row, one head of one batch entry; their share of the bias table's gradient.

    slots (B, heads, tiles, offsets), float32, hold zeros before. Elementwise, offset by offset: a pair belongs to one
    entry of the table, so that sums over rows are all there is to do.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % heads
    batch = pid // tiles // heads
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    ok = m < H * W
    m = tl.minimum(m, H * W - 1)
    y, x = m // W, m % W
    # groups of the dilation, positions inside them, and the keys that each query sees along each axis
    gy, gx, py, px = y % ey, x % ex, y // ey, x // ex
    ly, wide_y = query_bounds(py, (H - gy + ey - 1) // ey, wy, ty, CY)
    lx, wide_x = query_bounds(px, (W - gx + ex - 1) // ex, wx, tx, CX)
    q = load_rows(q_ptr + b64 * sqb + h64 * sqh, first + m, ok, sqn, D, DP, True).to(tl.float32)
    g = load_rows(g_ptr + b64 * sgb + h64 * sgh, first + m, ok, sgn, D, DP, True).to(tl.float32)
    row = (b64 * heads + h64) * N + first + m
    lse2 = load_lse(lse_ptr, row, ok)
    delta = tl.load(delta_ptr + row, mask=ok, other=0.0)
    k_base, v_base = k_ptr + b64 * skb + g64 * skh, v_ptr + b64 * svb + g64 * svh
    by, bx = 2 * wy - 1, 2 * wx - 1
    slot = slots_ptr + pid.to(tl.int64) * (by * bx)
    for offset in tl.range(0, by * bx, num_stages=1):
        ky = py + offset // bx - (wy - 1)
        kx = px + offset % bx - (wx - 1)
        seen = ok & (ky >= ly) & (ky < ly + wide_y) & (kx >= lx) & (kx < lx + wide_x)
        if tl.max(seen.to(tl.int32), 0) > 0:
            token = first + (gy + ky * ey) * W + gx + kx * ex
            k = load_rows(k_base, token, seen, skn, D, DP, True).to(tl.float32)
            v = load_rows(v_base, token, seen, svn, D, DP, True).to(tl.float32)
            bias = tl.load(bias_ptr + h64 * (by * bx) + offset).to(tl.float32) * 1.4426950408889634
            p = tl.exp2(tl.sum(q * k, 1) * qk_scale + bias - lse2)
            ds = tl.where(seen, p * (tl.sum(g * v, 1) - delta), 0.0)
            tl.store(slot + offset, tl.sum(ds, 0))
