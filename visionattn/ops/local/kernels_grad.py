# ruff: noqa: RUF059, SIM113, B007 -- tuples of arguments are unpacked whole
"""Gluon: backward kernels of local attention for Hopper GPUs (compute capability 9.0), on grids of two axes.

As kernels_backward.py: one kernel for dq, one for dk and dv, and nothing is added atomically. What is different: one
warp loads tiles of 8 x 8 tokens of the other side for two warpgroups of 8 x 8 tokens each, which halves the traffic
from L2 that bounds Triton's kernels; and queries and their gradients stay in registers in the first kernel. Windows
whose tiles are all full (KIND 0), and disks (KIND 1) with the words of bits of kernels_disk.py: a disk is symmetric, so
that they serve keys that own the tile as they serve queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from visionattn.ops._hopper import as_block, thread_barrier

from . import kernels
from .kernels_disk import hide, place, visit, visits_of, words_of

M = gl.constexpr(64)  # tokens of a warpgroup, and of a tile of the other side: 8 x 8 each
visit_keys, visit_queries = gluon.jit(kernels.visit_keys.fn), gluon.jit(kernels.visit_queries.fn)


@gluon.jit
def visited(ty, tx, sizes, box, table, classes_x, QY: gl.constexpr, QX: gl.constexpr, KIND: gl.constexpr,
            KEYS_OWN: gl.constexpr):  # fmt: skip
    """Numbers of the first visited tile and behind the last, and what :func:`origin` needs."""
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    if KIND == 0:
        wy, wx, sy, sx = box
        if KEYS_OWN:
            oy, cy, fy, Fy = visit_queries(ty * QY * 8, H, wy, sy, False, QY * 8, 8)
            ox, cx, fx, Fx = visit_queries(tx * QX * 8, W, wx, sx, False, QX * 8, 8)
        else:
            oy, cy, fy, Fy = visit_keys(ty * QY * 8, H, wy, sy, False, QY * 8, 8)
            ox, cx, fx, Fx = visit_keys(tx * QX * 8, W, wx, sx, False, QX * 8, 8)
        return 0, cy * cx, (oy, ox, cx)
    else:
        begin, stop = visits_of(table, ty, tx, tiles_y, tiles_x, classes_x)
        return begin, stop, (ty * QY * 8, tx * QX * 8, 1)


@gluon.jit
def origin(i, shape, table, entries, KIND: gl.constexpr):
    """Origin (y, x) of the i-th visited tile, and its number in the table of words."""
    oy, ox, cx = shape
    if KIND == 0:
        row = i // cx
        return oy + row * 8, ox + (i - row * cx) * 8, 0
    else:
        dy, dx, number = visit(table, i, entries)
        return oy + dy, ox + dx, number


@gluon.jit
def base_two(lse):
    """A natural log-sum-exp in base 2; +inf for a row that saw no key, so that its probabilities are 0."""
    return gl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)


@gluon.jit
def query_step(ring, words, MASKED: gl.constexpr, q, g, bufs, bars, dq, lse2, delta, qk_scale, STAGES: gl.constexpr,
               mma_s: gl.constexpr, ORDERED: gl.constexpr):  # fmt: skip
    """Adds a tile of keys' share to dq."""
    k_bufs, v_bufs = bufs
    full, empty = bars
    slot, phase = ring % STAGES, ring // STAGES & 1
    mbarrier.wait(full.index(slot), phase)
    zero = gl.zeros([M, M], gl.float32, mma_s)
    s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(g, v_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    if MASKED:
        s = hide(s, words)
    p = gl.exp2(s * qk_scale - lse2[:, None])
    if ORDERED:
        # Passes at once. It ends a basic block: without it ptxas moves the exponentials behind the wait for dp.
        mbarrier.wait(full.index(slot), phase)
        dp, p = warpgroup_mma_wait(0, deps=[dp, p])
    else:
        dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * (dp - delta[:, None])
    ds = gl.convert_layout(ds.to(k_bufs.dtype), gl.DotOperandLayout(0, dq.type.layout, 2))
    dq = warpgroup_mma(ds, k_bufs.index(slot), dq, is_async=True)
    dq, ds = warpgroup_mma_wait(0, deps=[dq, ds])
    mbarrier.arrive(empty.index(slot))
    return dq


@gluon.jit
def key_step(ring, words, MASKED: gl.constexpr, k, v, bufs, bars, dk, dv, qk_scale, STAGES: gl.constexpr,
             mma_s: gl.constexpr, ORDERED: gl.constexpr):  # fmt: skip
    """Adds a tile of queries' share to dk and dv. Logits are (keys, queries)."""
    q_bufs, g_bufs, lse_bufs, delta_bufs = bufs
    full, empty = bars
    slot, phase = ring % STAGES, ring // STAGES & 1
    column: gl.constexpr = gl.SliceLayout(0, mma_s)
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    mbarrier.wait(full.index(slot), phase)
    q, g = q_bufs.index(slot), g_bufs.index(slot)
    zero = gl.zeros([M, M], gl.float32, mma_s)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, g.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse2 = lse_bufs.index(slot).load(column)
    s = warpgroup_mma_wait(1, deps=[s])
    if MASKED:
        s = hide(s, words)
    p = gl.exp2(s * qk_scale - lse2[None, :])
    half = gl.convert_layout(p.to(q_bufs.dtype), operand)
    if ORDERED:  # as in query_step
        mbarrier.wait(full.index(slot), phase)
        dp, p, half = warpgroup_mma_wait(0, deps=[dp, p, half])
    else:
        dp = warpgroup_mma_wait(0, deps=[dp])
    dv = warpgroup_mma(half, g, dv, is_async=True)
    delta = delta_bufs.index(slot).load(column)
    ds = p * (dp - delta[None, :])
    ds = gl.convert_layout(ds.to(q_bufs.dtype), operand)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dv, dk, half, ds = warpgroup_mma_wait(0, deps=[dv, dk, half, ds])
    mbarrier.arrive(empty.index(slot))
    return dk, dv


@gluon.jit
def pass_over(ring, bars, STAGES: gl.constexpr):
    """Gives a tile back unread, once it is there."""
    full, empty = bars
    slot, phase = ring % STAGES, ring // STAGES & 1
    mbarrier.wait(full.index(slot), phase)
    mbarrier.arrive(empty.index(slot))


@gluon.jit
def store_grid(acc, buf, desc, batch, y, x, head):
    """Writes 8 x 8 tokens through a buffer that nobody reads any more; what lies outside the grid is dropped."""
    thread_barrier()
    buf.store(acc.to(buf.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [batch, y, x, head, 0], as_block(buf, desc))


@gluon.jit
def consume_queries(WHICH: gl.constexpr, bufs, bars, own_bufs, own_bars, dq_desc, numbers, CONST: gl.constexpr):
    """A warpgroup: dq of its 8 x 8 queries."""
    STAGES: gl.constexpr = CONST[0]
    QY: gl.constexpr = CONST[1]
    QX: gl.constexpr = CONST[2]
    KIND: gl.constexpr = CONST[3]
    QREG: gl.constexpr = CONST[4]
    ORDERED: gl.constexpr = CONST[5]
    sizes, box, text, group, classes_x, entries, table, bits, lse_ptr, delta_ptr, length, first, scales = numbers
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    qk_scale, scale = scales
    q_bufs, g_bufs = own_bufs
    own_full, own_empty = own_bars
    D: gl.constexpr = q_bufs.shape[2]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row: gl.constexpr = gl.SliceLayout(1, mma_s)
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads)
        begin, stop, shape = visited(ty, tx, sizes, box, table, classes_x, QY, QX, KIND, False)
        y, x = ty * QY * 8 + WHICH // QX * 8, tx * QX * 8 + WHICH % QX * 8
        m = gl.arange(0, M, layout=row)
        qy, qx = y + m // 8, x + m % 8
        there = (qy < H) & (qx < W)
        at = (batch * heads + head).to(gl.int64) * length + first + qy * W + qx
        lse2 = base_two(gl.load(lse_ptr + at, mask=there, other=0.0))
        delta = gl.load(delta_ptr + at, mask=there, other=0.0)
        mbarrier.wait(own_full.index(WHICH), done & 1)
        if QREG:
            q = q_bufs.index(WHICH).load(gl.DotOperandLayout(0, mma_s, 2))
            g = g_bufs.index(WHICH).load(gl.DotOperandLayout(0, mma_s, 2))
        else:
            q, g = q_bufs.index(WHICH), g_bufs.index(WHICH)
        dq = gl.zeros([M, D], gl.float32, mma_o)
        for i in range(begin, stop):
            if KIND == 0:
                dq = query_step(ring, (0,), False, q, g, bufs, bars, dq, lse2, delta, qk_scale, STAGES, mma_s, ORDERED)
            else:
                ky, kx, number = origin(i, shape, table, entries, KIND)
                if (number >> (16 + WHICH)) & 1:
                    words = words_of(bits, number, ky, kx, sizes, WHICH, QY * QX, row)
                    dq = query_step(
                        ring, words, True, q, g, bufs, bars, dq, lse2, delta, qk_scale, STAGES, mma_s, ORDERED
                    )
                else:
                    pass_over(ring, bars, STAGES)
            ring += 1
        for i in range(0, text // M):
            dq = query_step(ring, (0,), False, q, g, bufs, bars, dq, lse2, delta, qk_scale, STAGES, mma_s, ORDERED)
            ring += 1
        if text % M > 0:
            all_ = gl.full([], 0xFFFFFFFFFFFFFFFF, gl.uint64)
            shown = (all_ >> (64 - text % M).to(gl.uint64)).to(gl.int64, bitcast=True)
            words = gl.full([M], 0, gl.int64, row) | shown
            dq = query_step(ring, words, True, q, g, bufs, bars, dq, lse2, delta, qk_scale, STAGES, mma_s, ORDERED)
            ring += 1
        store_grid(dq * scale, q_bufs.index(WHICH), dq_desc, batch, y, x, head)
        tma.store_wait(0)
        thread_barrier()
        mbarrier.arrive(own_empty.index(WHICH))
        done += 1


@gluon.jit
def consume_keys(WHICH: gl.constexpr, bufs, bars, own_bufs, own_bars, outs, numbers, CONST: gl.constexpr):
    """A warpgroup: dk and dv of its 8 x 8 keys."""
    STAGES: gl.constexpr = CONST[0]
    QY: gl.constexpr = CONST[1]
    QX: gl.constexpr = CONST[2]
    KIND: gl.constexpr = CONST[3]
    ORDERED: gl.constexpr = CONST[5]
    sizes, box, text, group, classes_x, entries, table, bits, lse_ptr, delta_ptr, length, first, scales = numbers
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    qk_scale, scale = scales
    k_bufs, v_bufs = own_bufs
    own_full, own_empty = own_bars
    dk_desc, dv_desc = outs
    D: gl.constexpr = k_bufs.shape[2]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row: gl.constexpr = gl.SliceLayout(1, mma_s)
    k, v = k_bufs.index(WHICH), v_bufs.index(WHICH)
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        kv_head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads // group)
        begin, stop, shape = visited(ty, tx, sizes, box, table, classes_x, QY, QX, KIND, True)
        mbarrier.wait(own_full.index(WHICH), done & 1)
        dk = gl.zeros([M, D], gl.float32, mma_o)
        dv = gl.zeros([M, D], gl.float32, mma_o)
        for member in range(0, group):
            for i in range(begin, stop):
                if KIND == 0:
                    dk, dv = key_step(ring, (0,), False, k, v, bufs, bars, dk, dv, qk_scale, STAGES, mma_s, ORDERED)
                else:
                    qy, qx, number = origin(i, shape, table, entries, KIND)
                    if (number >> (16 + WHICH)) & 1:
                        words = words_of(bits, number, qy, qx, sizes, WHICH, QY * QX, row)
                        dk, dv = key_step(ring, words, True, k, v, bufs, bars, dk, dv, qk_scale, STAGES, mma_s, ORDERED)
                    else:
                        pass_over(ring, bars, STAGES)
                ring += 1
            # queries behind the text's end are read as zeros, and so add nothing
            for i in range(0, (text + M - 1) // M):
                dk, dv = key_step(ring, (0,), False, k, v, bufs, bars, dk, dv, qk_scale, STAGES, mma_s, ORDERED)
                ring += 1
        y, x = ty * QY * 8 + WHICH // QX * 8, tx * QX * 8 + WHICH % QX * 8
        store_grid(dk * scale, k, dk_desc, batch, y, x, kv_head)
        store_grid(dv, v, dv_desc, batch, y, x, kv_head)
        tma.store_wait(0)
        thread_barrier()
        mbarrier.arrive(own_empty.index(WHICH))
        done += 1


@gluon.jit
def load_own(descs, bufs, bars, batch, ty, tx, head, done, QY: gl.constexpr, QX: gl.constexpr):
    """Starts the loads of both tensors of every warpgroup's own tokens."""
    first_desc, second_desc = descs
    first, second = bufs
    full, empty = bars
    D: gl.constexpr = first.shape[2]
    for c in gl.static_range(QY * QX):
        mbarrier.wait(empty.index(c), (done & 1) ^ 1)
        y, x = ty * QY * 8 + c // QX * 8, tx * QX * 8 + c % QX * 8
        bar = full.index(c)
        mbarrier.expect(bar, 2 * M * D * 2)
        at = [batch, y, x, head, 0]
        tma.async_copy_global_to_shared(first_desc, at, bar, as_block(first.index(c), first_desc))
        tma.async_copy_global_to_shared(second_desc, at, bar, as_block(second.index(c), second_desc))


@gluon.jit
def load_pair(descs, at, first, second, bar):
    """Starts the loads of a tile of both tensors of the other side."""
    first_desc, second_desc = descs
    mbarrier.expect(bar, 2 * M * first.shape[1] * 2)
    tma.async_copy_global_to_shared(first_desc, at, bar, as_block(first, first_desc))
    tma.async_copy_global_to_shared(second_desc, at, bar, as_block(second, second_desc))


@gluon.jit
def load_rows(lse_ptr, delta_ptr, at, there, lse_buf, delta_buf, bar):
    """A tile's log-sum-exps (base 2) and deltas; zeros where no query is."""
    lse = base_two(gl.load(lse_ptr + at, mask=there, other=0.0))
    delta = gl.load(delta_ptr + at, mask=there, other=0.0)
    lse_buf.store(lse)
    delta_buf.store(delta)
    thread_barrier()
    mbarrier.arrive(bar)


@gluon.jit
def produce_keys(bufs, bars, own_bufs, own_bars, descs, numbers, CONST: gl.constexpr):
    """The loading warp of the kernel of dq."""
    STAGES: gl.constexpr = CONST[0]
    QY: gl.constexpr = CONST[1]
    QX: gl.constexpr = CONST[2]
    KIND: gl.constexpr = CONST[3]
    sizes, box, text, group, classes_x, entries, table, bits, lse_ptr, delta_ptr, length, first, scales = numbers
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    own_descs, grid_descs, run_descs = descs
    k_bufs, v_bufs = bufs
    full, empty = bars
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads)
        begin, stop, shape = visited(ty, tx, sizes, box, table, classes_x, QY, QX, KIND, False)
        load_own(own_descs, own_bufs, own_bars, batch, ty, tx, head, done, QY, QX)
        for i in range(begin, stop):
            y, x, number = origin(i, shape, table, entries, KIND)
            slot, phase = ring % STAGES, ring // STAGES & 1
            mbarrier.wait(empty.index(slot), phase ^ 1)
            at = [batch, y, x, head // group, 0]
            load_pair(grid_descs, at, k_bufs.index(slot), v_bufs.index(slot), full.index(slot))
            ring += 1
        for i in range(0, (text + M - 1) // M):
            slot, phase = ring % STAGES, ring // STAGES & 1
            mbarrier.wait(empty.index(slot), phase ^ 1)
            at = [batch, i * M, head // group, 0]
            load_pair(run_descs, at, k_bufs.index(slot), v_bufs.index(slot), full.index(slot))
            ring += 1
        done += 1


@gluon.jit
def produce_queries(bufs, bars, own_bufs, own_bars, descs, numbers, CONST: gl.constexpr):
    """The loading warp of the kernel of dk and dv."""
    STAGES: gl.constexpr = CONST[0]
    QY: gl.constexpr = CONST[1]
    QX: gl.constexpr = CONST[2]
    KIND: gl.constexpr = CONST[3]
    sizes, box, text, group, classes_x, entries, table, bits, lse_ptr, delta_ptr, length, first, scales = numbers
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    TEXT_LAST: gl.constexpr = CONST[4]
    text_at = H * W if TEXT_LAST else 0
    own_descs, grid_descs, run_descs = descs
    q_bufs, g_bufs, lse_bufs, delta_bufs = bufs
    full, empty = bars
    m = gl.arange(0, M, layout=gl.BlockedLayout([2], [32], [1], [0]))
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        kv_head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads // group)
        begin, stop, shape = visited(ty, tx, sizes, box, table, classes_x, QY, QX, KIND, True)
        load_own(own_descs, own_bufs, own_bars, batch, ty, tx, kv_head, done, QY, QX)
        for member in range(0, group):
            head = kv_head * group + member
            rows = (batch * heads + head).to(gl.int64) * length
            for i in range(begin, stop):
                y, x, number = origin(i, shape, table, entries, KIND)
                slot, phase = ring % STAGES, ring // STAGES & 1
                mbarrier.wait(empty.index(slot), phase ^ 1)
                bar = full.index(slot)
                load_pair(grid_descs, [batch, y, x, head, 0], q_bufs.index(slot), g_bufs.index(slot), bar)
                qy, qx = y + m // 8, x + m % 8
                there = (qy >= 0) & (qy < H) & (qx >= 0) & (qx < W)
                at = rows + first + qy * W + qx
                load_rows(lse_ptr, delta_ptr, at, there, lse_bufs.index(slot), delta_bufs.index(slot), bar)
                ring += 1
            for i in range(0, (text + M - 1) // M):
                slot, phase = ring % STAGES, ring // STAGES & 1
                mbarrier.wait(empty.index(slot), phase ^ 1)
                bar = full.index(slot)
                load_pair(run_descs, [batch, i * M, head, 0], q_bufs.index(slot), g_bufs.index(slot), bar)
                token = i * M + m
                at = rows + text_at + token
                load_rows(lse_ptr, delta_ptr, at, token < text, lse_bufs.index(slot), delta_bufs.index(slot), bar)
                ring += 1
        done += 1


NUMBERS = [
    "H", "W", "heads", "tiles_y", "tiles_x", "tiles", "wy", "wx", "sy", "sx", "text", "group", "classes_x", "entries",
    "length", "first",
]  # fmt: skip


@gluon.jit
def ring_bars(STAGES: gl.constexpr, GROUPS: gl.constexpr, LOADS: gl.constexpr):
    """Barriers of a ring's tiles, and of the warpgroups' own tokens. LOADS: arrivals that make a tile full."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    own_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    own_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=LOADS)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(own_full.index(i), count=1)
        mbarrier.init(own_empty.index(i), count=1)
    fence_async_shared()
    return (full, empty), (own_full, own_empty)


@gluon.jit(do_not_specialize=NUMBERS)
def query_grad(
    q_desc, g_desc, k_desc, v_desc, kt_desc, vt_desc, dq_desc, lse_ptr, delta_ptr, table, bits,
    H, W, heads, tiles_y, tiles_x, tiles, wy, wx, sy, sx, text, group, classes_x, entries, length, first, qk_scale,
    scale,
    QY: gl.constexpr, QX: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, QREG: gl.constexpr,
    ORDERED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq of the grid's queries. Two warpgroups (QY, QX) of 8 x 8 queries share the loads of keys and values."""
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [QY * QX, M, D], layout)
    g_bufs = gl.allocate_shared_memory(dtype, [QY * QX, M, D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, M, D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, M, D], layout)
    bars, own_bars = ring_bars(STAGES, QY * QX, 1)
    bufs = (k_bufs, v_bufs)
    own_bufs = (q_bufs, g_bufs)
    sizes = (H, W, heads, tiles_y, tiles_x, tiles)
    box = (wy, wx, sy, sx)
    numbers = (
        sizes, box, text, group, classes_x, entries, table, bits, lse_ptr, delta_ptr, length, first, (qk_scale, scale),
    )  # fmt: skip
    descs = ((q_desc, g_desc), (k_desc, v_desc), (kt_desc, vt_desc))
    CONST: gl.constexpr = (STAGES, QY, QX, KIND, QREG, ORDERED)
    gl.warp_specialize(
        [
            (consume_queries, (0, bufs, bars, own_bufs, own_bars, dq_desc, numbers, CONST)),
            (consume_queries, (1, bufs, bars, own_bufs, own_bars, dq_desc, numbers, CONST)),
            (produce_keys, (bufs, bars, own_bufs, own_bars, descs, numbers, CONST)),
        ],
        [4, 1], [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


@gluon.jit(do_not_specialize=NUMBERS)
def key_grad(
    k_desc, v_desc, q_desc, g_desc, qt_desc, gt_desc, dk_desc, dv_desc, lse_ptr, delta_ptr, table, bits,
    H, W, heads, tiles_y, tiles_x, tiles, wy, wx, sy, sx, text, group, classes_x, entries, length, first, qk_scale,
    scale,
    QY: gl.constexpr, QX: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    TEXT_LAST: gl.constexpr, ORDERED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of the grid's keys. Two warpgroups (QY, QX) of 8 x 8 keys share the loads of queries."""
    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_bufs = gl.allocate_shared_memory(dtype, [QY * QX, M, D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [QY * QX, M, D], layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, M, D], layout)
    g_bufs = gl.allocate_shared_memory(dtype, [STAGES, M, D], layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, M], flat)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, M], flat)
    bars, own_bars = ring_bars(STAGES, QY * QX, 2)
    bufs = (q_bufs, g_bufs, lse_bufs, delta_bufs)
    own_bufs = (k_bufs, v_bufs)
    sizes = (H, W, heads, tiles_y, tiles_x, tiles)
    box = (wy, wx, sy, sx)
    numbers = (
        sizes, box, text, group, classes_x, entries, table, bits, lse_ptr, delta_ptr, length, first, (qk_scale, scale),
    )  # fmt: skip
    descs = ((k_desc, v_desc), (q_desc, g_desc), (qt_desc, gt_desc))
    outs = (dk_desc, dv_desc)
    CONST: gl.constexpr = (STAGES, QY, QX, KIND, TEXT_LAST, ORDERED)
    gl.warp_specialize(
        [
            (consume_keys, (0, bufs, bars, own_bufs, own_bars, outs, numbers, CONST)),
            (consume_keys, (1, bufs, bars, own_bufs, own_bars, outs, numbers, CONST)),
            (produce_queries, (bufs, bars, own_bufs, own_bars, descs, numbers, CONST)),
        ],
        [4, 1], [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip
