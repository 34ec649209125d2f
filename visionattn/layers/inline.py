"""InLine attention as a layer (NeurIPS 2024, arXiv 2412.06590, section 4).

One class for its four hosts, which differ in their projections and in the mean that predicts the local kernels:

- DeiT, Swin: one ``qkv`` projection; PVT: ``q`` and ``kv`` apart. The mean is of the layer's input.
- CSWin: no projections, these are the block's; CSWin's own ``get_v`` stays; the mean is of the block's input, which the
  caller hands over.
"""

import torch
from timm.layers import register_notrace_module, to_2tuple
from torch import nn

from visionattn.ops.inline import KERNELS, feature_map, inline_mix

from .cast import GroupedLinear, Linear
from .mixer import Mixer
from .registry import register_module
from .stripes import stripe_shape


@register_notrace_module  # the grid, which a tracer doesn't know, decides its shapes
@register_module("inline", "mixer")
class InLineAttention(Mixer):
    """InLine attention of tokens (B, P + H * W, C) on a grid (H, W), with P prefix tokens, and its local residual.

    The layer has no table, so it takes any grid. Prefix tokens take part in the attention and in the mean which
    predicts the 3 x 3 kernels, one per image and channel; the local residual is the grid's alone.

    Args:
        dim: C.
        num_heads: heads; must divide dim.
        window_size: grid of token inputs that come without one. ``grid`` is accepted for it; ``window`` too, and then
            means DeiT's layer (one class token); ``resolution`` too, and then means CSWin's layer.
        qkv_bias: biases of the projections.
        sr_ratio: None for one ``qkv`` projection, 1 for ``q`` and ``kv`` apart (PVT).
        kernel_func: feature map of queries and keys, ``'identity'`` (all published models), ``'relu'``,
            ``'leakyrelu'`` or ``'exp'`` (of 0.2 x).
        num_prefix_tokens: P.
        proj_drop: dropout of the output.
        attn_drop: accepted and unused, as released.
        idx, split_size: CSWin's branch and stripes; a kernel per image allows one branch over the whole map only.
        qk_norm, scale_norm, norm_layer: what timm hands an ``attn_layer`` too; off is all they can be.

    Raises:
        ValueError: for sizes that do not fit; in forward, for another number of tokens than the grid has.
    """

    grid: tuple[int, int]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
        sr_ratio: int | None = None,
        kernel_func: str | None = "identity",
        num_prefix_tokens: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj_bias: bool = True,
        grid: int | tuple[int, int] | None = None,
        window: int | None = None,
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
                f"InLineAttention has neither qk_norm={qk_norm} nor scale_norm={scale_norm}: switch them off"
            )
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"InLineAttention: num_heads={num_heads} does not divide dim={dim}: choose a divisor")
        if sr_ratio not in (None, 1):
            raise ValueError(f"InLineAttention: sr_ratio={sr_ratio}: keys and values are of the full map, use 1")
        self.kernel_func = kernel_func or "identity"
        if self.kernel_func not in KERNELS:
            raise ValueError(
                f"InLineAttention: kernel_func={kernel_func!r} is unknown: use one of {', '.join(KERNELS)}"
            )
        self.projected = resolution is None
        if not self.projected:
            resolution = to_2tuple(resolution)
            grid = stripe_shape(idx, to_2tuple(resolution if split_size is None else split_size), resolution)
            if grid != resolution:
                raise ValueError(
                    f"InLineAttention: stripes of {grid} on a map of {resolution}: its kernels are per image, so it "
                    "needs one branch over the whole map (split_size = the map's side)"
                )
        if num_prefix_tokens is None:
            num_prefix_tokens = 1 if window is not None else 0
        self.grid = to_2tuple(next((g for g in (window_size, grid, window) if g is not None), 14))
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.num_prefix_tokens = num_prefix_tokens

        self.qkv = self.q = self.kv = self.proj = self.get_v = None
        if self.projected:
            if sr_ratio is None:
                self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
            else:
                self.q = Linear(dim, dim, bias=qkv_bias, **dd)
                self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
            self.proj = Linear(dim, dim, bias=proj_bias, **dd)
        else:
            self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.residual = nn.Sequential(
            GroupedLinear(dim, dim, num_heads, **dd),
            nn.GELU(),
            GroupedLinear(dim, 9 * dim, num_heads, **dd),
        )
        self.proj_drop = nn.Dropout(proj_drop)

    def local_kernels(self, x_mean: torch.Tensor) -> torch.Tensor:
        """(B, C, 9): the 3 x 3 kernels, taps row by row, that the mean token (B, C) predicts."""
        return self.residual(x_mean.unsqueeze(2)).reshape(x_mean.shape[0], self.dim, 9)

    def _mix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x_mean: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Projected tokens (B, P + N, C) and the mean token (B, C) to what enters the output projection."""
        if self.kernel_func != "identity":
            q, k = feature_map(q, self.kernel_func), feature_map(k, self.kernel_func)
        kernels = self.local_kernels(x_mean)
        bias: torch.Tensor | None = None
        if self.get_v is not None:  # two depthwise convolutions of the same values are one
            kernels = kernels + self.get_v.weight.reshape(1, self.dim, 9)
            bias = self.get_v.bias
        return inline_mix(q, k, v, kernels, bias, self.num_heads, grid, self.num_prefix_tokens, self.scale)

    def forward(
        self,
        x: torch.Tensor,
        grid: tuple[int, int] | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        x_mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert attn_mask is None and not is_causal, "InLineAttention takes no mask"
        on = self.grid if grid is None else grid
        if self.proj is None:
            assert x_mean is not None, "InLineAttention of projected tokens needs x_mean, the mean of the block's input"
            return self._mix(x[0], x[1], x[2], x_mean, on)
        N = x.shape[1]
        torch._assert(
            on[0] * on[1] + self.num_prefix_tokens == N,
            f"InLineAttention: the tokens are not the grid's and {self.num_prefix_tokens} before it: pass their grid",
        )
        if self.qkv is not None:
            q, k, v = self.qkv(x).chunk(3, dim=2)
        elif self.q is not None and self.kv is not None:
            q = self.q(x)
            k, v = self.kv(x).chunk(2, dim=2)
        else:
            raise RuntimeError("InLineAttention has no projections")
        return self.proj_drop(self.proj(self._mix(q, k, v, x.mean(dim=1), on)))
