"""Halo attention as a layer (HaloNet, CVPR 2021, arXiv 2103.12731, section 3).

The parameters lie as in timm's ``HaloAttn`` (``q``, ``kv``, ``pos_embed.{height,width}_rel``), so that its weights
load. The other public layout (``to_q``, ``to_kv``, ``to_out``, ``rel_pos_emb``) is converted when it is loaded.
"""

import torch
from timm.layers import make_divisible, register_notrace_module, trunc_normal_
from torch import nn

from visionattn.ops.halo import halo_attention_kv

from .mixer import Mixer
from .registry import register_module

_LUCID_NAMES = {
    "to_q.weight": "q.weight",
    "to_kv.weight": "kv.weight",
    "to_out.weight": "proj.weight",
    "to_out.bias": "proj.bias",
    "rel_pos_emb.rel_height": "pos_embed.height_rel",
    "rel_pos_emb.rel_width": "pos_embed.width_rel",
}


class RelativeTables(nn.Module):
    """The two relative tables of a layer, (2 * window - 1, D) each, shared by its heads."""

    def __init__(self, window: int, dim_head: int, device=None, dtype=None):
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.height_rel.shape[1] ** -0.5
        trunc_normal_(self.height_rel, std=std)
        trunc_normal_(self.width_rel, std=std)


@register_notrace_module  # a map or tokens: the branch in forward depends on the input
@register_module("halo", "mixer")
class HaloAttention(Mixer):
    """Blocked local self-attention: every ``block_size`` square of queries sees itself and a halo around it.

    Takes a map (B, C, H, W), or tokens (B, N, C) with their ``grid``; any size. Downsampling (``stride=2``)
    subsamples the queries, as the paper does, unless ``avg_down`` asks for pooling of the full output.

    Args:
        dim: input channels.
        dim_out: output channels, ``dim`` by default; the values are this wide.
        stride: 1 or 2.
        num_heads: heads; ``heads`` is accepted for it, and then means the other public layer: an output projection,
            scaled relative logits and ``dim_out = heads * dim_head`` values, masked borders unless ``border`` says.
        dim_head: width of a query and key head, ``dim_out * qk_ratio / num_heads`` by default.
        block_size, halo_size: b and h.
        qk_ratio: queries' and keys' width over ``dim_out``, where ``dim_head`` is not given.
        qkv_bias: biases of the projections.
        avg_down: 2 x 2 average pooling instead of strided queries (also where 2 does not divide the block).
        scale_pos_embed: scale the relative logits like q.k.
        border: ``'zero'`` keeps keys outside the map as zeros in the softmax (what the paper's text says, no mask),
            ``'mask'`` leaves them out.
        proj: output projection ``dim_out -> dim_out``; ``proj_bias``, ``proj_drop`` belong to it.
        grid: default grid of token inputs that come without one (as an ``attn_layer`` of timm's VisionTransformer).
        num_prefix_tokens: leading tokens that are not on the grid (class, registers): they pass unchanged.
        backend: of :func:`visionattn.ops.halo_attention`.
        qk_norm, scale_norm, attn_drop, norm_layer: what timm hands an ``attn_layer`` too; off is all they can be.

    Raises:
        ValueError: for sizes that do not fit; in forward, for tokens without a grid or of another number.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        border: str | None = None,
        proj: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        heads: int | None = None,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
        qk_norm: bool = False,
        scale_norm: bool = False,
        attn_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if qk_norm or scale_norm or attn_drop > 0.0:
            raise ValueError(
                f"HaloAttention has none of qk_norm={qk_norm}, scale_norm={scale_norm}, attn_drop={attn_drop}: "
                "switch them off"
            )
        dim_v = dim_out = dim if dim_out is None else dim_out
        if heads is not None:
            num_heads, dim_head, proj, scale_pos_embed = heads, 64 if dim_head is None else dim_head, True, True
            border = border or "mask"
            dim_v = heads * dim_head
        self.border = border or "zero"
        if stride not in (1, 2):
            raise ValueError(f"HaloAttention: stride={stride} is not supported: use 1 or 2")
        if self.border not in ("zero", "mask"):
            raise ValueError(f"HaloAttention: border={border!r} is unknown: use 'zero' or 'mask'")
        if num_heads < 1 or dim_v % num_heads != 0:
            raise ValueError(f"HaloAttention: num_heads={num_heads} does not divide dim_out={dim_v}: choose a divisor")
        if block_size < 1 or halo_size < 0:
            raise ValueError(f"HaloAttention: block_size={block_size}, halo_size={halo_size}: use >= 1 and >= 0")
        if dim_head is None:
            dim_head = make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        if dim < 1 or dim_v < 1 or dim_head < 1:
            raise ValueError(
                f"HaloAttention: dim={dim}, dim_out={dim_out}, num_heads={num_heads}, qk_ratio={qk_ratio} make "
                f"dim_head={dim_head}: use 1 channel or more, and give dim_head where qk_ratio leaves none"
            )
        if num_prefix_tokens > 0 and dim_out != dim:
            raise ValueError(
                f"HaloAttention: num_prefix_tokens={num_prefix_tokens} pass unchanged, with dim={dim} channels, beside "
                f"dim_out={dim_out}: use dim_out={dim}"
            )
        self.num_heads = num_heads
        self.dim_head = dim_head
        self.dim_head_v = dim_v // num_heads
        self.scale = self.dim_head**-0.5
        self.scale_pos_embed = scale_pos_embed
        self.block_size = block_size
        self.halo_size = halo_size
        self.backend = backend
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        pooled = stride > 1 and (avg_down or block_size % stride != 0)
        self.stride = 1 if pooled else stride

        dim_qk = num_heads * self.dim_head
        self.q = nn.Conv2d(dim, dim_qk, 1, stride=self.stride, bias=qkv_bias, **dd)
        self.kv = nn.Conv2d(dim, dim_qk + dim_v, 1, bias=qkv_bias, **dd)
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, self.dim_head, **dd)
        self.proj = nn.Conv2d(dim_v, dim_out, 1, bias=proj_bias, **dd) if proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)
        # an odd map keeps its last row and column, as strided queries (and a strided shortcut) do
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True) if pooled else nn.Identity()
        self.register_load_state_dict_pre_hook(_convert_layout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.q, self.kv):
            trunc_normal_(conv.weight, std=conv.weight.shape[1] ** -0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.pos_embed.reset_parameters()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, dim_out, ceil(H / stride), ceil(W / stride))."""
        q = self.q(x).permute(0, 2, 3, 1).unflatten(3, (self.num_heads, self.dim_head))
        # one head of kv is [its key | its value]
        kv = self.kv(x).permute(0, 2, 3, 1).unflatten(3, (self.num_heads, self.dim_head + self.dim_head_v))
        out = halo_attention_kv(
            q,
            kv,
            self.pos_embed.height_rel,
            self.pos_embed.width_rel,
            self.block_size,
            self.halo_size,
            self.stride,
            self.border,
            self.scale,
            self.scale_pos_embed,
            1,
            self.backend,
        )
        out = out.flatten(3).permute(0, 3, 1, 2)
        return self.pool(self.proj_drop(self.proj(out)))

    def forward(
        self,
        x: torch.Tensor,
        grid: tuple[int, int] | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        assert attn_mask is None and not is_causal, "HaloAttention takes no mask"
        if x.dim() == 4:
            return self.attend(x)
        grid = self.grid if grid is None else grid
        if grid is None:
            raise ValueError("HaloAttention: tokens came without their grid: pass grid=(H, W)")
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        B, N, C = tokens.shape
        if grid[0] * grid[1] != N:
            raise ValueError(
                f"HaloAttention: {N} tokens are not a {grid[0]} x {grid[1]} grid: pass the grid they lie on"
            )
        out = self.attend(tokens.transpose(1, 2).reshape(B, C, grid[0], grid[1])).flatten(2).transpose(1, 2)
        return torch.cat([prefix, out], dim=1) if self.num_prefix_tokens > 0 else out


def _convert_layout(module: HaloAttention, state_dict: dict, prefix: str, *args) -> None:
    """Renames the other public layout in place, and reorders its [all keys | all values] to one head after another."""
    for theirs, ours in _LUCID_NAMES.items():
        if prefix + theirs not in state_dict:
            continue
        value = state_dict.pop(prefix + theirs)
        if theirs == "to_kv.weight":
            heads = module.num_heads
            k, v = value.split([heads * module.dim_head, heads * module.dim_head_v])
            value = torch.cat([k.unflatten(0, (heads, -1)), v.unflatten(0, (heads, -1))], dim=1).flatten(0, 1)
        if theirs.startswith("to_") and theirs.endswith("weight"):
            value = value[:, :, None, None]
        state_dict[prefix + ours] = value
