"""Launches the Gluon kernels (kernels_hopper.py, kernels_disk.py): the forward pass on compute capability 9.0."""

import math
from dataclasses import dataclass, replace

import torch
import triton

from visionattn.ops._triton import cannot_build_gluon

from . import counts, fused, tables
from .patterns import Cross, Disk, Neighborhood, radius_squared
from .tiles import Shape, cdiv

KERNELS = "visionattn.ops.local.kernels_hopper"


@dataclass(frozen=True)
class Setting:
    """A variant of the kernel: tiles of queries and keys (z, y, x), and how its warps share the work.

    part: the queries of one warpgroup, or the whole tile where all warpgroups run as one. `special`: a warp of its own
    loads. `registers`: per thread, of consumers and of the loading warp; `cap`: what ptxas is told. `persistent`: as
    many programs as multiprocessors, each of which goes through many tiles.
    """

    query: Shape = (1, 8, 16)
    key: Shape = (1, 8, 16)
    part: Shape = (1, 4, 16)
    stages: int = 2
    special: bool = True
    pingpong: bool = False
    registers: tuple[int, int] = (240, 24)
    cap: int | None = 168
    persistent: bool = True

    @property
    def keys(self) -> int:
        return math.prod(self.key)

    @property
    def rows(self) -> int:
        return math.prod(self.part)


@dataclass(frozen=True)
class DiskSetting:
    """A variant of the disk's kernel: warpgroups (y, x) of 8 x 8 queries that share loads; whether their queries stay
    in registers; whether the maximum of a row may lag (ops/_hopper.softmax); whether keys are given back with the
    values; programs of a multiprocessor."""

    groups: tuple[int, int] = (1, 2)
    stages: int = 6
    in_registers: bool = True
    lazy: bool = True
    together: bool = False
    registers: tuple[int, int] = (240, 24)
    cap: int = 168
    programs: int = 1


WIDEST = 128  # the table of a disk of this radius has a megabyte


def reason(q, k, v, ek, bias, lengths, grid, pattern, text) -> str | None:
    """Why the kernels can't run on these arguments, or None."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"needs heads of 64 or 128 channels, got {q.shape[-1]}"
    if isinstance(pattern, Disk) and len(grid) != 2:
        return f"needs a grid of two axes for a disk, got {len(grid)}"
    if isinstance(pattern, Disk) and pattern.radius > WIDEST:
        return f"has no table for disks of a radius above {WIDEST}, got {pattern.radius}"
    if ek is not None or bias is not None or (lengths is not None and text):
        return "has no extra keys, biases or text lengths"
    if not isinstance(pattern, Cross) and any(d > 1 for d in fused.boxes(pattern, grid).dilations):
        return "has no dilation"
    if not all(fused._suits_descriptor(x) for x in (q, k, v)):
        return "needs addresses and strides of q, k and v that are multiples of 16 bytes"
    return cannot_build_gluon(KERNELS)


# As measured on an H100 (docs/kernels.md): of windows in two axes, and in three.
WINDOW = Setting(pingpong=True)
VIDEO = Setting(query=(2, 8, 8), key=(2, 8, 8), part=(1, 8, 8))
DISK = DiskSetting()
# Tiles of queries for each multiprocessor: with 93 it was 1.15 times as fast as Triton's kernel, with 6 0.93 times.
TILES = 16
RADIUS = 32  # disks up to here take it; larger ones were not timed, and have more tiles without masks
# The least share of visited tiles that need no mask: window 80 of stride 1 (0.64) was 1.14 times as fast as with
# Triton's kernel, window 48 (0.42) 0.91 times, and disks, with many masks, were slower too.
FULL = 0.6


# Versions of triton with which they ran: they compile for others too, but a deadlock could not be caught.
MEASURED = ("3.6.",)


def choose(q, k, v, ek, bias, lengths, grid, pattern, text, which: str) -> Setting | DiskSetting | None:
    """What the grid's rows run with, or None for the Triton kernel.

    which: ``'auto'`` takes Gluon where it was measured to be faster: windows of heads of 128 channels most of whose
    tiles need no mask, as those whose stride is a multiple of the tile or that are large, and disks, enough of them to
    fill the GPU, and a version of triton they ran with; ``'triton'`` never; ``'gluon'`` wherever it can run.
    """
    if which == "triton" or (which == "auto" and failed):
        return None
    if not isinstance(pattern, (Neighborhood, Disk)) or len(grid) == 1:
        return None
    if reason(q, k, v, ek, bias, lengths, grid, pattern, text) is not None:
        return None
    if isinstance(pattern, Disk):
        queries = math.prod(tables.SIDE * g for g in DISK.groups)
        fills = math.prod(grid) * q.shape[0] * q.shape[2] >= TILES * queries * _processors(q.device)
        measured = q.shape[-1] == 128 and pattern.radius <= RADIUS and triton.__version__.startswith(MEASURED)
        return DISK if which == "gluon" or (measured and fills) else None
    setting = VIDEO if fused.boxes(pattern, grid).three else WINDOW
    if which == "gluon":
        return setting
    if not triton.__version__.startswith(MEASURED):
        return None
    visited, full = counts.visits(pattern, grid, setting.query, setting.key)
    tiles = math.prod(fused.boxes(pattern, grid).tiles(setting.query)) * q.shape[0] * q.shape[2]
    fills = tiles >= _processors(q.device)
    return setting if q.shape[-1] == 128 and fills and full >= FULL * visited else None


failed: list[str] = []


def _describe(found, block):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = gl.bfloat16 if found.base.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(list(block), element)
    return TensorDescriptor(found.base, list(found.shape), list(found.strides), list(block), layout)


def _processors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(setting: Setting, tiles: int, device) -> int:
    if not (setting.special and setting.persistent):
        return tiles
    return min(tiles, _processors(device))


def _launch(p, setting, descriptors, pointers, sizes, box, rest, tiles, kind, three, causal, parts):
    from . import kernels_hopper

    kernels_hopper.forward_kernel[(_programs(setting, tiles, p.device),)](
        *descriptors, *pointers, *sizes, *box, *rest, tiles, p.qk_scale,
        Q=setting.query, K=setting.key, SUB=setting.part, CAUSAL=causal, KIND=kind, THREE=three, PARTS=parts,
        LENGTHS=False, STAGES=setting.stages, D=p.D, SPECIAL=setting.special, PINGPONG=setting.pingpong,
        REGISTERS=setting.registers, num_warps=setting.rows // 16, maxnreg=setting.cap,
    )  # fmt: skip


def grid_forward(p: fused.Plan, q, k, v, out, lse, setting: Setting | DiskSetting) -> None:
    """The rows of grid queries. `lse` (B, heads, N)."""
    if isinstance(setting, DiskSetting):
        return disk_forward(p, q, k, v, out, lse, setting)
    b = p.boxes
    table, classes = p.table(setting.query, setting.key)
    for batch, count in p.batches() if b.three else [(0, p.batch)]:
        part, block = [*setting.part, 1, p.D], [*setting.key, 1, p.D]
        grids = [
            _describe(p.grid_descriptor(x, y, batch), z)
            for x, y, z in ((q, setting.part, part), (k, setting.key, block), (v, setting.key, block))
        ]
        run = (None, None)
        if p.text:
            run = tuple(
                _describe(p.run_descriptor(x[batch:], p.text_at, p.text, setting.keys), [1, setting.keys, 1, p.D])
                for x in (k, v)
            )
        tiles = b.tiles(setting.query)
        _launch(
            p, setting, (*grids, *run, _describe(p.grid_descriptor(out, setting.part, batch), part)),
            (None, lse[batch:], None, table), (*b.lengths, p.heads, *tiles), (*b.windows, *b.strides),
            (p.text, 0, p.group, classes, b.radius_sq, p.N, p.first), math.prod(tiles) * p.heads * count, b.kind,
            b.three, b.causal, 2 if p.text else 1,
        )  # fmt: skip


_words: dict[tuple, tuple] = {}


def _disk_tables(pattern: Disk, grid, groups, device) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """What tables.disk_words returns, on a device; made once."""
    key = radius_squared(pattern), tuple(grid), groups, str(device)
    found = _words.get(key)
    if found is None:
        if len(_words) >= 256:
            _words.clear()
        table, entries, words, classes = tables.disk_words(*key[:3])
        table, words = (torch.from_numpy(x).to(device) for x in (table, words))
        found = _words[key] = table, entries, words, classes
    return found


def disk_forward(p: fused.Plan, q, k, v, out, lse, setting: DiskSetting) -> None:
    """The rows of grid queries of a disk."""
    from . import kernels_disk

    square, keys = (1, tables.SIDE, tables.SIDE), tables.SIDE**2
    table, entries, words, classes = _disk_tables(p.pattern, p.grid, setting.groups, p.device)
    grids = [_describe(p.grid_descriptor(x, square, 0), [*square, 1, p.D]) for x in (q, k, v, out)]
    # without text there is no run: a descriptor has to be valid, and is never used
    start, text = (p.text_at, p.text) if p.text else (0, 1)
    runs = [_describe(p.run_descriptor(x, start, text, keys), [1, keys, 1, p.D]) for x in (k, v)]
    tiles_y, tiles_x = (-(-n // (tables.SIDE * g)) for n, g in zip(p.grid, setting.groups, strict=True))
    tiles = tiles_y * tiles_x * p.heads * p.batch
    kernels_disk.disk_forward[(min(tiles, setting.programs * _processors(p.device)),)](
        *grids[:3], *runs, grids[3], lse, table, words, *p.grid, p.heads, tiles_y, tiles_x, p.text, p.group, classes,
        entries, tiles, p.N, p.first, p.qk_scale, QY=setting.groups[0], QX=setting.groups[1], STAGES=setting.stages,
        D=p.D, QREG=setting.in_registers, LAZY=setting.lazy, TOGETHER=setting.together,
        REGISTERS=setting.registers, num_warps=4, maxnreg=setting.cap,
    )  # fmt: skip


def best_chunks(programs: int, length: int, block: int, processors: int) -> int:
    """Into how many chunks the keys of `programs` tiles are cut so that the multiprocessors end together."""
    most = max(1, min(24, length // (8 * block)))

    def cost(chunks):
        rounds = -(-programs * chunks // processors)
        return rounds * (-(-length // chunks) + 2 * block)  # a program's start and end cost about two tiles

    return min(range(1, most + 1), key=cost)


def text_forward(p: fused.Plan, q, k, v, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of the rows of text queries: (chunks, B, heads, text, D), and log-sum-exp of base 2, in float32."""
    queries = math.prod(setting.query)
    tiles = cdiv(p.text, queries)
    processors = _processors(p.device)
    chunks = best_chunks(tiles * p.heads * p.batch, p.N, setting.keys, processors)
    chunk = cdiv(cdiv(p.N, chunks), setting.keys) * setting.keys
    chunks = cdiv(p.N, chunk)
    part = torch.empty((chunks, p.batch, p.heads, p.text, p.D), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    rows = [1, setting.rows, 1, p.D]
    block = [1, setting.keys, 1, p.D]
    descriptors = [_describe(p.run_descriptor(q, p.text_at, p.text, setting.rows), rows), None, None]
    descriptors += [_describe(p.run_descriptor(x, 0, p.N, setting.keys), block) for x in (k, v)]
    _launch(
        p, setting, (*descriptors, None), (part, part_lse, None, None), (p.batch, 1, 1, p.heads, chunks, 1, tiles),
        (1,) * 6, (p.text, chunk, p.group, 0, 0, p.N, p.first), chunks * tiles * p.heads * p.batch, 0, False,
        (False,) * 3, 0,
    )  # fmt: skip
    return part, part_lse


TEXT = Setting(query=(1, 1, 128), key=(1, 1, 128), part=(1, 1, 64))


def forward(q, k, v, grid, pattern, text, text_first, scale, setting: Setting, dense: Setting = TEXT):
    """As fused.forward: output (B, N, H, D), and natural log-sum-exp (B, H, N) in float32."""
    q, k, v = (fused._inner(t) for t in (q, k, v))
    p = fused.plan(q, k, v, None, None, None, None, grid, pattern, text, text_first, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((p.batch, p.heads, p.N), dtype=torch.float32, device=q.device)
    if p.text:
        parts, part_lse = text_forward(p, q, k, v, dense)
        merge(p, parts, part_lse, out, lse)
    grid_forward(p, q, k, v, out, lse, setting)
    return out, lse


def merge(p: fused.Plan, parts, part_lse, out, lse) -> None:
    """Joins the parts of text rows."""
    rows, chunks = 16, len(parts)
    tiles = cdiv(p.text, rows)
    launch = p.launch(
        ("merge", chunks), fused.kernels.merge_chunks, tiles * p.heads * p.batch,
        (*out.stride()[:3], p.heads, p.text, p.text_at, p.N, tiles, chunks), dict(BM=rows, D=p.D, DP=p.DP),
        replace(p.tiles.forward, warps=4, stages=1),
    )  # fmt: skip
    launch(parts, part_lse, out, lse)
