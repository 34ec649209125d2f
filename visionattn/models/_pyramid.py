"""What the hosts with four stages (Swin, CSWin, PVT) share: head, features at strides 4, 8, 16 and 32, pruning."""

from typing import Any

import torch
from timm.layers import LayerNorm, SelectAdaptivePool2d, get_device_dtype, register_notrace_module, trunc_normal_
from torch import nn

from visionattn._timm import checkpoint, feature_take_indices
from visionattn.layers.cast import Conv2d, PatchConv2d

STAGES = 4


class Blocks(nn.ModuleList):
    """The blocks of a stage, each on maps (B, H, W, C)."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


@register_notrace_module
class PatchEmbed(nn.Module):
    """Convolution with kernel = stride, then layer norm over channels: (B, C, H, W) to (B, H / p, W / p, dim).

    Args:
        pad: fill maps up to a multiple of ``patch_size`` with zeros on the right and at the bottom; a rest is left out
            otherwise.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        norm: bool = True,
        eps: float = 1e-5,
        pad: bool = True,
        channels_last: bool = False,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = patch_size
        self.pad = pad
        self.channels_last = channels_last
        kind = Conv2d if channels_last else PatchConv2d
        self.proj = kind(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = LayerNorm(dim, eps=eps, **dd) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        p = self.patch_size
        down, right = (p - x.shape[2] % p) % p, (p - x.shape[3] % p) % p
        if self.pad and (down > 0 or right > 0):
            x = nn.functional.pad(x, (0, right, 0, down))
        x = self.proj(x).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


def init_host_weights(module: nn.Module) -> None:
    """The authors' initialisation: linear layers truncated normal 0.02, zero biases; the rest has its own already."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Pyramid(nn.Module):
    """A backbone of four stages. A host gives :meth:`_stages`, ``stage_names`` and :meth:`_truncate`.

    Maps are (B, H, W, C) inside and in ``forward_features``; ``forward_intermediates`` and ``features_only`` give
    (B, C, H, W) unless asked.
    """

    output_fmt = "NHWC"

    def _init_pyramid(
        self, in_chans: int, dims: list[int], num_classes: int, global_pool: str, drop_rate: float
    ) -> None:
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_stages = STAGES
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=self.stage_names[i]) for i, dim in enumerate(dims)
        ]
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)

    def _make_head(self, dims: list[int], final_norm: bool, out_norm: bool, dd: dict) -> None:
        self.norm = LayerNorm(dims[-1], eps=1e-5, **dd) if final_norm else nn.Identity()
        self.norm0 = LayerNorm(dims[0], eps=1e-5, **dd) if out_norm else None
        self.norm1 = LayerNorm(dims[1], eps=1e-5, **dd) if out_norm else None
        self.norm2 = LayerNorm(dims[2], eps=1e-5, **dd) if out_norm else None
        self.norm3 = LayerNorm(dims[3], eps=1e-5, **dd) if out_norm else None
        self.pool = SelectAdaptivePool2d(pool_type=self.global_pool, flatten=bool(self.global_pool), input_fmt="NHWC")
        self.head_hidden_size = self.num_features * self.pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, self.num_classes, **dd) if self.num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises linear layers and, where ``needs_reset``, everything else too."""
        for module in self.modules():
            if module is not self and needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.apply(init_host_weights)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        if global_pool is not None:
            self.global_pool = global_pool
            self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt="NHWC")
        self.head_hidden_size = self.num_features * self.pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _normalise(self, x: torch.Tensor, stage: int, norm: bool) -> torch.Tensor:
        """An output map with its own norm (``out_norm``), or with the final norm where that is asked for and fits."""
        if stage == 0 and self.norm0 is not None:
            return self.norm0(x)
        if stage == 1 and self.norm1 is not None:
            return self.norm1(x)
        if stage == 2 and self.norm2 is not None:
            return self.norm2(x)
        if stage == 3 and self.norm3 is not None:
            return self.norm3(x)
        if norm and stage == 3:
            return self.norm(x)
        return x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The output of ``forward_features`` and the maps of the chosen stages, at strides 4, 8, 16 and 32."""
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        last = max_index + 1 if stop_early else self.num_stages
        maps = self._stages(x, last)
        intermediates = []
        for i in range(last):
            if i in take_indices:
                y = self._normalise(maps[i], i, norm)
                intermediates.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        y = maps[-1]
        if last == STAGES:
            y = self.norm(y)
        return y, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the stages after the chosen ones, norms that nothing needs, and the head; returns the indices."""
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        cut = max_index + 1 < self.num_stages
        if prune_norm or cut:
            self.norm = nn.Identity()
        for i in range(STAGES):
            if i not in take_indices and getattr(self, f"norm{i}") is not None:
                setattr(self, f"norm{i}", None)
        if cut:
            self.num_stages = max_index + 1
            self._truncate(self.num_stages)
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self._stages(x, self.num_stages)[-1])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def _stages(self, x: torch.Tensor, count: int) -> list[torch.Tensor]:
        """The maps (B, H, W, C) of the first ``count`` stages, before downsampling."""
        raise NotImplementedError

    def _truncate(self, count: int) -> None:
        """Removes all stages but the first ``count``."""
        raise NotImplementedError


def host_group_matcher(stem: str, stages: str, coarse: bool) -> dict[str, Any]:
    """Parameter groups by depth: ``stages`` matches stage and block."""
    return dict(stem=stem, blocks=[(stages, None), (r"^norm\d?\.", (99999,))])
