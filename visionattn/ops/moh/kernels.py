"""Triton kernels of mixture-of-head attention at inference: a head's queries are only the tokens that chose it."""

import triton
import triton.language as tl


@triton.jit
def choosers(
    G, ORDER, COUNT, gb, gn, gh, N, heads,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One (image, head): indices of the tokens whose gate is not 0, in order, and their number."""
    pair = tl.program_id(0)
    gates = G + (pair // heads).to(tl.int64) * gb + (pair % heads) * gh
    order = ORDER + pair.to(tl.int64) * N
    total = tl.zeros((), dtype=tl.int32)
    for start in range(0, N, CHUNK):
        token = start + tl.arange(0, CHUNK)
        gate = tl.load(gates + token * gn, mask=token < N, other=0.0)
        chosen = ((gate != 0.0) & (token < N)).to(tl.int32)
        slot = tl.cumsum(chosen, 0) - 1 + total
        tl.store(order + slot, token, mask=chosen != 0)
        total += tl.sum(chosen, 0)
    tl.store(COUNT + pair, total)


@triton.jit
def _load(base, row, stride, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, inside, TAIL: tl.constexpr):
    """Channels FIRST .. FIRST + SIZE of the rows; 0 beyond D, and for rows that are not inside (TAIL)."""
    channel = FIRST + tl.arange(0, SIZE)
    at = base + row[:, None] * stride + channel[None]
    if TAIL:
        if FIRST + SIZE > D:
            return tl.load(at, mask=inside[:, None] & (channel < D)[None], other=0.0)
        return tl.load(at, mask=inside[:, None], other=0.0)
    if FIRST + SIZE > D:
        return tl.load(at, mask=(channel < D)[None], other=0.0)
    return tl.load(at)


@triton.jit
def _step(
    q1, q2, high, low, acc1, acc2, K, V, start, M, kn, vn, qk_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One tile of keys through the running softmax: high is the maximum, low the sum."""
    key = start + tl.arange(0, BN)
    inside = key < M
    k1 = _load(K, key, kn, D, 0, D1, inside, TAIL)
    logits = tl.dot(q1, tl.trans(k1), input_precision=PREC)
    if D2 > 0:
        k2 = _load(K, key, kn, D, D1, D2, inside, TAIL)
        logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PREC)
    if TAIL:
        logits = tl.where(inside[None], logits, float("-inf"))
    higher = tl.maximum(high, tl.max(logits, 1) * qk_scale)
    weight = tl.exp2(logits * qk_scale - higher[:, None])
    fade = tl.exp2(high - higher)
    low = low * fade + tl.sum(weight, 1)
    weight = weight.to(q1.dtype)
    v1 = _load(V, key, vn, D, 0, D1, inside, TAIL)
    acc1 = tl.dot(weight, v1, acc1 * fade[:, None], input_precision=PREC)
    if D2 > 0:
        v2 = _load(V, key, vn, D, D1, D2, inside, TAIL)
        acc2 = tl.dot(weight, v2, acc2 * fade[:, None], input_precision=PREC)
    return higher, low, acc1, acc2


@triton.jit
def moh_forward(
    Q, K, V, G, OUT, ORDER, COUNT,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, gb, gn, gh, ob, on, oh,
    N, M, heads, tiles, qk_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """BM of the queries that chose one (image, head), over all keys; programs beyond their number leave at once.

    Strides of Q, K, V, OUT come in units: Triton knows of an integer only whether 16 divides it, so that a head's 72
    channels would be read one by one.
    """
    pair = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BM
    count = tl.load(COUNT + pair)
    if first >= count:
        return
    image = (pair // heads).to(tl.int64)
    head = pair % heads
    qn, kn, vn, on = qn * UNIT, kn * UNIT, vn * UNIT, on * UNIT
    slot = first + tl.arange(0, BM)
    live = slot < count
    token = tl.load(ORDER + pair.to(tl.int64) * N + slot, mask=live, other=0)
    Q += (image * qb + head * qh) * UNIT
    K += (image * kb + head * kh) * UNIT
    V += (image * vb + head * vh) * UNIT
    q1 = _load(Q, token, qn, D, 0, D1, live, True)
    acc1 = tl.zeros((BM, D1), dtype=tl.float32)
    if D2 > 0:
        q2 = _load(Q, token, qn, D, D1, D2, live, True)
        acc2 = tl.zeros((BM, D2), dtype=tl.float32)
    else:
        q2 = q1
        acc2 = acc1
    high = tl.full((BM,), float("-inf"), dtype=tl.float32)
    low = tl.zeros((BM,), dtype=tl.float32)
    full = M // BN * BN
    for start in range(0, full, BN):
        high, low, acc1, acc2 = _step(
            q1, q2, high, low, acc1, acc2, K, V, start, M, kn, vn, qk_scale, D, D1, D2, BN, False, PREC,
        )  # fmt: skip
    if full < M:
        high, low, acc1, acc2 = _step(
            q1, q2, high, low, acc1, acc2, K, V, full, M, kn, vn, qk_scale, D, D1, D2, BN, True, PREC,
        )  # fmt: skip
    gate = tl.load(G + image * gb + token * gn + head * gh, mask=live, other=0.0).to(tl.float32)
    factor = (gate / low)[:, None]
    OUT += (image * ob + head * oh) * UNIT
    channel = tl.arange(0, D1)
    out = OUT + token[:, None] * on
    tl.store(out + channel[None], (acc1 * factor).to(OUT.dtype.element_ty), mask=live[:, None] & (channel < D)[None])
    if D2 > 0:
        channel = D1 + tl.arange(0, D2)
        tl.store(
            out + channel[None], (acc2 * factor).to(OUT.dtype.element_ty), mask=live[:, None] & (channel < D)[None]
        )
