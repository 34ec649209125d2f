"""Neighbourhood attention as a layer (NAT, CVPR 2023, arXiv 2204.07143; dilated: DiNAT, arXiv 2209.15001).

The parameters carry the released names (``rpb``, ``qkv``, ``proj``).
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import nn

from visionattn.ops.local import Neighborhood, local_attention
from visionattn.ops.local.patterns import is_whole
from visionattn.ops.neighborhood import choose_backend, fixed, neighborhood_attention, tiled_attention

from .mixer import Mixer
from .registry import register_module


@register_notrace_module  # padding depends on the input's size
@register_module("neighborhood", "mixer")
class NeighborhoodAttention(Mixer):
    """Multi-head attention of every token to the ``kernel_size`` tokens around it along each axis of its grid.

    Takes tokens (B, N, C) with their ``grid`` of 1, 2 or 3 lengths, or a channels-last map (B, ..., C). A side below
    kernel_size * dilation is zero-padded at its end, before the projection and unmasked, as the papers' networks do
    it, so every size goes.

    Args:
        dim: C.
        num_heads: heads, a divisor of ``dim``.
        kernel_size: window along each axis, one number or one for each of ``dims`` axes.
        dilation: step between the keys of a window, likewise; None is 1.
        stride: queries ``i // stride`` share a window (GNA, arXiv 2504.16922), likewise.
        causal: whether keys after the query are hidden, likewise.
        dims: axes of the grid; as many as a ``kernel_size`` or ``dilation`` of several numbers has.
        rel_pos_bias: learned biases ``rpb`` (heads, 2 * kernel_size - 1, ...) of the offsets key - query.
        qkv_bias, proj_bias: biases of the projections.
        qk_scale: factor of q.k, (dim / num_heads) ** -0.5 by default.
        attn_drop, proj_drop: dropout of attention weights and of the output.
        backend: of :func:`visionattn.ops.neighborhood.neighborhood_attention`.
        grid: default grid of tokens that come without one (as an ``attn_layer`` of timm's VisionTransformer).
        num_prefix_tokens: leading tokens that are not on the grid (class, registers): they see all tokens, and all
            tokens see them.
        qk_norm, scale_norm, norm_layer: what timm hands an ``attn_layer`` too; off is all they can be.

    Raises:
        ValueError: for sizes that do not fit; in forward, for tokens without a grid or of another number.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] | None = 1,
        stride: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        dims: int | None = None,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        grid: tuple[int, ...] | None = None,
        num_prefix_tokens: int = 0,
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
                f"NeighborhoodAttention has none of qk_norm={qk_norm}, scale_norm={scale_norm}: switch them off"
            )
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"NeighborhoodAttention: num_heads={num_heads} does not divide dim={dim}: use a divisor")
        dilation = 1 if dilation is None else dilation
        lengths = {len(value) for value in (kernel_size, dilation, stride, causal) if isinstance(value, (tuple, list))}
        dims = dims or (max(lengths) if lengths else 2)
        if lengths - {dims} or not 1 <= dims <= 3:
            raise ValueError(
                f"NeighborhoodAttention: kernel_size={kernel_size}, dilation={dilation}, stride={stride}, "
                f"causal={causal}: give one number, or one for each of dims={dims} axes (1 to 3)"
            )
        self.dims = dims
        self.kernel_size = _per_axis("kernel_size", kernel_size, dims)
        self.dilation = _per_axis("dilation", dilation, dims)
        self.stride = _per_axis("stride", stride, dims)
        self.causal = [bool(flag) for flag in _per_axis("causal", causal, dims)]
        least = [k * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        if min(least) < 1:
            raise ValueError(f"NeighborhoodAttention: kernel_size={kernel_size}, dilation={dilation}: use at least 1")
        self.least = least
        self.pattern = Neighborhood(
            tuple(self.kernel_size), tuple(self.stride), tuple(self.dilation), tuple(self.causal)
        )
        self.pattern.check(tuple(least))
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.backend = backend
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size), **dd))
        else:
            self.register_parameter("rpb", None)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linears and biases of offsets: normal of deviation 0.02, cut at 2; biases zero."""
        for linear in (self.qkv, self.proj):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(
        self,
        x: torch.Tensor,
        grid: list[int] | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        assert attn_mask is None and not is_causal, "NeighborhoodAttention takes no mask"
        if x.dim() == self.dims + 2:
            size = x.shape[1:-1]
            return self._mix(x, x.flatten(1, self.dims)[:, :0]).unflatten(1, size)
        if grid is None:
            grid = self._default_grid()
        tokens = x[:, self.num_prefix_tokens :]
        count = 1
        for length in grid:
            count = count * length
        if x.dim() != 3 or len(grid) != self.dims or count != tokens.shape[1]:
            raise ValueError(
                f"NeighborhoodAttention: x {list(x.shape)} less {self.num_prefix_tokens} prefix tokens is not a grid "
                f"{grid}: pass tokens (B, N, C) and the {self.dims} lengths of the grid they lie on"
            )
        return self._mix(tokens.unflatten(1, list(grid)), x[:, : self.num_prefix_tokens])

    def _default_grid(self) -> list[int]:
        if torch.jit.is_scripting() or self.grid is None:
            raise ValueError("NeighborhoodAttention: tokens came without their grid: pass grid, one length per axis")
        return list(self.grid)

    def _mix(self, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """A map (B, ..., C) and prefix tokens (B, P, C) to tokens (B, P + N, C)."""
        size: list[int] = []
        padded: list[int] = []
        pad: list[int] = []
        small = False
        for a in range(self.dims):
            side = x.shape[1 + a]
            size.append(side)
            if side < self.least[a]:
                small, side = True, self.least[a]
            padded.append(side)
            pad = [0, side - size[a]] + pad  # noqa: RUF005  (TorchScript has no unpacking)
        if small:
            x = F.pad(x, [0, 0] + pad)  # noqa: RUF005
        x = x.flatten(1, self.dims)
        has_prefix = prefix.shape[1] > 0
        if has_prefix:
            x = torch.cat([prefix, x], 1)
        qkv = self.qkv(x).unflatten(2, [3, self.num_heads, self.head_dim])
        out = self._attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], padded, prefix.shape[1]).flatten(2)
        if small:
            first, out = out[:, : prefix.shape[1]], out[:, prefix.shape[1] :].unflatten(1, padded)
            for a in range(self.dims):
                out = out.narrow(1 + a, 0, size[a])
            out = out.flatten(1, self.dims)
            if has_prefix:
                out = torch.cat([first, out], 1)
        return self.proj_drop(self.proj(out))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: list[int], prefix: int) -> torch.Tensor:
        dropout = self.attn_drop if self.training else 0.0
        backend = self.backend
        if torch.jit.is_scripting():
            assert prefix == 0, "NeighborhoodAttention: TorchScript has no prefix tokens here, use torch.export"
            backend = "tiles"
        elif prefix > 0:
            return self._attend_with_prefix(q, k, v, grid, prefix, dropout)
        elif backend == "auto":
            backend = choose_backend(q, k, v, self.pattern, self.dims, self.rpb, self.scale, dropout)
        if backend == "tiles":  # padding has seen to what the operator checks
            if not torch.jit.is_scripting():
                grid = [fixed(n) for n in grid]  # symbolic sides would be traced for minutes
            return tiled_attention(
                q, k, v, grid, self.kernel_size, self.dilation, self.stride, self.causal, self.rpb, self.scale, dropout
            )
        return self._attend_by(backend, q, k, v, grid, dropout)

    @torch.jit.unused
    def _attend_by(
        self, backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: list[int], dropout: float
    ) -> torch.Tensor:
        return neighborhood_attention(
            q, k, v, tuple(grid), self.pattern, bias=self.rpb, scale=self.scale, dropout=dropout, backend=backend
        )

    @torch.jit.unused
    def _attend_with_prefix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: list[int], prefix: int, dropout: float
    ) -> torch.Tensor:
        if dropout > 0.0:
            raise ValueError(f"NeighborhoodAttention: attn_drop={dropout} does not go with prefix tokens: use 0")
        backend = "auto" if self.backend == "tiles" else self.backend
        return local_attention(
            q, k, v, tuple(grid), self.pattern, text=prefix, bias=self.rpb, scale=self.scale, backend=backend
        )


def _per_axis(name: str, value, dims: int) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value] * dims
    if not all(is_whole(x) for x in values):
        raise ValueError(f"NeighborhoodAttention: {name}={value}: give whole numbers")
    return [int(x) for x in values]
