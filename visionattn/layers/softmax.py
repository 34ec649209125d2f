"""Softmax attention over all tokens in the interface of a mixer: what the linear mechanisms are measured against."""

import torch
import torch.nn.functional as F
from torch import nn

from .cast import Linear
from .mixer import Mixer


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """The same values in rows of a multiple of 8, which fused attention would otherwise copy them to in every call."""
    columns = bias.shape[-1]
    return F.pad(bias, (0, -columns % 8))[..., :columns] if columns % 8 else bias.contiguous()


class SoftmaxAttention(Mixer):
    """``softmax(q k^T) v`` of tokens (B, N, C), fused, without positions.

    Args:
        dim: C.
        num_heads: heads; must divide dim.
        qkv_bias, attn_drop, proj_drop: as usual.

    Raises:
        ValueError: where num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"SoftmaxAttention: num_heads={num_heads} does not divide dim={dim}: choose a divisor")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int] | None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        B, N, C = x.shape
        heads = self.num_heads
        q, k, v = self.qkv(x).reshape(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))
