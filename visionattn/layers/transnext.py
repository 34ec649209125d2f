"""TransNeXt's layers (CVPR 2024, arXiv 2311.17132), with or without routed heads (MoH, arXiv 2410.11842).

Every size of map goes: position biases are made for the grid that comes. The parameters carry the released names.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple, trunc_normal_
from torch import nn

from visionattn.ops.aggregated import aggregated_attention
from visionattn.ops.conv_glu import conv_glu, takes_kernel, taps_of
from visionattn.ops.moh import moh_attention

from .cast import Linear, autocast_dtype, lowered
from .eval_cache import EvalCache
from .moh import HeadRouter
from .registry import register_module

_CACHED_ELEMENTS = 2**22  # a larger bias is not kept between forwards


def axis_offsets(
    q: int, k: int, pretrain: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-spaced distances between q queries and k pooled keys along one axis.

    A key lies at the mean of the queries that adaptive pooling gives it.

    Args:
        pretrain: queries along the axis in pretraining, to which distances are relative.

    Returns:
        The distinct distances (U,) in ``dtype``, and the index (q, k) of each pair's.
    """
    queries = torch.arange(q, device=device)
    keys = torch.arange(k, device=device)
    if q % k == 0:
        step = q // k
        index = queries[:, None] - step * keys[None] + step * (k - 1)
        values = torch.arange(q + step * (k - 1), device=device) - (step * (k - 1) + (step - 1) / 2)
    else:  # bins of two sizes: distances in halves
        twice = keys * q // k + ((keys + 1) * q + k - 1) // k - 1
        last = (k - 1) * q // k + q - 1
        first = (q + k - 1) // k - 1
        index = 2 * queries[:, None] - twice[None] + last
        values = (torch.arange(2 * (q - 1) + last - first + 1, device=device) - last) / 2
    distance = values.to(dtype) * 8.0 / max(pretrain - 1, 1)
    return torch.sign(distance) * torch.log2(distance.abs() + 1.0) / 3.0, index  # log2(8)


class ContinuousPositionBias(HeadRouter):
    """What both attentions share: temperature, query embedding, and the bias from distances (paper, section 3.2.3)."""

    def _init_positions(self, dim: int, num_heads: int, pretrain_grid: tuple[int, int], dd: dict) -> None:
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.pretrain_grid = pretrain_grid
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, **dd))
        self.cpb_fc1 = nn.Linear(2, 512, **dd)
        self.cpb_fc2 = nn.Linear(512, num_heads, **dd)

    def reset_parameters(self) -> None:
        """Initialises what is not a linear, convolution or norm."""
        nn.init.constant_(self.temperature, math.log(math.exp(1 / 0.24) - 1))
        trunc_normal_(self.query_embedding, std=0.02)

    def position_bias(self, grid: tuple[int, int], pooled: tuple[int, int]) -> torch.Tensor:
        """(heads, H * W, Hp * Wp): the network of the distances, evaluated once for each distinct pair of them."""
        if torch.jit.is_scripting():
            pairs, index = self.distances(grid, pooled)
        else:
            pairs, index = self._kept_distances(grid, pooled)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(pairs)))
        bias = table.t().index_select(1, index)
        return bias.view(self.num_heads, grid[0] * grid[1], pooled[0] * pooled[1])

    def distances(self, grid: tuple[int, int], pooled: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct pairs of distances (U, 2), and the index (H * W * Hp * Wp) of each query's and key's."""
        weight = self.cpb_fc1.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rows, row_index = axis_offsets(grid[0], pooled[0], self.pretrain_grid[0], weight.device, dtype)
        cols, col_index = axis_offsets(grid[1], pooled[1], self.pretrain_grid[1], weight.device, dtype)
        n_rows, n_cols = rows.shape[0], cols.shape[0]
        pairs = torch.stack([rows[:, None].expand(n_rows, n_cols), cols[None].expand(n_rows, n_cols)], dim=-1)
        index = row_index[:, None, :, None] * n_cols + col_index[None, :, None, :]
        return pairs.flatten(0, 1).to(weight.dtype), index.flatten()

    @torch.jit.unused
    def _kept_distances(self, grid: tuple[int, int], pooled: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.cpb_fc1.weight
        if grid[0] * grid[1] * pooled[0] * pooled[1] > _CACHED_ELEMENTS:
            return self.distances(grid, pooled)
        key = (*grid, *pooled, *self.pretrain_grid, weight.dtype, weight.device)
        return self.constant(key, lambda: self.distances(grid, pooled))

    def cached_bias(self, grid: tuple[int, int], pooled: tuple[int, int]) -> torch.Tensor:
        """:meth:`position_bias`, kept between evaluations of one size; new weights, dtype or device make a new one."""
        if torch.jit.is_scripting():
            return self.position_bias(grid, pooled)
        return self._from_cache(grid, pooled)

    @torch.jit.unused
    def _from_cache(self, grid: tuple[int, int], pooled: tuple[int, int]) -> torch.Tensor:
        if self.num_heads * grid[0] * grid[1] * pooled[0] * pooled[1] > _CACHED_ELEMENTS:
            return self.position_bias(grid, pooled)
        weights = (self.cpb_fc1.weight, self.cpb_fc1.bias, self.cpb_fc2.weight, self.cpb_fc2.bias)
        key = ("bias", *grid, *pooled, autocast_dtype(weights[0]))
        return self.cached(key, weights, lambda: self.position_bias(grid, pooled))

    @torch.jit.unused
    def merged(self, layers: tuple[nn.Module, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of linear layers that read the same tokens, one below the other; None where they have hooks
        or rules of their own."""
        if torch.jit.is_tracing() or not all(_is_plain(layer) for layer in layers):
            return None
        weights = (*(m.weight for m in layers), *(m.bias for m in layers))

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            weight = torch.cat([m.weight.flatten(1) for m in layers])
            return lowered(weight), lowered(torch.cat([m.bias for m in layers]))

        return self.cached(("merged", autocast_dtype(weights[0])), weights, compute)


def _is_plain(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    plain = type(layer) in (nn.Linear, Linear, nn.Conv2d) and layer.bias is not None
    return plain and not any(hooks) and type(layer.weight) is nn.Parameter


def _grid_of(x: torch.Tensor, grid: tuple[int, int] | None, default: tuple[int, int]) -> tuple[int, int]:
    H, W = default if grid is None else grid
    torch._assert(
        x.shape[1] == H * W, f"{x.shape[1]} tokens are not a {H} x {W} grid: pass the grid=(H, W) that they lie on"
    )
    return H, W


def _pretrain(pretrain_size_tokens: int | tuple[int, int] | None, resolution: tuple[int, int]) -> tuple[int, int]:
    return resolution if pretrain_size_tokens is None else to_2tuple(pretrain_size_tokens)


@register_notrace_module
@register_module("moh_cosine", "mixer")
class CosineAttention(ContinuousPositionBias):
    """TransNeXt's full attention: normalised queries and keys, log-length scaling, a continuous position bias.

    Args:
        dim: C of the tokens (B, N, C).
        input_resolution: default grid (H, W); any grid may come in forward.
        num_heads: heads; must divide dim.
        shared_head, routed_head: shared heads and top-k of the others (see :class:`MoHAttention`); None for both is
            TransNeXt itself, without routers.
        pretrain_size_tokens: grid of pretraining, to which distances are relative; input_resolution by default.
        backend: of :func:`visionattn.ops.moh.moh_attention`.

    Raises:
        ValueError: for heads that do not divide dim or do not fit.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | tuple[int, int],
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        shared_head: int | None = None,
        routed_head: int | None = None,
        pretrain_size_tokens: int | tuple[int, int] | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"CosineAttention: num_heads={num_heads} does not divide dim={dim}: choose a divisor")
        self.grid = to_2tuple(input_resolution)
        self.attn_drop = attn_drop
        self.backend = backend
        self._init_positions(dim, num_heads, _pretrain(pretrain_size_tokens, self.grid), dd)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._init_router(dim, num_heads, shared_head, routed_head, "linear", dd)
        self.reset_parameters()

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        B, N, _ = x.shape
        grid = _grid_of(x, grid, self.grid)
        if not torch.jit.is_scripting():
            x = lowered(x)
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = F.normalize(qkv[:, :, 0], dim=-1), F.normalize(qkv[:, :, 1], dim=-1), qkv[:, :, 2]
        gates: torch.Tensor | None = self.gates(x, q) if self.routed else None
        scale = F.softplus(self.temperature) * math.log(N)
        q = (q + self.query_embedding.view(self.num_heads, self.head_dim)) * scale.view(self.num_heads, 1)
        bias = self.cached_bias(grid, grid).to(v.dtype)
        dropout = self.attn_drop if self.training else 0.0
        out = moh_attention(q.to(v.dtype), k.to(v.dtype), v, gates, 1.0, bias, dropout, self.backend, self.active)
        return self.proj_drop(self.proj(out.flatten(2)))


@register_notrace_module
@register_module("moh_aggregated", "mixer")
class AggregatedAttention(ContinuousPositionBias):
    """TransNeXt's aggregated attention: a window around every token and a pooled map, under one softmax.

    Args:
        dim: C of the tokens (B, N, C).
        input_resolution: default grid (H, W); any grid may come in forward.
        num_heads: heads; must divide dim.
        window_size: odd side of the neighbourhood.
        sr_ratio: the pooled map is the grid divided by it, rounded down (at least 1).
        fixed_pool_size: side of the pooled map instead (linear complexity), at most the grid's.
        shared_head, routed_head: shared heads and top-k of the others (see :class:`MoHAttention`); None for both is
            TransNeXt itself, without routers.
        pretrain_size_tokens: grid of pretraining, to which distances are relative; input_resolution by default.
        backend: of :func:`visionattn.ops.aggregated.aggregated_attention`.

    Raises:
        ValueError: for heads that do not divide dim or do not fit, or an even window.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | tuple[int, int],
        num_heads: int = 8,
        window_size: int = 3,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        sr_ratio: int = 1,
        fixed_pool_size: int | tuple[int, int] | None = None,
        shared_head: int | None = None,
        routed_head: int | None = None,
        pretrain_size_tokens: int | tuple[int, int] | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"AggregatedAttention: num_heads={num_heads} does not divide dim={dim}: choose a divisor")
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"AggregatedAttention: window_size={window_size}: the neighbourhood has an odd side")
        self.grid = to_2tuple(input_resolution)
        self.window_size = window_size
        self.sr_ratio = sr_ratio
        self.pool_size = None if fixed_pool_size is None else to_2tuple(fixed_pool_size)
        self.attn_drop = attn_drop
        self.backend = backend
        self._init_positions(dim, num_heads, _pretrain(pretrain_size_tokens, self.grid), dd)
        local = window_size**2
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, local, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, local, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, local, **dd))
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._init_router(dim, num_heads, shared_head, routed_head, "linear", dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def pooled_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(Hp, Wp) of a grid (H, W)."""
        H, W = grid
        size = self.pool_size
        if size is not None:
            return min(size[0], H), min(size[1], W)
        return max(H // self.sr_ratio, 1), max(W // self.sr_ratio, 1)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, N, C), keys and values (B, N, 2 C), and what is pooled (B, N, C) before its GELU."""
        C = x.shape[2]
        if not torch.jit.is_scripting():
            merged = self.merged((self.q, self.kv, self.sr))
            if merged is not None:
                q, kv, pooled = F.linear(x, merged[0], merged[1]).split([C, 2 * C, C], dim=2)
                return q, kv, pooled
        # the 1x1 convolution as a linear: tokens stay tokens
        return self.q(x), self.kv(x), F.linear(x, self.sr.weight.flatten(1), self.sr.bias)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        B, N, C = x.shape
        H, W = _grid_of(x, grid, self.grid)
        Hp, Wp = self.pooled_grid((H, W))
        heads, dim = self.num_heads, self.head_dim
        if not torch.jit.is_scripting():
            x = lowered(x)
        q, kv, pooled = self.project(x)
        q, kv, pooled = q.view(B, N, heads, dim), kv.view(B, N, 2, heads, dim), F.gelu(pooled)
        if H % Hp == 0 and W % Wp == 0:  # equal bins: a mean over axes, without the adaptive kernel's atomic gradient
            pooled = pooled.view(B, Hp, H // Hp, Wp, W // Wp, C).mean(dim=(2, 4)).view(B, Hp * Wp, C)
        else:
            pooled = pooled.transpose(1, 2).reshape(B, C, H, W)
            pooled = F.adaptive_avg_pool2d(pooled, (Hp, Wp)).flatten(2).transpose(1, 2)
        kv_pool = self.kv(self.norm(pooled)).view(B, Hp * Wp, 2, heads, dim)

        gates: torch.Tensor | None = self.gates(x, q) if self.routed else None
        out = aggregated_attention(
            q,
            kv,
            kv_pool,
            self.query_embedding.view(heads, dim),
            F.softplus(self.temperature).flatten(),
            self.relative_pos_bias_local,
            self.cached_bias((H, W), (Hp, Wp)),
            self.learnable_tokens,
            self.learnable_bias.view(heads, self.window_size * self.window_size),
            H,
            W,
            self.window_size,
            self.attn_drop if self.training else 0.0,
            self.backend,
        )
        if gates is not None:
            out = out * gates.unsqueeze(-1).to(out.dtype)
        return self.proj_drop(self.proj(out.flatten(2).to(x.dtype)))


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution of tokens (B, N, C) on their grid."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid[0], grid[1])
        return self.dwconv(x).flatten(2).transpose(1, 2)


@register_notrace_module
class ConvGLU(EvalCache):
    """Convolutional gated linear unit (paper, section 3.4): ``fc2(GELU(dwconv(a)) * v)``, (a, v) = fc1(x).

    Args:
        in_features: C of the tokens (B, N, C).
        hidden_features: nominal width; two thirds of it are built, ``int(2 * hidden_features / 3)`` per branch.
        drop: dropout after the product and after fc2.
    """

    def __init__(
        self, in_features: int, hidden_features: int | None = None, drop: float = 0.0, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = int(2 * (hidden_features or in_features) / 3)
        self.fc1 = Linear(in_features, 2 * hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, in_features, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        h = self.fc1(x)
        if torch.jit.is_scripting() or not self._takes_kernel(h):
            a, v = h.chunk(2, dim=-1)
            h = self.act(self.dwconv(a, grid)) * v
        else:
            conv = self.dwconv.dwconv
            h = conv_glu(h, conv.weight, conv.bias, grid, "triton", self._kept_taps())
        return self.drop(self.fc2(self.drop(h)))

    @torch.jit.unused
    def _kept_taps(self) -> torch.Tensor | None:
        weight = self.dwconv.dwconv.weight
        if torch.is_grad_enabled():
            return None
        return self.cached("taps", (weight,), lambda: taps_of(weight))

    @torch.jit.unused
    def _takes_kernel(self, h: torch.Tensor) -> bool:
        conv = self.dwconv.dwconv
        plain = type(conv) is nn.Conv2d and type(self.act) is nn.GELU and self.act.approximate == "none"
        return plain and not conv._forward_hooks and not conv._forward_pre_hooks and takes_kernel(h)


class OverlapPatchEmbed(nn.Module):
    """Strided convolution with overlap, then layer norm (eps 1e-5), on maps: (B, C, H, W) to tokens and their grid."""

    def __init__(
        self,
        patch_size: int = 7,
        stride: int = 4,
        in_chans: int = 3,
        embed_dim: int = 768,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=stride, padding=patch_size // 2, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Tokens (B, N, embed_dim), row by row, and (H, W)."""
        x = self.proj(x)
        grid = (x.shape[2], x.shape[3])
        return self.norm(x.flatten(2).transpose(1, 2)), grid
