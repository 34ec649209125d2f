"""CSWin Transformer as a host: its attention is an argument, stage by stage and block by block.

Paper of the host: 'CSWin Transformer' (CVPR 2022), https://arxiv.org/abs/2107.00652. The block owns the projections;
each branch of it gets the projected queries, keys and values of its channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, calculate_drop_path_rates, register_notrace_module, to_2tuple
from torch import nn

from visionattn._timm import update_model_input_size
from visionattn.layers.cast import Conv2d, Linear, Mlp, PreNorm, ResidualNorm
from visionattn.layers.inline import InLineAttention
from visionattn.layers.stripes import stripe_shape
from visionattn.layers.window import StripeAttention

from ._plan import make_mixer, mixes, numbers
from ._pyramid import STAGES, Blocks, Pyramid
from ._resize import checked_size

__all__ = ["CSWinHost"]


@register_notrace_module  # branches and stripes depend on the input's size
class CSWinBlock(nn.Module):
    """Norm, projections, one or two branches of attention, projection, norm, MLP, on maps (B, H, W, C).

    Args:
        branches: one for all channels, or two for half of them each (vertical and horizontal stripes).
    """

    def __init__(
        self,
        dim: int,
        branches: list[nn.Module],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = PreNorm(dim, eps=1e-5, **dd)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attns = nn.ModuleList(branches)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm2 = ResidualNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        # InLine attention predicts its kernels from the mean of the block's input, before the norm
        self.wants_mean = any(isinstance(branch, InLineAttention) for branch in branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(B, H * W, 3, C).permute(2, 0, 1, 3)
        x_mean: torch.Tensor | None = None
        if self.wants_mean:
            x_mean = x.mean(dim=(1, 2)).to(qkv.dtype)
        width = C // len(self.attns)
        outs: list[torch.Tensor] = []
        for i, attn in enumerate(self.attns):
            part = qkv if width == C else qkv[:, :, :, i * width : (i + 1) * width]
            outs.append(attn(part, (H, W), x_mean=x_mean))
        y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        x, y = self.norm2(x, self.drop_path(self.proj_drop(self.proj(y)).reshape(B, H, W, C)))
        return x + self.drop_path(self.mlp(y))


class ToChannelsLast(nn.Module):
    """(B, C, H, W) to (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """3 x 3 convolution with stride 2, then norm: (B, H, W, C) to (B, H / 2, W / 2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CSWinHost(Pyramid):
    """CSWin with any attention that can take projected queries, keys and values.

    Any input size: stripes that do not tile a map are padded, and the padding is not attended to (a mechanism's stripes
    have no mask, and see zeros); a branch that covers the whole map goes on covering it.

    Args:
        img_size: input size that the tables are made for.
        split_size: width of the softmax stages' stripes, (1, 2, 7, 7) at 224 px; by default 7 becomes img_size // 32.
        la_split_size: width of the mechanism's stripes ('56-28-14-7'); by default the whole map of each stage.
            ``agent_split_size`` is accepted for it.
        attn_layer, attn_type, agent_num, attn_args, out_norm: as :class:`visionattn.models.swin.SwinHost` has them.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: of the head, MLPs and projections, attention, blocks.

    Raises:
        ValueError: for settings that do not fit together.
    """

    stage_names = ("stage1", "stage2", "stage3", "stage4")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attn_layer: str | type[nn.Module] = "agent",
        attn_type: str = "BBBB",
        split_size: int | str | Sequence[int] | None = None,
        la_split_size: int | str | Sequence[int] | None = None,
        agent_split_size: int | str | Sequence[int] | None = None,
        agent_num: int | str | Sequence[int] | None = None,
        out_norm: bool = False,
        attn_args: dict[str, Any] | None = None,
        mlp_ratio: float = 4.0,
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
        if len(depths) != STAGES or len(num_heads) != STAGES:
            raise ValueError(f"CSWinHost: depths={depths}, num_heads={num_heads}: give {STAGES} entries each")
        dims = [embed_dim * 2**i for i in range(STAGES)]
        self._init_pyramid(in_chans, dims, num_classes, global_pool, drop_rate)
        self.embed_dim = embed_dim
        self.img_size = to_2tuple(img_size)
        la_split_size = agent_split_size if la_split_size is None else la_split_size
        self.split_arg = None if split_size is None else numbers(split_size, "split_size", STAGES)
        self.mixer_split_arg = None if la_split_size is None else numbers(la_split_size, "la_split_size", STAGES)
        plan = mixes(attn_type, depths)
        agents = None if agent_num is None else numbers(agent_num, "agent_num", STAGES)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def branches(stage: int, mixed: bool) -> list[nn.Module]:
            resolution, split = self._geometry(stage, mixed)
            count = 1 if split == resolution or stage == STAGES - 1 else 2
            dim, heads = dims[stage] // count, num_heads[stage] // count
            asked = dict(attn_args or {})
            if agents is not None:
                asked["agent_num"] = agents[stage]
            made = []
            for i in range(count):
                place = dict(resolution=resolution, idx=-1 if count == 1 else i, split_size=split)
                if mixed:
                    made.append(make_mixer(attn_layer, dim, heads, {**asked, **place}, attn_drop=attn_drop_rate, **dd))
                else:
                    made.append(StripeAttention(dim, heads, **place, attn_drop=attn_drop_rate, **dd))
            return made

        def blocks(stage: int) -> Blocks:
            settings = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop_rate)
            return Blocks(
                [
                    CSWinBlock(dims[stage], branches(stage, mixed), **settings, drop_path=rates[stage][i], **dd)
                    for i, mixed in enumerate(plan[stage])
                ]
            )

        self.stage1_conv_embed = nn.Sequential(
            Conv2d(in_chans, embed_dim, 7, stride=4, padding=2, **dd),
            ToChannelsLast(),
            LayerNorm(embed_dim, eps=1e-5, **dd),
        )
        self.stage1, self.stage2, self.stage3, self.stage4 = map(blocks, range(STAGES))
        self.merge1, self.merge2, self.merge3 = (Merge(dims[i], dims[i + 1], **dd) for i in range(STAGES - 1))
        self._make_head(dims, True, out_norm, dd)
        self.init_weights(needs_reset=False)

    def _geometry(self, stage: int, mixed: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """A stage's map at ``img_size``, and the width (rows, columns) of its blocks' stripes."""
        sides = [max(1, (size - 3) // 4 + 1) for size in self.img_size]
        for _ in range(stage):
            sides = [(side + 1) // 2 for side in sides]
        resolution = (sides[0], sides[1])
        if mixed:
            split = resolution if self.mixer_split_arg is None else to_2tuple(self.mixer_split_arg[stage])
        elif self.split_arg is not None:
            split = to_2tuple(self.split_arg[stage])
        elif stage < 2:
            split = to_2tuple(stage + 1)
        else:
            split = tuple(max(7, size // 32) for size in self.img_size)
        return resolution, (min(split[0], sides[0]), min(split[1], sides[1]))

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        split_size: int | str | Sequence[int] | None = None,
        la_split_size: int | str | Sequence[int] | None = None,
    ) -> None:
        """Makes the model one for another size, tables resized as the authors' loader does; a block keeps its number of
        branches.

        Args:
            img_size: the new size; the present one by default.
            split_size, la_split_size: stripes, as the constructor has them; by default they follow the map, or stay
                what the constructor was given.
        """
        self.img_size = self.img_size if img_size is None else checked_size(img_size)
        if split_size is not None:
            self.split_arg = numbers(split_size, "split_size", STAGES)
        if la_split_size is not None:
            self.mixer_split_arg = numbers(la_split_size, "la_split_size", STAGES)
        for stage in range(self.num_stages):
            for block in getattr(self, f"stage{stage + 1}"):
                for attn in block.attns:
                    resolution, split = self._geometry(stage, not isinstance(attn, StripeAttention))
                    attn.split_size = split
                    if hasattr(attn, "set_grid"):
                        attn.set_grid(stripe_shape(attn.idx, split, resolution))
        update_model_input_size(self, self.img_size, split_size=self.split_arg, la_split_size=self.mixer_split_arg)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^stage1_conv_embed"
        if coarse:
            return dict(stem=stem, blocks=r"^(?:stage|merge)(\d+)")
        return dict(
            stem=stem,
            blocks=[(r"^merge(\d+)", (99,)), (r"^stage(\d+)\.(\d+)", None), (r"^norm", (99999,))],
        )

    def _stages(self, x: torch.Tensor, count: int) -> list[torch.Tensor]:
        x = self.stage1(self.stage1_conv_embed(x))
        maps = [x]
        if count > 1 and self.merge1 is not None and self.stage2 is not None:
            x = self.stage2(self.merge1(x))
            maps.append(x)
        if count > 2 and self.merge2 is not None and self.stage3 is not None:
            x = self.stage3(self.merge2(x))
            maps.append(x)
        if count > 3 and self.merge3 is not None and self.stage4 is not None:
            x = self.stage4(self.merge3(x))
            maps.append(x)
        return maps

    def _truncate(self, count: int) -> None:
        for stage in range(count + 1, STAGES + 1):
            setattr(self, f"stage{stage}", None)
            setattr(self, f"merge{stage - 1}", None)
