# ruff: noqa: RUF059, F841, SIM113 -- tuples of arguments are unpacked whole
"""Gluon: forward kernels of local attention for Hopper GPUs (compute capability 9.0), after FlashAttention-3.

One warp loads tiles of keys and values through tensor descriptors into a ring in shared memory; the others multiply.
The product of queries and the next keys is issued before the product of probabilities and values, and the softmax of
the first runs while the second does (Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.2). A program owns
128 queries, 64 for each warpgroup, and visits the same tiles as kernels.grid_forward: first those that need a mask.
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


def _shared(fn):
    """A helper of the Triton kernels, for scalars and for tensors that have layouts."""
    return gluon.jit(fn.fn)


visit_keys, full_visit, masked_visit = (
    _shared(f) for f in (kernels.visit_keys, kernels.full_visit, kernels.masked_visit)
)
query_bounds, sees = _shared(kernels.query_bounds), _shared(kernels.sees)
table_range, table_visit = _shared(kernels.table_range), _shared(kernels.table_visit)


RUN, GRID, BOTH = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def place(tile, sizes):
    """Head, batch entry and tile (z, y, x) of queries; for runs of text: chunk of the keys, 0, tile of queries."""
    T, H, W, heads, tiles_z, tiles_y, tiles_x = sizes
    x = tile % tiles_x
    rest = tile // tiles_x
    y = rest % tiles_y
    rest = rest // tiles_y
    z = rest % tiles_z
    rest = rest // tiles_z
    return rest % heads, rest // heads, z, y, x


@gluon.jit
def count_visits(tz, ty, tx, sizes, box, run, table, classes_x, Q: gl.constexpr, K: gl.constexpr,
                 CAUSAL: gl.constexpr, KIND: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """How many tiles are visited: the partial one of the run, those of the grid with a mask, without, of the run.

    Returns these four numbers, and what :func:`grid_visit` needs.
    """
    T, H, W, heads, tiles_z, tiles_y, tiles_x = sizes
    wz, wy, wx, sz, sy, sx = box
    partial, whole, masked, full = 0, 0, 0, 0
    oz, oy, ox, cz, cy, cx, fz, fy, fx, Fz, Fy, Fx = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
    if PARTS != 1:
        BN: gl.constexpr = K[0] * K[1] * K[2]
        begin, end = run
        whole = gl.maximum(end - begin, 0) // BN
        partial = (gl.maximum(end - begin, 0) + BN - 1) // BN - whole
    if PARTS != 0:
        if KIND == 0:
            oz, cz, fz, Fz = visit_keys(tz * Q[0], T, wz, sz, CAUSAL[0], Q[0], K[0])
            oy, cy, fy, Fy = visit_keys(ty * Q[1], H, wy, sy, CAUSAL[1], Q[1], K[1])
            ox, cx, fx, Fx = visit_keys(tx * Q[2], W, wx, sx, CAUSAL[2], Q[2], K[2])
            full = Fz * Fy * Fx
            masked = cz * cy * cx - full
        else:
            first, middle, stop = table_range(table, ty, tx, tiles_y, tiles_x, classes_x)
            masked, full = middle - first, stop - middle
            oz, oy, ox = first, ty * Q[1], tx * Q[2]
    return partial, masked, full, whole, (oz, oy, ox, cz, cy, cx, fz, fy, fx, Fz, Fy, Fx)


@gluon.jit
def grid_visit(i, masked, shape, table, K: gl.constexpr, KIND: gl.constexpr, WHICH: gl.constexpr):
    """Origin of the i-th visited tile of the grid. WHICH: 0 masked, 1 full, 2 either."""
    oz, oy, ox, cz, cy, cx, fz, fy, fx, Fz, Fy, Fx = shape
    if KIND == 0:
        if WHICH == 0:
            z, y, x = masked_visit(i, cz, cy, cx, fz, fy, fx, Fz, Fy, Fx)
        elif WHICH == 1:
            z, y, x = full_visit(i - masked, fy, fx, Fy, Fx, fz)
        else:
            if i < masked:
                z, y, x = masked_visit(i, cz, cy, cx, fz, fy, fx, Fz, Fy, Fx)
            else:
                z, y, x = full_visit(i - masked, fy, fx, Fy, Fx, fz)
        return oz + z * K[0], oy + y * K[1], ox + x * K[2]
    else:
        dy, dx = table_visit(table, oz + i)
        return 0, oy + dy, ox + dx


@gluon.jit
def load_tile(i, counts, shape, run, batch, kv_head, table, grid_desc, run_desc, bar, buf,
              K: gl.constexpr, KIND: gl.constexpr, THREE: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """Starts the load of the i-th tile of the keys or the values."""
    partial, masked, full, whole = counts
    mbarrier.expect(bar, K[0] * K[1] * K[2] * buf.shape[1] * 2)
    if PARTS == 0:
        begin, end = run
        BN: gl.constexpr = K[0] * K[1] * K[2]
        at = begin + gl.where(i < partial, whole, i - partial) * BN
        tma.async_copy_global_to_shared(run_desc, [batch, at, kv_head, 0], bar, as_block(buf, run_desc))
    elif PARTS == 1:
        z, y, x = grid_visit(i, masked, shape, table, K, KIND, 2)
        tma.async_copy_global_to_shared(
            grid_desc, [z if THREE else batch, y, x, kv_head, 0], bar, as_block(buf, grid_desc)
        )
    else:
        j = i - partial
        if (j >= 0) & (j < masked + full):
            z, y, x = grid_visit(j, masked, shape, table, K, KIND, 2)
            tma.async_copy_global_to_shared(
                grid_desc, [z if THREE else batch, y, x, kv_head, 0], bar, as_block(buf, grid_desc)
            )
        else:
            begin, end = run
            BN: gl.constexpr = K[0] * K[1] * K[2]
            at = begin + gl.where(j < 0, whole, j - masked - full) * BN
            tma.async_copy_global_to_shared(run_desc, [batch, at, kv_head, 0], bar, as_block(buf, run_desc))


@gluon.jit
def load_queries(q_desc, tile_z, tile_y, tile_x, batch, head, c, bar, buf,
                 Q: gl.constexpr, SUB: gl.constexpr, THREE: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    mbarrier.expect(bar, buf.shape[0] * buf.shape[1] * 2)
    z, y, x = part_origin(tile_z, tile_y, tile_x, c, Q, SUB)
    if PARTS == 0:
        tma.async_copy_global_to_shared(q_desc, [batch, x, head, 0], bar, as_block(buf, q_desc))
    else:
        tma.async_copy_global_to_shared(q_desc, [z if THREE else batch, y, x, head, 0], bar, as_block(buf, q_desc))


@gluon.jit
def part_origin(tile_z, tile_y, tile_x, c, Q: gl.constexpr, SUB: gl.constexpr):
    """Origin of warpgroup c's part of a tile of queries."""
    z, y, x = tile_z * Q[0], tile_y * Q[1], tile_x * Q[2]
    if SUB[0] < Q[0]:
        z += c * SUB[0]
    elif SUB[1] < Q[1]:
        y += c * SUB[1]
    elif SUB[2] < Q[2]:
        x += c * SUB[2]
    return z, y, x


@gluon.jit
def softmax(s, row_max, row_sum, qk_scale):
    """Probabilities, and the running maximum, sum and factor of what was before."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * qk_scale)
    p = gl.exp2(s * qk_scale - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def hide_run(s, counts, run, K: gl.constexpr):
    """Hides keys behind the end of the run: only the partial tile has any, and that is visited first."""
    begin, end = run
    partial, masked, full, whole = counts
    BN: gl.constexpr = K[0] * K[1] * K[2]
    n = gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
    limit = gl.where(partial > 0, end - begin - whole * BN, BN)
    return gl.where((n < limit)[None, :], s, -float("inf"))


@gluon.jit
def hide_grid(s, z0, y0, x0, rows, sizes, radius_sq, K: gl.constexpr, KIND: gl.constexpr, THREE: gl.constexpr):
    """Hides keys of a tile of the grid that queries don't see."""
    T, H, W, heads, tiles_z, tiles_y, tiles_x = sizes
    qz, qy, qx, lz, ly, lx, cz, cy, cx = rows
    BN: gl.constexpr = K[0] * K[1] * K[2]
    n = gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
    kz, ky, kx = z0 + n // (K[1] * K[2]), y0 + n // K[2] % K[1], x0 + n % K[2]
    seen = sees(
        KIND, THREE, qz[:, None], qy[:, None], qx[:, None], kz[None, :], ky[None, :], kx[None, :], lz[:, None],
        ly[:, None], lx[:, None], cz[:, None], cy[:, None], cx[:, None], H, W, radius_sq,
    )  # fmt: skip
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def query_rows(z, y, x, sizes, box, M: gl.constexpr, SUB: gl.constexpr, CAUSAL: gl.constexpr, layout: gl.constexpr):
    """Positions of the queries, and where their windows begin and how wide they are."""
    T, H, W, heads, tiles_z, tiles_y, tiles_x = sizes
    wz, wy, wx, sz, sy, sx = box
    m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    qz, qy, qx = z + m // (SUB[1] * SUB[2]), y + m // SUB[2] % SUB[1], x + m % SUB[2]
    lz, cz = query_bounds(qz, T, wz, sz, CAUSAL[0])
    ly, cy = query_bounds(qy, H, wy, sy, CAUSAL[1])
    lx, cx = query_bounds(qx, W, wx, sx, CAUSAL[2])
    return qz, qy, qx, lz, ly, lx, cz, cy, cx


@gluon.jit
def step(s_scale, i, ring, held, steps, mask_args, q, k_bufs, v_bufs, bars, p, acc, row_max, row_sum, loads,
         MASKED: gl.constexpr, CONST: gl.constexpr):  # fmt: skip
    """Visits tile i >= 1: its logits, and meanwhile the product of p and the values of the tile before.

    ring, held: which loads these two tiles are, counted since the program began. Returns p, acc, maximum and sum.
    """
    K: gl.constexpr = CONST[0]
    KIND: gl.constexpr = CONST[1]
    THREE: gl.constexpr = CONST[2]
    PARTS: gl.constexpr = CONST[3]
    STAGES: gl.constexpr = CONST[4]
    INLINE: gl.constexpr = CONST[5]
    mma_s: gl.constexpr = CONST[6]
    mma_o: gl.constexpr = CONST[7]
    PINGPONG: gl.constexpr = CONST[8]
    WHICH: gl.constexpr = CONST[9]
    k_full, v_full, k_empty, v_empty, turn = bars
    slot, phase = ring % STAGES, ring // STAGES & 1
    old_slot = held % STAGES
    M: gl.constexpr = q.shape[0]
    BN: gl.constexpr = K[0] * K[1] * K[2]

    mbarrier.wait(k_full.index(slot), phase)
    if PINGPONG:
        mbarrier.wait(turn.index(WHICH), (steps & 1) ^ (1 - WHICH))
    zero = gl.zeros([M, BN], gl.float32, mma_s)
    s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_bufs.index(old_slot), acc, is_async=True)
    if PINGPONG:
        mbarrier.arrive(turn.index(1 - WHICH))
    s = warpgroup_mma_wait(1, deps=[s])
    if INLINE:
        refill(i, ring, 0, loads, k_full, k_bufs, CONST)
    else:
        mbarrier.arrive(k_empty.index(slot))
    if MASKED:
        z0, y0, x0, rows, sizes, radius_sq = mask_args
        s = hide_grid(s, z0, y0, x0, rows, sizes, radius_sq, K, KIND, THREE)
    new, row_max, row_sum, rescale = softmax(s, row_max, row_sum, s_scale)
    new = gl.convert_layout(new.to(q.dtype), p.type.layout)
    # This wait for the values of the next step ends a basic block: without it ptxas moves the exponentials behind the
    # wait for the product that they are to run beside.
    mbarrier.wait(v_full.index(slot), phase)
    acc, p, new, row_sum = warpgroup_mma_wait(0, deps=[acc, p, new, row_sum])
    if INLINE:
        refill(i - 1, ring - 1, 1, loads, v_full, v_bufs, CONST)
    else:
        mbarrier.arrive(v_empty.index(old_slot))
    rescale = gl.convert_layout(rescale, gl.SliceLayout(1, mma_o))
    return new, acc * rescale[:, None], row_max, row_sum


@gluon.jit
def refill(i, ring, VALUES: gl.constexpr, loads, full_bars, bufs, CONST: gl.constexpr):
    """Loads tile i + STAGES where tile i was, after every warp has read that."""
    K: gl.constexpr = CONST[0]
    KIND: gl.constexpr = CONST[1]
    THREE: gl.constexpr = CONST[2]
    PARTS: gl.constexpr = CONST[3]
    STAGES: gl.constexpr = CONST[4]
    counts, shape, run, batch, kv_head, table, descs, total = loads
    k_desc, v_desc, kt_desc, vt_desc = descs
    thread_barrier()
    if i + STAGES < total:
        slot = ring % STAGES
        grid_desc = v_desc if VALUES else k_desc
        run_desc = vt_desc if VALUES else kt_desc
        load_tile(
            i + STAGES, counts, shape, run, batch, kv_head, table, grid_desc, run_desc, full_bars.index(slot),
            bufs.index(slot), K, KIND, THREE, PARTS,
        )  # fmt: skip


@gluon.jit
def tile_numbers(tile, sizes, box, text, table, lengths, chunking, group, classes_x,
                 Q: gl.constexpr, K: gl.constexpr, CAUSAL: gl.constexpr, KIND: gl.constexpr, PARTS: gl.constexpr,
                 LENGTHS: gl.constexpr):  # fmt: skip
    """Which queries a tile is, and what it visits."""
    head, batch, tz, ty, tx = place(tile, sizes)
    if PARTS == 0:
        N, chunk = chunking
        begin = tz * chunk
        run = (begin, gl.minimum(begin + chunk, N))
    else:
        limit = text
        if LENGTHS:
            limit = gl.minimum(gl.maximum(gl.load(lengths + batch).to(gl.int32), 0), text)
        run = (0, limit)
    partial, masked, full, whole, shape = count_visits(
        tz, ty, tx, sizes, box, run, table, classes_x, Q, K, CAUSAL, KIND, PARTS
    )
    return head, batch, tz, ty, tx, run, (partial, masked, full, whole), shape


@gluon.jit
def consume(WHICH: gl.constexpr, bufs, bars, outs, numbers, descs, CONST: gl.constexpr):
    """A warpgroup (or all of them, WHICH 0 and SUB the whole tile): logits, softmax, output of its queries."""
    q_bufs, k_bufs, v_bufs, o_bufs = bufs
    q_full, q_empty, k_full, v_full, k_empty, v_empty, turn = bars
    o_desc, o_ptr, lse_ptr = outs
    sizes, box, text, table, lengths, chunking, group, classes_x, radius_sq, N, first, tiles, qk_scale = numbers
    Q: gl.constexpr = CONST[0]
    K: gl.constexpr = CONST[1]
    SUB: gl.constexpr = CONST[2]
    CAUSAL: gl.constexpr = CONST[3]
    KIND: gl.constexpr = CONST[4]
    THREE: gl.constexpr = CONST[5]
    PARTS: gl.constexpr = CONST[6]
    LENGTHS: gl.constexpr = CONST[7]
    STAGES: gl.constexpr = CONST[8]
    INLINE: gl.constexpr = CONST[9]
    PINGPONG: gl.constexpr = CONST[10]
    ring_bars = (k_full, v_full, k_empty, v_empty, turn)
    D: gl.constexpr = q_bufs.shape[2]
    M: gl.constexpr = SUB[0] * SUB[1] * SUB[2]
    BN: gl.constexpr = K[0] * K[1] * K[2]
    WARPS: gl.constexpr = M // 16
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    S: gl.constexpr = (K, KIND, THREE, PARTS, STAGES, INLINE, mma_s, mma_o, PINGPONG, WHICH)
    q = q_bufs.index(WHICH)
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, batch, tz, ty, tx, run, counts, shape = tile_numbers(
            tile, sizes, box, text, table, lengths, chunking, group, classes_x, Q, K, CAUSAL, KIND, PARTS, LENGTHS
        )
        partial, masked, full, whole = counts
        total = partial + masked + full + whole
        z, y, x = part_origin(tz, ty, tx, WHICH, Q, SUB)
        loads = (counts, shape, run, batch, head // group, table, descs[1:], total)
        if PARTS != 0:
            rows = query_rows(z, y, x, sizes, box, M, SUB, CAUSAL, mma_s)
        else:
            rows = (0,)
        if INLINE:
            load_queries(descs[0], tz, ty, tx, batch, head, 0, q_full.index(0), q, Q, SUB, THREE, PARTS)
            for j in gl.static_range(STAGES):
                refill(j - STAGES, j, 0, loads, k_full, k_bufs, S)
                refill(j - STAGES, j, 1, loads, v_full, v_bufs, S)

        mbarrier.wait(q_full.index(WHICH), done & 1)
        slot, phase = ring % STAGES, ring // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        zero = gl.zeros([M, BN], gl.float32, mma_s)
        s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        if INLINE:
            refill(0, ring, 0, loads, k_full, k_bufs, S)
        else:
            mbarrier.arrive(k_empty.index(slot))
        if PARTS == 0:
            s = hide_run(s, counts, run, K)
        elif PARTS == 1:
            z0, y0, x0 = grid_visit(0, masked, shape, table, K, KIND, 2)
            s = hide_grid(s, z0, y0, x0, rows, sizes, radius_sq, K, KIND, THREE)
        else:
            if (partial > 0) | (masked + full == 0):
                s = hide_run(s, counts, run, K)
            else:
                z0, y0, x0 = grid_visit(0, masked, shape, table, K, KIND, 2)
                s = hide_grid(s, z0, y0, x0, rows, sizes, radius_sq, K, KIND, THREE)
        row_max = gl.full([M], -1e30, gl.float32, gl.SliceLayout(1, mma_s))
        row_sum = gl.zeros([M], gl.float32, gl.SliceLayout(1, mma_s))
        p, row_max, row_sum, rescale = softmax(s, row_max, row_sum, qk_scale)
        p = gl.convert_layout(p.to(q.dtype), p_layout)
        acc = gl.zeros([M, D], gl.float32, mma_o)
        mbarrier.wait(v_full.index(slot), phase)
        held = ring

        if PARTS != 0:
            for i in range(gl.maximum(partial, 1), partial + masked):
                z0, y0, x0 = grid_visit(i - partial, masked, shape, table, K, KIND, 0)
                mask_args = (z0, y0, x0, rows, sizes, radius_sq)
                p, acc, row_max, row_sum = step(
                    qk_scale, i, ring + i, held, ring + i - done - 1, mask_args, q, k_bufs, v_bufs, ring_bars, p,
                    acc, row_max, row_sum, loads, True, S,
                )  # fmt: skip
                held = ring + i
        for i in range(gl.maximum(partial + masked, 1), total):
            p, acc, row_max, row_sum = step(
                qk_scale, i, ring + i, held, ring + i - done - 1, (0,), q, k_bufs, v_bufs, ring_bars, p, acc, row_max,
                row_sum, loads, False, S,
            )  # fmt: skip
            held = ring + i

        ring += total
        slot = held % STAGES
        acc = warpgroup_mma(p, v_bufs.index(slot), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        if not INLINE:
            mbarrier.arrive(v_empty.index(slot))
            mbarrier.arrive(q_empty.index(WHICH))
        finish(
            acc, row_max, row_sum, o_bufs.index(WHICH), outs, tz, z, y, x, batch, head, sizes, N, first, text, SUB,
            THREE, PARTS, mma_o,
        )  # fmt: skip
        done += 1
    tma.store_wait(0)


@gluon.jit
def finish(acc, row_max, row_sum, o_buf, outs, chunk, z, y, x, batch, head, sizes, N, first, text,
           SUB: gl.constexpr, THREE: gl.constexpr, PARTS: gl.constexpr, mma_o: gl.constexpr):  # fmt: skip
    """Writes a tile's output and log-sum-exp: natural for the grid; of base 2, and in float32, for a run's part."""
    T, H, W, heads, tiles_z, tiles_y, tiles_x = sizes
    o_desc, o_ptr, lse_ptr = outs
    M: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    some = row_sum > 0
    scale = gl.convert_layout(1.0 / gl.where(some, row_sum, 1.0), gl.SliceLayout(1, mma_o))
    acc = acc * scale[:, None]
    lse = row_max + gl.log2(row_sum)
    m = gl.arange(0, M, layout=row_sum.type.layout)
    if PARTS == 0:
        token = x + m
        row = ((chunk * T + batch) * heads + head).to(gl.int64) * text
        gl.store(lse_ptr + row + token, gl.where(some, lse, -1e30), mask=token < text)
        token = x + gl.arange(0, M, layout=gl.SliceLayout(1, mma_o))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, mma_o))
        gl.store(o_ptr + (row + token)[:, None] * D + d[None, :], acc, mask=(token < text)[:, None])
    else:
        qz, qy, qx = z + m // (SUB[1] * SUB[2]), y + m // SUB[2] % SUB[1], x + m % SUB[2]
        token = first + (qz * H + qy) * W + qx
        row = (batch * heads + head).to(gl.int64) * N
        lse = gl.where(some, lse * 0.6931471805599453, -float("inf"))
        gl.store(lse_ptr + row + token, lse, mask=(qz < T) & (qy < H) & (qx < W))
        tma.store_wait(0)
        thread_barrier()
        o_buf.store(acc.to(o_buf.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [z if THREE else batch, y, x, head, 0], as_block(o_buf, o_desc))


@gluon.jit
def produce(bufs, bars, numbers, descs, CONST: gl.constexpr):
    """The loading warp."""
    q_bufs, k_bufs, v_bufs, o_bufs = bufs
    q_full, q_empty, k_full, v_full, k_empty, v_empty, turn = bars
    sizes, box, text, table, lengths, chunking, group, classes_x, radius_sq, N, first, tiles, qk_scale = numbers
    q_desc, k_desc, v_desc, kt_desc, vt_desc = descs
    Q: gl.constexpr = CONST[0]
    K: gl.constexpr = CONST[1]
    SUB: gl.constexpr = CONST[2]
    CAUSAL: gl.constexpr = CONST[3]
    KIND: gl.constexpr = CONST[4]
    THREE: gl.constexpr = CONST[5]
    PARTS: gl.constexpr = CONST[6]
    LENGTHS: gl.constexpr = CONST[7]
    STAGES: gl.constexpr = CONST[8]
    GROUPS: gl.constexpr = q_bufs.shape[0]
    ring = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, batch, tz, ty, tx, run, counts, shape = tile_numbers(
            tile, sizes, box, text, table, lengths, chunking, group, classes_x, Q, K, CAUSAL, KIND, PARTS, LENGTHS
        )
        partial, masked, full, whole = counts
        kv_head = head // group
        for c in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(c), (done & 1) ^ 1)
            load_queries(q_desc, tz, ty, tx, batch, head, c, q_full.index(c), q_bufs.index(c), Q, SUB, THREE, PARTS)
        for i in range(0, partial + masked + full + whole):
            slot, phase = ring % STAGES, ring // STAGES & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            load_tile(
                i, counts, shape, run, batch, kv_head, table, k_desc, kt_desc, k_full.index(slot), k_bufs.index(slot),
                K, KIND, THREE, PARTS,
            )  # fmt: skip
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            load_tile(
                i, counts, shape, run, batch, kv_head, table, v_desc, vt_desc, v_full.index(slot), v_bufs.index(slot),
                K, KIND, THREE, PARTS,
            )  # fmt: skip
            ring += 1
        done += 1


NUMBERS = [
    "T", "H", "W", "heads", "tiles_z", "tiles_y", "tiles_x", "wz", "wy", "wx", "sz", "sy", "sx", "text", "chunk",
    "group", "classes_x", "radius_sq", "N", "first", "tiles",
]  # fmt: skip


@gluon.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q_desc, k_desc, v_desc, kt_desc, vt_desc, o_desc, o_ptr, lse_ptr, len_ptr, table,
    T, H, W, heads, tiles_z, tiles_y, tiles_x, wz, wy, wx, sz, sy, sx, text, chunk, group, classes_x, radius_sq, N,
    first, tiles, qk_scale,
    Q: gl.constexpr, K: gl.constexpr, SUB: gl.constexpr, CAUSAL: gl.constexpr, KIND: gl.constexpr,
    THREE: gl.constexpr, PARTS: gl.constexpr, LENGTHS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    SPECIAL: gl.constexpr, PINGPONG: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Queries of a grid over a run of text and their neighbourhoods (PARTS 2; 1: no text), or of text over all (0).

    SPECIAL: a warp of its own loads. SUB: the part of a tile of queries that belongs to a warpgroup; the whole tile
    where all warpgroups run as one.
    REGISTERS: of the consumers' threads, and the loading warp's.
    """
    GROUPS: gl.constexpr = (Q[0] * Q[1] * Q[2]) // (SUB[0] * SUB[1] * SUB[2])
    M: gl.constexpr = SUB[0] * SUB[1] * SUB[2]
    BN: gl.constexpr = K[0] * K[1] * K[2]
    dtype: gl.constexpr = q_desc.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], dtype)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [GROUPS, M, D], rows)
    o_bufs = gl.allocate_shared_memory(dtype, [GROUPS, M, D], rows)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, D], keys)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BN, D], keys)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    bufs = (q_bufs, k_bufs, v_bufs, o_bufs)
    bars = (q_full, q_empty, k_full, v_full, k_empty, v_empty, turn)
    sizes = (T, H, W, heads, tiles_z, tiles_y, tiles_x)
    box = (wz, wy, wx, sz, sy, sx)
    numbers = (
        sizes, box, text, table, len_ptr, (N, chunk), group, classes_x, radius_sq, N, first, tiles, qk_scale,
    )  # fmt: skip
    descs = (q_desc, k_desc, v_desc, kt_desc, vt_desc)
    outs = (o_desc, o_ptr, lse_ptr)
    CONST: gl.constexpr = (Q, K, SUB, CAUSAL, KIND, THREE, PARTS, LENGTHS, STAGES, not SPECIAL, PINGPONG)
    if SPECIAL:
        if GROUPS == 2:
            gl.warp_specialize(
                [
                    (consume, (0, bufs, bars, outs, numbers, descs, CONST)),
                    (consume, (1, bufs, bars, outs, numbers, descs, CONST)),
                    (produce, (bufs, bars, numbers, descs, CONST)),
                ],
                [4, 1], [REGISTERS[0], REGISTERS[1]],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (consume, (0, bufs, bars, outs, numbers, descs, CONST)),
                    (produce, (bufs, bars, numbers, descs, CONST)),
                ],
                [1], [REGISTERS[1]],
            )  # fmt: skip
    else:
        consume(0, bufs, bars, outs, numbers, descs, CONST)
