# ruff: noqa: RUF059 -- tuples of arguments are unpacked whole
"""Gluon: mixture-of-head attention at inference on Hopper GPUs (compute capability 9.0), after FlashAttention-3.

One warp loads tiles of keys and values through tensor descriptors into a ring in shared memory; two or three warpgroups
have 64 queries each, which they gather by cp.async. The product of queries and the next keys is issued before that of
probabilities and values, and the softmax of the first runs while the second does (Shah et al., "FlashAttention-3",
arXiv 2407.08608, section 3.2). As many programs as multiprocessors go through the items of kernels._schedule.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from visionattn.ops._hopper import as_block, scaled, softmax, thread_barrier


@gluon.jit
def read_item(work, item, total):
    """(image, head), the first query's slot, and the end; without queries beyond the last item."""
    at = work + item * 3
    there = item < total
    return gl.load(at, there, other=0), gl.load(at + 1, there, other=0), gl.load(at + 2, there, other=0)


@gluon.jit
def read_tokens(order, pair, slot, end, N):
    return gl.load(order + pair.to(gl.int64) * N + slot, mask=slot < end, other=0)


@gluon.jit
def copy_queries(q_ptr, strides, pair, heads, token, live, q, q2, D: gl.constexpr, UNIT: gl.constexpr,
                 rest: gl.constexpr):  # fmt: skip
    """Starts to gather 64 queries; rows that are not live become 0."""
    qb, qn, qh = strides
    q_ptr += ((pair // heads).to(gl.int64) * qb + (pair % heads) * qh) * UNIT
    D1: gl.constexpr = q.shape[1]
    channel = gl.arange(0, D1, layout=gl.SliceLayout(0, token.type.layout.parent))
    at = token[:, None] * (qn * UNIT) + channel[None, :]
    async_copy.async_copy_global_to_shared(q, q_ptr + at, mask=live[:, None] & (channel < D)[None, :])
    if D > D1:
        token = gl.convert_layout(token, gl.SliceLayout(1, rest))
        live = gl.convert_layout(live, gl.SliceLayout(1, rest))
        channel = D1 + gl.arange(0, 16, layout=gl.SliceLayout(0, rest))
        at = token[:, None] * (qn * UNIT) + channel[None, :]
        async_copy.async_copy_global_to_shared(q2, q_ptr + at, mask=live[:, None] & (channel < D)[None, :])
    async_copy.commit_group()


@gluon.jit
def multiply_keys(queries, keys, slot, mma_s: gl.constexpr, REST: gl.constexpr):
    """Issues the product of queries and a tile of keys."""
    q, q2 = queries
    k_bufs, k2_bufs = keys
    BN: gl.constexpr = k_bufs.shape[1]
    s = gl.zeros([64, BN], gl.float32, mma_s)
    s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    if REST:
        s = warpgroup_mma(q2, k2_bufs.index(slot).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def multiply_values(p, values, slot, acc, acc2, mma_o2: gl.constexpr, REST: gl.constexpr):
    """Issues the product of probabilities and a tile of values."""
    v_bufs, v2_bufs = values
    acc = warpgroup_mma(p, v_bufs.index(slot), acc, is_async=True)
    if REST:
        p2 = gl.convert_layout(p, gl.DotOperandLayout(0, mma_o2, 2))
        acc2 = warpgroup_mma(p2, v2_bufs.index(slot), acc2, is_async=True)
    return acc, acc2


@gluon.jit
def step(ring, steps, both, queries, keys, values, bars, p, acc, acc2, row_max, row_sum, qk_scale,
         CONST: gl.constexpr):  # fmt: skip
    """Visits tile `ring` of the loads: its logits, and meanwhile the product of p and the values of the tile before.

    steps: those before in which both warpgroups took part; then they issue products in turns, so that one's softmax
    runs beside the other's products.
    """
    STAGES: gl.constexpr = CONST[0]
    mma_s: gl.constexpr = CONST[1]
    mma_o2: gl.constexpr = CONST[2]
    REST: gl.constexpr = CONST[3]
    TURNS: gl.constexpr = CONST[4]
    WHICH: gl.constexpr = CONST[5]
    LAZY: gl.constexpr = CONST[6]
    k_full, v_full, empty, turns = bars
    slot, phase = ring % STAGES, ring // STAGES & 1
    old_slot = (ring - 1) % STAGES

    mbarrier.wait(k_full.index(slot), phase)
    if TURNS:
        mbarrier.wait(turns.index(WHICH), (steps & 1) ^ (1 - WHICH), pred=both)
    s = multiply_keys(queries, keys, slot, mma_s, REST)
    acc, acc2 = multiply_values(p, values, old_slot, acc, acc2, mma_o2, REST)
    if TURNS:
        mbarrier.arrive(turns.index(1 - WHICH), pred=both)
    if REST:
        s = warpgroup_mma_wait(2, deps=[s])
    else:
        s = warpgroup_mma_wait(1, deps=[s])
    new, row_max, row_sum, rescale = softmax(s, row_max, row_sum, qk_scale, LAZY)
    new = gl.convert_layout(new.to(p.dtype), p.type.layout)
    # This wait for the values of the next step ends a basic block: without it ptxas moves the exponentials behind the
    # wait for the product that they are to run beside.
    mbarrier.wait(v_full.index(slot), phase)
    if REST:
        acc, acc2, p, new, row_sum = warpgroup_mma_wait(0, deps=[acc, acc2, p, new, row_sum])
    else:
        acc, p, new, row_sum = warpgroup_mma_wait(0, deps=[acc, p, new, row_sum])
    mbarrier.arrive(empty.index(old_slot))
    acc = scaled(acc, rescale, LAZY)
    if REST:
        acc2 = scaled(acc2, rescale, False)
    return new, acc, acc2, row_max, row_sum


@gluon.jit
def store_rows(out, token, inside, acc, factor, on, first: gl.constexpr, D: gl.constexpr, rows: gl.constexpr):
    """Writes acc * factor at channels from `first` on."""
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    acc = gl.convert_layout(acc.to(out.dtype.element_ty), rows)
    token = gl.convert_layout(token, gl.SliceLayout(1, rows))
    inside = gl.convert_layout(inside, gl.SliceLayout(1, rows))
    SIZE: gl.constexpr = acc.shape[1]
    channel = first + gl.arange(0, SIZE, layout=gl.SliceLayout(0, rows))
    gl.store(out + token[:, None] * on + channel[None, :], acc, mask=inside[:, None] & (channel < D)[None, :])


@gluon.jit
def consume(WHICH: gl.constexpr, bufs, bars, pointers, strides, numbers, CONST: gl.constexpr):
    """A warpgroup: logits, softmax, output of its 64 queries of each item."""
    q_bufs, q2_bufs, k_bufs, k2_bufs, v_bufs, v2_bufs = bufs
    k_full, v_full, empty, turns = bars
    q_ptr, g_ptr, out, order, work, zeros, totals = pointers
    q_strides, g_strides, o_strides = strides
    N, M, heads, qk_scale = numbers
    D: gl.constexpr = CONST[0]
    STAGES: gl.constexpr = CONST[1]
    UNIT: gl.constexpr = CONST[2]
    REST: gl.constexpr = CONST[3]
    TURNS: gl.constexpr = CONST[4]
    LAZY: gl.constexpr = CONST[5]
    D1: gl.constexpr = q_bufs.shape[2]
    BN: gl.constexpr = k_bufs.shape[1]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    mma_o2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    lanes: gl.constexpr = D1 // 8  # 16 bytes each
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    rest: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    S: gl.constexpr = (STAGES, mma_s, mma_o2, REST, TURNS, WHICH, LAZY)
    keys = (k_bufs, k2_bufs)
    values = (v_bufs, v2_bufs)
    gb, gn, gh = g_strides
    ob, on, oh = o_strides
    row = WHICH * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, rows))
    mma_row = WHICH * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s))
    key = gl.arange(0, BN, layout=gl.SliceLayout(0, mma_s))
    tiles = (M + BN - 1) // BN
    total = gl.load(totals)
    hop = gl.num_programs(0)
    pair, first, end = read_item(work, gl.program_id(0), total)
    pair1, first1, end1 = read_item(work, gl.program_id(0) + hop, total)
    token = read_tokens(order, pair, first + row, end, N)
    token1 = read_tokens(order, pair1, first1 + row, end1, N)
    q, q2 = q_bufs.index(2 * WHICH), q2_bufs.index(2 * WHICH)
    copy_queries(q_ptr, q_strides, pair, heads, token, first + row < end, q, q2, D, UNIT, rest)
    ring = 0
    turn = 0
    steps = 0
    for item in range(gl.program_id(0), total, hop):
        # queries of the next item are on the way during this one, and the tokens of the one after that
        pair2, first2, end2 = read_item(work, item + 2 * hop, total)
        q, q2 = q_bufs.index(2 * WHICH + turn), q2_bufs.index(2 * WHICH + turn)
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()  # this item's queries are there, and all warps have read those of the last one
        turn = 1 - turn
        copy_queries(
            q_ptr, q_strides, pair1, heads, token1, first1 + row < end1, q_bufs.index(2 * WHICH + turn),
            q2_bufs.index(2 * WHICH + turn), D, UNIT, rest,
        )  # fmt: skip
        if first + WHICH * 64 < end:
            mma_token = read_tokens(order, pair, first + mma_row, end, N)
            slot, phase = ring % STAGES, ring // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            s = multiply_keys((q, q2), keys, slot, mma_s, REST)
            s = warpgroup_mma_wait(0, deps=[s])
            # the last tile comes first: only it may be partial
            s = gl.where((key < M - (tiles - 1) * BN)[None, :], s, -float("inf"))
            row_max = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, mma_s))
            row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, mma_s))
            p, row_max, row_sum, rescale = softmax(s, row_max, row_sum, qk_scale, False)
            p = gl.convert_layout(p.to(q.dtype), p_layout)
            acc = gl.zeros([64, D1], gl.float32, mma_o)
            acc2 = gl.zeros([64, 16], gl.float32, mma_o2)
            gates = g_ptr + (pair // heads).to(gl.int64) * gb + (pair % heads) * gh
            gate = gl.load(gates + mma_token * gn, mask=first + mma_row < end, other=0.0).to(gl.float32)
            token2 = read_tokens(order, pair2, first2 + row, end2, N)
            mbarrier.wait(v_full.index(slot), phase)
            both = first + 64 < end
            for i in range(1, tiles):
                p, acc, acc2, row_max, row_sum = step(
                    ring + i, steps, both, (q, q2), keys, values, bars, p, acc, acc2, row_max, row_sum, qk_scale, S
                )
                steps += both.to(gl.int32)
            slot = (ring + tiles - 1) % STAGES
            acc, acc2 = multiply_values(p, values, slot, acc, acc2, mma_o2, REST)
            if REST:
                acc, acc2, p = warpgroup_mma_wait(0, deps=[acc, acc2, p])
            else:
                acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(empty.index(slot))
            factor = gate / row_sum
            o_ptr = out + ((pair // heads).to(gl.int64) * ob + (pair % heads) * oh) * UNIT
            store_rows(o_ptr, token, first + row < end, acc, factor, on * UNIT, 0, D, rows)
            if REST:
                store_rows(o_ptr, token, first + row < end, acc2, factor, on * UNIT, D1, D, rest)
        else:
            token2 = read_tokens(order, pair2, first2 + row, end2, N)
            for i in range(0, tiles):
                slot, phase = (ring + i) % STAGES, (ring + i) // STAGES & 1
                mbarrier.wait(k_full.index(slot), phase)
                mbarrier.wait(v_full.index(slot), phase)
                mbarrier.arrive(empty.index(slot))
        ring += tiles
        pair, first, end, token = pair1, first1, end1, token1
        pair1, first1, end1, token1 = pair2, first2, end2, token2
    async_copy.wait_group(0)


@gluon.jit
def read_zeros(zeros, chunk, count, D1: gl.constexpr, ROWS: gl.constexpr):
    """Rows of a chunk of the list of zeros; -1 beyond its end."""
    lanes: gl.constexpr = D1 // 8
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [1, 1], [1, 0])
    at = chunk * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows))
    return gl.load(zeros + at, mask=at < count, other=-1)


@gluon.jit
def clear(out, row, D: gl.constexpr, D1: gl.constexpr):
    """Writes 0 to rows of D channels of the output; by one warp."""
    rows: gl.constexpr = row.type.layout.parent
    ROWS: gl.constexpr = row.shape[0]
    at = out + row.to(gl.int64)[:, None] * D
    inside = (row >= 0)[:, None]
    channel = gl.arange(0, D1, layout=gl.SliceLayout(0, rows))
    zero = gl.zeros([ROWS, D1], out.dtype.element_ty, rows)
    gl.store(at + channel[None, :], zero, mask=inside & (channel < D)[None, :])
    if D > D1:
        channel += D1
        gl.store(at + channel[None, :], zero, mask=inside & (channel < D)[None, :])


@gluon.jit
def produce(bufs, bars, descs, pointers, strides, numbers, CONST: gl.constexpr):
    """The loading warp; between loads it also writes zeros, its share of all, for tokens that did not choose a head."""
    q_bufs, q2_bufs, k_bufs, k2_bufs, v_bufs, v2_bufs = bufs
    k_full, v_full, empty, turns = bars
    k_desc, v_desc, k2_desc, v2_desc = descs
    q_ptr, g_ptr, out, order, work, zeros, totals = pointers
    N, M, heads, qk_scale = numbers
    D: gl.constexpr = CONST[0]
    STAGES: gl.constexpr = CONST[1]
    REST: gl.constexpr = CONST[3]
    ROWS: gl.constexpr = 32
    D1: gl.constexpr = q_bufs.shape[2]
    BN: gl.constexpr = k_bufs.shape[1]
    BYTES: gl.constexpr = BN * (D1 + (16 if REST else 0)) * 2
    tiles = (M + BN - 1) // BN
    hop = gl.num_programs(0)
    total = gl.load(totals)
    count = gl.load(totals + 1)
    chunks = (count + ROWS - 1) // ROWS
    chunk = gl.program_id(0)
    rows = read_zeros(zeros, chunk, count, D1, ROWS)
    ring = 0
    for item in range(gl.program_id(0), total, hop):
        pair, first, end = read_item(work, item, total)
        image, head = pair // heads, pair % heads
        for i in range(0, tiles):
            slot, phase = ring % STAGES, ring // STAGES & 1
            start = gl.where(i == 0, tiles - 1, i - 1) * BN
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(
                k_desc, [image, start, head, 0], k_full.index(slot), as_block(k_bufs.index(slot), k_desc)
            )
            if REST:
                tma.async_copy_global_to_shared(
                    k2_desc, [image, start, head, D1], k_full.index(slot), as_block(k2_bufs.index(slot), k2_desc)
                )
            mbarrier.expect(v_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(
                v_desc, [image, start, head, 0], v_full.index(slot), as_block(v_bufs.index(slot), v_desc)
            )
            if REST:
                tma.async_copy_global_to_shared(
                    v2_desc, [image, start, head, D1], v_full.index(slot), as_block(v2_bufs.index(slot), v2_desc)
                )
            if chunk < chunks:  # its rows were asked for a step ago
                clear(out, rows, D, D1)
                chunk += hop
                rows = read_zeros(zeros, chunk, count, D1, ROWS)
            ring += 1
    for rest in range(chunk, chunks, hop):
        clear(out, rows, D, D1)
        rows = read_zeros(zeros, rest + hop, count, D1, ROWS)


NUMBERS = ["qb", "qn", "qh", "gb", "gn", "gh", "ob", "on", "oh", "N", "M", "heads"]


@gluon.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q_ptr, k_desc, v_desc, k2_desc, v2_desc, g_ptr, out, order, work, zeros, totals,
    qb, qn, qh, gb, gn, gh, ob, on, oh, N, M, heads, qk_scale,
    D: gl.constexpr, D1: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    UNIT: gl.constexpr, TURNS: gl.constexpr, LAZY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """GROUPS warpgroups; REGISTERS: of the threads of the second and third one, and of the loading warp.

    TURNS: two warpgroups issue their products in turns. LAZY: see softmax. Strides of q and out come in units of UNIT
    elements, 16 bytes.
    """
    REST: gl.constexpr = D > D1
    dtype: gl.constexpr = k_desc.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(
        dtype, [2 * GROUPS, 64, D1], gl.NVMMASharedLayout.get_default_for([64, D1], dtype)
    )
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D1], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, D1], wide)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, D1], wide)
    if REST:
        narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, 16], dtype)
        q2_bufs = gl.allocate_shared_memory(
            dtype, [2 * GROUPS, 64, 16], gl.NVMMASharedLayout.get_default_for([64, 16], dtype)
        )
        k2_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, 16], narrow)
        v2_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, 16], narrow)
    else:
        q2_bufs = q_bufs  # not used
        k2_bufs = k_bufs
        v2_bufs = v_bufs
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    bufs = (q_bufs, q2_bufs, k_bufs, k2_bufs, v_bufs, v2_bufs)
    bars = (k_full, v_full, empty, turns)
    descs = (k_desc, v_desc, k2_desc, v2_desc)
    pointers = (q_ptr, g_ptr, out, order, work, zeros, totals)
    strides = ((qb, qn, qh), (gb, gn, gh), (ob, on, oh))
    numbers = (N, M, heads, qk_scale)
    CONST: gl.constexpr = (D, STAGES, UNIT, REST, TURNS, LAZY)
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (consume, (0, bufs, bars, pointers, strides, numbers, CONST)),
                (consume, (1, bufs, bars, pointers, strides, numbers, CONST)),
                (consume, (2, bufs, bars, pointers, strides, numbers, CONST)),
                (produce, (bufs, bars, descs, pointers, strides, numbers, CONST)),
            ],
            [4, 4, 1], [REGISTERS[0], REGISTERS[0], REGISTERS[1]],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, bufs, bars, pointers, strides, numbers, CONST)),
                (consume, (1, bufs, bars, pointers, strides, numbers, CONST)),
                (produce, (bufs, bars, descs, pointers, strides, numbers, CONST)),
            ],
            [4, 1], [REGISTERS[0], REGISTERS[1]],
        )  # fmt: skip
