"""NiNformer: a transformer whose attention is a gate made by an inner MLP-Mixer block.

Paper: 'NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function' (Neural Computing and
Applications 2025), https://arxiv.org/abs/2403.02411. The number of tokens is baked into the token-mixing weights, so
the models have a fixed input size (``img_size``).
"""

from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import _assert, get_device_dtype, global_pool_nlc, to_2tuple
from torch import nn

from visionattn._timm import (
    checkpoint,
    checkpoint_seq,
    feature_take_indices,
    generate_default_cfgs,
    register_model,
)
from visionattn.layers.nin import NiNBlock

from ._checkpoint import build_model_with_cfg, unwrap_state_dict
from ._shipped import digits_cfgs

__all__ = ["NiNformer"]

POOLS = ("avg", "avgmax", "max", "")


class NiNformer(nn.Module):
    """NiNformer image classifier: patches, blocks, mean over tokens, linear; no positions, no final norm.

    Args:
        img_size: height and width of the input, fixed by the weights.
        patch_size: side of the patches; must divide img_size.
        embed_dim, ffn_dim: width of the tokens and of all feed-forwards.
        depth: number of blocks.
        drop_rate: dropout inside the feed-forwards (0.5 as released).

    Raises:
        ValueError: where patches do not tile the image, for no blocks, or an unknown pooling.
        AssertionError: in forward, for another input size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        embed_dim: int = 256,
        ffn_dim: int = 512,
        depth: int = 4,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.5,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if depth < 1:
            raise ValueError(f"NiNformer: depth={depth}: use 1 block or more")
        _check_pool(global_pool)
        self.img_size = to_2tuple(img_size)
        if any(size < patch_size or size % patch_size for size in self.img_size):
            raise ValueError(
                f"NiNformer: img_size={img_size} is not made of whole {patch_size} x {patch_size} patches: "
                "choose a multiple of patch_size"
            )
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patcher = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, **dd)
        seq_len = self.grid_size[0] * self.grid_size[1]
        self.model = nn.Sequential(*[NiNBlock(embed_dim, ffn_dim, seq_len, drop_rate, **dd) for _ in range(depth)])
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"model.{i}") for i in range(depth)]
        self.classifier = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^patcher", blocks=r"^model\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.classifier = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.classifier.train(self.training)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        for axis in (0, 1):  # one condition each: a symbolic trace can't join them
            _assert(
                x.shape[2 + axis] == self.img_size[axis],
                f"NiNformer: the input is not {self.img_size[0]} x {self.img_size[1]} px, which its token-mixing "
                "weights are made for: resize it, or build the model with its img_size",
            )
        return self.patcher(x).flatten(2).transpose(1, 2)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Final tokens (B, N, C) and the outputs of the chosen blocks, as maps (``'NCHW'``) or tokens (``'NLC'``)."""
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.model), indices)
        B = x.shape[0]
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice a ModuleList
            blocks = self.model
        else:
            blocks = self.model[: max_index + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                intermediates.append(x)
        if output_fmt == "NCHW":
            H, W = self.grid_size
            intermediates = [y.transpose(1, 2).reshape(B, -1, H, W).contiguous() for y in intermediates]
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the blocks after the chosen ones and the head; returns the indices."""
        take_indices, max_index = feature_take_indices(len(self.model), indices)
        self.model = self.model[: max_index + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.model, x)
        return self.model(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=0)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise ValueError(f"NiNformer: global_pool={global_pool!r} is unknown: use one of {', '.join(map(repr, POOLS))}")


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Opens wrappers; the names are the authors' own."""
    return unwrap_state_dict(state_dict)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,  # 0.5, as released
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patcher",
        "classifier": "classifier",
        "license": "bsd-3-clause",
        "paper_ids": "arXiv:2403.02411",
        "paper_name": "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        "origin_url": "https://github.com/Abdullah-88/NiNformer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "ninformer_patch4_32.untrained": _cfg(),
        "ninformer_patch4_28.untrained": _cfg(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,)),
        "ninformer_small_patch16_224.untrained": _cfg(input_size=(3, 224, 224), num_classes=1000, crop_pct=0.9),
        **digits_cfgs("test_ninformer", _cfg(num_classes=1000), 32),
    }
)


def _create_ninformer(variant: str, pretrained: bool = False, **kwargs: Any) -> NiNformer:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        NiNformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def ninformer_patch4_32(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """The released configuration (CIFAR, 32 px, 10 classes, 2,652,170 parameters)."""
    model_args = dict(patch_size=4, embed_dim=256, ffn_dim=512, depth=4, drop_rate=0.5)
    return _create_ninformer("ninformer_patch4_32", pretrained, **dict(model_args, **kwargs))


@register_model
def ninformer_patch4_28(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """The released configuration at MNIST's size (28 px, 1 channel)."""
    model_args = dict(patch_size=4, embed_dim=256, ffn_dim=512, depth=4, drop_rate=0.5)
    return _create_ninformer("ninformer_patch4_28", pretrained, **dict(model_args, **kwargs))


@register_model
def ninformer_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """A model of our own for 224 px: 384 wide, 12 blocks; not published."""
    model_args = dict(patch_size=16, embed_dim=384, ffn_dim=768, depth=12, drop_rate=0.0)
    return _create_ninformer("ninformer_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def test_ninformer(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """A small NiNformer for tests and demonstrations."""
    model_args = dict(patch_size=4, embed_dim=64, ffn_dim=128, depth=3, drop_rate=0.0)
    return _create_ninformer("test_ninformer", pretrained, **dict(model_args, **kwargs))
