"""What token mixers share."""

from typing import Any

from torch import nn


class Mixer(nn.Module):
    """A module on tokens (B, N, C) and their grid (H, W)."""

    grid: tuple[int, int] | None
    num_prefix_tokens: int

    @classmethod
    def configured(cls, **defaults: Any) -> type["Mixer"]:
        """A class with other defaults, for hosts that build their attention themselves and hand it no grid.

        ``timm.create_model('vit_tiny_patch16_224', attn_layer=HaloAttention.configured(grid=(14, 14),
        num_prefix_tokens=1))``
        """

        class Configured(cls):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **{**defaults, **kwargs})

        Configured.__name__ = Configured.__qualname__ = cls.__name__
        return Configured
