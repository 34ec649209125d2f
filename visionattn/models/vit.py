"""DeiT as a host: timm's VisionTransformer whose blocks hand their attention the grid of the patches.

Paper of the host: 'Training data-efficient image transformers' (ICML 2021), https://arxiv.org/abs/2012.12877.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, DropPath, LayerNorm, PatchEmbed, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from visionattn._timm import checkpoint, feature_take_indices, update_model_input_size
from visionattn.layers.cast import Mlp, PatchConv2d, PreNorm, ResidualNorm

from ._plan import make_mixer, numbers
from ._resize import checked_size, resize_positions

__all__ = ["ViTHost"]


class GridBlock(nn.Module):
    """Norm, attention, norm, MLP, on tokens whose grid is known; timm builds it with the arguments of its own block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        depth: int = 0,
        plan: Any = None,
        device=None,
        dtype=None,
        **unused: Any,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = PreNorm(dim, eps=1e-6, **dd)
        self.attn = plan(depth, dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.norm2 = ResidualNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x, y = self.norm2(x, self.drop_path(self.attn(self.norm1(x), grid)))
        return x + self.drop_path(self.mlp(y))


class PlainAttention(Attention):
    """timm's attention, which has no use for the grid."""

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class PatchProduct(PatchEmbed):
    """timm's patch embedding, its convolution as a matrix product."""

    def __init__(self, *args: Any, device=None, dtype=None, **kwargs: Any):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        conv = self.proj
        self.proj = PatchConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, bias=conv.bias is not None,
            device=device, dtype=dtype,
        )  # fmt: skip


class ViTHost(VisionTransformer):
    """A VisionTransformer (class token, learned positions) with any attention, at any input size.

    At sizes other than ``img_size``, positions are resized bicubically, as the authors' loader does, and the
    mechanism's tables bilinearly; sizes that the patches don't divide are padded with zeros on the right and at the
    bottom.

    Args:
        img_size: input size that positions and tables are made for.
        attn_layer: the mechanism: a registered mixer's name or a class; None for softmax attention.
        agent_layer: number of leading blocks with the mechanism (the rest have softmax attention); all by default.
        agent_num: agents, one number or four; blocks 0-1, 2-3, 4-9 and 10-11 have the four.
        attn_args: further arguments of the mechanism.

    Other arguments are timm's. Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_layer: str | type[nn.Module] | None = None,
        agent_layer: int | None = None,
        agent_num: int | str | Sequence[int] | None = None,
        attn_args: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        img_size = to_2tuple(img_size)
        grid = tuple(-(-size // patch_size) for size in img_size)
        leading = depth if agent_layer is None else agent_layer
        if attn_layer is None:
            leading = 0
        agents = None if agent_num is None else numbers(agent_num, "agent_num", 4)

        def plan(i: int, dim: int, heads: int, **common: Any) -> nn.Module:
            if i >= leading:
                return PlainAttention(dim, heads, **common)
            asked = dict(attn_args or {})
            if agents is not None:
                asked["agent_num"] = agents[0 if i < 2 else 1 if i < 4 else 2 if i < 10 else 3]
            return make_mixer(attn_layer, dim, heads, asked, window_size=grid, num_prefix_tokens=1, **common)

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            fc_norm=False,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=PatchProduct,
            norm_layer=partial(LayerNorm, eps=1e-6),
            block_fn=partial(GridBlock, plan=plan),
            device=device,
            dtype=dtype,
        )
        self.blocks = nn.ModuleList(self.blocks)  # a Sequential could not hand over the grid
        self.grid: tuple[int, int] = grid

    @torch.jit.ignore
    def position_grid(self, name: str) -> tuple[int, int]:
        """The map that the table of positions belongs to."""
        return self.grid

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Makes the model one for another size, positions and tables resized as the authors' loader does."""
        img_size = checked_size(self.patch_embed.img_size if img_size is None else img_size)
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        grid = tuple(-(-size // side) for size, side in zip(img_size, self.patch_embed.patch_size, strict=True))
        if grid != self.grid:
            table = self.pos_embed
            with torch.no_grad():
                value = resize_positions(table, self.grid, grid[0], grid[1], self.num_prefix_tokens, "bicubic")
            self.pos_embed = nn.Parameter(value, requires_grad=table.requires_grad)
            for block in self.blocks:
                if hasattr(block.attn, "set_grid"):
                    block.attn.set_grid(grid)
            self.grid = grid
        update_model_input_size(self, img_size, patch_size=patch_size)

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """A map of patches (B, H, W, C) to the class token and its patches, (B, 1 + H * W, C), with positions."""
        B, H, W, C = x.shape
        positions = resize_positions(self.pos_embed, self.grid, H, W, self.num_prefix_tokens, "bicubic")
        x = torch.cat([self.cls_token.expand(B, -1, -1), x.reshape(B, H * W, C)], dim=1)
        return self.pos_drop(x + positions)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = self._tokens(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        return self.norm(x)

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
        """Final tokens and the outputs of the chosen blocks, as maps (``'NCHW'``) or tokens (``'NLC'``).

        The class token is left out of them, unless ``return_prefix_tokens``.
        """
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x = self.patch_embed(x)
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        x = self._tokens(x)
        intermediates: list[torch.Tensor] = []
        if torch.jit.is_scripting() or not stop_early:
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, (H, W))
            else:
                x = block(x, (H, W))
            if i in take_indices:
                intermediates.append(self.norm(x) if norm else x)
        P = self.num_prefix_tokens
        prefix = [y[:, :P] for y in intermediates]
        intermediates = [y[:, P:] for y in intermediates]
        if output_fmt == "NCHW":
            intermediates = [y.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if not torch.jit.is_scripting() and return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix, strict=True))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
