"""Launches the Gluon kernels of the backward pass (kernels_grad.py) on compute capability 9.0."""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton

from . import gluon, tables
from .patterns import Axis, Disk, Neighborhood

SIDE = tables.SIDE
KERNELS = "visionattn.ops.local.kernels_grad"


@dataclass(frozen=True)
class Setting:
    """A variant of a kernel.

    groups: warpgroups (y, x) of 8 x 8 own tokens that share loads; `stages`: tiles in flight; `registers`: per thread,
    of the consumers and of the loading warp; `cap`: what ptxas is told; `in_registers`: whether queries and their
    gradients stay there; `ordered`: whether exponentials are kept beside the product of gradients and values.
    """

    groups: tuple[int, int] = (1, 2)
    stages: int = 4
    registers: tuple[int, int] = (240, 24)
    cap: int = 168
    in_registers: bool = True
    ordered: bool = False


# As measured on an H100 (docs/kernels.md): what dq, and dk and dv, run with.
WINDOW = (Setting(), Setting(groups=(2, 1)))
DISK = tuple(replace(s, ordered=True) for s in WINDOW)

failed: list[str] = []


@functools.lru_cache(maxsize=256)
def _full_axis(axis: Axis, own: int, other: int, keys_own: bool) -> bool:
    """Whether all tiles are full that tiles of queries of an axis, or of keys, visit."""
    n = axis.length
    at = np.arange(n)
    low, high = axis.start(at, n), axis.end(at, n)
    if keys_own:
        low, high = np.searchsorted(high, at, "right"), np.searchsorted(low, at, "right")
    first = np.arange(0, n, own)
    last = np.minimum(first + own, n) - 1
    same = (low[first] == low[last]) & (high[first] == high[last])
    return bool((same & ((high[first] - low[first]) % other == 0)).all())


def reason(q, k, v, ek, bias, lengths, grid, pattern, text) -> str | None:
    """Why the kernels can't run on these arguments, or None."""
    if not isinstance(pattern, (Neighborhood, Disk)) or len(grid) != 2:
        return "is of windows and disks on grids of two axes"
    why = gluon.reason(q, k, v, ek, bias, lengths, grid, pattern, text) or gluon.cannot_build_gluon(KERNELS)
    if why is not None or isinstance(pattern, Disk):
        return why
    axes = pattern.axes(grid)
    if any(a.causal for a in axes):
        return "has no causal windows"
    owners = ((WINDOW[0].groups, False), (WINDOW[1].groups, True))
    if not all(_full_axis(a, SIDE * g, SIDE, keys) for s, keys in owners for g, a in zip(s, axes, strict=True)):
        return f"is of windows all of whose tiles of {SIDE} x {SIDE} are full"
    return None


def choose(q, k, v, ek, bias, lengths, grid, pattern, text, which: str) -> tuple[Setting, Setting] | None:
    """What the grid's rows of dq, and of dk and dv, run with, or None for the Triton kernels.

    which: ``'auto'`` takes Gluon where it was measured to be faster: bfloat16, heads of 128 channels, enough tiles to
    fill the GPU, and a version of triton they ran with; ``'triton'`` never; ``'gluon'`` wherever it can run.
    """
    if which == "triton" or (which == "auto" and failed):
        return None
    if reason(q, k, v, ek, bias, lengths, grid, pattern, text) is not None:
        return None
    if which == "auto":
        fills = math.prod(grid) * q.shape[0] * k.shape[2] >= gluon.TILES * 2 * SIDE**2 * gluon._processors(q.device)
        measured = q.shape[-1] == 128 and q.dtype == torch.bfloat16 and triton.__version__.startswith(gluon.MEASURED)
        if isinstance(pattern, Disk):
            measured = measured and pattern.radius <= gluon.RADIUS
        if not (measured and fills):
            return None
    return DISK if isinstance(pattern, Disk) else WINDOW


def _numbers(p, setting: Setting) -> tuple:
    """KIND, tables, and the kernels' numbers."""
    tiles_y, tiles_x = (-(-n // (SIDE * g)) for n, g in zip(p.grid, setting.groups, strict=True))
    if isinstance(p.pattern, Disk):
        table, entries, words, classes = gluon._disk_tables(p.pattern, p.grid, setting.groups, p.device)
    else:
        table, entries, words, classes = None, 0, None, 0
    b = p.boxes
    box = (*b.windows[1:], *b.strides[1:])
    return b.kind, (table, words), tiles_y, tiles_x, box, (classes, entries)


def _grid(p, x):
    return gluon._describe(p.grid_descriptor(x, (1, SIDE, SIDE), 0), [1, SIDE, SIDE, 1, p.D])


def _runs(p, *tensors):
    # without text there is no run: a descriptor has to be valid, and is never used
    start, text = (p.text_at, p.text) if p.text else (0, 1)
    return [gluon._describe(p.run_descriptor(x, start, text, SIDE**2), [1, SIDE**2, 1, p.D]) for x in tensors]


def query_grad(p, q, k, v, grad, lse, delta, dq, setting: Setting) -> None:
    """Writes the grid's rows of dq."""
    from . import kernels_grad

    kind, tensors, tiles_y, tiles_x, box, rest = _numbers(p, setting)
    tiles = tiles_y * tiles_x * p.heads * p.batch
    kernels_grad.query_grad[(min(tiles, gluon._processors(p.device)),)](
        *(_grid(p, x) for x in (q, grad, k, v)), *_runs(p, k, v), _grid(p, dq), lse, delta, *tensors,
        *p.grid, p.heads, tiles_y, tiles_x, tiles, *box, p.text, p.group, *rest, p.N, p.first, p.qk_scale, p.scale,
        QY=setting.groups[0], QX=setting.groups[1], KIND=kind, STAGES=setting.stages, D=p.D,
        QREG=setting.in_registers, ORDERED=setting.ordered, REGISTERS=setting.registers, num_warps=4,
        maxnreg=setting.cap,
    )  # fmt: skip


def key_grad(p, q, k, v, grad, lse, delta, dk, dv, setting: Setting) -> None:
    """Writes the grid's rows of dk and dv."""
    from . import kernels_grad

    kind, tensors, tiles_y, tiles_x, box, rest = _numbers(p, setting)
    tiles = tiles_y * tiles_x * p.kv_heads * p.batch
    kernels_grad.key_grad[(min(tiles, gluon._processors(p.device)),)](
        *(_grid(p, x) for x in (k, v, q, grad)), *_runs(p, q, grad), _grid(p, dk), _grid(p, dv), lse, delta, *tensors,
        *p.grid, p.heads, tiles_y, tiles_x, tiles, *box, p.text, p.group, *rest, p.N, p.first, p.qk_scale, p.scale,
        QY=setting.groups[0], QX=setting.groups[1], KIND=kind, STAGES=setting.stages, D=p.D,
        TEXT_LAST=p.first == 0 and p.text > 0, ORDERED=setting.ordered, REGISTERS=setting.registers,
        num_warps=4, maxnreg=setting.cap,
    )  # fmt: skip


def backward(p, q, k, v, grad, lse, delta, dq, dk, dv) -> None:
    """Writes the grid's rows of all three gradients."""
    query, key = p.gluon_grad
    query_grad(p, q, k, v, grad, lse, delta, dq, query)
    key_grad(p, q, k, v, grad, lse, delta, dk, dv, key)
