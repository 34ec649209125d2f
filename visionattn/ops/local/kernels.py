"""Triton: the forward kernels of local attention, and what they share with the backward ones.

Grids are 3-D here (2-D: T = 1, and the batch in its place of a tensor descriptor). A program owns a tile of queries,
QZ x QH x QW tokens of one dilation group, and visits tiles of keys: first those that need a mask, then those
that don't. KIND 0 (boxes) computes its visits; KINDs 1 (disk) and 2 (cross) read them from a table (tables.py).
Positions are counted inside a dilation group. Divisions are of non-negative numbers only.
"""

import triton
import triton.language as tl

LOG2E = 1.4426950408889634

# Numbers that change with the grid: no kernel is compiled again for them.
NUMBERS = [
    "batch0", "T", "H", "W", "heads", "group", "text", "text_at", "first", "extra", "N",
    "wz", "wy", "wx", "tz", "ty", "tx", "ez", "ey", "ex", "radius_sq", "tiles_z", "tiles_y", "tiles_x", "classes_x",
]  # fmt: skip


@triton.jit
def axis_start(i, n, w, s, CAUSAL: tl.constexpr):
    """patterns.Axis.start."""
    if CAUSAL:
        return tl.maximum(tl.minimum(i // s * s + s - 1, n - 1) - w + 1, 0)
    else:
        return tl.minimum(tl.maximum(tl.minimum(i // s * s + s // 2, n - 1) - w // 2, 0), n - w)


@triton.jit
def axis_end(i, n, w, s, CAUSAL: tl.constexpr):
    if CAUSAL:
        return i + 1
    else:
        return axis_start(i, n, w, s, CAUSAL) + w


@triton.jit
def axis_first_after(j, n, w, s, CAUSAL: tl.constexpr):
    """patterns.Axis.first_after."""
    if CAUSAL:
        leader = j + w
        lead = s - 1
        never = leader > n - 1
    else:
        leader = j + w // 2 + 1
        lead = s // 2
        never = (leader > n - 1) | (j >= n - w)
    first = tl.minimum((tl.maximum(leader - lead, 0) + s - 1) // s * s, n)
    return tl.where(j < 0, 0, tl.where(never, n, first))


@triton.jit
def tile_of_axis(t, length, dilation, TILE: tl.constexpr):
    """Group, first position and length of the group, of the t-th tile of an axis."""
    per_group = ((length + dilation - 1) // dilation + TILE - 1) // TILE
    group = t // per_group
    return group, (t - group * per_group) * TILE, (length - group + dilation - 1) // dilation


@triton.jit
def cut(lo, hi, full_lo, full_hi, TILE: tl.constexpr):
    """Tiles from `lo` on that cover [lo, hi): their number, and the first and number of those inside the full part."""
    n = (tl.maximum(hi - lo, 0) + TILE - 1) // TILE
    first = (tl.maximum(full_lo - lo, 0) + TILE - 1) // TILE
    last = tl.maximum(full_hi - lo, 0) // TILE
    return n, first, tl.maximum(tl.minimum(last, n) - first, 0)


@triton.jit
def visit_keys(a, n, w, s, CAUSAL: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """The tiles of keys along an axis that queries [a, a + OWN) see: origin, and :func:`cut`'s three numbers."""
    i0 = tl.minimum(a, n - 1)
    i1 = tl.minimum(a + OWN, n) - 1
    i1 = tl.maximum(i1, i0)
    lo = axis_start(i0, n, w, s, CAUSAL)
    count, first, full = cut(
        lo, axis_end(i1, n, w, s, CAUSAL), axis_start(i1, n, w, s, CAUSAL), axis_end(i0, n, w, s, CAUSAL), OTHER
    )
    return lo, count, first, full


@triton.jit
def seen_from(j, n, w, s, CAUSAL: tl.constexpr):
    """First query of an axis that sees key j."""
    if CAUSAL:
        return j
    else:
        return axis_first_after(j - w, n, w, s, CAUSAL)


@triton.jit
def visit_queries(a, n, w, s, CAUSAL: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """The tiles of queries along an axis that see keys [a, a + OWN)."""
    j0 = tl.minimum(a, n - 1)
    j1 = tl.minimum(a + OWN, n) - 1
    j1 = tl.maximum(j1, j0)
    lo = seen_from(j0, n, w, s, CAUSAL)
    count, first, full = cut(
        lo, axis_first_after(j1, n, w, s, CAUSAL), seen_from(j1, n, w, s, CAUSAL),
        axis_first_after(j0, n, w, s, CAUSAL), OTHER,
    )  # fmt: skip
    return lo, count, first, full


@triton.jit
def around(i, first, full):
    """The i-th tile that is not among the `full` ones from `first` on."""
    return tl.where(i < first, i, i + full)


@triton.jit
def full_visit(i, fy, fx, Fy, Fx, fz):
    """Tile coordinates of the i-th visit that needs no mask."""
    row = i // Fx
    z = row // Fy
    return fz + z, fy + row - z * Fy, fx + i - row * Fx


@triton.jit
def masked_visit(i, nz, ny, nx, fz, fy, fx, Fz, Fy, Fx):
    """Tile coordinates of the i-th visit that needs a mask: all tiles of the box but a box of full ones."""
    px = tl.maximum(nx - Fx, 1)
    py = tl.maximum(ny - Fy, 1)
    a = Fz * Fy * (nx - Fx)
    b = a + Fz * (ny - Fy) * nx
    in_a = i < a
    in_b = i < b
    i = tl.where(in_a, i, tl.where(in_b, i - a, i - b))
    width = tl.where(in_a, px, tl.maximum(nx, 1))
    row = i // width
    x = i - row * width
    height = tl.where(in_a, tl.maximum(Fy, 1), tl.where(in_b, py, tl.maximum(ny, 1)))
    z = row // height
    y = row - z * height
    x = tl.where(in_a, around(x, fx, Fx), x)
    y = tl.where(in_a, fy + y, tl.where(in_b, around(y, fy, Fy), y))
    z = tl.where(in_b, fz + z, around(z, fz, Fz))
    return z, y, x


@triton.jit
def table_range(table, tile_y, tile_x, tiles_y, tiles_x, classes_x):
    """Visits of a tile in a table: where they begin, where the full ones begin, where they end."""
    cls = tl.load(table + tile_y) * classes_x + tl.load(table + tiles_y + tile_x)
    head = table + tiles_y + tiles_x + 3 * cls
    return tl.load(head), tl.load(head + 1), tl.load(head + 2)


@triton.jit
def table_visit(table, i):
    """Offset (y, x) of a visited tile from the owner's origin."""
    packed = tl.load(table + i)
    return packed >> 16, (packed << 16) >> 16


@triton.jit
def query_bounds(i, n, w, s, CAUSAL: tl.constexpr):
    """First key and number of keys of queries i along an axis."""
    i = tl.minimum(i, n - 1)
    lo = axis_start(i, n, w, s, CAUSAL)
    return lo, axis_end(i, n, w, s, CAUSAL) - lo


@triton.jit
def sees(KIND: tl.constexpr, THREE: tl.constexpr, qz, qy, qx, kz, ky, kx, lz, ly, lx, cz, cy, cx, H, W, radius_sq):
    """Whether queries (first operands, of one shape) see keys (of a shape that broadcasts with it).

    One comparison of what depends on x with what depends on y and z, so that little is left to do for each pair.
    """
    BIG: tl.constexpr = 2147483647
    if KIND == 0:
        row = (ky - ly).to(tl.uint32, bitcast=True) < cy.to(tl.uint32, bitcast=True)
        if THREE:
            row = row & ((kz - lz).to(tl.uint32, bitcast=True) < cz.to(tl.uint32, bitcast=True))
        limit = tl.where(row, cx, 0)
        return (kx - lx).to(tl.uint32, bitcast=True) < limit.to(tl.uint32, bitcast=True)
    elif KIND == 1:
        dy = ky - qy
        dx = kx - qx
        limit = tl.where((ky >= 0) & (ky < H), radius_sq - dy * dy, 0)
        return tl.where((kx >= 0) & (kx < W), dx * dx, BIG) < limit
    else:
        row = (ky - ly).to(tl.uint32, bitcast=True) < cy.to(tl.uint32, bitcast=True)
        limit = tl.where(row, BIG, tl.where((ky >= 0) & (ky < H), cx, 0))
        return tl.where((kx >= 0) & (kx < W), tl.where(kx >= lx, kx - lx, BIG - 1), BIG) < limit


@triton.jit
def load_rows(ptr, tokens, ok, stride, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """(tokens, DP) rows of a sequence."""
    d = tl.arange(0, DP)[None, :]
    at = ptr + tokens.to(tl.int64)[:, None] * stride + d
    if MASKED:
        return tl.load(at, mask=ok[:, None] & (d < D), other=0.0)
    elif D == DP:
        return tl.load(at)
    else:
        return tl.load(at, mask=d < D, other=0.0)


@triton.jit
def load_tile(
    ptr, desc, cz, cy, cx, head, tokens, ok, stride,
    TZ: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of the grid: by the descriptor at (cz, cy, cx), zeros outside, or by the addresses of its tokens."""
    if TMA:
        return desc.load([cz, cy, cx, head, 0]).reshape(TZ * TH * TW, DP)
    else:
        return load_rows(ptr, tokens, ok, stride, D, DP, MASKED)


@triton.jit
def load_run(
    ptr, desc, batch, start, head, tokens, ok, stride,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """R tokens in a row, from `start` on."""
    if TMA:
        return desc.load([batch, start, head, 0]).reshape(R, DP)
    else:
        return load_rows(ptr, tokens, ok, stride, D, DP, MASKED)


@triton.jit
def accumulate(s, row_max, row_sum, acc, v, qk_scale, PREC: tl.constexpr):
    """One step of the online softmax. row_max is in units of the exponent; hidden logits are -inf."""
    new_max = tl.maximum(row_max, tl.max(s, 1) * qk_scale)
    p = tl.exp2(s * qk_scale - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PREC)
    return new_max, row_sum, acc


@triton.jit
def add_bias(s, bias, query_at, key_at, ok, qk_scale, MASKED: tl.constexpr):
    """Logits in units of the exponent, with the bias of their offsets."""
    at = bias + (key_at[None, :] - query_at[:, None])
    if MASKED:
        table = tl.load(at, mask=ok, other=0.0)
    else:
        table = tl.load(at)
    return s * qk_scale + table.to(tl.float32) * 1.4426950408889634


@triton.jit(do_not_specialize=NUMBERS)
def grid_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, ek_ptr, ev_ptr, bias_ptr, len_ptr, table,
    k_desc, v_desc, kt_desc, vt_desc, ke_desc, ve_desc,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sob, son, soh, seb, sen, seh, sfb, sfn, sfh,
    batch0, T, H, W, heads, group, text, text_at, first, extra, N,
    wz, wy, wx, tz, ty, tx, ez, ey, ex, radius_sq, tiles_z, tiles_y, tiles_x, classes_x, qk_scale,
    KIND: tl.constexpr, THREE: tl.constexpr, CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    QZ: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr, KZ: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, TEXT: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr,
    LENGTHS: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: a tile of grid queries, one head. w*: windows, t*: strides, e*: dilations along z, y, x."""
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
    k_base, v_base = k_ptr + b64 * skb + g64 * skh, v_ptr + b64 * svb + g64 * svh
    row_max = tl.full([M], -1e30, tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    n = tl.arange(0, NK)

    if TEXT:
        limit = text
        if LENGTHS:
            limit = tl.minimum(tl.maximum(tl.load(len_ptr + batch).to(tl.int32), 0), text)
        whole = limit // NK * NK
        for t in tl.range(0, whole, NK):
            k = load_run(k_base, kt_desc, batch, t, kv_head, text_at + t + n, n < NK, skn, NK, D, DP, TMA, False)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
            v = load_run(v_base, vt_desc, batch, t, kv_head, text_at + t + n, n < NK, svn, NK, D, DP, TMA, False)
            row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, qk_scale, PREC)
        if whole < limit:
            ok = whole + n < limit
            k = load_rows(k_base, text_at + whole + n, ok, skn, D, DP, True)
            s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision=PREC), -float("inf"))
            v = load_rows(v_base, text_at + whole + n, ok, svn, D, DP, True)
            row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, qk_scale, PREC)
    if EXTRA:
        ek_base, ev_base = ek_ptr + b64 * seb + g64 * seh, ev_ptr + b64 * sfb + g64 * sfh
        whole = extra // NK * NK
        for t in tl.range(0, whole, NK):
            k = load_run(ek_base, ke_desc, batch, t, kv_head, t + n, n < NK, sen, NK, D, DP, TMA, False)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
            v = load_run(ev_base, ve_desc, batch, t, kv_head, t + n, n < NK, sfn, NK, D, DP, TMA, False)
            row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, qk_scale, PREC)
        if whole < extra:
            ok = whole + n < extra
            k = load_rows(ek_base, whole + n, ok, sen, D, DP, True)
            s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision=PREC), -float("inf"))
            v = load_rows(ev_base, whole + n, ok, sfn, D, DP, True)
            row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, qk_scale, PREC)

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

    if KIND == 1:
        # Far from every border all keys are on the grid: distances alone hide, which takes half of the instructions.
        reach = tl.sqrt(radius_sq.to(tl.float32)).to(tl.int32) + KH + KW
        far = (ay >= reach) & (ay + QH + reach <= H) & (ax >= reach) & (ax + QW + reach <= W)
        near = tl.where(far, end, begin)
        for i in tl.range(begin, near):
            dy, dx = table_visit(table, i)
            y0, x0 = ay + dy, ax + dx
            ky, kx = y0 + nky, x0 + nkx
            token = first + ky * W + kx
            k = load_tile(k_base, k_desc, batch, y0, x0, kv_head, token, n < NK, skn, KZ, KH, KW, D, DP, TMA, False)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
            apart_y, apart_x = ky[None, :] - qy[:, None], kx[None, :] - qx[:, None]
            s = tl.where(apart_y * apart_y + apart_x * apart_x < radius_sq, s, -float("inf"))
            v = load_tile(v_base, v_desc, batch, y0, x0, kv_head, token, n < NK, svn, KZ, KH, KW, D, DP, TMA, False)
            row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, step_scale, PREC)
        begin = near

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
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        seen = sees(
            KIND, THREE, qz[:, None], qy[:, None], qx[:, None], kz[None, :], ky[None, :], kx[None, :], lz[:, None],
            ly[:, None], lx[:, None], wide_z[:, None], wide_y[:, None], wide_x[:, None], H, W, radius_sq,
        )  # fmt: skip
        if BIAS:
            s = add_bias(s, bias, q_at, (kz * by + ky) * bx + kx, seen, qk_scale, True)
        s = tl.where(seen, s, -float("inf"))
        v = load_tile(v_base, v_desc, at_z, y0, x0, kv_head, token, ok, svn, KZ, KH, KW, D, DP, TMA, True)
        row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, step_scale, PREC)

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
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        if BIAS:
            s = add_bias(s, bias, q_at, (kz * by + ky) * bx + kx, None, qk_scale, False)
        v = load_tile(v_base, v_desc, at_z, y0, x0, kv_head, token, n < NK, svn, KZ, KH, KW, D, DP, TMA, False)
        row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, step_scale, PREC)

    some = row_sum > 0
    acc = acc / tl.where(some, row_sum, 1.0)[:, None]
    lse = tl.where(some, (row_max + tl.log2(row_sum)) * 0.6931471805599453, -float("inf"))
    tl.store(lse_ptr + (b64 * heads + h64) * N + q_token, lse, mask=q_ok)
    d = tl.arange(0, DP)[None, :]
    out = o_ptr + b64 * sob + h64 * soh + q_token.to(tl.int64)[:, None] * son + d
    tl.store(out, acc.to(o_ptr.dtype.element_ty), mask=q_ok[:, None] & (d < D))


@triton.jit(do_not_specialize=["heads", "group", "text", "text_at", "N", "chunk", "tiles", "chunks"])
def dense_forward(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, len_ptr, k_desc, v_desc,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    heads, group, text, text_at, N, chunk, tiles, chunks, qk_scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LENGTHS: tl.constexpr,
    TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: BM text queries of one head over one chunk of all keys.

    part (chunks, B, heads, text, D) and lse (chunks, B, heads, text; base 2) in float32. `chunk` is a multiple of BN.
    """
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
    k_base, v_base = k_ptr + b64 * skb + g64 * skh, v_ptr + b64 * svb + g64 * svh
    limit = text
    if LENGTHS:
        limit = tl.minimum(tl.maximum(tl.load(len_ptr + batch).to(tl.int32), 0), text)
    row_max = tl.full([BM], -1e30, tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    n = tl.arange(0, BN)
    begin = part * chunk
    end = tl.minimum(begin + chunk, N)
    whole = begin + tl.maximum(end - begin, 0) // BN * BN
    for t in tl.range(begin, whole, BN):
        k = load_run(k_base, k_desc, batch, t, kv_head, t + n, n < BN, skn, BN, D, DP, TMA, False)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        if LENGTHS:
            s = tl.where(((t + n < text_at + limit) | (t + n >= text_at + text))[None, :], s, -float("inf"))
        v = load_run(v_base, v_desc, batch, t, kv_head, t + n, n < BN, svn, BN, D, DP, TMA, False)
        row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, qk_scale, PREC)
    if whole < end:
        inside = whole + n < end
        ok = inside & ((whole + n < text_at + limit) | (whole + n >= text_at + text))
        k = load_rows(k_base, whole + n, inside, skn, D, DP, True)
        s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision=PREC), -float("inf"))
        v = load_rows(v_base, whole + n, inside, svn, D, DP, True)
        row_max, row_sum, acc = accumulate(s, row_max, row_sum, acc, v, qk_scale, PREC)

    some = row_sum > 0
    acc = acc / tl.where(some, row_sum, 1.0)[:, None]
    lse = tl.where(some, row_max + tl.log2(row_sum), -1e30)
    batches = tl.num_programs(0) // (tiles * chunks * heads)
    row = ((part * batches + batch) * heads + head).to(tl.int64) * text + m
    tl.store(lse_ptr + row, lse, mask=q_ok)
    d = tl.arange(0, DP)[None, :]
    tl.store(part_ptr + row[:, None] * D + d, acc, mask=q_ok[:, None] & (d < D))


@triton.jit(do_not_specialize=["heads", "text", "text_at", "N", "tiles", "chunks"])
def merge_chunks(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, sob, son, soh, heads, text, text_at, N, tiles, chunks,
    BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Joins the chunks of :func:`dense_forward`."""
    pid = tl.program_id(0)
    tile = pid % tiles
    rest = pid // tiles
    head = rest % heads
    batch = rest // heads
    batches = tl.num_programs(0) // (tiles * heads)
    m = tile * BM + tl.arange(0, BM)
    ok = m < text
    d = tl.arange(0, DP)[None, :]
    row_max = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for c in range(0, chunks):
        row = ((c * batches + batch) * heads + head).to(tl.int64) * text + m
        lse = tl.load(part_lse_ptr + row, mask=ok, other=0.0)
        out = tl.load(part_ptr + row[:, None] * D + d, mask=ok[:, None] & (d < D), other=0.0)
        new_max = tl.maximum(row_max, lse)
        weight = tl.exp2(lse - new_max)
        rescale = tl.exp2(row_max - new_max)
        acc = acc * rescale[:, None] + out * weight[:, None]
        total = total * rescale + weight
        row_max = new_max
    none = row_max <= -1e30
    acc = acc / total[:, None]
    token = text_at + m
    b64, h64 = batch.to(tl.int64), head.to(tl.int64)
    lse = tl.where(none, -float("inf"), (row_max + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse_ptr + (b64 * heads + h64) * N + token, lse, mask=ok)
    out = o_ptr + b64 * sob + h64 * soh + token.to(tl.int64)[:, None] * son + d
    tl.store(out, acc.to(o_ptr.dtype.element_ty), mask=ok[:, None] & (d < D))
