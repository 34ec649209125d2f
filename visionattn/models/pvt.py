"""Pyramid Vision Transformer v1 (without class token) as a host: its attention is an argument.

Paper of the host: 'Pyramid Vision Transformer' (ICCV 2021), https://arxiv.org/abs/2102.12122. Every stage has its own
learned positions; there is no norm behind the last one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from torch import nn

from visionattn._timm import update_model_input_size
from visionattn.layers.cast import Mlp, PreNorm, ResidualNorm
from visionattn.layers.window import SpatialReductionAttention

from ._plan import agent_shapes_of, make_mixer, mixes, numbers
from ._pyramid import STAGES, Blocks, PatchEmbed, Pyramid
from ._resize import checked_size, resize_positions

__all__ = ["PVTHost"]


class PVTBlock(nn.Module):
    """Norm, attention, norm, MLP, on maps (B, H, W, C); ``attn`` takes (tokens, grid)."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = PreNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = ResidualNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        y = self.attn(self.norm1(x).reshape(B, H * W, C), (H, W))
        x, y = self.norm2(x, self.drop_path(y.reshape(B, H, W, C)))
        return x + self.drop_path(self.mlp(y))


@register_notrace_module  # whether the table is resized depends on the input's size
class AddPositions(nn.Module):
    """A map (B, H, W, C) plus a table of positions (1, h * w, C), resized bilinearly to the map, then dropout."""

    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, table: torch.Tensor, made_for: tuple[int, int]) -> torch.Tensor:
        H, W, C = x.shape[1], x.shape[2], x.shape[3]
        return self.drop(x + resize_positions(table, made_for, H, W, 0, "bilinear").reshape(1, H, W, C))


class PVTHost(Pyramid):
    """PVT v1 with any attention, at any input size of at least 32 px: positions (bilinearly) and tables follow the map.

    Args:
        img_size: input size that positions and tables are made for.
        embed_dims, depths, num_heads, mlp_ratios: per stage.
        attn_layer, attn_type, agent_num, agent_shapes, attn_args: as :class:`visionattn.models.swin.SwinHost` has them;
            ``out_norm`` too, though the authors' copies for dense prediction have no norms here.
        sr_ratios: spatial reduction of the softmax stages.
        agent_sr_ratios: of the mechanism's stages; ``la_sr_ratios`` is accepted for it.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: of the head, MLPs and projections, attention, blocks.

    Raises:
        ValueError: for settings that do not fit together.
    """

    stage_names = ("block1", "block2", "block3", "block4")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_layer: str | type[nn.Module] = "agent",
        attn_type: str = "BBBB",
        sr_ratios: int | str | Sequence[int] = (8, 4, 2, 1),
        agent_sr_ratios: int | str | Sequence[int] = "1111",
        la_sr_ratios: int | str | Sequence[int] | None = None,
        agent_num: int | str | Sequence[int] | None = None,
        agent_shapes: Sequence | None = None,
        out_norm: bool = False,
        attn_args: dict[str, Any] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if any(len(v) != STAGES for v in (embed_dims, depths, num_heads, mlp_ratios)):
            raise ValueError(f"PVTHost: embed_dims, depths, num_heads and mlp_ratios need {STAGES} entries each")
        dims = list(embed_dims)
        self._init_pyramid(in_chans, dims, num_classes, global_pool, drop_rate)
        self.img_size = to_2tuple(img_size)
        self.grids = self._grids()
        if min(self.grids[-1]) < 1:
            raise ValueError(f"PVTHost: img_size={img_size} is too small for four stages: use at least 32")
        plan = mixes(attn_type, depths)
        agents = None if agent_num is None else numbers(agent_num, "agent_num", STAGES)
        shapes = agent_shapes_of(agent_shapes)
        soft = numbers(sr_ratios, "sr_ratios", STAGES)
        reduced = numbers(agent_sr_ratios if la_sr_ratios is None else la_sr_ratios, "agent_sr_ratios", STAGES)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        common = dict(qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd)

        def embed(stage: int) -> PatchEmbed:
            before = in_chans if stage == 0 else dims[stage - 1]
            side = 4 if stage == 0 else 2
            return PatchEmbed(before, dims[stage], side, pad=False, channels_last=stage > 0, **dd)

        def positions(stage: int) -> nn.Parameter:
            height, width = self.grids[stage]
            return nn.Parameter(torch.empty(1, height * width, dims[stage], **dd))

        def blocks(stage: int) -> Blocks:
            dim, heads = dims[stage], num_heads[stage]
            asked = dict(attn_args or {})
            if agents is not None:
                asked["agent_num"] = agents[stage]
            if shapes[stage] is not None:
                asked["agent_shape"] = shapes[stage]
            built = []
            for i, mixed in enumerate(plan[stage]):
                if mixed:
                    made_for = dict(window_size=self.grids[stage], sr_ratio=reduced[stage])
                    attn = make_mixer(attn_layer, dim, heads, asked, **made_for, **common)
                else:
                    attn = SpatialReductionAttention(dim, heads, soft[stage], **common)
                drops = dict(proj_drop=proj_drop_rate, drop_path=rates[stage][i])
                built.append(PVTBlock(dim, attn, mlp_ratios[stage], **drops, **dd))
            return Blocks(built)

        self.patch_embed1, self.patch_embed2, self.patch_embed3, self.patch_embed4 = map(embed, range(STAGES))
        self.pos_embed1, self.pos_embed2, self.pos_embed3, self.pos_embed4 = map(positions, range(STAGES))
        self.block1, self.block2, self.block3, self.block4 = map(blocks, range(STAGES))
        self.place = AddPositions(proj_drop_rate)
        self._make_head(dims, False, out_norm, dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        for stage in range(1, self.num_stages + 1):
            trunc_normal_(getattr(self, f"pos_embed{stage}"), std=0.02)

    def _grids(self) -> list[tuple[int, int]]:
        return [(self.img_size[0] // r, self.img_size[1] // r) for r in (4, 8, 16, 32)]

    @torch.jit.ignore
    def position_grid(self, name: str) -> tuple[int, int]:
        """The map that the table ``name`` (``pos_embed1`` ...) belongs to."""
        return self.grids[int(name[-1]) - 1]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Makes the model one for another size, positions and tables resized as the authors' loader does."""
        old = self.grids
        self.img_size = self.img_size if img_size is None else checked_size(img_size, 32)
        self.grids = self._grids()
        for stage in range(self.num_stages):
            name, grid = f"pos_embed{stage + 1}", self.grids[stage]
            table = getattr(self, name)
            if grid != old[stage]:
                with torch.no_grad():
                    value = resize_positions(table, old[stage], grid[0], grid[1], 0, "bicubic")
                setattr(self, name, nn.Parameter(value, requires_grad=table.requires_grad))
            for block in getattr(self, f"block{stage + 1}"):
                if hasattr(block.attn, "set_grid"):
                    block.attn.set_grid(grid)
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()  # the authors' list has only a class token, which this PVT lacks: positions are decayed

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^(?:patch_embed1|pos_embed1)"
        if coarse:
            return dict(stem=stem, blocks=r"^(?:block|patch_embed|pos_embed)(\d+)")
        return dict(
            stem=stem,
            blocks=[
                (r"^(?:patch_embed|pos_embed)(\d+)", (0,)),
                (r"^block(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    def _stages(self, x: torch.Tensor, count: int) -> list[torch.Tensor]:
        x = self.block1(self.place(self.patch_embed1(x), self.pos_embed1, self.grids[0]))
        maps = [x]
        if count > 1 and self.patch_embed2 is not None and self.pos_embed2 is not None and self.block2 is not None:
            x = self.block2(self.place(self.patch_embed2(x), self.pos_embed2, self.grids[1]))
            maps.append(x)
        if count > 2 and self.patch_embed3 is not None and self.pos_embed3 is not None and self.block3 is not None:
            x = self.block3(self.place(self.patch_embed3(x), self.pos_embed3, self.grids[2]))
            maps.append(x)
        if count > 3 and self.patch_embed4 is not None and self.pos_embed4 is not None and self.block4 is not None:
            x = self.block4(self.place(self.patch_embed4(x), self.pos_embed4, self.grids[3]))
            maps.append(x)
        return maps

    def _truncate(self, count: int) -> None:
        for stage in range(count + 1, STAGES + 1):
            for name in ("patch_embed", "pos_embed", "block"):
                setattr(self, f"{name}{stage}", None)
