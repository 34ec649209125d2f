# ruff: noqa: RUF059, SIM113, B007 -- tuples of arguments are unpacked whole
"""Gluon: the forward kernel of disks for Hopper GPUs (compute capability 9.0), heads of 128 channels.

As kernels_hopper.py: one warp loads, the others multiply, in FlashAttention-3's order. What differs: every warpgroup
owns 8 x 8 queries and passes over steps that only others need; a step is BN keys gathered in pieces of PH x 8
(steps.py); and the mask is a word of bits for each query, read from a table, which leaves two instructions for each
logit. Keys and values lie in shared memory as two tiles of 64 channels, so that pieces follow one another there.
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

from .kernels_hopper import thread_barrier

M = gl.constexpr(64)  # queries of a warpgroup
HALF = gl.constexpr(64)  # channels of a tile in shared memory: 128 bytes
KEEP = gl.constexpr(
    "{.reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.u32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p;}"
)


@gluon.jit
def place(tile, tiles_y, tiles_x, heads):
    x = tile % tiles_x
    rest = tile // tiles_x
    y = rest % tiles_y
    rest = rest // tiles_y
    return rest % heads, rest // heads, y, x


@gluon.jit
def pick(n, words, BN: gl.constexpr):
    """The 32-bit word of key n."""
    if BN == 128:
        a, b, c, d = words
        low = gl.where((n < 32)[None, :], a[:, None], b[:, None])
        high = gl.where((n < 96)[None, :], c[:, None], d[:, None])
        return gl.where((n < 64)[None, :], low, high)
    else:
        a, b = words
        return gl.where((n < 32)[None, :], a[:, None], b[:, None])


@gluon.jit
def hide(s, words, BN: gl.constexpr):
    """words: tensors (M,) of 32 bits; bit n of all together is whether key n is seen."""
    n = gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
    one = gl.full([BN], 1, gl.uint32, n.type.layout) << (n & 31).to(gl.uint32)
    word, one = gl.broadcast(pick(n, words, BN), one[None, :])
    return gl.inline_asm_elementwise(KEEP, "=f,f,r,r", [s, word, one], gl.float32, True, 1)


@gluon.jit
def halves(words):
    return (words & 0xFFFFFFFF).to(gl.uint32), (words >> 32).to(gl.uint32)


@gluon.jit
def softmax(s, row_max, row_sum, qk_scale, LAZY: gl.constexpr):
    """Probabilities, and the running maximum, sum and factor of what was before."""
    top = gl.max(s, 1) * qk_scale
    if LAZY:
        new_max = gl.where(top > row_max + 6.0, top, row_max)  # probabilities up to 64
    else:
        new_max = gl.maximum(row_max, top)
    p = gl.exp2(s * qk_scale - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


ASM_RESCALE = gl.constexpr(
    "{\n.reg .pred p, q;\nsetp.neu.f32 p, $64, 0f3F800000;\n"
    + "\n".join(f"setp.neu.or.f32 p, ${64 + i}, 0f3F800000, p;" for i in (1, 2, 3))
    + "\nvote.sync.any.pred q, p, 0xffffffff;\n"
    + "\n".join(f"mov.b32 ${i}, ${32 + i};" for i in range(32))
    + "\n@!q bra DONE;\n"
    + "\n".join(f"mul.f32 ${i}, ${i}, ${64 + i};" for i in range(32))
    + "\nDONE:\n}"
)
ASM_CONSTRAINTS = gl.constexpr(",".join(["=&f"] * 32 + ["f"] * 64))


@gluon.jit
def scaled(acc, rescale, LAZY: gl.constexpr):
    factor = gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    if LAZY:
        factor, same = gl.broadcast(factor, acc)
        return gl.inline_asm_elementwise(ASM_RESCALE, ASM_CONSTRAINTS, [acc, factor], gl.float32, True, 32)
    else:
        return acc * factor


@gluon.jit
def words_of(bits, at, BN: gl.constexpr, layout: gl.constexpr):
    """Words of M queries; at: which M."""
    m = gl.arange(0, M, layout=layout)
    if BN == 128:
        base = bits + at * (2 * M) + 2 * m
        return gl.load(base), gl.load(base + 1)
    else:
        return (gl.load(bits + at * M + m),)


@gluon.jit
def border_of(edges, row, column, steps, i, outer, BN: gl.constexpr):
    """Words of the keys of step i that lie on the grid. outer: whether the tile is near a border."""
    if BN == 128:
        rows, columns = edges + 2 * (row * steps + i), edges + 2 * (column * steps + i)
        a = gl.load(rows, mask=outer, other=-1) & gl.load(columns, mask=outer, other=-1)
        b = gl.load(rows + 1, mask=outer, other=-1) & gl.load(columns + 1, mask=outer, other=-1)
        return a, b, ((a | b) != 0)
    else:
        rows, columns = edges + row * steps + i, edges + column * steps + i
        a = gl.load(rows, mask=outer, other=-1) & gl.load(columns, mask=outer, other=-1)
        return a, a, (a != 0)


@gluon.jit
def cut(words, border, BN: gl.constexpr):
    """32-bit words of what is seen and on the grid."""
    a, b, some = border
    if BN == 128:
        u, v = words
        return halves(u & a) + halves(v & b)
    else:
        return halves(words[0] & a)


@gluon.jit
def first_bits(count):
    """The first `count` of 64 bits; none below 1, all above 63."""
    full = gl.full([], 0xFFFFFFFFFFFFFFFF, gl.uint64)
    shift = gl.minimum(gl.maximum(64 - count, 0), 63).to(gl.uint64)
    return gl.where(count > 0, full >> shift, 0).to(gl.int64, bitcast=True)


@gluon.jit
def run_words(count, BN: gl.constexpr, layout: gl.constexpr):
    zero = gl.full([M], 0, gl.int64, layout)
    if BN == 128:
        return halves(zero | first_bits(count)) + halves(zero | first_bits(count - 64))
    else:
        return halves(zero | first_bits(count))


@gluon.jit
def logits(q, k_bufs, slot, BN: gl.constexpr, layout: gl.constexpr):
    """Starts the products of queries and keys."""
    q0, q1 = q
    zero = gl.zeros([M, BN], gl.float32, layout)
    s = warpgroup_mma(q0, k_bufs.index(2 * slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q1, k_bufs.index(2 * slot + 1).permute((1, 0)), s, is_async=True)


@gluon.jit
def step(ring, held, words, MASKED: gl.constexpr, q, bufs, bars, state, qk_scale, S: gl.constexpr):
    """Visits BN keys: their logits, and meanwhile the product of p and the values of the step before.

    ring, held: which loads these two are, counted since the program began.
    """
    STAGES: gl.constexpr = S[0]
    BN: gl.constexpr = S[1]
    LAZY: gl.constexpr = S[2]
    MERGE: gl.constexpr = S[3]
    k_bufs, v_bufs = bufs
    k_full, v_full, k_empty, v_empty = bars
    p, acc0, acc1, row_max, row_sum = state
    slot, phase = ring % STAGES, ring // STAGES & 1
    old_slot = held % STAGES
    mma_s: gl.constexpr = row_max.type.layout.parent
    mbarrier.wait(k_full.index(slot), phase)
    s = logits(q, k_bufs, slot, BN, mma_s)
    acc0 = warpgroup_mma(p, v_bufs.index(2 * old_slot), acc0, is_async=True)
    acc1 = warpgroup_mma(p, v_bufs.index(2 * old_slot + 1), acc1, is_async=True)
    s = warpgroup_mma_wait(2, deps=[s])
    if MASKED:
        # ends a basic block: else ptxas looks at the words' bits early and keeps them in registers. The keys are not
        # given back yet, so that the barrier cannot have gone on to its next phase.
        mbarrier.wait(k_full.index(slot), phase)
    if not MERGE:
        mbarrier.arrive(k_empty.index(slot))
    if MASKED:
        s = hide(s, words, BN)
    new, row_max, row_sum, rescale = softmax(s, row_max, row_sum, qk_scale, LAZY)
    new = gl.convert_layout(new.to(p.dtype), p.type.layout)
    # This wait for the values of the next step ends a basic block: without it ptxas moves the exponentials behind the
    # wait for the product that they are to run beside.
    mbarrier.wait(v_full.index(slot), phase)
    acc0, acc1, p, new, row_sum = warpgroup_mma_wait(0, deps=[acc0, acc1, p, new, row_sum])
    mbarrier.arrive(v_empty.index(old_slot))
    return new, scaled(acc0, rescale, LAZY), scaled(acc1, rescale, LAZY), row_max, row_sum


@gluon.jit
def pass_over(ring, bars, STAGES: gl.constexpr, MERGE: gl.constexpr):
    """Gives a step back unread, once its values are there: they are loaded after its keys."""
    k_full, v_full, k_empty, v_empty = bars
    slot, phase = ring % STAGES, ring // STAGES & 1
    mbarrier.wait(v_full.index(slot), phase)
    if not MERGE:
        mbarrier.arrive(k_empty.index(slot))
    mbarrier.arrive(v_empty.index(slot))


@gluon.jit
def consume(WHICH: gl.constexpr, bufs, bars, q_bars, q_bufs, outs, numbers, CONST: gl.constexpr):
    """A warpgroup: logits, softmax, output of its 8 x 8 queries."""
    STAGES: gl.constexpr = CONST[0]
    QY: gl.constexpr = CONST[1]
    QX: gl.constexpr = CONST[2]
    QREG: gl.constexpr = CONST[3]
    LAZY: gl.constexpr = CONST[4]
    MERGE: gl.constexpr = CONST[5]
    BN: gl.constexpr = CONST[6]
    DIRECT: gl.constexpr = CONST[8]
    GROUPS: gl.constexpr = QY * QX
    S: gl.constexpr = (STAGES, BN, LAZY, MERGE)
    k_bufs, v_bufs = bufs
    k_full, v_full, k_empty, v_empty = bars
    q_full, q_empty = q_bars
    o_desc, o_ptr, o_strides, lse_ptr = outs
    sizes, group, N, first, qk_scale, lists = numbers
    H, W, heads, tiles_y, tiles_x, text, steps, total_tiles = sizes
    table, edges, bits = lists
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    row: gl.constexpr = gl.SliceLayout(1, mma_s)
    q_buf0, q_buf1 = q_bufs.index(2 * WHICH), q_bufs.index(2 * WHICH + 1)
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads)
        y, x = (ty * QY + WHICH // QX) * 8, (tx * QX + WHICH % QX) * 8
        row_class, column_class = gl.load(table + ty), gl.load(table + tiles_y + tx)
        needs = table + tiles_y + tiles_x
        outer = (row_class != 0) | (column_class != 1)
        runs = (text + BN - 1) // BN
        slot, phase = ring % STAGES, ring // STAGES & 1

        mbarrier.wait(q_full.index(WHICH), done & 1)
        if QREG:
            layout: gl.constexpr = gl.DotOperandLayout(0, mma_s, 2)
            q = q_buf0.load(layout), q_buf1.load(layout)
        else:
            q = q_buf0, q_buf1
        # the end of the text; of the grid where there is no text
        border = border_of(edges, row_class, column_class, steps, 0, outer, BN)
        words = cut(words_of(bits, WHICH, BN, row), border, BN)
        if runs > 0:
            words = run_words(text - (runs - 1) * BN, BN, row)
        mbarrier.wait(k_full.index(slot), phase)
        s = logits(q, k_bufs, slot, BN, mma_s)
        s = warpgroup_mma_wait(0, deps=[s])
        if not MERGE:
            mbarrier.arrive(k_empty.index(slot))
        s = hide(s, words, BN)
        row_max = gl.full([M], -1e30, gl.float32, row)
        row_sum = gl.zeros([M], gl.float32, row)
        p, row_max, row_sum, rescale = softmax(s, row_max, row_sum, qk_scale, False)
        p = gl.convert_layout(p.to(q_bufs.dtype), p_layout)
        acc0 = gl.zeros([M, HALF], gl.float32, mma_o)
        acc1 = gl.zeros([M, HALF], gl.float32, mma_o)
        mbarrier.wait(v_full.index(slot), phase)
        held = ring
        ring += 1

        begin = gl.where(runs > 0, 0, 1)
        last = steps - 1
        near = gl.minimum(begin, last)
        need = gl.load(needs + near)
        border = border_of(edges, row_class, column_class, steps, near, outer, BN)
        for i in range(begin, steps):
            near = gl.minimum(i + 1, last)
            next_need = gl.load(needs + near)
            next_border = border_of(edges, row_class, column_class, steps, near, outer, BN)
            if border[2]:
                if (need >> WHICH) & 1:
                    words = cut(words_of(bits, i * GROUPS + WHICH, BN, row), border, BN)
                    p, acc0, acc1, row_max, row_sum = step(
                        ring, held, words, True, q, bufs, bars, (p, acc0, acc1, row_max, row_sum), qk_scale, S
                    )
                    held = ring
                else:
                    pass_over(ring, bars, STAGES, MERGE)
                ring += 1
            need, border = next_need, next_border
        for i in range(0, runs - 1):
            p, acc0, acc1, row_max, row_sum = step(
                ring, held, (0,), False, q, bufs, bars, (p, acc0, acc1, row_max, row_sum), qk_scale, S
            )
            held = ring
            ring += 1

        if DIRECT:
            mbarrier.arrive(q_empty.index(WHICH))  # the last logits are there
        slot = held % STAGES
        acc0 = warpgroup_mma(p, v_bufs.index(2 * slot), acc0, is_async=True)
        acc1 = warpgroup_mma(p, v_bufs.index(2 * slot + 1), acc1, is_async=True)
        acc0, acc1, p = warpgroup_mma_wait(0, deps=[acc0, acc1, p])
        mbarrier.arrive(v_empty.index(slot))

        some = row_sum > 0
        factor = gl.convert_layout(1.0 / gl.where(some, row_sum, 1.0), gl.SliceLayout(1, mma_o))[:, None]
        lse = gl.where(some, (row_max + gl.log2(row_sum)) * 0.6931471805599453, -float("inf"))
        m = gl.arange(0, M, layout=row)
        qy, qx = y + m // 8, x + m % 8
        at_lse = (batch * heads + head).to(gl.int64) * N + first + qy * W + qx
        gl.store(lse_ptr + at_lse, lse, mask=(qy < H) & (qx < W))
        if DIRECT:
            stride_b, stride_n, stride_h = o_strides
            m = gl.arange(0, M, layout=gl.SliceLayout(1, mma_o))
            d = gl.arange(0, HALF, layout=gl.SliceLayout(0, mma_o))
            qy, qx = y + m // 8, x + m % 8
            base = o_ptr + batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h
            at = (base + (first + qy * W + qx).to(gl.int64) * stride_n)[:, None] + d[None, :]
            inside = ((qy < H) & (qx < W))[:, None]
            gl.store(at, (acc0 * factor).to(q_bufs.dtype), mask=inside)
            gl.store(at + HALF, (acc1 * factor).to(q_bufs.dtype), mask=inside)
        else:
            # the output takes the queries' place: all have been read
            thread_barrier()
            q_buf0.store((acc0 * factor).to(q_bufs.dtype))
            q_buf1.store((acc1 * factor).to(q_bufs.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [batch, y, x, head, 0], _as(q_buf0, o_desc))
            tma.async_copy_shared_to_global(o_desc, [batch, y, x, head, HALF], _as(q_buf1, o_desc))
            tma.store_wait(0)
            thread_barrier()
            mbarrier.arrive(q_empty.index(WHICH))
        done += 1


@gluon.jit
def _as(buf, desc):
    """A buffer with the shape of a descriptor's block: the same bytes."""
    return buf._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def load_step(pieces, desc, y, x, batch, kv_head, bar, bufs, slot, P: gl.constexpr, BN: gl.constexpr):
    """pieces: pointer to the step's offsets. bufs: (slots * 2 * P, BN / P, HALF)."""
    mbarrier.expect(bar, BN * 2 * HALF * 2)
    for j in gl.static_range(P):
        offset = gl.load(pieces + j)
        ky, kx = y + (offset >> 16), x + ((offset << 16) >> 16)
        for h in gl.static_range(2):
            buf = bufs.index((2 * slot + h) * P + j)
            tma.async_copy_global_to_shared(desc, [batch, ky, kx, kv_head, h * HALF], bar, _as(buf, desc))


@gluon.jit
def load_run(desc, token, batch, kv_head, bar, bufs, slot, BN: gl.constexpr):
    mbarrier.expect(bar, BN * 2 * HALF * 2)
    for h in gl.static_range(2):
        tma.async_copy_global_to_shared(
            desc, [batch, token, kv_head, h * HALF], bar, _as(bufs.index(2 * slot + h), desc)
        )


@gluon.jit
def produce(bufs, bars, q_bars, q_bufs, descs, numbers, CONST: gl.constexpr):
    """The loading warp."""
    STAGES: gl.constexpr = CONST[0]
    QY: gl.constexpr = CONST[1]
    QX: gl.constexpr = CONST[2]
    MERGE: gl.constexpr = CONST[5]
    BN: gl.constexpr = CONST[6]
    PH: gl.constexpr = CONST[7]
    P: gl.constexpr = BN // (PH * 8)
    k_bufs, v_bufs = bufs
    k_full, v_full, k_empty, v_empty = bars
    q_full, q_empty = q_bars
    q_desc, k_desc, v_desc, kt_desc, vt_desc = descs
    sizes, group, N, first, qk_scale, lists = numbers
    H, W, heads, tiles_y, tiles_x, text, steps, total_tiles = sizes
    table, edges, bits = lists
    piece_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN // P, HALF], k_desc.dtype)
    k_pieces = k_bufs._reinterpret(k_desc.dtype, [STAGES * 2 * P, BN // P, HALF], piece_layout)
    v_pieces = v_bufs._reinterpret(k_desc.dtype, [STAGES * 2 * P, BN // P, HALF], piece_layout)
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads)
        kv_head = head // group
        own_y, own_x = ty * QY * 8, tx * QX * 8
        row_class, column_class = gl.load(table + ty), gl.load(table + tiles_y + tx)
        pieces = table + tiles_y + tiles_x + steps
        outer = (row_class != 0) | (column_class != 1)
        runs = (text + BN - 1) // BN
        for c in gl.static_range(QY * QX):
            mbarrier.wait(q_empty.index(c), (done & 1) ^ 1)
            y, x = (ty * QY + c // QX) * 8, (tx * QX + c % QX) * 8
            mbarrier.expect(q_full.index(c), M * 2 * HALF * 2)
            for h in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    q_desc, [batch, y, x, head, h * HALF], q_full.index(c), _as(q_bufs.index(2 * c + h), q_desc)
                )
        # the text's end, the grid, the rest of the text
        start = gl.where(runs > 0, -1, 0)
        stop = gl.where(runs > 0, steps + runs - 1, steps)
        for i in range(start, stop):
            on_grid = (i >= 0) & (i < steps)
            visible = True
            if on_grid:
                border = border_of(edges, row_class, column_class, steps, i, outer, BN)
                visible = border[2]
            if visible:
                slot, phase = ring % STAGES, ring // STAGES & 1
                token = gl.where(i < 0, runs - 1, i - steps) * BN
                if not MERGE:
                    mbarrier.wait(k_empty.index(slot), phase ^ 1)
                else:
                    mbarrier.wait(v_empty.index(slot), phase ^ 1)
                if on_grid:
                    load_step(
                        pieces + i * P, k_desc, own_y, own_x, batch, kv_head, k_full.index(slot), k_pieces, slot, P, BN
                    )
                else:
                    load_run(kt_desc, token, batch, kv_head, k_full.index(slot), k_bufs, slot, BN)
                if not MERGE:
                    mbarrier.wait(v_empty.index(slot), phase ^ 1)
                if on_grid:
                    load_step(
                        pieces + i * P, v_desc, own_y, own_x, batch, kv_head, v_full.index(slot), v_pieces, slot, P, BN
                    )
                else:
                    load_run(vt_desc, token, batch, kv_head, v_full.index(slot), v_bufs, slot, BN)
                ring += 1
        done += 1


NUMBERS = ["H", "W", "heads", "tiles_y", "tiles_x", "text", "steps", "tiles", "group", "length", "first"]


@gluon.jit(do_not_specialize=NUMBERS)
def disk_forward(
    q_desc, k_desc, v_desc, kt_desc, vt_desc, o_desc, o_ptr, lse_ptr, table, edges, bits,
    o_batch, o_token, o_head, H, W, heads, tiles_y, tiles_x, text, steps, tiles, group, length, first, qk_scale,
    QY: gl.constexpr, QX: gl.constexpr, STAGES: gl.constexpr, QREG: gl.constexpr, LAZY: gl.constexpr,
    MERGE: gl.constexpr, BN: gl.constexpr, PH: gl.constexpr, DIRECT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Queries of a grid over text and disks. QY x QX warpgroups of 8 x 8 queries share the loads of keys and values."""
    GROUPS: gl.constexpr = QY * QX
    dtype: gl.constexpr = q_desc.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, HALF], dtype)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, HALF], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2 * GROUPS, M, HALF], rows)
    k_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, BN, HALF], keys)
    v_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, BN, HALF], keys)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    bufs = (k_bufs, v_bufs)
    bars = (k_full, v_full, k_empty, v_empty)
    q_bars = (q_full, q_empty)
    sizes = (H, W, heads, tiles_y, tiles_x, text, steps, tiles)
    numbers = (sizes, group, length, first, qk_scale, (table, edges, bits))
    descs = (q_desc, k_desc, v_desc, kt_desc, vt_desc)
    outs = (o_desc, o_ptr, (o_batch, o_token, o_head), lse_ptr)
    CONST: gl.constexpr = (STAGES, QY, QX, QREG, LAZY, MERGE, BN, PH, DIRECT)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (consume, (0, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (produce, (bufs, bars, q_bars, q_bufs, descs, numbers, CONST)),
            ],
            [1], [REGISTERS[1]],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (0, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (consume, (1, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (produce, (bufs, bars, q_bars, q_bufs, descs, numbers, CONST)),
            ],
            [4, 1], [REGISTERS[0], REGISTERS[1]],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (consume, (1, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (consume, (2, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (produce, (bufs, bars, q_bars, q_bufs, descs, numbers, CONST)),
            ],
            [4, 4, 1], [REGISTERS[0], REGISTERS[0], REGISTERS[1]],
        )  # fmt: skip
