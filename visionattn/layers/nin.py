"""NiNformer's network-in-network block, arXiv 2403.02411 (Neural Computing and Applications 2025)."""

import torch
from torch import nn

from .registry import register_module


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear, dropout over the last axis, under the released parameter names."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim, **dd),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim, **dd),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Transpose(nn.Module):
    """(B, N, C) to (B, C, N) and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class MixerBlock(nn.Module):
    """MLP-Mixer block on tokens (B, num_patch, dim): mixing over tokens, then over channels, each residual."""

    def __init__(
        self,
        dim: int,
        num_patch: int,
        token_dim: int,
        channel_dim: int,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.token_mix = nn.Sequential(
            nn.LayerNorm(dim, **dd),
            Transpose(),
            FeedForward(num_patch, token_dim, dropout, **dd),
            Transpose(),
        )
        self.channel_mix = nn.Sequential(nn.LayerNorm(dim, **dd), FeedForward(dim, channel_dim, dropout, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.token_mix(x)
        return x + self.channel_mix(x)


class MixerGatingUnit(nn.Module):
    """``(n W + b) * mixer(n)``: a linear projection gated by an inner mixer block, which keeps its residuals."""

    def __init__(self, d_model: int, d_ffn: int, seq_len: int, dropout: float = 0.0, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.Mixer = MixerBlock(d_model, seq_len, d_ffn, d_ffn, dropout, **dd)
        self.proj = nn.Linear(d_model, d_model, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * self.Mixer(x)


@register_module("nin", "mixer")
class NiNBlock(nn.Module):
    """NiNformer block: gating unit and feed-forward, each residual, behind ONE shared layer norm.

    Args:
        d_model: C of the tokens (B, seq_len, C). ``dim`` is accepted for it.
        d_ffn: hidden width of all three feed-forwards (token mixing, channel mixing, block). ``ffn_dim`` is accepted.
        seq_len: number of tokens, which the token-mixing weights fix.
        dropout: dropout rate inside the feed-forwards.

    Raises:
        ValueError: where a size is missing; in forward, where the tokens or the grid are not seq_len.
    """

    def __init__(
        self,
        d_model: int | None = None,
        d_ffn: int | None = None,
        seq_len: int | None = None,
        dropout: float = 0.0,
        dim: int | None = None,
        ffn_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        d_model = dim if d_model is None else d_model
        d_ffn = ffn_dim if d_ffn is None else d_ffn
        if not (d_model and d_ffn and seq_len):
            raise ValueError(f"NiNBlock needs d_model, d_ffn and seq_len, got {d_model}, {d_ffn}, {seq_len}")
        self.seq_len = seq_len
        self.norm = nn.LayerNorm(d_model, **dd)
        self.mgu = MixerGatingUnit(d_model, d_ffn, seq_len, dropout, **dd)
        self.ffn = FeedForward(d_model, d_ffn, dropout, **dd)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        if grid is not None and grid[0] * grid[1] != self.seq_len:
            raise ValueError(f"NiNBlock: grid {grid} is not seq_len={self.seq_len}: build it for that number of tokens")
        x = x + self.mgu(self.norm(x))
        return x + self.ffn(self.norm(x))
