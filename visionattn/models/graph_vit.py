"""GraphViT: the graph transformer on images whose patches are the nodes of a graph.

Paper of the layer: 'A Generalization of Transformer Networks to Graphs' (DLG-AAAI 2021),
https://arxiv.org/abs/2012.09699. Nothing visual is published with it; the wiring is ours: patches, Laplacian encodings
of the patch grid, layers on the grid's graph (``graph_vit_*``) or on the k nearest neighbours in feature space, found
anew in each layer as Vision GNN (https://arxiv.org/abs/2206.00272) does (``graph_vit_knn_*``), whose depths and widths
they have.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    _assert,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    register_notrace_function,
    to_2tuple,
)
from torch import nn

from visionattn._timm import (
    checkpoint,
    feature_take_indices,
    generate_default_cfgs,
    register_model,
    update_model_input_size,
)
from visionattn.layers.graph_transformer import grid_neighbours
from visionattn.ops.graph import grid_laplacian_basis, neighbour_attention_reference

from ._checkpoint import build_model_with_cfg, unwrap_state_dict
from ._shipped import digits_cfgs

__all__ = ["GraphViT"]

register_notrace_function(neighbour_attention_reference)


class GridGraph(nn.Module):
    """Every patch and its 4 or 8 neighbours on the grid; the same in all layers."""

    def __init__(self, grid: tuple[int, int], k: int, device=None):
        super().__init__()
        self.k = k
        neighbour, valid = grid_neighbours(grid, k, device)
        self.register_buffer("neighbour", neighbour, persistent=False)
        self.register_buffer("valid", valid, persistent=False)

    def set_grid(self, grid: tuple[int, int]) -> None:
        self.neighbour, self.valid = grid_neighbours(grid, self.k, self.neighbour.device)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Neighbours (N, k) of tokens (B, N, C), and which of them lie on the grid."""
        return self.neighbour, self.valid


class KNNGraph(nn.Module):
    """Every patch and the k others whose features point in the most similar direction."""

    def __init__(self, grid: tuple[int, int], k: int, device=None):
        super().__init__()
        if k < 1:
            raise ValueError(f"GraphViT: k={k}: a patch needs 1 nearest neighbour at least")
        self.k = k
        self.set_grid(grid)

    def set_grid(self, grid: tuple[int, int]) -> None:
        if self.k > grid[0] * grid[1] - 1:
            raise ValueError(
                f"GraphViT: {grid[0]} x {grid[1]} patches have {grid[0] * grid[1] - 1} neighbours each, not "
                f"k={self.k}: choose a smaller k, or a larger image"
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Neighbours (B, N, k) of tokens (B, N, C); none of them pads."""
        x = F.normalize(x.detach(), dim=-1)
        similarity = x @ x.transpose(1, 2)
        itself = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) * 3.0  # cosines differ by 2 at most
        return torch.topk(similarity - itself, self.k, dim=-1)[1], None


class NeighbourAttention(nn.Module):
    """The paper's attention (equations 3 to 5) on graphs in which every node has the same number of neighbours."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.Q = nn.Linear(dim, dim, bias=False, **dd)
        self.K = nn.Linear(dim, dim, bias=False, **dd)
        self.V = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: torch.Tensor, neighbour: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        B, N, C = x.shape
        shape = (B, N, self.num_heads, C // self.num_heads)
        q, k, v = self.Q(x).reshape(shape), self.K(x).reshape(shape), self.V(x).reshape(shape)
        return neighbour_attention_reference(q, k, v, neighbour, valid).reshape(B, N, C)


class GraphViTBlock(nn.Module):
    """The paper's layer on tokens (B, N, C): attention and feed-forward, each residual, norms after them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        norm: str,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.batch_norm = norm == "bn"
        norm_layer = nn.BatchNorm1d if self.batch_norm else nn.LayerNorm
        self.attention = NeighbourAttention(dim, num_heads, **dd)
        self.O = nn.Linear(dim, dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.FFN_layer1 = nn.Linear(dim, 2 * dim, **dd)
        self.FFN_layer2 = nn.Linear(2 * dim, dim, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, neighbour: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        x = x + self.drop_path(self.O(self.drop(self.attention(x, neighbour, valid))))
        x = self.norm1(x.flatten(0, 1)).reshape(x.shape) if self.batch_norm else self.norm1(x)
        x = x + self.drop_path(self.FFN_layer2(self.drop(F.relu(self.FFN_layer1(x)))))
        return self.norm2(x.flatten(0, 1)).reshape(x.shape) if self.batch_norm else self.norm2(x)


class GraphViT(nn.Module):
    """Patches, their places in the grid's Laplacian basis, graph transformer layers, mean, linear.

    Args:
        img_size: height and width of the input; the graph is built for it (:meth:`set_input_size` changes it). Images
            that patches do not tile are padded with zeros at the bottom and right.
        patch_size: side of the patches.
        embed_dim, depth, num_heads: width and number of the layers, and their heads.
        k: neighbours of a patch: 4 or 8 on the grid, any number with ``knn``.
        knn: the nearest in feature space instead of the grid's.
        norm: 'bn' (the paper's better one) or 'ln' (independent of the batch).
        pos_enc_dim: columns of the grid's Laplacian basis, times sqrt(patches): each has mean square 1 at any size.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the classifier, in the layers, and of branches.

    Raises:
        ValueError: for an unknown norm, heads that do not divide the width, or k out of range; in forward, for another
            input size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        k: int = 8,
        knn: bool = False,
        norm: str = "bn",
        pos_enc_dim: int = 16,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if norm not in ("bn", "ln"):
            raise ValueError(f"GraphViT: norm={norm!r} is unknown: use 'bn' or 'ln'")
        if embed_dim % num_heads:
            raise ValueError(f"GraphViT: num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.patch_size, self.pos_enc_dim = patch_size, pos_enc_dim
        self.img_size, self.grid_size, self.padding = to_2tuple(img_size), (0, 0), (0, 0)
        self._measure()
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, **dd)
        self.register_buffer("basis", self._basis(device, dtype), persistent=False)
        self.embedding_lap_pos_enc = nn.Linear(pos_enc_dim, embed_dim, **dd)
        self.neighbours = (KNNGraph if knn else GridGraph)(self.grid_size, k, device=device)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.layers = nn.ModuleList(
            [GraphViTBlock(embed_dim, num_heads, norm, proj_drop_rate, rates[i], **dd) for i in range(depth)]
        )
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"layers.{i}") for i in range(depth)]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def _measure(self) -> None:
        H, W = self.img_size
        self.grid_size = (-(-H // self.patch_size), -(-W // self.patch_size))
        self.padding = (self.grid_size[0] * self.patch_size - H, self.grid_size[1] * self.patch_size - W)

    def _basis(self, device: Any, dtype: Any) -> torch.Tensor:
        count = self.grid_size[0] * self.grid_size[1]
        basis = grid_laplacian_basis(self.grid_size, self.pos_enc_dim) * count**0.5
        return basis.to(device=device or torch.get_default_device(), dtype=dtype or torch.get_default_dtype())

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Rebuilds the graph and the positions for another input size; no weight depends on it.

        Raises:
            ValueError: where k nearest neighbours are more than the other patches.
        """
        if img_size is None or to_2tuple(img_size) == self.img_size:
            return
        self.img_size = to_2tuple(img_size)
        self._measure()
        self.neighbours.set_grid(self.grid_size)
        self.basis = self._basis(self.basis.device, self.basis.dtype)
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^patch_embed|^embedding_lap_pos_enc", blocks=r"^layers\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        for axis in (0, 1):  # one condition each: a symbolic trace can't join them
            _assert(
                x.shape[2 + axis] == self.img_size[axis],
                f"GraphViT: the input is not {self.img_size[0]} x {self.img_size[1]} px, which its graph is made for: "
                "resize it, call set_input_size, or build the model with its img_size",
            )
        if self.padding[0] > 0 or self.padding[1] > 0:
            x = F.pad(x, (0, self.padding[1], 0, self.padding[0]))
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return x + self.embedding_lap_pos_enc(self.basis)

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
        """Final tokens (B, N, C) and the outputs of the chosen layers, as maps (``'NCHW'``) or tokens (``'NLC'``)."""
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        B = x.shape[0]
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice a ModuleList
            layers = self.layers
        else:
            layers = self.layers[: max_index + 1]
        for i, layer in enumerate(layers):
            neighbour, valid = self.neighbours(x)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x, neighbour, valid)
            else:
                x = layer(x, neighbour, valid)
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
        """Removes the layers after the chosen ones and the head; returns the indices."""
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: max_index + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self._embed(x)
        for layer in self.layers:
            neighbour, valid = self.neighbours(x)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x, neighbour, valid)
            else:
                x = layer(x, neighbour, valid)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=0))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Opens wrappers; nothing is published, so the names are our own."""
    return unwrap_state_dict(state_dict)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2012.09699",
        "paper_name": "A Generalization of Transformer Networks to Graphs",
        "origin_url": "https://github.com/graphdeeplearning/graphtransformer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "graph_vit_tiny_patch16_224.untrained": _cfg(),
        "graph_vit_small_patch16_224.untrained": _cfg(),
        "graph_vit_base_patch16_224.untrained": _cfg(),
        "graph_vit_knn_tiny_patch16_224.untrained": _cfg(),
        "graph_vit_knn_small_patch16_224.untrained": _cfg(),
        **digits_cfgs("test_graph_vit", _cfg(input_size=(3, 32, 32), crop_pct=1.0), 32),
    }
)


def _create_graph_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> GraphViT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        GraphViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def graph_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> GraphViT:
    """Patch grid with 8 neighbours, Vision GNN's tiny depth and width; not published."""
    model_args = dict(embed_dim=192, depth=12, num_heads=6)
    return _create_graph_vit("graph_vit_tiny_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def graph_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> GraphViT:
    """Patch grid with 8 neighbours, Vision GNN's small depth and width; not published."""
    model_args = dict(embed_dim=320, depth=16, num_heads=10)
    return _create_graph_vit("graph_vit_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def graph_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> GraphViT:
    """Patch grid with 8 neighbours, Vision GNN's base depth and width; not published."""
    model_args = dict(embed_dim=640, depth=16, num_heads=20)
    return _create_graph_vit("graph_vit_base_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def graph_vit_knn_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> GraphViT:
    """The 9 nearest patches in feature space, found in each layer; tiny; not published."""
    model_args = dict(embed_dim=192, depth=12, num_heads=6, k=9, knn=True)
    return _create_graph_vit("graph_vit_knn_tiny_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def graph_vit_knn_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> GraphViT:
    """The 9 nearest patches in feature space, found in each layer; small; not published."""
    model_args = dict(embed_dim=320, depth=16, num_heads=10, k=9, knn=True)
    return _create_graph_vit("graph_vit_knn_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def test_graph_vit(pretrained: bool = False, **kwargs: Any) -> GraphViT:
    """A small GraphViT on the patch grid, for tests and demonstrations."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=4)
    return _create_graph_vit("test_graph_vit", pretrained, **dict(model_args, **kwargs))
