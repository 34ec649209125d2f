"""Magnitude-aware linear attention as a layer (MALA, ICCV 2025, arXiv 2507.00698), and its softmax twin."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple
from torch import nn

from visionattn.ops.linear import mala_mix, rotary_lines, rotary_softmax_mix, rotary_tables

from .cast import Conv2d, KeepsCast, scaled
from .mixer import Mixer
from .registry import register_module

ATTENTION = ("linear", "softmax")
_STORED = 256  # positions along one axis whose sines are kept: 1024 px at stride 4


@register_notrace_module  # the grid, which a tracer doesn't know, decides its shapes
class RotaryEmbedding(nn.Module):
    """Rotary tables of a grid for heads of D channels; raw token positions, no learned part.

    What is stored is a line of sines and cosines, not a table per size: two small kernels make any grid's table, in
    eager mode, in TorchScript, and inside an exported or compiled program alike.
    """

    def __init__(self, head_dim: int, device=None, dtype=None):
        super().__init__()
        if head_dim % 4 != 0:
            raise ValueError(
                f"RotaryEmbedding: heads of {head_dim} channels can't be rotated by rows and columns: "
                "choose num_heads so that dim / num_heads is a multiple of 4"
            )
        self.head_dim = head_dim
        lines = rotary_lines(_STORED, head_dim, device)
        self.register_buffer("lines", lines if dtype is None else lines.to(dtype), persistent=False)

    def reset_parameters(self) -> None:
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        with torch.no_grad():
            self.lines.copy_(rotary_lines(self.lines.shape[1], self.head_dim, self.lines.device))

    def forward(self, grid: tuple[int, int], prefix: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """sin, cos (prefix + H * W, D) in ``dtype``; prefix tokens are not turned."""
        H, W = grid
        if not torch.jit.is_scripting() and (isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt)):
            # a program for any size must not ask whether the size is stored
            lines = rotary_lines(H + W, self.head_dim, self.lines.device).to(dtype)
        elif max(H, W) > self.lines.shape[1]:
            lines = rotary_lines(max(H, W), self.head_dim, self.lines.device).to(dtype)
        else:
            lines = self.lines.to(dtype)
        sin, cos = rotary_tables(lines[:, :H], lines[:, :W])
        if prefix > 0:
            sin, cos = F.pad(sin, (0, 0, prefix, 0)), F.pad(cos, (0, 0, prefix, 0), value=1.0)
        return sin, cos


@register_notrace_module
class PointwiseConv(KeepsCast, nn.Conv2d):
    """A 1 x 1 convolution, with a convolution's parameters, of tokens (..., C): one matrix product."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """``scale``: factors of the output channels. They go onto the weights, which saves passes over the tokens."""
        if torch.jit.is_scripting():
            weight, bias = scaled(self.weight, self.bias, scale)
        else:
            weight, bias = self.cast(scale)
        return F.linear(x, weight.flatten(1), bias)


@register_notrace_module  # the grid decides its shapes
@register_module("mala", "mixer")
class MALA(Mixer):
    """MALA of tokens (B, P + H * W, C) on a grid (H, W), with P prefix tokens, its local term and its gate.

    ``proj((attention(q, k, v) + dwconv5x5(v)) * o)``, with q, k, v and the gate o of one projection; q and k are
    rotated by their rows and columns. The layer has no table, so it takes any grid. Prefix tokens take part in the
    attention, unrotated and without a local term. A map (B, C, H, W) is taken too, and given back as one.

    Args:
        dim: C.
        num_heads: heads; must divide dim into multiples of 4.
        attn_type: ``'linear'`` (MALA), or ``'softmax'``, softmax attention in the same layer (the paper's last stages).
        qkv_bias, proj_bias: biases of the projections.
        grid: grid of token inputs that come without one; ``window_size`` is accepted for it.
        num_prefix_tokens: P.
        attn_drop: accepted and unused, there are no weights to drop.
        proj_drop: dropout of the output.
        backend: of the linear attention, see :func:`visionattn.ops.linear.mala_mix`.
        own_tables: False for a host that hands over one grid's tables to many layers.
        qk_norm, scale_norm, norm_layer: what timm hands an ``attn_layer`` too; off is all they can be.

    Raises:
        ValueError: for sizes that do not fit, an unknown ``attn_type``; in forward, for another number of tokens than
            the grid has.
    """

    grid: tuple[int, int]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_type: str = "linear",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        grid: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        own_tables: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: type[nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if qk_norm or scale_norm:
            raise ValueError(f"MALA has neither qk_norm={qk_norm} nor scale_norm={scale_norm}: switch them off")
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"MALA: num_heads={num_heads} does not divide dim={dim}: choose a divisor")
        if attn_type not in ATTENTION:
            raise ValueError(f"MALA: attn_type={attn_type!r} is unknown: use one of {', '.join(ATTENTION)}")
        grid = window_size if grid is None else grid
        self.grid = to_2tuple(14 if grid is None else grid)
        self.dim = dim
        self.num_heads = num_heads
        self.linear = attn_type == "linear"
        self.num_prefix_tokens = num_prefix_tokens
        self.backend = backend
        self.rope = RotaryEmbedding(dim // num_heads, device=device) if own_tables else None
        self.qkvo = PointwiseConv(dim, 4 * dim, bias=qkv_bias, **dd)
        self.lepe = Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = PointwiseConv(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: torch.Tensor,
        grid: tuple[int, int] | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        layer_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mixed tokens; ``tables``: the grid's sines and cosines, ``layer_scale``: C factors of the output."""
        assert attn_mask is None and not is_causal, "MALA takes no mask"
        as_map = x.ndim == 4
        on = self.grid if grid is None else grid
        if as_map:
            on = (x.shape[2], x.shape[3])
            x = x.flatten(2).transpose(1, 2)
        torch._assert(
            x.shape[1] == on[0] * on[1] + self.num_prefix_tokens,
            f"MALA: the tokens are not the grid's and {self.num_prefix_tokens} before it: pass their grid",
        )
        x = self.qkvo(x)
        if tables is None:
            assert self.rope is not None, "MALA without own_tables needs the grid's tables"
            tables = self.rope(on, self.num_prefix_tokens, x.dtype)
        sin, cos = tables[0].to(x.dtype), tables[1].to(x.dtype)
        weight, bias = self.lepe.weight, self.lepe.bias
        if not torch.jit.is_scripting():
            weight, bias = self.lepe.cast()
        if self.linear:
            x = mala_mix(x, weight, bias, sin, cos, self.num_heads, on, self.backend)
        else:
            x = rotary_softmax_mix(x, weight, bias, sin, cos, self.num_heads, on)
        x = self.proj_drop(self.proj(x, layer_scale))
        if as_map:
            x = x.transpose(1, 2).reshape(x.shape[0], self.dim, on[0], on[1])
        return x
