"""Agent attention as a layer (ECCV 2024, arXiv 2312.08874, section 4).

One class for its four hosts, which differ in their projections and in what stands before the grid's tokens:

- DeiT: one ``qkv`` projection, a class token, which has biases of its own (``ac_bias``, ``ca_bias``);
- PVT: ``q`` and ``kv`` apart, keys and values optionally from a smaller map (``sr_ratio``);
- Swin: one ``qkv`` projection over a window (the whole map, in the published models);
- CSWin: no projections, these are the block's; the convolution is CSWin's own ``get_v``.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple, trunc_normal_
from torch import nn

from visionattn.ops.agent import (
    agent_attention,
    agent_key_bias,
    pool_agents,
    pooling_bins,
    query_agent_bias,
    resize_agents,
)
from visionattn.ops.depthwise import depthwise_residual

from .cast import Conv2d, Linear
from .eval_cache import EvalCache
from .mixer import Mixer
from .registry import register_module
from .softmax import aligned
from .stripes import pad_to, stripe_shape, stripes, stripes_back

TABLES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")
LINE_AXIS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}  # where a row or column table has its places


@register_notrace_module  # its tables follow the grid, which a tracer doesn't know
@register_module("agent", "mixer")
class AgentAttention(EvalCache, Mixer):
    """Agent attention of tokens (B, P + H * W, C) on a grid (H, W), with P prefix tokens.

    The bias tables are made for one grid and resized bilinearly to any other; in eval mode that happens once.

    Args:
        dim: C.
        num_heads: heads; must divide dim.
        agent_num: number of agent tokens, a square number.
        window_size: grid that the tables are made for, an integer for a square one. ``grid`` is accepted for it;
            ``window`` too, and then means DeiT's layer (one class token); ``num_patches`` too (a square number), and
            then means PVT's layer; ``resolution`` too, and then means CSWin's, with ``idx`` and ``split_size``.
        qkv_bias: biases of the projections.
        sr_ratio: None for one ``qkv`` projection; r >= 1 for ``q`` and ``kv`` apart, keys and values from an r times
            smaller map where r > 1.
        num_prefix_tokens: P, 0 or 1. The prefix token is a key, a value and a query, never an agent.
        agent_shape: (p, r) agents instead of sqrt(agent_num) squared, to which the tables are resized (section 5.3's
            dense prediction).
        idx: CSWin's branch: -1 the whole map, 0 vertical stripes ``split_size`` wide, 1 horizontal ones.
        attn_drop, proj_drop: dropout of both softmax results, and of the output.
        qk_norm, scale_norm, norm_layer: what timm hands an ``attn_layer`` too; off is all they can be.

    Raises:
        ValueError: for sizes that do not fit; in forward, for another number of tokens than the grid has.
    """

    grid: tuple[int, int]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        agent_num: int = 49,
        window_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        sr_ratio: int | None = None,
        num_prefix_tokens: int | None = None,
        agent_shape: int | tuple[int, int] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj_bias: bool = True,
        grid: int | tuple[int, int] | None = None,
        window: int | None = None,
        num_patches: int | None = None,
        resolution: int | tuple[int, int] | None = None,
        idx: int = -1,
        split_size: int | tuple[int, int] | None = None,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: type[nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if qk_norm or scale_norm:
            raise ValueError(
                f"AgentAttention has neither qk_norm={qk_norm} nor scale_norm={scale_norm}: switch them off"
            )
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"AgentAttention: num_heads={num_heads} does not divide dim={dim}: choose a divisor")
        self.agent_num = int(agent_num)
        side = math.isqrt(self.agent_num)
        if side < 1 or side * side != self.agent_num:
            raise ValueError(f"AgentAttention: agent_num={agent_num} is not a square number: use 9, 16, 49 ...")
        if num_patches is not None:
            sr_ratio = 1 if sr_ratio is None else sr_ratio
            grid = math.isqrt(num_patches) if grid is None else grid
        if num_prefix_tokens is None:
            num_prefix_tokens = 1 if window is not None else 0
        if num_prefix_tokens not in (0, 1):
            raise ValueError(f"AgentAttention: num_prefix_tokens={num_prefix_tokens}: its tables know 0 or 1 of them")
        self.projected = resolution is None
        self.idx = -1
        self.split_size = (0, 0)
        if not self.projected:
            resolution = to_2tuple(resolution)
            self.idx, self.split_size = idx, to_2tuple(resolution if split_size is None else split_size)
            grid = stripe_shape(self.idx, self.split_size, resolution)
        grid = next((g for g in (window_size, grid, window) if g is not None), 14)
        self.grid = to_2tuple(grid)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.sr_ratio = sr_ratio or 1
        self.num_prefix_tokens = num_prefix_tokens
        self.agent_shape: tuple[int, int] = to_2tuple(side if agent_shape is None else agent_shape)
        self.attn_drop = attn_drop

        self.qkv = self.q = self.kv = self.sr = self.norm = self.proj = self.dwc = self.get_v = None
        if self.projected:
            if sr_ratio is None:
                self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
            else:
                self.q = Linear(dim, dim, bias=qkv_bias, **dd)
                self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
            if self.sr_ratio > 1:
                self.sr = Conv2d(dim, dim, self.sr_ratio, stride=self.sr_ratio, **dd)
                self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
            self.proj = Linear(dim, dim, bias=proj_bias, **dd)
            self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        else:
            self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._make_tables(dd)
        self.reset_parameters()

    def _make_tables(self, dd: dict) -> None:
        heads, n, (H, W) = self.num_heads, self.agent_num, self.grid
        h, w = self._key_grid(self.grid)

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **dd))

        self.an_bias, self.na_bias = table(heads, n, 7, 7), table(heads, n, 7, 7)
        self.ah_bias, self.aw_bias = table(1, heads, n, h, 1), table(1, heads, n, 1, w)
        self.ha_bias, self.wa_bias = table(1, heads, H, 1, n), table(1, heads, 1, W, n)
        prefix = self.num_prefix_tokens > 0
        self.register_parameter("ac_bias", table(1, heads, n, 1) if prefix else None)
        self.register_parameter("ca_bias", table(1, heads, 1, n) if prefix else None)

    def reset_parameters(self) -> None:
        for table in (*(getattr(self, name) for name in TABLES), self.ac_bias, self.ca_bias):
            if table is not None:
                trunc_normal_(table, std=0.02)

    def _apply(self, fn, recurse: bool = True):
        # to(memory_format=torch.channels_last) refuses modules with parameters of five axes: they are shown as two
        return super()._apply(lambda t: fn(t.flatten(1)).reshape(t.shape) if t.dim() == 5 else fn(t), recurse)

    def _key_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] // self.sr_ratio, grid[1] // self.sr_ratio

    @torch.jit.ignore
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Makes the tables for another grid (window, stripe), linearly, as the authors' loader does."""
        grid = to_2tuple(grid)
        if grid == self.grid:
            return
        self._entries = {}
        self.grid = grid
        (H, W), (h, w) = grid, self._key_grid(grid)
        for name, size in (("ah_bias", h), ("aw_bias", w), ("ha_bias", H), ("wa_bias", W)):
            table = getattr(self, name)
            with torch.no_grad():
                value = resize_lines(name, table, size)
            setattr(self, name, nn.Parameter(value, requires_grad=table.requires_grad))

    def biases(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(heads, agents, P + keys) and (heads, P + tokens, agents) for the tokens of ``grid``."""
        key_grid = (grid[0] // self.sr_ratio, grid[1] // self.sr_ratio)
        over_keys = agent_key_bias(self.an_bias, self.ah_bias, self.aw_bias, key_grid, self.agent_shape)
        over_agents = query_agent_bias(self.na_bias, self.ha_bias, self.wa_bias, grid, self.agent_shape)
        if self.ac_bias is not None and self.ca_bias is not None:
            ac_bias = resize_agents(self.ac_bias[0], self.agent_num, self.agent_shape)
            ca_bias = resize_agents(self.ca_bias[0].transpose(1, 2), self.agent_num, self.agent_shape)
            over_keys = torch.cat([ac_bias, over_keys], dim=2)
            over_agents = torch.cat([ca_bias.transpose(1, 2), over_agents], dim=1)
        return over_keys, over_agents

    @torch.jit.unused
    def _kept_biases(self, grid: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        def compute():
            over_keys, over_agents = self.biases(grid)
            return aligned(over_keys.to(dtype)), aligned(over_agents.to(dtype))

        weights = tuple(self._parameters[name] for name in (*TABLES, "ac_bias", "ca_bias"))
        key = (int(grid[0]), int(grid[1]), dtype)
        return self.cached(key, tuple(w for w in weights if w is not None), compute)

    @torch.jit.unused
    def _bins(self, grid: tuple[int, int], q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        H, W = grid
        if not q.is_cuda or (H % self.agent_shape[0] == 0 and W % self.agent_shape[1] == 0):
            return None
        key = ("bins", H, W, q.dtype, q.device)
        return self.constant(key, lambda: pooling_bins(grid, self.agent_shape, q.device, q.dtype))

    def _mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: tuple[int, int],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Projected tokens (B, P + N, C) to the mixed ones, before the output projection."""
        B, N, C = q.shape
        heads, P = self.num_heads, self.num_prefix_tokens
        if torch.jit.is_scripting():
            over_keys, over_agents = self.biases(grid)
            agents = pool_agents(q[:, P:], grid, self.agent_shape)
        else:
            over_keys, over_agents = self._kept_biases(grid, q.dtype)
            agents = pool_agents(q[:, P:], grid, self.agent_shape, self._bins(grid, q))
        out = agent_attention(
            q.reshape(B, N, heads, C // heads),
            k.reshape(B, k.shape[1], heads, C // heads),
            v.reshape(B, v.shape[1], heads, C // heads),
            agents.reshape(B, agents.shape[1], heads, C // heads),
            over_keys,
            over_agents,
            self.scale,
            self.attn_drop if self.training else 0.0,
        ).reshape(B, N, C)
        if self.sr_ratio > 1:
            h, w = self._key_grid(grid)
            v = v.transpose(1, 2).reshape(B, C, h, w)
            v = F.interpolate(v, size=[grid[0], grid[1]], mode="bilinear", align_corners=False)
            v = v.flatten(2).transpose(1, 2)
        return depthwise_residual(out, v, weight.reshape(1, C, 9), bias, grid, P)

    def _stripes(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(3, B, N, C) queries, keys and values to (B, N, C): each stripe for itself."""
        shape = stripe_shape(self.idx, self.split_size, grid)
        assert self.get_v is not None
        weight, bias = self.get_v.weight, self.get_v.bias
        if shape[0] == grid[0] and shape[1] == grid[1]:
            return self._mix(x[0], x[1], x[2], grid, weight, bias)
        B, C = x.shape[1], x.shape[3]
        padded = pad_to(grid, shape)
        x = x.reshape(3 * B, grid[0], grid[1], C)
        x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        x = stripes(x.reshape(3 * B, padded[0] * padded[1], C), padded, shape)
        x = x.reshape(3, -1, shape[0] * shape[1], C)
        out = stripes_back(self._mix(x[0], x[1], x[2], shape, weight, bias), B, padded, shape)
        return out.reshape(B, padded[0], padded[1], C)[:, : grid[0], : grid[1]].reshape(B, -1, C)

    def forward(
        self,
        x: torch.Tensor,
        grid: tuple[int, int] | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        x_mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert attn_mask is None and not is_causal, "AgentAttention takes no mask"
        on = self.grid if grid is None else grid
        if self.proj is None or self.dwc is None:
            return self._stripes(x, on)
        B, N, C = x.shape
        torch._assert(
            on[0] * on[1] + self.num_prefix_tokens == N,
            f"AgentAttention: the tokens are not the grid's and {self.num_prefix_tokens} before it: pass their grid",
        )
        if self.qkv is not None:
            q, k, v = self.qkv(x).chunk(3, dim=2)
        elif self.q is not None and self.kv is not None:
            q = self.q(x)
            if self.sr is not None and self.norm is not None:
                x = x.transpose(1, 2).reshape(B, C, on[0], on[1])
                x = self.norm(self.sr(x).flatten(2).transpose(1, 2))
            k, v = self.kv(x).chunk(2, dim=2)
        else:
            raise RuntimeError("AgentAttention has no projections")
        return self.proj_drop(self.proj(self._mix(q, k, v, on, self.dwc.weight, self.dwc.bias)))


def resize_lines(name: str, table: torch.Tensor, size: int) -> torch.Tensor:
    """A row or column table (``ah_bias``, ``aw_bias``, ``ha_bias``, ``wa_bias``) for ``size`` places, by linear
    interpolation along its one spatial axis, as the authors' loader does for another resolution."""
    axis = LINE_AXIS[name]
    if table.shape[axis] == size:
        return table
    lines = table.movedim(axis, -1)
    shape = lines.shape[:-1]
    lines = F.interpolate(lines.reshape(1, -1, lines.shape[-1]).float(), size=size, mode="linear", align_corners=False)
    return lines.reshape(*shape, size).movedim(-1, axis).to(table.dtype).contiguous()
