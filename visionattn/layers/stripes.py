"""Tokens of a map to windows or stripes and back."""

import torch


def stripe_shape(idx: int, split_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """CSWin's windows: the whole map (idx -1), vertical stripes (0) or horizontal ones (1)."""
    if idx == -1:
        return grid[0], grid[1]
    if idx == 0:
        return grid[0], split_size[1]
    return split_size[0], grid[1]


def pad_to(grid: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The smallest grid that windows of this shape tile."""
    H = grid[0] + (shape[0] - grid[0] % shape[0]) % shape[0]
    W = grid[1] + (shape[1] - grid[1] % shape[1]) % shape[1]
    return H, W


def stripes(x: torch.Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """(B, H * W, C) to (B * windows, h * w, C), windows and tokens row by row; shape divides the grid."""
    B, C = x.shape[0], x.shape[2]
    (H, W), (h, w) = grid, shape
    if w == W:  # whole rows lie together already
        return x.reshape(B * (H // h), h * w, C)
    x = x.reshape(B, H // h, h, W // w, w, C)
    return x.transpose(2, 3).reshape(-1, h * w, C)


def stripes_back(x: torch.Tensor, batch: int, grid: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """What :func:`stripes` took apart, (batch, H * W, C)."""
    C = x.shape[2]
    (H, W), (h, w) = grid, shape
    if w == W:
        return x.reshape(batch, H * W, C)
    x = x.reshape(batch, H // h, W // w, h, w, C)
    return x.transpose(2, 3).reshape(batch, H * W, C)
