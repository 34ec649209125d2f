"""Windows: maps of windows put at their place in the image, and what the blocks' partitions are."""

import torch
import torch.nn.functional as F
from timm.models.maxxvit import PartitionAttentionCl, grid_partition
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn

from visionattn.layers.stripes import pad_to, stripes
from visionattn.models.swin import SwinBlock

from .registry import Placement, register_placement
from .result import Explanation, Segment


def partition(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0), pad_first: bool = True, device=None
) -> Placement:
    """Windows of a map (H, W): padded at the bottom and right, and rolled by ``-shift`` before or after that."""
    H, W = grid
    y, x = pad_to(grid, window)
    index = torch.arange(H * W, device=device).reshape(1, H, W)
    roll = (-shift[0], -shift[1])
    if not pad_first:
        index = torch.roll(index, roll, dims=(1, 2))
    index = F.pad(index, (0, x - W, 0, y - H), value=-1)
    padding = index < 0
    index[padding] = H * W + torch.arange(int(padding.sum()), device=device)
    if pad_first:
        index = torch.roll(index, roll, dims=(1, 2))
    return Placement(stripes(index.reshape(1, y * x, 1), (y, x), window).squeeze(2), (H, W))


@register_placement(SwinBlock)
def _ours(block: nn.Module, x: torch.Tensor) -> Placement | None:
    if block.whole:
        return None
    grid = (x.shape[1], x.shape[2])
    shift = block.shift_at_home if block.resolution == grid else block.shift
    return partition(grid, block.window_size, shift, True, x.device)


@register_placement(SwinTransformerBlock, SwinTransformerV2Block)
def _timm(block: nn.Module, x: torch.Tensor) -> Placement | None:
    return partition((x.shape[1], x.shape[2]), tuple(block.window_size), tuple(block.shift_size), False, x.device)


@register_placement(PartitionAttentionCl)
def _maxvit(block: nn.Module, x: torch.Tensor) -> Placement:
    grid, size = (x.shape[1], x.shape[2]), tuple(block.partition_size)
    if block.partition_block:
        return partition(grid, size, device=x.device)
    index = torch.arange(grid[0] * grid[1], device=x.device).reshape(1, *grid, 1)
    return Placement(grid_partition(index, size).flatten(1), grid)


def place(inner: Explanation, placement: Placement) -> Explanation:
    """The explanation of windows (B * windows, ...) as one of the images (B, ...), padding among the keys.

    All weights of the windows are held: they are few beside the image's, of which they are the part that is not zero.
    """
    index, (H, W) = placement.index, placement.grid
    count, n = index.shape
    batch, keys = inner.batch // count, index.numel()
    order = torch.empty(keys, dtype=torch.int64, device=index.device)
    order[index.reshape(-1)] = torch.arange(keys, device=index.device)

    def put(t: torch.Tensor, tokens: int, total: int) -> torch.Tensor:
        """(B * windows, ..., n, ...) with tokens at axis ``tokens`` to (B, ..., total, ...)."""
        t = t.unflatten(0, (batch, count)).movedim(1, tokens).flatten(tokens, tokens + 1)
        return t.index_select(tokens, order[:total])

    windows = []

    def rows(i: torch.Tensor) -> torch.Tensor:
        if not windows:
            everything = inner.rows(torch.arange(n, device=index.device))
            windows.append(everything.unflatten(0, (batch, count)))
        window, local = order[i] // n, order[i] % n
        weights = windows[0][:, window, :, local]  # (i, B, heads, n)
        out = weights.new_zeros(len(i), batch, inner.heads, keys)
        out.scatter_(3, index[window][:, None, None].expand_as(weights), weights)
        return out.permute(1, 2, 0, 3)

    return Explanation(
        kind=inner.kind,
        rows=rows,
        heads=inner.heads,
        batch=batch,
        queries=(Segment("grid", (H, W)),),
        keys=placement.segments,
        values=put(inner.values, 2, keys),
        gates=None if inner.gates is None else put(inner.gates, 2, H * W),
        added={name: put(t, 1, H * W) for name, t in inner.added.items()},
        multiplied={name: put(t, 1, H * W) for name, t in inner.multiplied.items()},
    )
