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
    if p.side**2 in (16, 32, 64):  # all queries of a block at once
        key_tiles = Tiles(queries, _rows_of_keys(p.block, 64), 1 if queries == 16 else 2, 1)
    elif p.block <= 12:
        key_tiles = Tiles(16, _rows_of_keys(p.block, 64), 2, 2)
    else:
        key_tiles = Tiles(16, _rows_of_keys(p.block, 128), 4, 2)
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


def _aligned(tensors) -> bool:
    return not any(t.data_ptr() & 15 for t in tensors)


class _Launch:
    """A kernel whose numbers are bound; called with its tensors.

    Triton looks at every argument of every launch, which costs more than these kernels do on small maps. A plan is
    made per shapes, strides and dtypes, so all that Triton would look at is known but the pointers' alignment.
    """

    def __init__(self, kernel, programs: int, numbers: tuple, constants: dict, tiles: Tiles):
        self.kernel, self.numbers, self.named = kernel, numbers, {**constants, **tiles.launch()}
        self.grid = (programs, 1, 1)
        constexprs = [name for name in kernel.arg_names if name in constants]
        self.rest = (*numbers, *(constants[name] for name in constexprs))
        self.compiled = None

    def __call__(self, *tensors) -> None:
        if self.grid[0] == 0:
            return
        aligned = _aligned(tensors)
        if aligned and self.compiled is not None:
            self.compiled[self.grid](*tensors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.named)
        if aligned:
            self.compiled = compiled  # None where kernels are interpreted


class _Plan:
    """What follows from the arguments' shapes, strides and dtypes: sizes of buffers, and the launches."""

    def __init__(self, q, k, v, settings: tuple, tiles: tuple[Tiles, Tiles, Tiles] | None):
        block, halo, stride, mask, self.scale, self.rel_scale, rel_step = settings
        B, H, W, heads, dim = k.shape
        HQ, WQ = q.shape[1:3]
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        precision = precision if q.dtype == torch.float32 else "ieee"  # float32 only; others multiply exactly
        p = Problem(block, halo, stride, rel_step, mask, dim, v.shape[-1], q.dtype, precision)
        self.problem, self.tiles = p, tiles or pick_tiles(p)
        rows, cols = -(-H // block), -(-W // block)
        self.out = (B, HQ, WQ, heads, p.dim_v)
        self.lse = (B, rows, cols, heads, p.side**2)
        self.rel = (*self.lse, 2, _pad(p.window))
        self.dkv = (B, H, W, heads, dim + p.dim_v)
        self.blocks = B * rows * cols * heads
        self.sizes = (H, W, HQ, WQ, heads, rows, cols)
        self.qk_scale, self.ratio = self.scale * math.log2(math.e), self.rel_scale / self.scale
        self.inputs = (*q.stride(), *k.stride(), *v.stride())

        self.forward = _Launch(
            kernels.halo_forward,
            self.blocks * triton.cdiv(p.side**2, self.tiles[0].queries),
            (*self.inputs, *_strides(self.out), *self.sizes, self.qk_scale, self.ratio),
            forward_constants(p, self.tiles[0]),
            self.tiles[0],
        )
        items = self.blocks * triton.cdiv(p.side**2, self.tiles[1].queries)
        self.per_program = max(1, min(8, items // 2048))
        self.items, self.programs = items, triton.cdiv(items, self.per_program)
        self.tables = (self.programs, 2, _pad(2 * p.window - 1), _pad(dim))
        self._backward = {}

    def backward(self, grad) -> tuple[_Launch, _Launch]:
        """The query and the key launch, for a gradient of these strides."""
        found = self._backward.get(grad.stride())
        if found is None:
            p, tiles = self.problem, self.tiles
            dq = _strides((*self.out[:-1], p.dim))
            numbers = (self.items, self.per_program, self.qk_scale, self.ratio, self.scale, self.rel_scale)
            queries = _Launch(
                kernels.halo_query_grad,
                self.programs,
                (*self.inputs, *_strides(self.out), *grad.stride(), *dq, *self.sizes, *numbers),
                forward_constants(p, tiles[1]),
                tiles[1],
            )
            keys = _Launch(
                kernels.halo_key_grad,
                self.blocks * triton.cdiv(p.block, tiles[2].keys),
                (*self.inputs, *grad.stride(), *_strides(self.dkv), *self.sizes, self.qk_scale, self.scale),
                key_constants(p, tiles[2]),
                tiles[2],
            )
            found = self._backward[grad.stride()] = (queries, keys)
        return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides))


_plans: dict[tuple, _Plan] = {}


def plan(q, k, v, rel_h, rel_w, settings: tuple, tiles: tuple[Tiles, Tiles, Tiles] | None = None) -> _Plan:
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, rel_h.dtype, rel_w.dtype, q.device,
        settings, tiles, torch.backends.cuda.matmul.allow_tf32,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= 4096:  # shapes that never repeat
            _plans.clear()
        found = _plans[key] = _Plan(q, k, v, settings, tiles)
    return found


def _elsewhere(q) -> bool:
    return q.is_cuda and q.device.index != torch.cuda.current_device()


def forward(q, k, v, rel_h, rel_w, *settings, tiles=None):
    """Output (B, Hq, Wq, heads, Dv) and log-sum-exp (base 2; B, rows, columns, heads, queries of a block)."""
    if _elsewhere(q):
        with torch.cuda.device(q.device):
            return forward(q, k, v, rel_h, rel_w, *settings, tiles=tiles)
    this = plan(q, k, v, rel_h, rel_w, settings, tiles)
    out = q.new_empty(this.out)
    lse = q.new_empty(this.lse, dtype=torch.float32)
    this.forward(q, k, v, rel_h.contiguous(), rel_w.contiguous(), out, lse)
    return out, lse


def backward(grad, q, k, v, rel_h, rel_w, out, lse, *settings, tiles=None):
    """Gradients of q, of keys and values as one tensor (B, H, W, heads, D + Dv), of the tables as one in float32."""
    if _elsewhere(q):
        with torch.cuda.device(q.device):
            return backward(grad, q, k, v, rel_h, rel_w, out, lse, *settings, tiles=tiles)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    out = out.contiguous()
    this = plan(q, k, v, rel_h, rel_w, settings, tiles)
    p = this.problem
    queries, keys = this.backward(grad)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkv = k.new_empty(this.dkv)
    delta = torch.empty_like(lse)
    rel = q.new_empty(this.rel)
    tables = q.new_empty(this.tables, dtype=torch.float32)
    queries(q, k, v, rel_h.contiguous(), rel_w.contiguous(), out, grad, lse, delta, rel, dq, tables)
    keys(q, k, v, grad, lse, delta, rel, dkv, dkv[..., p.dim :])
    return dq, dkv, tables[:, :, : 2 * p.window - 1, : p.dim].sum(0)


class HaloFunction(torch.autograd.Function):
    """The operators below for eager mode, where the dispatcher's Python layers would cost more than the kernels."""

    @staticmethod
    def forward(ctx, q, k, v, rel_h, rel_w, settings):
        out, lse = forward(q, k, v, rel_h, rel_w, *settings)
        ctx.save_for_backward(q, k, v, rel_h, rel_w, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        dq, dkv, tables = backward(grad, *saved, *ctx.settings)
        dim, rel_h, rel_w = dq.shape[-1], saved[3], saved[4]
        return dq, dkv[..., :dim], dkv[..., dim:], tables[0].to(rel_h.dtype), tables[1].to(rel_w.dtype), None


class HaloFunctionKV(torch.autograd.Function):
    """:class:`HaloFunction` with keys and values in one tensor."""

    @staticmethod
    def forward(ctx, q, kv, rel_h, rel_w, settings):
        dim = q.shape[-1]
        out, lse = forward(q, kv[..., :dim], kv[..., dim:], rel_h, rel_w, *settings)
        ctx.save_for_backward(q, kv, rel_h, rel_w, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, kv, rel_h, rel_w, out, lse = ctx.saved_tensors
        dim = q.shape[-1]
        k, v = kv[..., :dim], kv[..., dim:]
        dq, dkv, tables = backward(grad, q, k, v, rel_h, rel_w, out, lse, *ctx.settings)
        return dq, dkv, tables[0].to(rel_h.dtype), tables[1].to(rel_w.dtype), None


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
