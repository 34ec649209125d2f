"""Efficient Local Attention (ELA), arXiv 2403.01123.

timm's ``EfficientLocalAttn`` (``create_attn('ela')``) is another module: it has its own convolution and norm for each
direction, one normalisation group and a SiLU before the sigmoid. Weights and outputs are not interchangeable.
"""

from math import gcd

import torch
from torch import nn

from .registry import register_module

# kernel size, channels that one output channel of the convolution sees, groups of the norm (paper, section 3.3)
VERSIONS = {"t": (5, 1, 32), "b": (7, 1, 16), "s": (5, 8, 16), "l": (7, 8, 16)}


def parse_version(version: str) -> str:
    """``'t'``, ``'T'`` or ``'ELA-T'`` to ``'t'``; ValueError for a version that does not exist."""
    key = str(version).lower().removeprefix("ela").lstrip("-_")
    if key not in VERSIONS:
        raise ValueError(f"version={version!r} of ELA does not exist: use one of {', '.join(VERSIONS)}")
    return key


@register_module("ela_t", "channel", version="t")
@register_module("ela_b", "channel", version="b")
@register_module("ela_s", "channel", version="s")
@register_module("ela_l", "channel", version="l")
class ELA(nn.Module):
    """Gates a map by its row and column means, each passed through the same 1-D convolution and group norm.

    ``y = x * sigmoid(GN(conv(mean_w x))) * sigmoid(GN(conv(mean_h x)))`` (section 3.2). The norm's statistics are
    those of one sample and one direction. No channel reduction, no residual.

    Args:
        channels: C of the (B, C, H, W) maps.
        version: ``'t'`` (kernel 5, depthwise, 32 norm groups), ``'b'`` (7, depthwise, 16), ``'s'`` (5, C / 8
            convolution groups, 16) or ``'l'`` (7, C / 8, 16).
        kernel_size, conv_groups, gn_groups, conv_bias: override what the version fixes.

    Raises:
        ValueError: where the version does not exist or its groups do not divide the channels (ELA-T on 144).
    """

    def __init__(
        self,
        channels: int,
        version: str = "b",
        kernel_size: int | None = None,
        conv_groups: int | None = None,
        gn_groups: int | None = None,
        conv_bias: bool = False,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.version = parse_version(version)
        kernel, width, groups = VERSIONS[self.version]
        kernel_size = kernel if kernel_size is None else kernel_size
        asked, gn_groups = gn_groups, groups if gn_groups is None else gn_groups
        if gn_groups < 1:
            raise ValueError(f"ELA: gn_groups={gn_groups} is not positive: use a divisor of channels={channels}")
        if channels < 1 or channels % gn_groups != 0:
            fitting = [v for v, (_, _, g) in VERSIONS.items() if channels > 0 and channels % g == 0 and asked is None]
            raise ValueError(
                f"ELA-{self.version.upper()} needs channels divisible by its {gn_groups} normalisation groups, got "
                f"{channels}: "
                + (f"use version {', '.join(fitting)}" if fitting else "choose gn_groups that divide it")
            )
        conv_groups = max(channels // width, 1) if conv_groups is None else conv_groups
        if conv_groups < 1 or channels % conv_groups != 0:
            raise ValueError(f"ELA: conv_groups={conv_groups} does not divide channels={channels}: choose a divisor")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"ELA: kernel_size={kernel_size} is not odd and positive: use one that is, the map keeps its size"
            )
        self.channels = channels
        self.conv = nn.Conv1d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=conv_groups, bias=conv_bias, **dd
        )
        self.gn = nn.GroupNorm(gn_groups, channels, **dd)

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gates of rows (B, C, H) and of columns (B, C, W) of a map (B, C, H, W)."""
        a_h = self.gn(self.conv(x.mean(dim=3))).sigmoid()
        a_w = self.gn(self.conv(x.mean(dim=2))).sigmoid()
        return a_h, a_w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a_h, a_w = self.gates(x)
        return x * a_h.unsqueeze(3) * a_w.unsqueeze(2)

    @staticmethod
    def fit(channels: int, version: str = "b", **kwargs) -> dict[str, int]:
        """Groups in place of those of ``version`` that do not divide ``channels``; empty where all do."""
        _, width, groups = VERSIONS[parse_version(version)]
        fitted = {}
        if kwargs.get("gn_groups") is None and channels % groups:
            fitted["gn_groups"] = gcd(channels, groups)
        if kwargs.get("conv_groups") is None and channels % width:
            fitted["conv_groups"] = channels // gcd(channels, width)
        return fitted

    @torch.jit.ignore
    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the convolutions on a map of this (H, W), as the paper counts them."""
        return self.conv.weight.numel() * (grid[0] + grid[1])
