"""DiT and MoH-DiT: class-conditional diffusion transformers with adaLN-Zero blocks, plain or with routed heads.

Papers: 'Scalable Diffusion Models with Transformers' (ICCV 2023), https://arxiv.org/abs/2212.09748; 'MoH: Multi-Head
Attention as Mixture-of-Head Attention' (ICML 2025), https://arxiv.org/abs/2410.11842. Written from the formulas; the
parameters carry the names that both releases share. They take ``(x, t, y)``, so they are not timm models:
:func:`create_dit` builds them.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from timm.layers import Mlp, to_2tuple
from torch import nn

from visionattn._timm import checkpoint
from visionattn.layers.moh import MoHAttention, set_aux_weights

__all__ = ["DiT", "DiTBlock", "create_dit", "list_dits"]


def sincos_positions(dim: int, grid: tuple[int, int], device=None) -> torch.Tensor:
    """Fixed positions (H * W, dim) in float32: column index in the first half, row in the second, [sin, cos] each."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim / 4))

    def axis(size: int) -> torch.Tensor:
        angle = torch.arange(size, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    H, W = grid
    cols = axis(W)[None].expand(H, W, -1)
    rows = axis(H)[:, None].expand(H, W, -1)
    return torch.cat([cols, rows], dim=-1).reshape(H * W, dim).float()


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """(B, C, H, W) latents to tokens (B, N, hidden_size), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int, dd: dict):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Diffusion steps (B,), whole or not, to vectors (B, hidden_size): 256 sinusoids, then a two-layer network."""

    def __init__(self, hidden_size: int, dd: dict, frequencies: int = 256):
        super().__init__()
        self.half = frequencies // 2
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size, **dd), nn.SiLU(), nn.Linear(hidden_size, hidden_size, **dd)
        )

    def forward(self, t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``dtype``: to compute in where the weights' own type is for storage alone (float8, int8)."""
        steps = torch.arange(self.half, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(10000.0) * steps / self.half)
        kind = self.mlp[0].weight.dtype
        if not kind.is_floating_point or kind.itemsize == 1:  # stored in 8 bits; its hooks compute in another type
            kind = torch.float32 if dtype is None else dtype
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(kind))


class LabelEmbedder(nn.Module):
    """Class ids (B,) to vectors; ``num_classes`` is the null class, to which training drops some of the labels."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float, dd: dict):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size, **dd)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = y.masked_fill(drop, self.num_classes)
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """adaLN-Zero block on tokens x (B, N, hidden_size) under a condition c (B, hidden_size).

    Args:
        shared_head, routed_head: see :class:`MoHAttention`, with ``moh``; plain attention without it.
        head_dim: ``hidden_size // num_heads`` by default.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        moh: bool = False,
        shared_head: int | None = None,
        routed_head: int | None = None,
        head_dim: int | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False, **dd)
        self.attn = MoHAttention(
            hidden_size, num_heads, qkv_bias=True, moh=moh, shared_head=shared_head, routed_head=routed_head,
            head_dim=head_dim, backend=backend, **dd,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False, **dd)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU("tanh"), **dd)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size, **dd))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm and a linear to the pixels of a patch."""

    def __init__(self, hidden_size: int, outputs: int, dd: dict):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False, **dd)
        self.linear = nn.Linear(hidden_size, outputs, **dd)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size, **dd))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def _per_layer(name: str, value: int | Sequence[int] | None, depth: int) -> list[int | None]:
    if value is None or isinstance(value, int):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"DiT: {name} has {len(value)} entries: give one number, or depth={depth} of them")
    return list(value)


class DiT(nn.Module):
    """Diffusion transformer: noise (and variance) of latents x (B, C, H, W) at steps t (B,) for classes y (B,).

    Args:
        input_size: side or (H, W) of the latents that ``pos_embed`` is kept for; any multiple of the patch may come.
        patch_size, in_channels, hidden_size, depth, mlp_ratio: sizes.
        num_heads: one number (heads of ``hidden_size // num_heads``), or one a layer, of ``head_dim`` channels each.
        moh: routed heads, with ``shared_head`` and ``routed_head`` (k), one number or one a layer.
        num_classes, class_dropout_prob: classes, and the share of labels that training drops; above 0 there is a null
            class ``num_classes``.
        learn_sigma: twice the channels out, the second half interpolates the variance.
        aux_coefficient: weight of the mean load-balance loss (:func:`visionattn.layers.pop_aux_loss`).

    Raises:
        ValueError: for lists of another length than depth, latents that patches do not tile, heads that do not fit, or
            a hidden_size that is no multiple of 4.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int | Sequence[int] = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        moh: bool = False,
        shared_head: int | Sequence[int] | None = None,
        routed_head: int | Sequence[int] | None = None,
        head_dim: int | None = None,
        aux_coefficient: float = 0.01,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if hidden_size % 4 != 0:
            raise ValueError(f"DiT: hidden_size={hidden_size}: the positions' sines and cosines need a multiple of 4")
        if isinstance(num_heads, int):
            if hidden_size % num_heads != 0:
                raise ValueError(f"DiT: num_heads={num_heads} does not divide hidden_size={hidden_size}")
            head_dim = hidden_size // num_heads
        elif head_dim is None:
            raise ValueError("DiT: heads that differ from layer to layer need a head_dim")
        self.input_size = to_2tuple(input_size)
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grad_checkpointing = False
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, dd)
        self.t_embedder = TimestepEmbedder(hidden_size, dd)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob, dd)
        grid = self._grid(*self.input_size)
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], hidden_size, **dd), requires_grad=False)
        heads = _per_layer("num_heads", num_heads, depth)
        shared = _per_layer("shared_head", shared_head, depth)
        routed = _per_layer("routed_head", routed_head, depth)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, heads[i], mlp_ratio, moh, shared[i], routed[i], head_dim, backend, **dd)
            for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, dd)
        set_aux_weights(self, aux_coefficient)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            table = sincos_positions(self.pos_embed.shape[-1], self._grid(*self.input_size), self.pos_embed.device)
            self.pos_embed.copy_(table)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        last = (self.final_layer.linear, self.final_layer.adaLN_modulation[1])
        for layer in (*last, *(block.adaLN_modulation[1] for block in self.blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height % p != 0 or width % p != 0:
            raise ValueError(f"DiT: latents of {height} x {width} are not whole patches of {p}: pad or crop them")
        return height // p, width // p

    def condition(self, t: torch.Tensor, y: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(B, hidden_size): embedding of the steps plus that of the classes."""
        return self.t_embedder(t, dtype) + self.y_embedder(y)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(B, out_channels, H, W): predicted noise, then (``learn_sigma``) the variance's interpolation in -1..1."""
        grid = self._grid(x.shape[2], x.shape[3])
        positions = self.pos_embed
        if (x.shape[2], x.shape[3]) != self.input_size:
            positions = sincos_positions(self.pos_embed.shape[-1], grid, x.device)
        x = self.x_embedder(x)
        x = x + positions.to(x.dtype)
        c = self.condition(t, y, x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, c) if self.grad_checkpointing and self.training else block(x, c)
        x = self.final_layer(x, c)
        p = self.patch_size
        x = x.view(x.shape[0], grid[0], grid[1], p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, grid[0] * p, grid[1] * p)

    def forward_with_cfg(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, cfg_scale: float) -> torch.Tensor:
        """Classifier-free guidance as released: only the first three noise channels are guided.

        ``x``'s first half is taken for both halves of the batch; ``y`` holds the classes, then as many null classes.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :3].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


_SIZES = {
    "s": dict(depth=12, hidden_size=384, num_heads=6),
    "b": dict(depth=12, hidden_size=768, num_heads=12),
    "l": dict(depth=24, hidden_size=1024, num_heads=16),
    "xl": dict(depth=28, hidden_size=1152, num_heads=16),
}


def _runs(*pairs: tuple[int, int]) -> list[int]:
    """Values and how many layers in a row have them."""
    return [value for value, count in pairs for _ in range(count)]


_L_HEADS = dict(num_heads=_runs((8, 8), (16, 8), (24, 8)), head_dim=64)
_XL_HEADS = dict(num_heads=_runs((8, 9), (16, 10), (24, 9)), head_dim=72)
_MOH = {  # spec: MoH-DiT, shared heads and top-k of each layer
    "s_2_90": dict(shared_head=_runs((3, 8), (6, 4)), routed_head=_runs((2, 8), (0, 4))),
    "s_2_75": dict(shared_head=_runs((2, 2), (3, 8), (6, 2)), routed_head=_runs((1, 6), (2, 4), (0, 2))),
    "b_2_90": dict(shared_head=_runs((6, 5), (7, 5), (12, 2)), routed_head=_runs((4, 10), (0, 2))),
    "b_2_75": dict(shared_head=_runs((4, 2), (6, 8), (12, 2)), routed_head=_runs((2, 2), (3, 8), (0, 2))),
    "l_2_90": dict(_L_HEADS, shared_head=_runs((8, 8), (16, 16)), routed_head=_runs((0, 16), (3, 8))),
    "l_2_75": dict(_L_HEADS, shared_head=_runs((8, 16), (12, 8)), routed_head=_runs((0, 8), (4, 16))),
    "xl_2_90": dict(_XL_HEADS, shared_head=_runs((8, 9), (16, 19)), routed_head=_runs((0, 19), (3, 9))),
    "xl_2_75": dict(_XL_HEADS, shared_head=_runs((8, 9), (10, 10), (14, 9)), routed_head=_runs((0, 9), (2, 19))),
}
_CONFIGS: dict[str, dict[str, Any]] = {
    f"dit_{size}_{patch}": dict(config, patch_size=patch) for size, config in _SIZES.items() for patch in (2, 4, 8)
}
_CONFIGS |= {
    f"moh_dit_{name}": {**_SIZES[name.split("_")[0]], "patch_size": 2, "moh": True, **heads}
    for name, heads in _MOH.items()
}
_CONFIGS["test_moh_dit"] = dict(
    input_size=8, depth=2, hidden_size=48, num_heads=6, patch_size=2, num_classes=10, moh=True, shared_head=[2, 6],
    routed_head=[2, 0],
)  # fmt: skip


def list_dits() -> list[str]:
    """Sorted names that :func:`create_dit` knows."""
    return sorted(_CONFIGS)


def create_dit(name: str, checkpoint: str | None = None, **overrides: Any) -> DiT:
    """Builds a (MoH-)DiT by name: ``dit_{s,b,l,xl}_{2,4,8}``, ``moh_dit_{s,b,l,xl}_2_{90,75}``.

    Args:
        checkpoint: a file of weights under facebook's, MoH's or diffusers' names, wrapped or not (an EMA wins); read
            with PyTorch's safe reader.
        overrides: arguments of :class:`DiT`, ``input_size=64`` for 512 px for example.

    Raises:
        ValueError: for an unknown name, or values that the model refuses.
        TypeError: for an argument that DiT does not have.
        FileNotFoundError, CheckpointError: for a file that is not there, or does not fit.
    """
    if name not in _CONFIGS:
        near = get_close_matches(str(name), _CONFIGS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list_dits())}"
        raise ValueError(f"no DiT is called {name!r}: {hint}")
    model = DiT(**{**_CONFIGS[name], **overrides})
    if checkpoint is not None:
        from .dit_convert import load_dit

        load_dit(model, checkpoint)
    return model
