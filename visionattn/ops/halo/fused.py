"""Launches the Triton kernels of halo attention, and registers them as operators that autograd and compile know.

``visionattn::halo_attention`` takes k and v apart; ``visionattn::halo_attention_kv`` takes them as one tensor
(B, H, W, heads, D + Dv), each head's key before its value, and returns one gradient for both.
"""

import math
from dataclasses import dataclass

import torch
import triton

from . import kernels

# The most negative finite numbers a mask may use, by what the dtype holds.
_BIG = {torch.float16: 6e4, torch.bfloat16: 1e30, torch.float32: 1e30}


def _pad(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


@dataclass(frozen=True)
class Problem:
    """What is known of a call at compile time."""

    block: int
    halo: int
    stride: int
    rel_step: int
    mask: bool
    dim: int
    dim_v: int
    dtype: torch.dtype
    precision: str

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    @property
    def side(self) -> int:
        """Queries along a block's side."""
        return self.block // self.stride

    def padded(self) -> dict[str, int]:
        return dict(
            D=self.dim, DV=self.dim_v, DP=_pad(self.dim), DVP=_pad(self.dim_v), WP=_pad(self.window), PREC=self.precision
        )

    def shared(self) -> dict[str, int]:
        """The constants of the forward and of the query kernel."""
        return dict(
            B=self.block, HALO=self.halo, BQ=self.side, WIN=self.window, STEP=self.rel_step, MASK=self.mask,
            LP=_pad(2 * self.window - 1), BIG=_BIG[self.dtype], **self.padded(),
        )  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a launch: queries, keys (for the key kernel: rows of keys), warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        return dict(num_warps=self.warps, num_stages=self.stages)


def forward_constants(p: Problem, tiles: Tiles) -> dict:
    rest = p.window**2 % tiles.keys
    return dict(BM=tiles.queries, BN=tiles.keys, BT=_pad(rest) if rest else 0, **p.shared())


def key_constants(p: Problem, tiles: Tiles) -> dict:
    near = -(-p.halo // p.block)
    return dict(
        B=p.block, HALO=p.halo, BQ=p.side, NEAR=near, KR=tiles.keys, BM=tiles.queries, BK=_pad(tiles.keys * p.block),
        **p.padded(),
    )  # fmt: skip


def pick_tiles(p: Problem) -> tuple[Tiles, Tiles, Tiles]:
    """Tiles of the forward, the query and the key kernel; docs/kernels.md has the measurements behind them."""
    queries = min(64, _pad(p.side**2))
    wide = max(_pad(p.dim), _pad(p.dim_v)) * p.dtype.itemsize  # bytes of a row
    keys = 64 if wide <= 128 else 32 if wide <= 256 else 16
    warps = 4 if queries == 64 else 2 if queries == 32 else 1
    if wide > 128:
        queries = min(queries, 32)
    rows = p.block
    while rows > 1 and _pad(rows * p.block) > 64:
        rows -= 1
    rows = -(-p.block // -(-p.block // rows))  # even chunks
    if wide > 256:
        rows = max(1, min(rows, 32 // p.block))
    return (
        Tiles(queries, keys, warps, 2 if wide <= 128 else 1),
        Tiles(queries, keys, warps, 1),
        Tiles(queries, rows, 4, 1),
    )


def _problem(q, k, v, block: int, halo: int, stride: int, mask: bool, rel_step: int) -> Problem:
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    precision = precision if q.dtype == torch.float32 else "ieee"  # float32 only; others multiply exactly
    return Problem(block, halo, stride, rel_step, mask, q.shape[-1], v.shape[-1], q.dtype, precision)


def forward(
    q, k, v, rel_h, rel_w, block: int, halo: int, stride: int, mask: bool, scale: float, rel_scale: float,
    rel_step: int, tiles: Tiles | None = None,
):  # fmt: skip
    """Output (B, Hq, Wq, heads, Dv) and log-sum-exp (base 2; B, rows, columns, heads, queries of a block)."""
    B, H, W, heads, _ = k.shape
    HQ, WQ = q.shape[1:3]
    p = _problem(q, k, v, block, halo, stride, mask, rel_step)
    tiles = tiles or pick_tiles(p)[0]
    rows, cols = -(-H // block), -(-W // block)
    out = q.new_empty(B, HQ, WQ, heads, p.dim_v)
    lse = q.new_empty(B, rows, cols, heads, p.side**2, dtype=torch.float32)
    grid = (B * rows * cols * heads * triton.cdiv(p.side**2, tiles.queries),)
    if grid[0] > 0:
        kernels.halo_forward[grid](
            q, k, v, rel_h.contiguous(), rel_w.contiguous(), out, lse,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            H, W, HQ, WQ, heads, rows, cols, scale * math.log2(math.e), rel_scale / scale,
            **forward_constants(p, tiles), **tiles.launch(),
        )  # fmt: skip
    return out, lse


def backward(
    grad, q, k, v, rel_h, rel_w, out, lse, block: int, halo: int, stride: int, mask: bool, scale: float,
    rel_scale: float, rel_step: int, tiles: tuple[Tiles, Tiles] | None = None,
):  # fmt: skip
    """Gradients of q, of keys and values as one tensor (B, H, W, heads, D + Dv), and of the two tables."""
    B, H, W, heads, dim = k.shape
    HQ, WQ = q.shape[1:3]
    p = _problem(q, k, v, block, halo, stride, mask, rel_step)
    query_tiles, key_tiles = tiles or pick_tiles(p)[1:]
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    rows, cols = -(-H // block), -(-W // block)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkv = k.new_empty(B, H, W, heads, dim + p.dim_v)
    dk, dv = dkv[..., :dim], dkv[..., dim:]
    items = B * rows * cols * heads * triton.cdiv(p.side**2, query_tiles.queries)
    if items == 0:
        return dq, dkv, torch.zeros_like(rel_h), torch.zeros_like(rel_w)

    wp, lp = _pad(p.window), _pad(2 * p.window - 1)
    delta = torch.empty_like(lse)
    rel = q.new_empty(*lse.shape, 2, wp)
    per_program = max(1, min(8, items // 2048))
    programs = triton.cdiv(items, per_program)
    tables = q.new_empty(programs, 2, lp, _pad(dim), dtype=torch.float32)
    qk_scale = scale * math.log2(math.e)
    kernels.halo_query_grad[(programs,)](
        q, k, v, rel_h.contiguous(), rel_w.contiguous(), out, grad, lse, delta, rel, dq, tables,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *grad.stride(), *dq.stride(),
        H, W, HQ, WQ, heads, rows, cols, items, per_program, qk_scale, rel_scale / scale, scale, rel_scale,
        **forward_constants(p, query_tiles), **query_tiles.launch(),
    )  # fmt: skip
    chunks = triton.cdiv(block, key_tiles.keys)
    kernels.halo_key_grad[(B * rows * cols * heads * chunks,)](
        q, k, v, grad, lse, delta, rel, dk, dv,
        *q.stride(), *k.stride(), *v.stride(), *grad.stride(), *dk.stride(),
        H, W, HQ, WQ, heads, rows, cols, qk_scale, scale,
        **key_constants(p, key_tiles), **key_tiles.launch(),
    )  # fmt: skip
    dth, dtw = tables.sum(0)[:, : 2 * p.window - 1, :dim].unbind(0)
    return dq, dkv, dth.to(rel_h.dtype, copy=True), dtw.to(rel_w.dtype, copy=True)


_SETTINGS = "int block, int halo, int stride, bool mask, float scale, float rel_scale, int rel_step"
_N_SETTINGS = 7


@torch.library.custom_op(
    "visionattn::halo_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, {_SETTINGS}) -> (Tensor, Tensor)",
)
def halo_attention_op(q, k, v, rel_h, rel_w, *settings):
    return forward(q, k, v, rel_h, rel_w, *settings)


@torch.library.custom_op(
    "visionattn::halo_attention_kv",
    mutates_args=(),
    schema=f"(Tensor q, Tensor kv, Tensor rel_h, Tensor rel_w, {_SETTINGS}) -> (Tensor, Tensor)",
)
def halo_attention_kv_op(q, kv, rel_h, rel_w, *settings):
    dim = q.shape[-1]
    return forward(q, kv[..., :dim], kv[..., dim:], rel_h, rel_w, *settings)


@torch.library.custom_op(
    "visionattn::halo_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def halo_attention_backward_op(grad, q, k, v, rel_h, rel_w, out, lse, *settings):
    return backward(grad, q, k, v, rel_h, rel_w, out, lse, *settings)


@halo_attention_op.register_fake
def _(q, k, v, rel_h, rel_w, block, halo, stride, mask, scale, rel_scale, rel_step):
    B, H, W, heads, _ = k.shape
    rows, cols, side = (H + block - 1) // block, (W + block - 1) // block, block // stride
    out = q.new_empty(B, q.shape[1], q.shape[2], heads, v.shape[-1])
    return out, q.new_empty(B, rows, cols, heads, side * side, dtype=torch.float32)


@halo_attention_kv_op.register_fake
def _(q, kv, rel_h, rel_w, block, halo, stride, mask, scale, rel_scale, rel_step):
    B, H, W, heads, width = kv.shape
    rows, cols, side = (H + block - 1) // block, (W + block - 1) // block, block // stride
    out = q.new_empty(B, q.shape[1], q.shape[2], heads, width - q.shape[-1])
    return out, q.new_empty(B, rows, cols, heads, side * side, dtype=torch.float32)


@halo_attention_backward_op.register_fake
def _(grad, q, k, v, rel_h, rel_w, out, lse, *settings):
    B, H, W, heads, dim = k.shape
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        k.new_empty(B, H, W, heads, dim + v.shape[-1]),
        torch.empty_like(rel_h, memory_format=torch.contiguous_format),
        torch.empty_like(rel_w, memory_format=torch.contiguous_format),
    )


def _setup(ctx, inputs, output):
    tensors, ctx.settings = inputs[:-_N_SETTINGS], inputs[-_N_SETTINGS:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    q, k, v, rel_h, rel_w, out, lse = ctx.saved_tensors
    dq, dkv, dth, dtw = torch.ops.visionattn.halo_attention_backward(
        grad, q, k, v, rel_h, rel_w, out, lse, *ctx.settings
    )
    dim = q.shape[-1]
    return dq, dkv[..., :dim], dkv[..., dim:], dth, dtw, *[None] * _N_SETTINGS


def _backward_kv(ctx, grad, _):
    q, kv, rel_h, rel_w, out, lse = ctx.saved_tensors
    dim = q.shape[-1]
    dq, dkv, dth, dtw = torch.ops.visionattn.halo_attention_backward(
        grad, q, kv[..., :dim], kv[..., dim:], rel_h, rel_w, out, lse, *ctx.settings
    )
    return dq, dkv, dth, dtw, *[None] * _N_SETTINGS


halo_attention_op.register_autograd(_backward, setup_context=_setup)
halo_attention_kv_op.register_autograd(_backward_kv, setup_context=_setup)
