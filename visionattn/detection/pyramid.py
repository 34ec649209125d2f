"""Simple feature pyramid: maps of four strides from the one of a plain vision transformer.

Paper: 'Exploring Plain Vision Transformer Backbones for Object Detection' (ECCV 2022), https://arxiv.org/abs/2203.16527,
section 3 and figure 2.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import nn

__all__ = ["SimpleFeaturePyramid"]


class SimpleFeaturePyramid(nn.Module):
    """(B, C, H, W) at ``stride`` to maps at ``strides``, by transposed convolutions and max pooling.

    Twice finer: a 2 x 2 transposed convolution of stride 2 that halves the channels; four times: two of them, with
    layer norm and GELU between. Twice coarser: max pooling.

    Args:
        channels: C.
        stride: of the input map, pixels.
        strides: of the output maps, pixels; each a power of two times ``stride``.
        out_channels: the width of a 1 x 1 and a 3 x 3 convolution, each with layer norm, behind every map, as in
            ViTDet; None for neither, where an FPN follows.

    Raises:
        ValueError: for strides that are not powers of two apart.
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        strides: Sequence[int] = (4, 8, 16, 32),
        out_channels: int | None = None,
    ):
        super().__init__()
        levels, self.channels = [], []
        for target in strides:
            times = math.log2(stride / target)
            if times != int(times):
                raise ValueError(
                    f"a pyramid with strides {tuple(strides)} can't be made of maps at stride {stride}, which is no "
                    "power of two: give patch_size=16, by which timm resamples the patch embedding"
                )
            layers, width = self._resample(channels, int(times))
            if out_channels is not None:
                layers += [nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
                layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)]
                width = out_channels
            levels.append(nn.Sequential(*layers))
            self.channels.append(width)
        self.levels = nn.ModuleList(levels)

    @staticmethod
    def _resample(channels: int, times: int) -> tuple[list[nn.Module], int]:
        """Layers that make a map 2^times as fine, and the channels behind them."""
        layers: list[nn.Module] = []
        for i in range(times):
            if i > 0:
                layers += [LayerNorm2d(channels), nn.GELU()]
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
            channels //= 2
        layers += [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(-times)]
        return layers, channels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [level(x) for level in self.levels]
