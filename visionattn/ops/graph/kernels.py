"""Triton kernels of attention along edges, over sorted edges: one program a node, nothing added atomically."""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    q, k, v, start, neighbour, out, den,
    sq, sk, sv, heads, dim, scale, eps,
    HB: tl.constexpr, DP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out (N, H, D) and den (N, H) of one node: its incoming edges in blocks of BE."""
    node = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, DP)
    inside = (h < heads)[:, None] & (d < dim)[None, :]
    place = h[:, None] * dim + d[None, :]
    query = tl.load(q + node * sq + place, mask=inside, other=0.0).to(tl.float32) * scale
    first = tl.load(start + node)
    last = tl.load(start + node + 1)
    num = tl.zeros([HB, DP], tl.float32)
    total = tl.zeros([HB], tl.float32)
    for at in range(first, last, BE):
        edge = at + tl.arange(0, BE)
        real = edge < last
        j = tl.load(neighbour + edge, mask=real, other=0).to(tl.int64)
        mask = real[:, None, None] & inside[None, :, :]
        key = tl.load(k + (j * sk)[:, None, None] + place[None, :, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.sum(key * query[None, :, :], axis=2)
        w = tl.exp(tl.minimum(tl.maximum(s, -5.0), 5.0))
        w = tl.where(real[:, None], w, 0.0)
        value = tl.load(v + (j * sv)[:, None, None] + place[None, :, :], mask=mask, other=0.0).to(tl.float32)
        num += tl.sum(w[:, :, None] * value, axis=0)
        total += tl.sum(w, axis=0)
    total += eps
    safe = tl.where(total > 0.0, total, 1.0)
    tl.store(out + node * heads * dim + place, num / safe[:, None], mask=inside)
    tl.store(den + node * heads + h, safe, mask=h < heads)


@triton.jit
def query_kernel(
    q, k, v, start, neighbour, out, den, grad, dq, delta,
    sq, sk, sv, heads, dim, scale,
    HB: tl.constexpr, DP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dq of one node over its incoming edges; delta (N, H), the sum of out * grad, for the other kernel."""
    node = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, DP)
    inside = (h < heads)[:, None] & (d < dim)[None, :]
    place = h[:, None] * dim + d[None, :]
    own = node * heads * dim + place
    query = tl.load(q + node * sq + place, mask=inside, other=0.0).to(tl.float32) * scale
    g = tl.load(grad + own, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(out + own, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(den + node * heads + h, mask=h < heads, other=1.0)
    og = tl.sum(g * o, axis=1)
    tl.store(delta + node * heads + h, og, mask=h < heads)
    first = tl.load(start + node)
    last = tl.load(start + node + 1)
    acc = tl.zeros([HB, DP], tl.float32)
    for at in range(first, last, BE):
        edge = at + tl.arange(0, BE)
        real = edge < last
        j = tl.load(neighbour + edge, mask=real, other=0).to(tl.int64)
        mask = real[:, None, None] & inside[None, :, :]
        key = tl.load(k + (j * sk)[:, None, None] + place[None, :, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(v + (j * sv)[:, None, None] + place[None, :, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.sum(key * query[None, :, :], axis=2)
        p = tl.exp(tl.minimum(tl.maximum(s, -5.0), 5.0)) / total[None, :]
        ds = p * (tl.sum(value * g[None, :, :], axis=2) - og[None, :])
        ds = tl.where(real[:, None] & (s >= -5.0) & (s <= 5.0), ds, 0.0)
        acc += tl.sum(ds[:, :, None] * key, axis=0)
    tl.store(dq + own, acc * scale, mask=inside)


@triton.jit
def key_kernel(
    q, k, v, start, neighbour, den, grad, delta, dk, dv,
    sq, sk, sv, heads, dim, scale,
    HB: tl.constexpr, DP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one node over its outgoing edges."""
    node = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, DP)
    inside = (h < heads)[:, None] & (d < dim)[None, :]
    place = h[:, None] * dim + d[None, :]
    key = tl.load(k + node * sk + place, mask=inside, other=0.0).to(tl.float32) * scale
    value = tl.load(v + node * sv + place, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(start + node)
    last = tl.load(start + node + 1)
    dkey = tl.zeros([HB, DP], tl.float32)
    dvalue = tl.zeros([HB, DP], tl.float32)
    for at in range(first, last, BE):
        edge = at + tl.arange(0, BE)
        real = edge < last
        i = tl.load(neighbour + edge, mask=real, other=0).to(tl.int64)
        mask = real[:, None, None] & inside[None, :, :]
        query = tl.load(q + (i * sq)[:, None, None] + place[None, :, :], mask=mask, other=0.0).to(tl.float32)
        g_place = (i * heads * dim)[:, None, None] + place[None, :, :]
        g = tl.load(grad + g_place, mask=mask, other=0.0).to(tl.float32)
        row = (i * heads)[:, None] + h[None, :]
        row_mask = real[:, None] & (h < heads)[None, :]
        total = tl.load(den + row, mask=row_mask, other=1.0)
        og = tl.load(delta + row, mask=row_mask, other=0.0)
        s = tl.sum(query * key[None, :, :], axis=2)
        p = tl.exp(tl.minimum(tl.maximum(s, -5.0), 5.0)) / total
        p = tl.where(row_mask, p, 0.0)
        dvalue += tl.sum(p[:, :, None] * g, axis=0)
        ds = p * (tl.sum(g * value[None, :, :], axis=2) - og)
        ds = tl.where((s >= -5.0) & (s <= 5.0), ds, 0.0)
        dkey += tl.sum(ds[:, :, None] * query, axis=0)
    own = node * heads * dim + place
    tl.store(dk + own, dkey * scale, mask=inside)
    tl.store(dv + own, dvalue, mask=inside)
