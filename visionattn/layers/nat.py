"""How NAT and DiNAT (arXiv 2204.07143, section 3.3; 2209.15001) make and shrink their maps, channels last.

DiNAT_s has Swin's ways (arXiv 2103.14030, section 3.1) in their place.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn


@register_notrace_function
def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """(B, H, W, C) with zeros at the bottom and right, so that ``multiple`` divides H and W."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    if bottom > 0 or right > 0:
        x = F.pad(x, [0, 0, 0, right, 0, bottom])
    return x


class ConvTokenizer(nn.Module):
    """Two strided 3 x 3 convolutions with nothing between them, and a norm; images to maps (B, H / 4, W / 4, C)."""

    def __init__(self, in_chans: int, dim: int, norm_layer, dd: dict):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchTokenizer(nn.Module):
    """One 4 x 4 convolution of stride 4 and a norm (Swin's); a partial patch is filled with zeros."""

    def __init__(self, in_chans: int, dim: int, norm_layer, dd: dict):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """A strided 3 x 3 convolution and a norm, on maps (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int, norm_layer, dd: dict):
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """A norm and a projection of 2 x 2 neighbours (Swin's), on maps (B, H, W, C); odd sides are filled with zeros."""

    def __init__(self, in_dim: int, dim: int, norm_layer, dd: dict):
        super().__init__()
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, **dd)
        self.norm = norm_layer(4 * in_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_to_multiple(x, 2)
        top, bottom = x[:, 0::2], x[:, 1::2]
        x = torch.cat([top[:, :, 0::2], bottom[:, :, 0::2], top[:, :, 1::2], bottom[:, :, 1::2]], dim=-1)
        return self.reduction(self.norm(x))
