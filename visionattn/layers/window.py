"""Window attention with relative positions (Swin), stripe attention with LePE (CSWin), and spatial reduction (PVT).

The softmax attention of the three hosts, so that a block is built the same way whatever it attends with.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple, trunc_normal_
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionattn.ops.depthwise import depthwise_residual

from .cast import Conv2d, Linear
from .eval_cache import EvalCache
from .softmax import aligned
from .stripes import pad_to, stripe_shape, stripes, stripes_back


def relative_position_index(window: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(h * w, h * w): the row of the relative position table for each pair of tokens of a window."""
    h, w = window
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    dy = y[:, None, None, None] - y[None, None, :, None] + h - 1
    dx = x[None, :, None, None] - x[None, None, None, :] + w - 1
    return (dy * (2 * w - 1) + dx).reshape(h * w, h * w)


def resize_relative_table(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """A relative position table ((2 h - 1) (2 w - 1), heads) for another window: bicubic, as Swin's loader does."""
    if tuple(old) == tuple(new):
        return table
    heads = table.shape[1]
    bias = table.float().t().reshape(1, heads, 2 * old[0] - 1, 2 * old[1] - 1)
    bias = F.interpolate(bias, size=[2 * new[0] - 1, 2 * new[1] - 1], mode="bicubic", align_corners=False)
    return bias.reshape(heads, -1).t().to(table.dtype).contiguous()


def shift_mask(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """(windows, h * w, h * w): -100 between tokens that only the cyclic shift brought into one window, else 0."""
    y = torch.arange(grid[0], device=like.device)
    x = torch.arange(grid[1], device=like.device)
    rows = (y >= grid[0] - window[0]).int() + (y >= grid[0] - shift[0]).int() if shift[0] > 0 else 0 * y.int()
    columns = (x >= grid[1] - window[1]).int() + (x >= grid[1] - shift[1]).int() if shift[1] > 0 else 0 * x.int()
    regions = (3 * rows[:, None] + columns[None, :]).reshape(1, grid[0] * grid[1], 1)
    regions = stripes(regions, grid, window).squeeze(2)
    apart = regions[:, None, :] != regions[:, :, None]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


@register_notrace_module
class WindowAttention(EvalCache):
    """Softmax attention inside windows (B * windows, h * w, C), with Swin's relative position table.

    Args:
        dim, num_heads, qkv_bias, attn_drop, proj_drop: as usual.
        window_size: (h, w).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.window_size: tuple[int, int] = to_2tuple(window_size)
        self.attn_drop = attn_drop
        h, w = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * h - 1) * (2 * w - 1), num_heads, **dd))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    @torch.jit.ignore
    def set_grid(self, window: tuple[int, int]) -> None:
        """Makes the table for another window."""
        window = to_2tuple(window)
        if window == self.window_size:
            return
        table = self.relative_position_bias_table
        with torch.no_grad():
            value = resize_relative_table(table, self.window_size, window)
        self.relative_position_bias_table = nn.Parameter(value, requires_grad=table.requires_grad)
        self.window_size = window
        self._entries = {}

    def bias(self) -> torch.Tensor:
        """(heads, h * w, h * w)."""
        table = self.relative_position_bias_table
        index = relative_position_index(self.window_size, table.device)
        tokens = index.shape[0]
        return table[index.reshape(-1)].reshape(tokens, tokens, -1).permute(2, 0, 1)

    @torch.jit.unused
    def _kept_bias(self, dtype: torch.dtype) -> torch.Tensor:
        weights = (self.relative_position_bias_table,)
        return self.cached(dtype, weights, lambda: aligned(self.bias().to(dtype)))

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int] | None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        B, N, C = x.shape
        heads = self.num_heads
        q, k, v = self.qkv(x).reshape(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if torch.jit.is_scripting():
            bias = self.bias().to(q.dtype)
        else:
            bias = self._kept_bias(q.dtype)
        bias = bias.unsqueeze(0)
        if attn_mask is not None:
            windows = attn_mask.shape[0]
            bias = bias + attn_mask.to(q.dtype).unsqueeze(1)
            bias = bias.unsqueeze(0).expand(B // windows, -1, -1, -1, -1).reshape(B, heads, N, N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


# cuDNN's attention fails in its backward on an H100 (torch 2.11, bfloat16, stripes of 98 tokens: "Expected
# mha_graph.execute(...)" or an illegal memory access)
NO_CUDNN_GRADIENT = ("cuda",)


@torch.jit.unused
def _attend_without_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not torch.compiler.is_compiling():  # which can't read the switches; what the caller has switched off stays off
        cuda = torch.backends.cuda
        enabled = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
        backends = [backend for backend, on in zip(backends, enabled, strict=True) if on]
    if not backends:  # nothing but cuDNN is allowed
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """Softmax attention (B, heads, N, D), without cuDNN where its gradient is wanted."""
    if not torch.jit.is_scripting():
        wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if wanted and q.device.type in NO_CUDNN_GRADIENT:
            return _attend_without_cudnn(q, k, v, mask, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


@register_notrace_module
class StripeAttention(nn.Module):
    """Softmax attention inside CSWin's stripes, with LePE (a 3 x 3 depthwise convolution of the stripe's values).

    Takes queries, keys and values (3, B, H * W, C), gives (B, H * W, C). Maps that the stripes do not tile are padded;
    padding is never attended to.

    Args:
        dim: C of this branch.
        resolution: (H, W) that the layer is made for.
        idx: -1 the whole map, 0 vertical stripes, 1 horizontal ones.
        split_size: width of the stripes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: int | tuple[int, int],
        idx: int = -1,
        split_size: int | tuple[int, int] = 7,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if idx not in (-1, 0, 1):
            raise ValueError(
                f"StripeAttention: idx={idx} is unknown: use -1 (whole map), 0 (vertical) or 1 (horizontal)"
            )
        self.num_heads = num_heads
        self.idx = idx
        self.split_size: tuple[int, int] = to_2tuple(split_size)
        self.attn_drop = attn_drop
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, grid: tuple[int, int], x_mean: torch.Tensor | None = None) -> torch.Tensor:
        B, C = x.shape[1], x.shape[3]
        shape = stripe_shape(self.idx, self.split_size, grid)
        padded = pad_to(grid, shape)
        filled = padded[0] == grid[0] and padded[1] == grid[1]
        if shape[0] == padded[0] and shape[1] == padded[1] and filled:
            q, k, v = x[0], x[1], x[2]
        else:
            y = x.reshape(3 * B, grid[0], grid[1], C)
            if not filled:
                y = F.pad(y, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
            y = stripes(y.reshape(3 * B, padded[0] * padded[1], C), padded, shape)
            q, k, v = y.reshape(3, -1, shape[0] * shape[1], C).unbind(0)
        mask: torch.Tensor | None = None
        if not filled:
            inside = torch.ones(1, grid[0], grid[1], 1, dtype=torch.bool, device=x.device)
            inside = F.pad(inside, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
            inside = stripes(inside.reshape(1, padded[0] * padded[1], 1), padded, shape)
            mask = inside.reshape(1, -1, 1, 1, shape[0] * shape[1]).expand(B, -1, -1, -1, -1).flatten(0, 1)
        n, N, heads = q.shape[0], q.shape[1], self.num_heads
        out = _attend(
            q.reshape(n, N, heads, C // heads).transpose(1, 2),
            k.reshape(n, N, heads, C // heads).transpose(1, 2),
            v.reshape(n, N, heads, C // heads).transpose(1, 2),
            mask,
            self.attn_drop if self.training else 0.0,
        )
        out = out.transpose(1, 2).reshape(n, N, C)
        out = depthwise_residual(out, v, self.get_v.weight.reshape(1, C, 9), self.get_v.bias, shape)
        out = stripes_back(out, B, padded, shape)
        if not filled:
            out = out.reshape(B, padded[0], padded[1], C)[:, : grid[0], : grid[1]].reshape(B, -1, C)
        return out


@register_notrace_module
class SpatialReductionAttention(nn.Module):
    """Softmax attention to keys and values of an ``sr_ratio`` times smaller map (PVT v1), tokens (B, H * W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd) if sr_ratio > 1 else None
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor, grid: tuple[int, int], attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        B, N, C = x.shape
        heads = self.num_heads
        q = self.q(x).reshape(B, N, heads, C // heads).transpose(1, 2)
        if self.sr is not None and self.norm is not None:
            x = self.sr(x.transpose(1, 2).reshape(B, C, grid[0], grid[1]))
            x = self.norm(x.flatten(2).transpose(1, 2))
        k, v = self.kv(x).reshape(B, -1, 2, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))
