"""Swin Transformer v1 as a host: its attention is an argument, stage by stage and block by block.

Paper of the host: 'Swin Transformer' (ICCV 2021), https://arxiv.org/abs/2103.14030. Agent Attention and InLine
attention put their layers into its leading stages, with windows as large as the map; the names are the authors'.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, register_notrace_module, to_2tuple
from torch import nn

from visionattn._timm import update_model_input_size
from visionattn.layers.cast import Linear, Mlp, PreNorm, ResidualNorm
from visionattn.layers.eval_cache import EvalCache
from visionattn.layers.stripes import pad_to, stripes, stripes_back
from visionattn.layers.window import WindowAttention, shift_mask

from ._plan import agent_shapes_of, make_mixer, mixes, numbers
from ._pyramid import STAGES, Blocks, PatchEmbed, Pyramid
from ._resize import checked_size

__all__ = ["SwinHost"]


@register_notrace_module  # padding and shift depend on the input's size
class SwinBlock(EvalCache):
    """Norm, attention in windows, norm, MLP, on maps (B, H, W, C).

    Args:
        attn: takes (tokens, grid, mask); a :class:`WindowAttention` where ``softmax``.
        resolution: the map that the block is made for; there, windows are clipped to the map and then never shifted.
        window_size: (h, w), clipped already unless ``dense``.
        shifts: shift by half a window.
        softmax: whether a shift needs its mask (the mechanisms ignore it, as released).
        dense: behave as the authors' backbones for detection do: windows are never clipped, and a mechanism sees the
            whole map at once.
    """

    softmax: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        resolution: tuple[int, int],
        window_size: tuple[int, int],
        shifts: bool = False,
        softmax: bool = True,
        dense: bool = False,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.softmax = softmax
        self.shifts = shifts
        self.dense = dense
        self.norm1 = PreNorm(dim, eps=1e-5, **dd)
        self.attn = attn
        self.norm2 = ResidualNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.set_resolution(resolution, window_size)

    @torch.jit.ignore
    def set_resolution(self, resolution: tuple[int, int], window_size: tuple[int, int]) -> None:
        """The map and the (clipped) window that the block is for; the attention's tables follow by their own method."""
        self.resolution: tuple[int, int] = resolution
        self.window_size: tuple[int, int] = window_size
        self.whole = not self.softmax and (self.dense or window_size == resolution)
        half = [side // 2 if self.shifts else 0 for side in window_size]
        self.shift: tuple[int, int] = (half[0], half[1])
        clipped = [0 if window >= side else s for window, side, s in zip(window_size, resolution, half, strict=True)]
        self.shift_at_home: tuple[int, int] = self.shift if self.dense else (clipped[0], clipped[1])

    @torch.jit.unused
    def _kept_mask(self, grid: tuple[int, int], shift: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        key = (grid, shift, like.dtype, like.device)
        return self.constant(key, lambda: shift_mask(grid, self.window_size, shift, like))

    def _windowed(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        at_home = self.resolution[0] == H and self.resolution[1] == W
        shift = self.shift_at_home if at_home else self.shift
        grid = pad_to((H, W), self.window_size)
        if grid[0] > H or grid[1] > W:
            x = F.pad(x, (0, 0, 0, grid[1] - W, 0, grid[0] - H))
        shifted = shift[0] > 0 or shift[1] > 0
        mask: torch.Tensor | None = None
        if shifted:
            x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
            if self.softmax:
                if torch.jit.is_scripting():
                    mask = shift_mask(grid, self.window_size, shift, x)
                else:
                    mask = self._kept_mask(grid, shift, x)
        x = stripes(x.reshape(B, grid[0] * grid[1], C), grid, self.window_size)
        x = self.attn(x, self.window_size, mask)
        x = stripes_back(x, B, grid, self.window_size).reshape(B, grid[0], grid[1], C)
        if shifted:
            x = torch.roll(x, (shift[0], shift[1]), dims=(1, 2))
        return x[:, :H, :W]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        y = self.norm1(x)
        if self.whole:
            y = self.attn(y.reshape(B, H * W, C), (H, W), None).reshape(B, H, W, C)
        else:
            y = self._windowed(y)
        x, y = self.norm2(x, self.drop_path(y))
        return x + self.drop_path(self.mlp(y))


@register_notrace_module
class PatchMerging(nn.Module):
    """2 x 2 neighbours side by side, norm, linear: (B, H, W, C) to (B, H / 2, W / 2, 2 C); odd sides are padded."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = PreNorm(4 * dim, eps=1e-5, **dd)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        if H % 2 > 0 or W % 2 > 0:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        H, W = (H + 1) // 2, (W + 1) // 2
        # columns outside, rows inside: (0, 0), (1, 0), (0, 1), (1, 1)
        x = x.reshape(B, H, 2, W, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """The blocks of a stage, and the merging behind them, which the model calls after it took the stage's map."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = Blocks(blocks)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class SwinHost(Pyramid):
    """Swin v1 with any attention.

    At ``img_size`` the model is the authors' classifier. At any other size it behaves as their backbones for dense
    prediction: tables resized bilinearly, windows padded and shifted without regard to the map's size.

    Args:
        img_size: input size that the tables are made for.
        attn_layer: the mechanism: a registered mixer's name or a class.
        attn_type: a letter per stage, see :func:`visionattn.models._plan.mixes`.
        window_size: the mechanism's window W at stage 1, clipped to each stage's map; softmax blocks have
            max(7, W // 8). By default the whole map, a quarter of img_size.
        agent_num: agents per stage; only for mechanisms that take it.
        agent_shapes: the dense copies' ``downstream_agent_shapes``: (p, r) agents per stage. Switches to their
            behaviour at every size.
        out_norm: a norm per output map (``norm0`` ... ``norm3``), as the dense copies have; switches too.
        attn_args: further arguments of the mechanism.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: of the head, MLPs and projections, attention, blocks.

    Raises:
        ValueError: for settings that do not fit together.
    """

    stage_names = ("layers.0", "layers.1", "layers.2", "layers.3")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_layer: str | type[nn.Module] = "agent",
        attn_type: str = "BBBB",
        window_size: int | tuple[int, int] | None = None,
        agent_num: int | str | Sequence[int] | None = None,
        agent_shapes: Sequence | None = None,
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
        if len(depths) != STAGES:
            raise ValueError(
                f"SwinHost: depths={depths} has {len(depths)} entries: give one for each of {STAGES} stages"
            )
        dims = [embed_dim * 2**i for i in range(STAGES)]
        self._init_pyramid(in_chans, dims, num_classes, global_pool, drop_rate)
        self.embed_dim = embed_dim
        self.img_size = to_2tuple(img_size)
        self.window_arg = None if window_size is None else to_2tuple(window_size)
        self.dense = out_norm or agent_shapes is not None
        plan = mixes(attn_type, depths)
        agents = None if agent_num is None else numbers(agent_num, "agent_num", STAGES)
        shapes = agent_shapes_of(agent_shapes)

        self.patch_embed = PatchEmbed(in_chans, embed_dim, 4, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        layers = []
        for stage, dim in enumerate(dims):
            asked = dict(attn_args or {})
            if agents is not None:
                asked["agent_num"] = agents[stage]
            if shapes[stage] is not None:
                asked["agent_shape"] = shapes[stage]
            blocks = []
            for i, mixed in enumerate(plan[stage]):
                resolution, window = self._geometry(stage, not mixed)
                common = dict(qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd)
                if mixed:
                    attn = make_mixer(attn_layer, dim, num_heads[stage], asked, window_size=window, **common)
                else:
                    attn = WindowAttention(dim, num_heads[stage], window, **common)
                blocks.append(
                    SwinBlock(
                        dim,
                        attn,
                        resolution,
                        window,
                        shifts=i % 2 == 1,
                        softmax=not mixed,
                        dense=self.dense,
                        mlp_ratio=mlp_ratio,
                        proj_drop=proj_drop_rate,
                        drop_path=rates[stage][i],
                        **dd,
                    )
                )
            layers.append(SwinStage(blocks, PatchMerging(dim, **dd) if stage + 1 < STAGES else nn.Identity()))
        self.layers = nn.ModuleList(layers)
        self._make_head(dims, True, out_norm, dd)
        self.init_weights(needs_reset=False)

    def _geometry(self, stage: int, softmax: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """The map and the window of a stage's blocks at ``img_size``."""
        sides = [-(-size // 4) for size in self.img_size]  # the stem pads, and so do the mergings
        for _ in range(stage):
            sides = [-(-side // 2) for side in sides]
        window = self.window_arg or tuple(size // 4 for size in self.img_size)
        if softmax:
            window = [max(7, side // 8) for side in window]
        if not (softmax and self.dense):
            window = [min(w, side) for w, side in zip(window, sides, strict=True)]
        return (sides[0], sides[1]), (max(1, window[0]), max(1, window[1]))

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Makes the model the classifier for another size, tables resized as the authors' loader does.

        Args:
            img_size: the new size; the present one by default.
            window_size: the mechanism's window; by default it follows the map, or stays what the constructor was given.
        """
        self.img_size = self.img_size if img_size is None else checked_size(img_size)
        self.window_arg = self.window_arg if window_size is None else to_2tuple(window_size)
        for stage, layer in enumerate(self.layers):
            for block in layer.blocks:
                resolution, window = self._geometry(stage, block.softmax)
                block.set_resolution(resolution, window)
                if hasattr(block.attn, "set_grid"):
                    block.attn.set_grid(window)
        update_model_input_size(self, self.img_size, window_size=self.window_arg)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if "relative_position_bias_table" in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)")
        return dict(
            stem=r"^patch_embed",
            blocks=[
                (r"^layers\.(\d+)\.downsample", (0,)),
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    def _stages(self, x: torch.Tensor, count: int) -> list[torch.Tensor]:
        x = self.patch_embed(x)
        maps: list[torch.Tensor] = []
        for i, layer in enumerate(self.layers):
            if i < count:
                x = layer(x)
                maps.append(x)
                if i + 1 < count:
                    x = layer.downsample(x)
        return maps

    def _truncate(self, count: int) -> None:
        self.layers = self.layers[:count]
        self.layers[-1].downsample = nn.Identity()
