"""Triton kernels of mixture-of-head attention at inference: a head's queries are only the tokens that chose it."""

import triton
import triton.language as tl


@triton.jit
def _schedule(WORK, TOTALS, pair, there, count, PARTS: tl.constexpr):
    """Appends items of up to PARTS x 64 queries: pair, first slot and end. The 64s of a pair are spread evenly.

    Which item stands where varies between runs, what it says does not.
    """
    units = tl.cdiv(count, 64)
    items = tl.where(there, tl.cdiv(units, PARTS), 0)
    before = tl.atomic_add(TOTALS, tl.sum(items, 0)) + tl.cumsum(items, 0) - items
    for start in range(0, tl.max(items, 0), 16):
        item = start + tl.arange(0, 16)[:, None]
        inside = item < items[None]
        some = tl.maximum(items, 1)[None]
        first = item * units[None] // some * 64
        end = tl.minimum((item + 1) * units[None] // some * 64, count[None])
        at = WORK + (before[None] + item) * 3
        tl.store(at, tl.broadcast_to(pair[None], first.shape), mask=inside)
        tl.store(at + 1, first, mask=inside)
        tl.store(at + 2, end, mask=inside)


@triton.jit(do_not_specialize=["N", "heads", "groups"])
def partition(
    G, ORDER, COUNT, WORK, ZEROS, TOTALS, gb, gn, gh, N, heads, groups,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one image: for each a permutation of the tokens, and how many have a gate that is not 0.

    Those come first, in order; the others behind them, the last one first. With PARTS, :func:`_schedule` in place of
    the numbers, and the others as rows (image * N + token) * heads + head of one list for all.
    """
    image = (tl.program_id(0) // groups).to(tl.int64)
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    gates = G + image * gb + head[None] * gh
    order = ORDER + (image * heads + head[None]) * N
    total = tl.zeros((HEADS,), dtype=tl.int32)
    for start in range(0, N, CHUNK):
        token = start + tl.arange(0, CHUNK)[:, None]
        inside = (token < N) & (head < heads)[None]
        gate = tl.load(gates + token * gn, mask=inside, other=0.0)
        chosen = gate != 0.0
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        upto = rank + total[None]
        if PARTS > 0:
            tl.store(order + upto - 1, tl.broadcast_to(token, upto.shape), mask=chosen)
            found = tl.sum(chosen.to(tl.int32), 0)
            others = tl.where(head < heads, tl.minimum(N - start, CHUNK) - found, 0)
            before = tl.atomic_add(TOTALS + 1, tl.sum(others, 0)) + tl.cumsum(others, 0) - others
            row = (image.to(tl.int32) * N + token) * heads + head[None]
            tl.store(ZEROS + before[None] + token - start - rank, row, mask=inside & (gate == 0.0))
        else:
            slot = tl.where(chosen, upto - 1, N - 1 - token + upto)
            tl.store(order + slot, tl.broadcast_to(token, slot.shape), mask=inside)
        total += tl.sum(chosen.to(tl.int32), 0)
    if PARTS > 0:
        _schedule(WORK, TOTALS, image.to(tl.int32) * heads + head, head < heads, total, PARTS)
    else:
        tl.store(COUNT + image * heads + head, total, mask=head < heads)


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
def _tile(
    base, stride, image, head, start, key, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr,
    inside, TAIL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BN keys or values from `start` on: (BN, SIZE), 0 beyond the last."""
    if TMA:
        return tl.reshape(base.load([image, start, head, FIRST]), (BN, SIZE))
    else:
        return _load(base, key, stride, D, FIRST, SIZE, inside, TAIL)


@triton.jit
def _step(
    q1, q2, high, low, acc1, acc2, K, V, image, head, start, M, kn, vn, qk_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile of keys through the running softmax: high is the maximum, low the sum."""
    key = start + tl.arange(0, BN)
    inside = key < M
    k1 = _tile(K, kn, image, head, start, key, D, 0, D1, BN, inside, TAIL, TMA)
    logits = tl.dot(q1, tl.trans(k1), input_precision=PREC)
    if D2 > 0:
        k2 = _tile(K, kn, image, head, start, key, D, D1, D2, BN, inside, TAIL, False)
        logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PREC)
    if TAIL:
        logits = tl.where(inside[None], logits, float("-inf"))
    higher = tl.maximum(high, tl.max(logits, 1) * qk_scale)
    weight = tl.exp2(logits * qk_scale - higher[:, None])
    fade = tl.exp2(high - higher)
    low = low * fade + tl.sum(weight, 1)
    weight = weight.to(q1.dtype)
    v1 = _tile(V, vn, image, head, start, key, D, 0, D1, BN, inside, TAIL, TMA)
    acc1 = tl.dot(weight, v1, acc1 * fade[:, None], input_precision=PREC)
    if D2 > 0:
        v2 = _tile(V, vn, image, head, start, key, D, D1, D2, BN, inside, TAIL, False)
        acc2 = tl.dot(weight, v2, acc2 * fade[:, None], input_precision=PREC)
    return higher, low, acc1, acc2


@triton.jit
def _clear(OUT, order, on, first, N, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """Writes 0 for the BM tokens from slot `first` on."""
    slot = first + tl.arange(0, BM)
    inside = slot < N
    token = tl.load(order + slot, mask=inside, other=0)
    channel = tl.arange(0, DP)[None]
    zero = tl.zeros((BM, DP), dtype=OUT.dtype.element_ty)
    tl.store(OUT + token[:, None] * on + channel, zero, mask=inside[:, None] & (channel < D))


@triton.jit
def _attend(
    Q, K, V, gates, OUT, order, count, image, head, first, qn, kn, vn, gn, on, N, M, qk_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The BM queries from slot `first` on over all keys; 0 for those that did not choose the head."""
    slot = first + tl.arange(0, BM)
    live = slot < count
    inside = slot < N
    token = tl.load(order + slot, mask=inside, other=0)
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
            q1, q2, high, low, acc1, acc2, K, V, image, head, start, M, kn, vn, qk_scale,
            D, D1, D2, BN, False, PREC, TMA,
        )  # fmt: skip
    if full < M:
        high, low, acc1, acc2 = _step(
            q1, q2, high, low, acc1, acc2, K, V, image, head, full, M, kn, vn, qk_scale,
            D, D1, D2, BN, True, PREC, TMA,
        )  # fmt: skip
    gate = tl.load(gates + token * gn, mask=live, other=0.0).to(tl.float32)
    factor = (gate / low)[:, None]
    out = OUT + token[:, None] * on
    channel = tl.arange(0, D1)[None]
    found = tl.where(live[:, None], acc1 * factor, 0.0).to(OUT.dtype.element_ty)
    tl.store(out + channel, found, mask=inside[:, None] & (channel < D))
    if D2 > 0:
        channel = D1 + tl.arange(0, D2)[None]
        found = tl.where(live[:, None], acc2 * factor, 0.0).to(OUT.dtype.element_ty)
        tl.store(out + channel, found, mask=inside[:, None] & (channel < D))


@triton.jit(do_not_specialize=["N", "M", "heads", "tiles"])
def moh_forward(
    Q, K, V, G, OUT, ORDER, COUNT,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, gb, gn, gh, ob, on, oh,
    N, M, heads, tiles, qk_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
    UNIT: tl.constexpr, TMA: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """BM tokens of one (image, head), in the order of :func:`partition`; those that did not choose it get 0.

    Only tiles with a token that chose the head read keys, and the last of these only half a tile of queries where that
    is enough (HALVES). K and V are tensors, or descriptors (TMA) of (B, M, H, D).
    Strides of Q, K, V, OUT come in units: Triton knows of an integer only whether 16 divides it, so that a head's 72
    channels would be read one by one.
    """
    pair = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BM
    count = tl.load(COUNT + pair)
    order = ORDER + pair.to(tl.int64) * N
    image = (pair // heads).to(tl.int64)
    head = pair % heads
    qn, kn, vn, on = qn * UNIT, kn * UNIT, vn * UNIT, on * UNIT
    OUT += (image * ob + head * oh) * UNIT
    WIDE: tl.constexpr = D1 * 2 if D2 > 0 else D1
    if first >= count:
        _clear(OUT, order, on, first, N, D, WIDE, BM)
        return
    Q += (image * qb + head * qh) * UNIT
    if not TMA:
        K += (image * kb + head * kh) * UNIT
        V += (image * vb + head * vh) * UNIT
    gates = G + image * gb + head * gh
    image = image.to(tl.int32)
    if HALVES:  # noqa: SIM102 -- a constant, then a number of the run
        if first + BM // 2 >= count:
            _attend(
                Q, K, V, gates, OUT, order, count, image, head, first, qn, kn, vn, gn, on, N, M, qk_scale,
                D, D1, D2, BM // 2, BN, PREC, TMA,
            )  # fmt: skip
            _clear(OUT, order, on, first + BM // 2, N, D, WIDE, BM // 2)
            return
    _attend(
        Q, K, V, gates, OUT, order, count, image, head, first, qn, kn, vn, gn, on, N, M, qk_scale,
        D, D1, D2, BM, BN, PREC, TMA,
    )  # fmt: skip
