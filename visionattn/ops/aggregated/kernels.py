"""Triton kernels of aggregated attention. docs/moh.md derives the gradients.

All of them name things alike: a tile holds BM tokens `n` of one (image, head); `unit` are its normalised queries,
`asked` those that meet keys, (unit + query embedding) * tau * log(keys); L = WIN ** 2 neighbours lie in LP columns;
logits and their log-sum-exp are in base 2. Loops over neighbours are not unrolled: wide heads and windows of 5 would
spill registers. Strides come in units of UNIT numbers: of an integer Triton knows only whether 16 divides it, so that
the rows of 3 heads of 24 channels would be read number by number.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, row, stride, inside, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) in float32; 0 beyond D and for rows that are not inside."""
    channel = tl.arange(0, DP)
    mask = inside[:, None] & (channel < D)[None]
    return tl.load(base + row[:, None] * stride + channel[None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(base, row, stride, inside, value, D: tl.constexpr, DP: tl.constexpr):
    channel = tl.arange(0, DP)
    mask = inside[:, None] & (channel < D)[None]
    tl.store(base + row[:, None] * stride + channel[None], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_norm(x):
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)


@triton.jit
def _through_norm(grad, unit, inverse):
    """Gradient of x / |x| to x."""
    return (grad - unit * tl.sum(grad * unit, 1)[:, None]) * inverse[:, None]


@triton.jit
def _log_keys(n, H, W, P, R: tl.constexpr):
    """log(neighbours inside the map + pooled keys) of the tokens."""
    y = n // W
    x = n % W
    rows = tl.minimum(y + R, H - 1) - tl.maximum(y - R, 0) + 1
    cols = tl.minimum(x + R, W - 1) - tl.maximum(x - R, 0) + 1
    return tl.log((rows * cols + P).to(tl.float32))


@triton.jit
def _neighbour(n, inside, H, W, dy, dx):
    """Index of the token at an offset, and whether it is on the map."""
    y = n // W + dy
    x = n % W + dx
    return n + dy * W + dx, inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _local_logits(
    asked, K, kn, BL, n, inside, H, W,
    D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """(BM, LP) logits of the neighbourhood; -inf off the map and beyond L."""
    column = tl.arange(0, LP)[None]
    logits = tl.full((n.shape[0], LP), float("-inf"), dtype=tl.float32)
    for j in range(WIN * WIN):
        row, on = _neighbour(n, inside, H, W, j // WIN - WIN // 2, j % WIN - WIN // 2)
        key = _rows(K, row, kn, on, D, DP)
        logit = tl.sum(asked * key, 1) * _inverse_norm(key) + tl.load(BL + j).to(tl.float32)
        logit = tl.where(on, logit * LOG2E, float("-inf"))
        logits = tl.where(column == j, logit[:, None], logits)
    return logits


@triton.jit
def _pooled_bias(BP, n, p, inside, inside_p, P):
    return tl.load(BP + n[:, None] * P + p[None], mask=inside[:, None] & inside_p[None], other=0.0).to(tl.float32)


@triton.jit
def _pooled_logits(
    asked, k_unit, BP, n, p, inside, inside_p, P,
    PREC: tl.constexpr,
):  # fmt: skip
    """(BM, BP) logits of a tile of pooled keys; -inf beyond P."""
    logits = tl.dot(asked, tl.trans(k_unit), input_precision=PREC) + _pooled_bias(BP, n, p, inside, inside_p, P)
    return tl.where(inside_p[None], logits * LOG2E, float("-inf"))


@triton.jit
def forward(
    Q, KV, KVP, QE, TAU, BL, BP, TOK, TB, OUT, LSE,
    qb, qn, qh, kb, kn, kc, kh, pb, pn, pc, ph,
    N, P, H, W, heads, tiles,
    D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, LP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PREC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile: its neighbours, then the pooled keys by a running softmax, then the learned tokens' weights."""
    qb, qn, qh = qb * UNIT, qn * UNIT, qh * UNIT
    kb, kn, kc, kh = kb * UNIT, kn * UNIT, kc * UNIT, kh * UNIT
    pb, pn, pc, ph = pb * UNIT, pn * UNIT, pc * UNIT, ph * UNIT
    pair = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    image = (pair // heads).to(tl.int64)
    head = pair % heads
    inside = n < N
    n = tl.where(inside, n, 0)
    L: tl.constexpr = WIN * WIN
    channel = tl.arange(0, DP)
    Q += image * qb + head * qh
    KV += image * kb + head * kh
    KVP += image * pb + head * ph
    BL += head * L
    BP += head.to(tl.int64) * N * P

    q = _rows(Q, n, qn, inside, D, DP)
    unit = q * _inverse_norm(q)[:, None]
    embedding = tl.load(QE + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    scale = _log_keys(n, H, W, P, WIN // 2) * tl.load(TAU + head).to(tl.float32)
    asked = (unit + embedding[None]) * scale[:, None]

    local = _local_logits(asked, KV, kn, BL, n, inside, H, W, D, DP, WIN, LP)
    high = tl.maximum(tl.max(local, 1), -1e30)
    low = tl.sum(tl.exp2(local - high[:, None]), 1)
    acc = tl.zeros((BM, DP), dtype=tl.float32)
    asked = asked.to(Q.dtype.element_ty)
    for start in range(0, P, BK):
        p = start + tl.arange(0, BK)
        inside_p = p < P
        key = _rows(KVP, p, pn, inside_p, D, DP)
        k_unit = (key * _inverse_norm(key)[:, None]).to(Q.dtype.element_ty)
        logits = _pooled_logits(asked, k_unit, BP, n, p, inside, inside_p, P, PREC)
        higher = tl.maximum(high, tl.max(logits, 1))
        weight = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(high - higher)
        low = low * fade + tl.sum(weight, 1)
        value = _rows(KVP + pc, p, pn, inside_p, D, DP).to(Q.dtype.element_ty)
        acc = tl.dot(weight.to(Q.dtype.element_ty), value, acc * fade[:, None], input_precision=PREC)
        high = higher
    lse = high + tl.log2(low)
    acc = acc / low[:, None]

    column = tl.arange(0, LP)
    at = TOK + head * D * L + channel[:, None] * L + column[None]
    tokens = tl.load(at, mask=(channel < D)[:, None] & (column < L)[None], other=0.0).to(Q.dtype.element_ty)
    learned = tl.dot(unit.to(Q.dtype.element_ty), tokens, input_precision=PREC)
    learned += tl.load(TB + head * L + column, mask=column < L, other=0.0).to(tl.float32)[None]
    weight = tl.exp2(local - lse[:, None]) + learned
    for j in range(WIN * WIN):
        row, on = _neighbour(n, inside, H, W, j // WIN - WIN // 2, j % WIN - WIN // 2)
        share = tl.sum(tl.where(column[None] == j, weight, 0.0), 1)
        acc += share[:, None] * _rows(KV + kc, row, kn, on, D, DP)
    pair = pair.to(tl.int64)
    _store(OUT + (image * N * heads + head) * D, n, heads * D, inside, acc, D, DP)
    tl.store(LSE + pair * N + n, lse, mask=inside)


@triton.jit
def query_grad(
    Q, KV, KVP, QE, TAU, BL, BP, TOK, TB, OUT, LSE, DOUT, DELTA, DQ, PART,
    qb, qn, qh, kb, kn, kc, kh, pb, pn, pc, ph, gb, gn, gh,
    N, P, H, W, heads, chunks, per_chunk,
    D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, LP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PREC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries in `per_chunk` tiles, what these give the parameters, and delta = sum(A dA)."""
    qb, qn, qh = qb * UNIT, qn * UNIT, qh * UNIT
    kb, kn, kc, kh = kb * UNIT, kn * UNIT, kc * UNIT, kh * UNIT
    pb, pn, pc, ph = pb * UNIT, pn * UNIT, pc * UNIT, ph * UNIT
    gb, gn, gh = gb * UNIT, gn * UNIT, gh * UNIT
    program = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    image = (pair // heads).to(tl.int64)
    head = pair % heads
    L: tl.constexpr = WIN * WIN
    dtype: tl.constexpr = Q.dtype.element_ty
    channel = tl.arange(0, DP)
    column = tl.arange(0, LP)
    Q += image * qb + head * qh
    KV += image * kb + head * kh
    KVP += image * pb + head * ph
    DOUT += image * gb + head * gh
    OUT += (image * N * heads + head) * D
    DQ += (image * N * heads + head) * D
    LSE += pair.to(tl.int64) * N
    DELTA += pair.to(tl.int64) * N
    BL += head * L
    BP += head.to(tl.int64) * N * P
    embedding = tl.load(QE + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    tau = tl.load(TAU + head).to(tl.float32)
    at = TOK + head * D * L + channel[:, None] * L + column[None]
    tokens = tl.load(at, mask=(channel < D)[:, None] & (column < L)[None], other=0.0).to(dtype)
    token_bias = tl.load(TB + head * L + column, mask=column < L, other=0.0).to(tl.float32)

    d_tokens = tl.zeros((DP, LP), dtype=tl.float32)
    d_token_bias = tl.zeros((LP,), dtype=tl.float32)
    d_bias = tl.zeros((LP,), dtype=tl.float32)
    d_embedding = tl.zeros((DP,), dtype=tl.float32)
    d_tau = tl.zeros((BM,), dtype=tl.float32)
    for i in range(per_chunk):
        n = (chunk * per_chunk + i) * BM + tl.arange(0, BM)
        inside = n < N
        n = tl.where(inside, n, 0)
        q = _rows(Q, n, qn, inside, D, DP)
        inverse = _inverse_norm(q)
        unit = q * inverse[:, None]
        log_keys = _log_keys(n, H, W, P, WIN // 2)
        asked = (unit + embedding[None]) * (log_keys * tau)[:, None]
        lse = tl.load(LSE + n, mask=inside, other=float("inf"))  # no weight where there is no token
        grad = _rows(DOUT, n, gn, inside, D, DP)
        out = _rows(OUT, n, heads * D, inside, D, DP)
        local = _local_logits(asked, KV, kn, BL, n, inside, H, W, D, DP, WIN, LP)
        weight = tl.exp2(local - lse[:, None])
        d_weight = tl.zeros((BM, LP), dtype=tl.float32)
        for j in range(WIN * WIN):
            row, on = _neighbour(n, inside, H, W, j // WIN - WIN // 2, j % WIN - WIN // 2)
            value = _rows(KV + kc, row, kn, on, D, DP)
            d_weight = tl.where(column[None] == j, tl.sum(grad * value, 1)[:, None], d_weight)
        learned = tl.dot(unit.to(dtype), tokens, input_precision=PREC) + token_bias[None]
        delta = tl.sum(grad * out, 1) - tl.sum(learned * d_weight, 1)  # as exact as the stored output
        exact = tl.sum(weight * d_weight, 1)
        d_logits = weight * (d_weight - delta[:, None])
        bias = tl.load(BL + column, mask=column < L, other=0.0).to(tl.float32)
        local = tl.where(local > float("-inf"), local * (1 / LOG2E) - bias[None], 0.0)
        mean = tl.sum(weight * local, 1)  # of the logits without their biases
        d_asked = tl.zeros((BM, DP), dtype=tl.float32)
        for j in range(WIN * WIN):
            row, on = _neighbour(n, inside, H, W, j // WIN - WIN // 2, j % WIN - WIN // 2)
            key = _rows(KV, row, kn, on, D, DP)
            share = tl.sum(tl.where(column[None] == j, d_logits, 0.0), 1)
            d_asked += (share * _inverse_norm(key))[:, None] * key
        low_asked = asked.to(dtype)
        low_grad = grad.to(dtype)
        for start in range(0, P, BK):
            p = start + tl.arange(0, BK)
            inside_p = p < P
            key_p = _rows(KVP, p, pn, inside_p, D, DP)
            k_unit = (key_p * _inverse_norm(key_p)[:, None]).to(dtype)
            bias_p = _pooled_bias(BP, n, p, inside, inside_p, P)
            logits = tl.dot(low_asked, tl.trans(k_unit), input_precision=PREC)
            pooled = tl.where(inside_p[None], tl.exp2((logits + bias_p) * LOG2E - lse[:, None]), 0.0)
            mean += tl.sum(pooled * logits, 1)
            value_p = _rows(KVP + pc, p, pn, inside_p, D, DP).to(dtype)
            d_pooled = tl.dot(low_grad, tl.trans(value_p), input_precision=PREC)
            exact += tl.sum(pooled * d_pooled, 1)
            d_pooled = (pooled * (d_pooled - delta[:, None])).to(dtype)
            d_asked = tl.dot(d_pooled, k_unit, d_asked, input_precision=PREC)
        tl.store(DELTA + n, exact, mask=inside)
        low_d_weight = d_weight.to(dtype)
        d_unit = d_asked * (log_keys * tau)[:, None]
        d_embedding += tl.sum(d_unit, 0)
        # a sum over all tokens that nearly cancels: the error of delta would be its largest part
        d_tau += tl.sum(d_asked * (unit + embedding[None]), 1) * log_keys
        d_tau -= tl.where(inside, (exact - delta) * mean / tau, 0.0)
        d_unit = tl.dot(low_d_weight, tl.trans(tokens), d_unit, input_precision=PREC)
        d_tokens = tl.dot(tl.trans(unit.to(dtype)), low_d_weight, d_tokens, input_precision=PREC)
        d_token_bias += tl.sum(d_weight, 0)
        d_bias += tl.sum(d_logits, 0)
        _store(DQ, n, heads * D, inside, _through_norm(d_unit, unit, inverse), D, DP)
    PART += program * (DP * LP + 2 * LP + DP + 1)
    tl.store(PART + channel[:, None] * LP + column[None], d_tokens)
    tl.store(PART + DP * LP + column, d_token_bias)
    tl.store(PART + DP * LP + LP + column, d_bias)
    tl.store(PART + DP * LP + 2 * LP + channel, d_embedding)
    tl.store(PART + DP * LP + 2 * LP + DP, tl.sum(d_tau, 0))


@triton.jit
def key_grad(
    Q, KV, QE, TAU, BL, TOK, TB, LSE, DOUT, DELTA, DKV,
    qb, qn, qh, kb, kn, kc, kh, gb, gn, gh,
    N, P, H, W, heads, tiles,
    D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, from the queries around each that see it."""
    qb, qn, qh = qb * UNIT, qn * UNIT, qh * UNIT
    kb, kn, kc, kh = kb * UNIT, kn * UNIT, kc * UNIT, kh * UNIT
    gb, gn, gh = gb * UNIT, gn * UNIT, gh * UNIT
    pair = tl.program_id(0) // tiles
    m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    image = (pair // heads).to(tl.int64)
    head = pair % heads
    inside = m < N
    m = tl.where(inside, m, 0)
    L: tl.constexpr = WIN * WIN
    channel = tl.arange(0, DP)
    Q += image * qb + head * qh
    KV += image * kb + head * kh
    DOUT += image * gb + head * gh
    LSE += pair.to(tl.int64) * N
    DELTA += pair.to(tl.int64) * N
    embedding = tl.load(QE + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    tau = tl.load(TAU + head).to(tl.float32)
    key = _rows(KV, m, kn, inside, D, DP)
    inverse = _inverse_norm(key)
    k_unit = key * inverse[:, None]
    value = _rows(KV + kc, m, kn, inside, D, DP)
    d_key = tl.zeros((BM, DP), dtype=tl.float32)
    d_value = tl.zeros((BM, DP), dtype=tl.float32)
    for j in range(WIN * WIN):
        # the query whose neighbour j is m
        n, on = _neighbour(m, inside, H, W, WIN // 2 - j // WIN, WIN // 2 - j % WIN)
        q = _rows(Q, n, qn, on, D, DP)
        unit = q * _inverse_norm(q)[:, None]
        n = tl.where(on, n, 0)
        asked = (unit + embedding[None]) * (_log_keys(n, H, W, P, WIN // 2) * tau)[:, None]
        grad = _rows(DOUT, n, gn, on, D, DP)
        lse = tl.load(LSE + n, mask=on, other=float("inf"))
        delta = tl.load(DELTA + n, mask=on, other=0.0)
        logit = tl.sum(asked * k_unit, 1) + tl.load(BL + head * L + j).to(tl.float32)
        weight = tl.exp2(logit * LOG2E - lse)
        d_logit = weight * (tl.sum(grad * value, 1) - delta)
        d_key += d_logit[:, None] * asked
        tokens = tl.load(TOK + head * D * L + channel * L + j, mask=channel < D, other=0.0).to(tl.float32)
        learned = tl.sum(unit * tokens[None], 1) + tl.load(TB + head * L + j).to(tl.float32)
        d_value += (weight + learned)[:, None] * grad  # grad is 0 where there is no query
    DKV += (image * N * 2 * heads + head) * D
    _store(DKV, m, 2 * heads * D, inside, _through_norm(d_key, k_unit, inverse), D, DP)
    _store(DKV + heads * D, m, 2 * heads * D, inside, d_value, D, DP)


@triton.jit
def _pooled_tile(
    Q, QE, TAU, BP, LSE, DOUT, DELTA, k_unit, value, n, p, inside, inside_p, qn, gn, head, P, H, W,
    D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(asked, grad, weights, gradients of the logits) of a tile of queries and a tile of pooled keys."""
    dtype: tl.constexpr = Q.dtype.element_ty
    channel = tl.arange(0, DP)
    q = _rows(Q, n, qn, inside, D, DP)
    unit = q * _inverse_norm(q)[:, None]
    embedding = tl.load(QE + head * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    scale = _log_keys(n, H, W, P, WIN // 2) * tl.load(TAU + head).to(tl.float32)
    asked = ((unit + embedding[None]) * scale[:, None]).to(dtype)
    grad = _rows(DOUT, n, gn, inside, D, DP).to(dtype)
    lse = tl.load(LSE + n, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + n, mask=inside, other=0.0)
    weight = tl.exp2(_pooled_logits(asked, k_unit, BP, n, p, inside, inside_p, P, PREC) - lse[:, None])
    d_weight = tl.dot(grad, tl.trans(value), input_precision=PREC)
    return asked, grad, weight, weight * (d_weight - delta[:, None])


@triton.jit
def pool_grad(
    Q, KVP, QE, TAU, BP, LSE, DOUT, DELTA, DKVP,
    qb, qn, qh, pb, pn, pc, ph, gb, gn, gh,
    N, P, H, W, heads, chunks, per_chunk, tiles_p,
    D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of normalised pooled keys, and of values, from `per_chunk` tiles of queries."""
    qb, qn, qh = qb * UNIT, qn * UNIT, qh * UNIT
    pb, pn, pc, ph = pb * UNIT, pn * UNIT, pc * UNIT, ph * UNIT
    gb, gn, gh = gb * UNIT, gn * UNIT, gh * UNIT
    program = tl.program_id(0)
    chunk = program % chunks
    p = (program // chunks % tiles_p) * BK + tl.arange(0, BK)
    pair = program // (chunks * tiles_p)
    image = (pair // heads).to(tl.int64)
    head = pair % heads
    dtype: tl.constexpr = Q.dtype.element_ty
    inside_p = p < P
    KVP += image * pb + head * ph
    Q += image * qb + head * qh
    DOUT += image * gb + head * gh
    LSE += pair.to(tl.int64) * N
    DELTA += pair.to(tl.int64) * N
    BP += head.to(tl.int64) * N * P
    key = _rows(KVP, p, pn, inside_p, D, DP)
    k_unit = (key * _inverse_norm(key)[:, None]).to(dtype)
    value = _rows(KVP + pc, p, pn, inside_p, D, DP).to(dtype)
    d_key = tl.zeros((BK, DP), dtype=tl.float32)
    d_value = tl.zeros((BK, DP), dtype=tl.float32)
    for i in range(per_chunk):
        n = (chunk * per_chunk + i) * BM + tl.arange(0, BM)
        inside = n < N
        n = tl.where(inside, n, 0)
        asked, grad, weight, d_logits = _pooled_tile(
            Q, QE, TAU, BP, LSE, DOUT, DELTA, k_unit, value, n, p, inside, inside_p, qn, gn, head, P, H, W,
            D, DP, WIN, PREC,
        )  # fmt: skip
        d_key = tl.dot(tl.trans(d_logits.to(dtype)), asked, d_key, input_precision=PREC)
        d_value = tl.dot(tl.trans(weight.to(dtype)), grad, d_value, input_precision=PREC)
    # (chunks, B, P, 2, heads, D)
    images = tl.num_programs(0) // (chunks * tiles_p * heads)
    DKVP += ((chunk.to(tl.int64) * images + image) * P * 2 * heads + head) * D
    _store(DKVP, p, 2 * heads * D, inside_p, d_key, D, DP)
    _store(DKVP + heads * D, p, 2 * heads * D, inside_p, d_value, D, DP)


@triton.jit
def pool_sum(
    KVP, PART, DKVP,
    pb, pn, pc, ph,
    images, P, heads, chunks, tiles_p,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What pool_grad's chunks add up to, the keys' part through their norm."""
    pb, pn, pc, ph = pb * UNIT, pn * UNIT, pc * UNIT, ph * UNIT
    program = tl.program_id(0)
    p = (program % tiles_p) * BK + tl.arange(0, BK)
    pair = program // tiles_p
    image = (pair // heads).to(tl.int64)
    head = pair % heads
    inside = p < P
    place = (image * P * 2 * heads + head) * D
    step = (0 * image + images) * P * 2 * heads * D  # as wide as image
    at = PART + place
    d_key = tl.zeros((BK, DP), dtype=tl.float32)
    d_value = tl.zeros((BK, DP), dtype=tl.float32)
    for _ in range(chunks):
        d_key += _rows(at, p, 2 * heads * D, inside, D, DP)
        d_value += _rows(at + heads * D, p, 2 * heads * D, inside, D, DP)
        at += step
    key = _rows(KVP + image * pb + head * ph, p, pn, inside, D, DP)
    inverse = _inverse_norm(key)
    _store(DKVP + place, p, 2 * heads * D, inside, _through_norm(d_key, key * inverse[:, None], inverse), D, DP)
    _store(DKVP + place + heads * D, p, 2 * heads * D, inside, d_value, D, DP)


@triton.jit
def bias_grad(
    Q, KVP, QE, TAU, BP, LSE, DOUT, DELTA, DBP,
    qb, qn, qh, pb, pn, pc, ph, gb, gn, gh,
    N, P, H, W, heads, images, per_chunk, tiles, tiles_p,
    D: tl.constexpr, DP: tl.constexpr, WIN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of the pooled bias, over `per_chunk` images."""
    qb, qn, qh = qb * UNIT, qn * UNIT, qh * UNIT
    pb, pn, pc, ph = pb * UNIT, pn * UNIT, pc * UNIT, ph * UNIT
    gb, gn, gh = gb * UNIT, gn * UNIT, gh * UNIT
    program = tl.program_id(0)
    row = (program % tiles) * BM + tl.arange(0, BM)
    n = tl.where(row < N, row, 0)
    p = (program // tiles % tiles_p) * BK + tl.arange(0, BK)
    rest = program // (tiles * tiles_p)
    head = rest % heads
    chunk = rest // heads
    dtype: tl.constexpr = Q.dtype.element_ty
    inside_p = p < P
    BP += head.to(tl.int64) * N * P
    total = tl.zeros((BM, BK), dtype=tl.float32)
    for i in range(per_chunk):
        index = chunk * per_chunk + i
        inside = (row < N) & (index < images)
        image = tl.minimum(index, images - 1).to(tl.int64)
        pool = KVP + image * pb + head * ph
        pair = image * heads + head
        key = _rows(pool, p, pn, inside_p, D, DP)
        k_unit = (key * _inverse_norm(key)[:, None]).to(dtype)
        value = _rows(pool + pc, p, pn, inside_p, D, DP).to(dtype)
        _, _, _, d_logits = _pooled_tile(
            Q + image * qb + head * qh, QE, TAU, BP, LSE + pair * N, DOUT + image * gb + head * gh, DELTA + pair * N,
            k_unit, value, n, p, inside, inside_p, qn, gn, head, P, H, W, D, DP, WIN, PREC,
        )  # fmt: skip
        total += d_logits
    at = DBP + (chunk * heads + head).to(tl.int64) * N * P + n[:, None] * P + p[None]
    tl.store(at, total, mask=(row < N)[:, None] & inside_p[None])
