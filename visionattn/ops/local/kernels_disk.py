# ruff: noqa: RUF059, SIM113, B007 -- tuples of arguments are unpacked whole
"""Gluon: the forward kernel of disks for Hopper GPUs (compute capability 9.0).

As kernels_hopper.py: one warp loads tiles of 8 x 8 keys, the others multiply, in FlashAttention-3's order. What is
different: every warpgroup owns 8 x 8 queries and passes over tiles that only others need; and the mask is a word of 64
bits for each query, read from a table (tables.disk_words), which leaves two instructions for each logit. One word more
takes away the keys that lie outside the grid.
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

from visionattn.ops._hopper import as_block, scaled, softmax, thread_barrier

M, N = gl.constexpr(64), gl.constexpr(64)  # queries of a warpgroup, keys of a tile: 8 x 8 each
# In assembly, since LLVM packs half of the comparisons into a vector of bits and takes it apart again.
KEEP = gl.constexpr(
    "{.reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.u32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p;}"
)


@gluon.jit
def place(tile, tiles_y, tiles_x, heads):
    """Head, batch entry and tile (y, x) of queries."""
    x = tile % tiles_x
    rest = tile // tiles_x
    y = rest % tiles_y
    rest = rest // tiles_y
    return rest % heads, rest // heads, y, x


@gluon.jit
def visits_of(table, tile_y, tile_x, tiles_y, tiles_x, classes_x):
    """Where the visits of a tile of queries begin in the table, and where they end."""
    cls = gl.load(table + tile_y) * classes_x + gl.load(table + tiles_y + tile_x)
    head = table + tiles_y + tiles_x + 3 * cls
    return gl.load(head), gl.load(head + 2)


@gluon.jit
def visit(table, i, entries):
    """Offset (y, x) of a visited tile from the owner's origin; its number, and above that who needs it."""
    packed = gl.load(table + i)
    return packed >> 16, (packed << 16) >> 16, gl.load(table + i + entries)


@gluon.jit
def inside(origin, length):
    """Bits of the 8 positions from `origin` on that are within [0, length)."""
    low = (255 << gl.maximum(-origin, 0)) & 255
    return low & (255 >> gl.maximum(origin + 8 - length, 0))


@gluon.jit
def border(y, x, H, W):
    """A word of 64 bits: which keys of the tile at (y, x) lie on the grid. The tile meets the grid."""
    above = (gl.maximum(-y, 0) * 8).to(gl.uint64)
    below = (gl.maximum(y + 8 - H, 0) * 8).to(gl.uint64)
    rows = (gl.full([], 0xFFFFFFFFFFFFFFFF, gl.uint64) >> above) << above
    rows = (rows << below) >> below
    return inside(x, W).to(gl.int64) * 0x0101010101010101 & rows.to(gl.int64, bitcast=True)


@gluon.jit
def words_of(bits, number, y, x, sizes, WHICH: gl.constexpr, GROUPS: gl.constexpr, layout: gl.constexpr):
    """What the queries of a warpgroup see of the tile at (y, x): (M,) words of 64 bits."""
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    m = gl.arange(0, M, layout=layout)
    return gl.load(bits + ((number & 0xFFFF) * GROUPS + WHICH) * M + m) & border(y, x, H, W)


@gluon.jit
def hide(s, words):
    """words (M,): bit n says whether key n is seen."""
    low, high = (words & 0xFFFFFFFF).to(gl.uint32), (words >> 32).to(gl.uint32)
    n = gl.arange(0, N, layout=gl.SliceLayout(0, s.type.layout))
    one = gl.full([N], 1, gl.uint32, n.type.layout) << (n & 31).to(gl.uint32)
    word = gl.where((n < 32)[None, :], low[:, None], high[:, None])
    word, one = gl.broadcast(word, one[None, :])
    return gl.inline_asm_elementwise(KEEP, "=f,f,r,r", [s, word, one], gl.float32, True, 1)


@gluon.jit
def step(ring, held, words, MASKED: gl.constexpr, q, bufs, bars, state, qk_scale, STAGES: gl.constexpr,
         LAZY: gl.constexpr, TOGETHER: gl.constexpr):  # fmt: skip
    """Visits a tile: its logits, and meanwhile the product of p and the values of the tile before.

    ring, held: which loads these two tiles are, counted since the program began.
    """
    k_bufs, v_bufs = bufs
    k_full, v_full, k_empty, v_empty = bars
    p, acc, row_max, row_sum = state
    slot, phase = ring % STAGES, ring // STAGES & 1
    old_slot = held % STAGES
    mma_s: gl.constexpr = row_max.type.layout.parent
    mbarrier.wait(k_full.index(slot), phase)
    zero = gl.zeros([M, N], gl.float32, mma_s)
    s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_bufs.index(old_slot), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    if not TOGETHER:
        mbarrier.arrive(k_empty.index(slot))
    if MASKED:
        s = hide(s, words)
    new, row_max, row_sum, rescale = softmax(s, row_max, row_sum, qk_scale, LAZY)
    new = gl.convert_layout(new.to(p.dtype), p.type.layout)
    # This wait for the values of the next step ends a basic block: without it ptxas moves the exponentials behind the
    # wait for the product that they are to run beside.
    mbarrier.wait(v_full.index(slot), phase)
    acc, p, new, row_sum = warpgroup_mma_wait(0, deps=[acc, p, new, row_sum])
    mbarrier.arrive(v_empty.index(old_slot))
    return new, scaled(acc, rescale, LAZY), row_max, row_sum


@gluon.jit
def pass_over(ring, bars, STAGES: gl.constexpr, TOGETHER: gl.constexpr):
    """Gives a tile back unread, once its values are there: they are loaded after its keys."""
    k_full, v_full, k_empty, v_empty = bars
    slot, phase = ring % STAGES, ring // STAGES & 1
    mbarrier.wait(v_full.index(slot), phase)
    if not TOGETHER:
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
    TOGETHER: gl.constexpr = CONST[5]
    GROUPS: gl.constexpr = QY * QX
    k_bufs, v_bufs = bufs
    k_full, v_full, k_empty, v_empty = bars
    q_full, q_empty = q_bars
    sizes, text, group, classes_x, entries, table, bits, qk_scale = numbers
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    D: gl.constexpr = q_bufs.shape[2]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row: gl.constexpr = gl.SliceLayout(1, mma_s)
    q_buf = q_bufs.index(WHICH)
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads)
        own_y, own_x = ty * QY * 8, tx * QX * 8
        begin, stop = visits_of(table, ty, tx, tiles_y, tiles_x, classes_x)
        last = stop - 1
        whole, rest = text // N, text % N

        mbarrier.wait(q_full.index(WHICH), done & 1)
        if QREG:
            q = q_buf.load(gl.DotOperandLayout(0, mma_s, 2))
        else:
            q = q_buf
        # the first tile: what is left of the text, or the first of the grid
        dy, dx, number = visit(table, begin, entries)
        words = words_of(bits, number, own_y + dy, own_x + dx, sizes, WHICH, GROUPS, row)
        if rest > 0:
            all_ = gl.full([], 0xFFFFFFFFFFFFFFFF, gl.uint64)
            words = gl.full([M], 0, gl.int64, row) | (all_ >> (64 - rest).to(gl.uint64)).to(gl.int64, bitcast=True)
        else:
            begin += 1
        slot, phase = ring % STAGES, ring // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        zero = gl.zeros([M, N], gl.float32, mma_s)
        s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        if not TOGETHER:
            mbarrier.arrive(k_empty.index(slot))
        s = hide(s, words)
        row_max = gl.full([M], -1e30, gl.float32, row)
        row_sum = gl.zeros([M], gl.float32, row)
        p, row_max, row_sum, rescale = softmax(s, row_max, row_sum, qk_scale, False)
        p = gl.convert_layout(p.to(q_bufs.dtype), gl.DotOperandLayout(0, mma_o, 2))
        acc = gl.zeros([M, D], gl.float32, mma_o)
        mbarrier.wait(v_full.index(slot), phase)
        held = ring
        ring += 1

        dy, dx, number = visit(table, gl.minimum(begin, last), entries)
        for i in range(begin, stop):
            next_dy, next_dx, next_number = visit(table, gl.minimum(i + 1, last), entries)
            # The values of the tile before are given back by a step only: the loading warp must not wait for them.
            if ((number >> (16 + WHICH)) & 1) | (ring - held >= STAGES - 1):
                words = words_of(bits, number, own_y + dy, own_x + dx, sizes, WHICH, GROUPS, row)
                p, acc, row_max, row_sum = step(
                    ring,
                    held,
                    words,
                    True,
                    q,
                    bufs,
                    bars,
                    (p, acc, row_max, row_sum),
                    qk_scale,
                    STAGES,
                    LAZY,
                    TOGETHER,
                )
                held = ring
            else:
                pass_over(ring, bars, STAGES, TOGETHER)
            ring += 1
            dy, dx, number = next_dy, next_dx, next_number
        for i in range(0, whole):
            p, acc, row_max, row_sum = step(
                ring,
                held,
                (0,),
                False,
                q,
                bufs,
                bars,
                (p, acc, row_max, row_sum),
                qk_scale,
                STAGES,
                LAZY,
                TOGETHER,
            )
            held = ring
            ring += 1

        slot = held % STAGES
        acc = warpgroup_mma(p, v_bufs.index(slot), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(slot))
        y, x = own_y + WHICH // QX * 8, own_x + WHICH % QX * 8
        finish(acc, row_max, row_sum, q_buf, outs, batch, head, y, x, sizes)
        mbarrier.arrive(q_empty.index(WHICH))
        done += 1


@gluon.jit
def finish(acc, row_max, row_sum, buf, outs, batch, head, y, x, sizes):
    """Writes the output and its natural log-sum-exp. The output takes the queries' place: all have been read."""
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    o_desc, lse_ptr, length, first = outs
    some = row_sum > 0
    factor = gl.convert_layout(1.0 / gl.where(some, row_sum, 1.0), gl.SliceLayout(1, acc.type.layout))
    lse = gl.where(some, (row_max + gl.log2(row_sum)) * 0.6931471805599453, -float("inf"))
    m = gl.arange(0, M, layout=row_sum.type.layout)
    qy, qx = y + m // 8, x + m % 8
    at = (batch * heads + head).to(gl.int64) * length + first + qy * W + qx
    gl.store(lse_ptr + at, lse, mask=(qy < H) & (qx < W))
    thread_barrier()
    buf.store((acc * factor[:, None]).to(buf.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [batch, y, x, head, 0], as_block(buf, o_desc))
    tma.store_wait(0)
    thread_barrier()


@gluon.jit
def load_grid(desc, y, x, batch, head, bar, buf):
    mbarrier.expect(bar, N * buf.shape[1] * 2)
    tma.async_copy_global_to_shared(desc, [batch, y, x, head, 0], bar, as_block(buf, desc))


@gluon.jit
def load_text(token, ring, batch, kv_head, bufs, bars, descs, STAGES: gl.constexpr, TOGETHER: gl.constexpr):
    """N keys and values of the text, from `token` on."""
    k_bufs, v_bufs = bufs
    k_full, v_full, k_empty, v_empty = bars
    kt_desc, vt_desc = descs
    slot, phase = ring % STAGES, ring // STAGES & 1
    if not TOGETHER:
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
    else:
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
    mbarrier.expect(k_full.index(slot), N * k_bufs.shape[2] * 2)
    at = [batch, token, kv_head, 0]
    tma.async_copy_global_to_shared(kt_desc, at, k_full.index(slot), as_block(k_bufs.index(slot), kt_desc))
    if not TOGETHER:
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
    mbarrier.expect(v_full.index(slot), N * k_bufs.shape[2] * 2)
    tma.async_copy_global_to_shared(vt_desc, at, v_full.index(slot), as_block(v_bufs.index(slot), vt_desc))


@gluon.jit
def produce(bufs, bars, q_bars, q_bufs, descs, numbers, CONST: gl.constexpr):
    """The loading warp."""
    STAGES: gl.constexpr = CONST[0]
    QY: gl.constexpr = CONST[1]
    QX: gl.constexpr = CONST[2]
    TOGETHER: gl.constexpr = CONST[5]
    k_bufs, v_bufs = bufs
    k_full, v_full, k_empty, v_empty = bars
    q_full, q_empty = q_bars
    q_desc, k_desc, v_desc, kt_desc, vt_desc = descs
    sizes, text, group, classes_x, entries, table, bits, qk_scale = numbers
    H, W, heads, tiles_y, tiles_x, tiles = sizes
    runs = (kt_desc, vt_desc)
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, batch, ty, tx = place(tile, tiles_y, tiles_x, heads)
        kv_head = head // group
        own_y, own_x = ty * QY * 8, tx * QX * 8
        begin, stop = visits_of(table, ty, tx, tiles_y, tiles_x, classes_x)
        for c in gl.static_range(QY * QX):
            mbarrier.wait(q_empty.index(c), (done & 1) ^ 1)
            y, x = own_y + c // QX * 8, own_x + c % QX * 8
            load_grid(q_desc, y, x, batch, head, q_full.index(c), q_bufs.index(c))
        whole = text // N
        if text % N > 0:
            load_text(whole * N, ring, batch, kv_head, bufs, bars, runs, STAGES, TOGETHER)
            ring += 1
        last = stop - 1
        dy, dx, number = visit(table, begin, entries)
        for i in range(begin, stop):
            next_dy, next_dx, number = visit(table, gl.minimum(i + 1, last), entries)
            slot, phase = ring % STAGES, ring // STAGES & 1
            if not TOGETHER:
                mbarrier.wait(k_empty.index(slot), phase ^ 1)
            else:
                mbarrier.wait(v_empty.index(slot), phase ^ 1)
            load_grid(k_desc, own_y + dy, own_x + dx, batch, kv_head, k_full.index(slot), k_bufs.index(slot))
            if not TOGETHER:
                mbarrier.wait(v_empty.index(slot), phase ^ 1)
            load_grid(v_desc, own_y + dy, own_x + dx, batch, kv_head, v_full.index(slot), v_bufs.index(slot))
            ring += 1
            dy, dx = next_dy, next_dx
        for i in range(0, whole):
            load_text(i * N, ring, batch, kv_head, bufs, bars, runs, STAGES, TOGETHER)
            ring += 1
        done += 1


NUMBERS = [
    "H", "W", "heads", "tiles_y", "tiles_x", "text", "group", "classes_x", "entries", "tiles", "length", "first",
]  # fmt: skip


@gluon.jit(do_not_specialize=NUMBERS)
def disk_forward(
    q_desc, k_desc, v_desc, kt_desc, vt_desc, o_desc, lse_ptr, table, bits,
    H, W, heads, tiles_y, tiles_x, text, group, classes_x, entries, tiles, length, first, qk_scale,
    QY: gl.constexpr, QX: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, QREG: gl.constexpr,
    LAZY: gl.constexpr, TOGETHER: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Queries of a grid over text and disks. QY x QX warpgroups of 8 x 8 queries share the loads of keys and values.

    QREG: queries are read into registers once. LAZY: see softmax. TOGETHER: keys are given back with the values, which
    saves barriers. REGISTERS: of the consumers' threads, and the loading warp's.
    """
    GROUPS: gl.constexpr = QY * QX
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [GROUPS, M, D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, N, D], layout)
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
    sizes = (H, W, heads, tiles_y, tiles_x, tiles)
    numbers = (sizes, text, group, classes_x, entries, table, bits, qk_scale)
    descs = (q_desc, k_desc, v_desc, kt_desc, vt_desc)
    outs = (o_desc, lse_ptr, length, first)
    CONST: gl.constexpr = (STAGES, QY, QX, QREG, LAZY, TOGETHER)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (consume, (0, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (produce, (bufs, bars, q_bars, q_bufs, descs, numbers, CONST)),
            ],
            [1], [REGISTERS[1]],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (consume, (1, bufs, bars, q_bars, q_bufs, outs, numbers, CONST)),
                (produce, (bufs, bars, q_bars, q_bufs, descs, numbers, CONST)),
            ],
            [4, 1], [REGISTERS[0], REGISTERS[1]],
        )  # fmt: skip
