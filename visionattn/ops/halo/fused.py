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
            D=self.dim,
            DV=self.dim_v,
            DP=_pad(self.dim),
            DVP=_pad(self.dim_v),
            WP=_pad(self.window),
            PREC=self.precision,
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
    row = max(_pad(p.dim), _pad(p.dim_v)) * p.dtype.itemsize  # bytes
    if row > 128:
        return _pick_wide_tiles(p, row)
    if queries < 64:
        few = 1 if queries == 16 else 2
        forward_tiles, query_tiles = Tiles(queries, 64, few, 2), Tiles(queries, 64, few, 1)
    elif row <= 32:
        forward_tiles, query_tiles = Tiles(64, 64, 4, 1), Tiles(64, 64, 2, 1)
    else:
        forward_tiles, query_tiles = Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 1)
    rows = _rows_of_keys(p.block, 64)
    if p.side**2 in (16, 32, 64):
        key_tiles = Tiles(queries, rows, 1 if queries == 16 else 2, 1)
    elif row <= 32:
        key_tiles = Tiles(16, rows, 2, 1)
    else:
        key_tiles = Tiles(32, _rows_of_keys(p.block, 128), 4, 1)
    return forward_tiles, query_tiles, key_tiles


def _pick_wide_tiles(p: Problem, row: int) -> tuple[Tiles, Tiles, Tiles]:
    """Heads of more than 128 bytes: smaller tiles, so that four of them fit the shared memory of an RTX card."""
    queries = min(32, _pad(p.side**2))
    keys = 32 if row <= 256 else 16
    rows = _rows_of_keys(p.block, 64 if row <= 256 else 32 if row <= 512 else 16)
    return Tiles(queries, keys, 4, 1), Tiles(queries, keys, 4, 1), Tiles(16, rows, 4, 1)


def _rows_of_keys(block: int, most: int) -> int:
    """Rows of a block that a tile of `most` keys holds, evened out over the block's chunks."""
    rows = max(1, min(block, most // block))
    return -(-block // -(-block // rows))


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


def query_gradients(
    grad, q, k, v, rel_h, rel_w, out, lse, block: int, halo: int, stride: int, mask: bool, scale: float,
    rel_scale: float, rel_step: int, tiles: Tiles | None = None,
):  # fmt: skip
    """Gradients of q and of the tables (2, 2 * window - 1, D); sum(out * grad) and relative logits for the keys."""
    B, H, W, heads, dim = k.shape
    HQ, WQ = q.shape[1:3]
    p = _problem(q, k, v, block, halo, stride, mask, rel_step)
    tiles = tiles or pick_tiles(p)[1]
    rows, cols = -(-H // block), -(-W // block)
    items = B * rows * cols * heads * triton.cdiv(p.side**2, tiles.queries)
    per_program = max(1, min(8, items // 2048))
    programs = triton.cdiv(items, per_program)
    wp, lp = _pad(p.window), _pad(2 * p.window - 1)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    rel = q.new_empty(*lse.shape, 2, wp)
    tables = q.new_empty(programs, 2, lp, _pad(dim), dtype=torch.float32)
    if items > 0:
        kernels.halo_query_grad[(programs,)](
            q, k, v, rel_h.contiguous(), rel_w.contiguous(), out, grad, lse, delta, rel, dq, tables,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *grad.stride(), *dq.stride(),
            H, W, HQ, WQ, heads, rows, cols, items, per_program,
            scale * math.log2(math.e), rel_scale / scale, scale, rel_scale,
            **forward_constants(p, tiles), **tiles.launch(),
        )  # fmt: skip
    return dq, tables[:, :, : 2 * p.window - 1, :dim].sum(0), delta, rel


def key_gradients(
    grad, q, k, v, lse, delta, rel, block: int, halo: int, stride: int, mask: bool, scale: float,
    rel_scale: float, rel_step: int, tiles: Tiles | None = None,
):  # fmt: skip
    """The gradient of keys and values as one tensor (B, H, W, heads, D + Dv)."""
    B, H, W, heads, dim = k.shape
    HQ, WQ = q.shape[1:3]
    p = _problem(q, k, v, block, halo, stride, mask, rel_step)
    tiles = tiles or pick_tiles(p)[2]
    rows, cols = -(-H // block), -(-W // block)
    dkv = k.new_empty(B, H, W, heads, dim + p.dim_v)
    dk, dv = dkv[..., :dim], dkv[..., dim:]
    grid = (B * rows * cols * heads * triton.cdiv(block, tiles.keys),)
    if grid[0] > 0:
        kernels.halo_key_grad[grid](
            q, k, v, grad, lse, delta, rel, dk, dv,
            *q.stride(), *k.stride(), *v.stride(), *grad.stride(), *dk.stride(),
            H, W, HQ, WQ, heads, rows, cols, scale * math.log2(math.e), scale,
            **key_constants(p, tiles), **tiles.launch(),
        )  # fmt: skip
    return dkv


def backward(grad, q, k, v, rel_h, rel_w, out, lse, *settings):
    """Gradients of q, of keys and values as one tensor (B, H, W, heads, D + Dv), of the tables as one in float32."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    dq, tables, delta, rel = query_gradients(grad, q, k, v, rel_h, rel_w, out, lse, *settings)
    dkv = key_gradients(grad, q, k, v, lse, delta, rel, *settings)
    return dq, dkv, tables


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
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
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
        rel_h.new_empty(2, *rel_h.shape, dtype=torch.float32),
    )


def _setup(ctx, inputs, output):
    tensors, ctx.settings = inputs[:-_N_SETTINGS], inputs[-_N_SETTINGS:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    q, k, v, rel_h, rel_w, out, lse = ctx.saved_tensors
    dq, dkv, tables = torch.ops.visionattn.halo_attention_backward(grad, q, k, v, rel_h, rel_w, out, lse, *ctx.settings)
    dim = q.shape[-1]
    dth, dtw = tables[0].to(rel_h.dtype), tables[1].to(rel_w.dtype)
    return dq, dkv[..., :dim], dkv[..., dim:], dth, dtw, *[None] * _N_SETTINGS


def _backward_kv(ctx, grad, _):
    q, kv, rel_h, rel_w, out, lse = ctx.saved_tensors
    dim = q.shape[-1]
    dq, dkv, tables = torch.ops.visionattn.halo_attention_backward(
        grad, q, kv[..., :dim], kv[..., dim:], rel_h, rel_w, out, lse, *ctx.settings
    )
    return dq, dkv, tables[0].to(rel_h.dtype), tables[1].to(rel_w.dtype), *[None] * _N_SETTINGS


halo_attention_op.register_autograd(_backward, setup_context=_setup)
halo_attention_kv_op.register_autograd(_backward_kv, setup_context=_setup)
