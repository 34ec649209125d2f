"""Ultra-Lightweight Subspace Attention (ULSAM), arXiv 2006.15102 (WACV 2020)."""

from math import gcd

import torch
import torch.nn.functional as F
from torch import nn

from .registry import register_module


class SubSpace(nn.Module):
    """The attention map of one group of channels, as released (equations 5 and 6, with the norms of the code)."""

    def __init__(self, channels: int, norm: bool = True, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, bias=norm, **dd)
        # momentum 0.9 is the released value: new statistics weigh 0.9
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9, **dd) if norm else nn.Identity()
        self.conv_point = nn.Conv2d(channels, 1, 1, bias=norm, **dd)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9, **dd) if norm else nn.Identity()
        self.relu = nn.ReLU() if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, H, W) to its softmax over positions, (B, 1, H, W)."""
        x = self.relu(self.bn_dws(self.conv_dws(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        x = self.relu(self.bn_point(self.conv_point(x)))
        return x.flatten(2).softmax(dim=2).view_as(x)


@register_module("ulsam", "channel")
class ULSAM(nn.Module):
    """One spatial softmax map for each of g channel groups, multiplied in and added: ``y = x * A + x``.

    The published accounting is 2 m parameters for m channels; the released module has 5 m + 3 g, because its
    convolutions have biases and batch norms. ``form`` chooses.

    Args:
        channels: m, the channels of the (B, m, H, W) maps. ``nin`` is accepted for it.
        groups: g, the number of subspaces. ``num_splits`` is accepted for it.
        form: ``'released'`` (5 m + 3 g parameters, the module of the published code) or ``'printed'`` (2 m, the
            paper's formula: depthwise 1x1, max-pool, pointwise 1x1, softmax).
        nout, h, w: accepted for the released constructor's sake and not used, as there; ``nout`` must equal nin.

    Raises:
        ValueError: for an unknown form, or groups that do not divide the channels.
    """

    def __init__(
        self,
        channels: int | None = None,
        groups: int | None = None,
        form: str = "released",
        nin: int | None = None,
        nout: int | None = None,
        h: int | None = None,
        w: int | None = None,
        num_splits: int | None = None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        channels = nin if channels is None else channels
        num_splits = 4 if num_splits is None else num_splits
        groups = num_splits if groups is None else groups
        if channels is None or channels < 1:
            raise ValueError(f"ULSAM: channels={channels}: give the number of channels of the map")
        if nout is not None and nout != channels:
            raise ValueError(f"ULSAM: nout={nout} differs from nin={channels}: the module keeps its channels")
        if form not in ("released", "printed"):
            raise ValueError(f"ULSAM: form={form!r} is unknown: use 'released' or 'printed'")
        if groups < 1 or channels % groups != 0:
            raise ValueError(f"ULSAM: groups={groups} does not divide channels={channels}: choose a divisor")
        self.channels = channels
        self.groups = groups
        self.subspaces = nn.ModuleList(
            [SubSpace(channels // groups, norm=form == "released", **dd) for _ in range(groups)]
        )

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """The g spatial maps of (B, m, H, W), each summing to 1: (B, g, H, W)."""
        chunks = x.chunk(self.groups, dim=1)
        return torch.cat([subspace(chunks[i]) for i, subspace in enumerate(self.subspaces)], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attn = self.attention(x).repeat_interleave(self.channels // self.groups, dim=1)
        return x * attn + x

    @staticmethod
    def fit(channels: int, groups: int | None = None, num_splits: int | None = None, **kwargs) -> dict[str, int]:
        """Groups in place of those that do not divide ``channels``; empty where they do."""
        groups = next(g for g in (groups, num_splits, 4) if g is not None)
        return dict(groups=gcd(channels, groups)) if groups > 0 and channels % groups else {}

    @torch.jit.ignore
    def macs(self, grid: tuple[int, int]) -> int:
        """2 m h w, the published count: the depthwise and the pointwise convolution."""
        return 2 * self.channels * grid[0] * grid[1]
