"""Pooling of regions of interest: ``roi_align`` and ``roi_pool`` of ``mmcv._ext``, forward and backward.

RoIAlign: He et al., "Mask R-CNN" (ICCV 2017, arXiv 1703.06870), section 3; RoI pooling: Girshick, "Fast R-CNN"
(ICCV 2015, arXiv 1504.08083), section 2.1. RoIs are (K, 5): index of the image, then corners (x1, y1, x2, y2) in pixels
of the image; ``spatial_scale`` takes them to the feature map (B, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import c_float, kernel, widen

__all__ = ["roi_align_backward", "roi_align_forward", "roi_pool_backward", "roi_pool_forward"]

MAX = 0  # ``pool_mode``; 1 is the average
CHUNK = 1 << 26  # samples that maximum pooling holds at once


@kernel
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the pooled regions into ``output`` (K, C, aligned_height, aligned_width).

    Args:
        input: (B, C, H, W); rois: (K, 5).
        argmax_y, argmax_x: as ``output``; with maximum pooling the position of each bin's largest sample on the feature
            map is written into them (-1: none); else unused.
        sampling_ratio: samples of a bin along each side; 0: as many as the bin has pixels, rounded up.
        pool_mode: 0 maximum, 1 average of a bin's samples.
        aligned: pixel centres are at half-integer coordinates.

    Raises:
        RuntimeError: on a CPU, an aligned RoI with a negative side, or an image index outside the batch.
    """
    if not rois.size(0):
        return
    features, rois = _same_type(input, rois)
    _check_rois(rois, input.size(0), aligned)
    scale = c_float(spatial_scale)
    if pool_mode == MAX:
        size = (aligned_height, aligned_width)
        _max_align(features, rois, output, (argmax_y, argmax_x), size, scale, sampling_ratio, aligned)
    else:
        pool = torch.ops.torchvision.roi_align
        output.copy_(pool(features, rois, scale, aligned_height, aligned_width, sampling_ratio, aligned))


@kernel
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds the gradient by the feature map to ``grad_input`` (B, C, H, W); arguments as in the forward operator."""
    if not rois.size(0):
        return
    grad, rois = _same_type(grad_output, rois)
    if pool_mode == MAX:
        _spread(grad, rois[:, 0].long(), *widen(argmax_y, argmax_x), grad_input)
        return
    backward = torch.ops.torchvision._roi_align_backward
    size = (aligned_height, aligned_width)
    grad = backward(grad, rois, c_float(spatial_scale), *size, *grad_input.shape, sampling_ratio, aligned)
    grad_input.add_(grad.to(grad_input.dtype))


@kernel
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes each bin's maximum into ``output`` (K, C, pooled_height, pooled_width), its flat index into ``argmax``.

    A RoI covers the pixels x1 to x2 *included*, and is not rounded to whole pixels before it is divided into bins:
    mmcv's convention, not torchvision's. torchvision's kernel gets every bin as a RoI of its own. An empty bin is 0,
    with the index -1.
    """
    if not rois.size(0):
        return
    features, rois = _same_type(input, rois)
    _check_rois(rois, input.size(0), aligned=False)
    start = rois[:, 1:3] * c_float(spatial_scale)
    side = (rois[:, 3:5] + 1) * c_float(spatial_scale) - start
    low_x, high_x = _bins(start[:, 0], side[:, 0], pooled_width, input.size(3))
    low_y, high_y = _bins(start[:, 1], side[:, 1], pooled_height, input.size(2))
    shape = (rois.size(0), pooled_height, pooled_width)
    x1, x2, y1, y2 = (t.expand(shape) for t in (low_x[:, None], high_x[:, None], low_y[..., None], high_y[..., None]))
    full = (x2 > x1) & (y2 > y1) & (side > 0).all(1)[:, None, None]
    boxes = torch.stack([rois[:, 0, None, None].expand(shape), x1, y1, x2 - 1, y2 - 1], dim=-1)
    boxes = torch.where(full[..., None], boxes, 0).reshape(-1, 5)
    pooled, where = torch.ops.torchvision.roi_pool(features, boxes.to(features.dtype), 1.0, 1, 1)
    pooled, where = (t.view(*shape, -1).permute(0, 3, 1, 2) for t in (pooled, where))
    output.copy_(torch.where(full[:, None], pooled, 0))
    argmax.copy_(torch.where(full[:, None], where, -1))


@kernel
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds the gradient by the feature map to ``grad_input`` (B, C, H, W); arguments as in the forward operator."""
    if not rois.size(0):
        return
    grad, rois = _same_type(grad_output, rois)
    plane = _planes(rois[:, 0].long(), grad_input)
    flat = torch.zeros(grad_input.numel(), dtype=grad.dtype, device=grad.device)
    flat.index_add_(0, (plane + argmax.clamp_min(0)).reshape(-1), grad.where(argmax >= 0, 0).reshape(-1))
    grad_input.add_(flat.view_as(grad_input).to(grad_input.dtype))


def _same_type(features: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    (features,) = widen(features)
    return features, rois.to(features.dtype)


def _check_rois(rois: Tensor, batch: int, aligned: bool) -> None:
    """On a CPU only: on a GPU the answer would have to be waited for."""
    if rois.device.type != "cpu":
        return
    if aligned and ((rois[:, 3] < rois[:, 1]) | (rois[:, 4] < rois[:, 2])).any():
        raise RuntimeError("RoIs (index, x1, y1, x2, y2) of an aligned RoIAlign need x1 <= x2 and y1 <= y2")
    if ((rois[:, 0] < 0) | (rois[:, 0] >= batch)).any():
        raise RuntimeError(f"RoIs (index, x1, y1, x2, y2) need an image index from 0 to {batch - 1}, the batch's last")


def _bins(start: Tensor, side: Tensor, number: int, limit: int) -> tuple[Tensor, Tensor]:
    """First pixel of every bin along one side, and the one after its last: two (K, number)."""
    bins, steps = side[:, None] / number, torch.arange(number + 1, device=side.device, dtype=side.dtype)
    # mmcv rounds with C's float functions, also in double precision
    edges = (steps * bins + start[:, None]).float()
    return edges[:, :-1].floor().clamp(0, limit), edges[:, 1:].ceil().clamp(0, limit)


def _planes(image: Tensor, like: Tensor) -> Tensor:
    """Index of the first pixel of every RoI's channels in the flattened (B, C, H, W): (K, C, 1, 1)."""
    channels, pixels = like.size(1), like.size(2) * like.size(3)
    channel = torch.arange(channels, device=image.device)
    return ((image[:, None] * channels + channel) * pixels)[..., None, None]


def _max_align(features, rois, output, argmax, size, scale, sampling_ratio, aligned) -> None:
    """Maximum over a bin's samples: each sample is a bin of torchvision's RoIAlign, max pooling does the rest."""
    corners = rois[:, 1:] * scale - (0.5 if aligned else 0)
    start, side = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        side = side.clamp_min(1)
    bins = side / side.new_tensor(size[::-1])
    grid = torch.full_like(bins, sampling_ratio) if sampling_ratio > 0 else bins.ceil()
    # where mmcv's kernels start the search: an empty bin keeps it
    lowest = -10000.0 if features.device.type == "cpu" else torch.finfo(output.dtype).min
    for grid_w, grid_h in grid.long().unique(dim=0).tolist():
        group = (grid == grid.new_tensor([grid_w, grid_h])).all(1).nonzero().squeeze(1)
        if grid_w <= 0 or grid_h <= 0:
            output[group] = lowest
            argmax[0][group] = argmax[1][group] = -1
            continue
        fine = (size[0] * grid_h, size[1] * grid_w)
        for part in group.split(max(1, CHUNK // (features.size(1) * fine[0] * fine[1]))):
            samples = torch.ops.torchvision.roi_align(features, rois[part], scale, *fine, 1, aligned)
            best, index = F.max_pool2d(samples, (grid_h, grid_w), return_indices=True)
            y = _position(index // fine[1], grid_h, start[part, 1], bins[part, 1])
            x = _position(index % fine[1], grid_w, start[part, 0], bins[part, 0])
            none = best <= lowest
            output[part] = best.masked_fill(none, lowest).to(output.dtype)
            argmax[0][part] = y.masked_fill(none, -1).to(output.dtype)
            argmax[1][part] = x.masked_fill(none, -1).to(output.dtype)


def _position(sample: Tensor, grid: int, start: Tensor, bins: Tensor) -> Tensor:
    """Coordinate of a sample on the feature map, from its number along the side."""
    start, bins = (t[:, None, None, None] for t in (start, bins))
    return start + (sample // grid) * bins + (sample % grid + 0.5) * bins / grid


def _spread(grad: Tensor, image: Tensor, y: Tensor, x: Tensor, grad_input: Tensor) -> None:
    """Adds ``grad`` (K, C, h, w) to the four pixels around the positions (y, x), by their bilinear weights."""
    height, width = grad_input.shape[2:]
    grad = grad.where((y != -1) & (y >= -1) & (y <= height) & (x >= -1) & (x <= width), 0)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y_low, x_low = y.floor(), x.floor()
    y_part, x_part = y - y_low, x - x_low
    plane = _planes(image, grad_input)
    flat = torch.zeros(grad_input.numel(), dtype=grad.dtype, device=grad.device)
    for row, y_weight in ((y_low, 1 - y_part), ((y_low + 1).clamp_max(height - 1), y_part)):
        for column, x_weight in ((x_low, 1 - x_part), ((x_low + 1).clamp_max(width - 1), x_part)):
            pixel = plane + (row * width + column).long()
            flat.index_add_(0, pixel.reshape(-1), (grad * y_weight * x_weight).reshape(-1))
    grad_input.add_(flat.view_as(grad_input).to(grad_input.dtype))
