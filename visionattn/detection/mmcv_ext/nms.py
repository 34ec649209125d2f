"""Non-maximum suppression: ``nms``, ``softnms``, ``nms_match`` of ``mmcv._ext``.

Soft-NMS: Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code" (ICCV 2017, arXiv 1704.04503),
algorithm 1; groups of suppressed boxes: Cao et al., "Prime Sample Attention in Object Detection" (CVPR 2020,
arXiv 1904.04821), section 3.2.
"""

import numpy as np
import torch
from torch import Tensor

from ._call import c_float, kernel, widen

__all__ = ["nms", "nms_match", "softnms"]

NAIVE, LINEAR, GAUSSIAN = 0, 1, 2


@kernel
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that stay, best score first.

    Args:
        boxes: (N, 4), corners (x1, y1, x2, y2) in pixels; any floating type, any device.
        scores: (N,).
        iou_threshold: a box goes if its overlap with a better one is above this.
        offset: 0 or 1; widths and heights are x2 - x1 + offset.

    Returns:
        int64 indices (K,) on the boxes' device.
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    boxes, scores = widen(boxes, scores)
    if offset:
        # in double precision the shift loses nothing of coordinates that batched NMS made large
        boxes = boxes.double()
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # the same sort as mmcv's: of equal scores the same box comes first. torchvision sorts once more, in another way, so
    # it gets ranks, among which none are equal (float32 holds them up to 2**24)
    order = scores.sort(descending=True).indices
    ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
    return order[torch.ops.torchvision.nms(boxes[order], ranks, _threshold(iou_threshold, boxes.dtype))]


@kernel
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS on the CPU: the best box is taken, the scores of those that overlap it are lowered, and so on.

    Args:
        boxes: (N, 4) corners; scores: (N,).
        dets: (N, 5), written: row i is the i-th box taken and its score when it was taken. Rows beyond the number of
            indices returned are left as they are.
        iou_threshold: overlaps from here on lower a score (methods 0 and 1).
        sigma: width of the Gaussian (method 2).
        min_score: boxes whose score falls below are dropped.
        method: 0 zeroes an overlapping box's score, 1 multiplies it by 1 - IoU, 2 by exp(-IoU^2 / sigma).
        offset: 0 or 1; widths and heights are x2 - x1 + offset.

    Returns:
        int64 indices (K,) of the boxes taken, in that order.
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long)
    boxes, scores = widen(boxes, scores)
    box, score = boxes.cpu().numpy().copy(), scores.cpu().numpy().astype(boxes.cpu().numpy().dtype)
    area = _area(box, offset)
    index = np.arange(len(box))
    number, i = len(box), 0
    with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
        while i < number:
            best = i + _first_best(score[i:number])
            for array in (box, score, area, index):
                array[[i, best]] = array[[best, i]]
            rest = slice(i + 1, number)
            overlap = _overlap(box[i], area[i], box[rest], area[rest], offset)
            score[rest] *= _weight(overlap, iou_threshold, sigma, method)
            drop = score[rest] < min_score
            if drop.any():
                # mmcv fills the place of a dropped box from the end; which of equal scores comes next depends on it
                left = number - int(drop.sum())
                places = i + 1 + np.flatnonzero(drop[: left - i - 1])
                movers = left + np.flatnonzero(~drop[left - i - 1 :])[::-1]
                for array in (box, score, area, index):
                    array[places] = array[movers]
                number = left
            i += 1
    dets[:number].copy_(torch.from_numpy(np.concatenate([box[:number], score[:number, None]], axis=1)))
    return torch.from_numpy(index[:number].copy())


@kernel
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """NMS that keeps account of what it suppresses.

    Args:
        dets: (N, 5), corners and score, on the CPU.
        iou_threshold: a box joins a better one's group if their overlap is at least this.

    Returns:
        One list for each box that stays: its index, then those of the boxes it suppressed, best score first.
    """
    (dets,) = widen(dets)
    order = dets[:, 4].sort(descending=True).indices.numpy()
    box = dets[:, :4].numpy()[order]
    area = _area(box, 0)
    threshold = box.dtype.type(c_float(iou_threshold))
    groups, free = [], np.arange(len(box))
    with np.errstate(divide="ignore", invalid="ignore"):
        while free.size:
            first, rest = free[0], free[1:]
            taken = _overlap(box[first], area[first], box[rest], area[rest], 0) >= threshold
            groups.append([int(order[first]), *order[rest[taken]].tolist()])
            free = rest[~taken]
    return groups


def _threshold(iou_threshold: float, dtype: torch.dtype) -> float:
    """``iou_threshold`` as a number that float32 holds, and that an overlap equal to it is not above.

    mmcv's threshold is a C float: an overlap of exactly 0.6f is not above 0.6f, but above the double 0.6. torchvision
    compares with a double on a CPU and with a float on a GPU, where the double 0.7 is above 0.7f.
    """
    threshold = np.float32(iou_threshold)
    if dtype == torch.float64 and float(threshold) < iou_threshold:
        threshold = np.nextafter(threshold, np.float32(np.inf))
    return float(threshold)


def _area(box: np.ndarray, offset: int) -> np.ndarray:
    return (box[:, 2] - box[:, 0] + offset) * (box[:, 3] - box[:, 1] + offset)


def _overlap(one: np.ndarray, one_area, many: np.ndarray, many_area: np.ndarray, offset: int) -> np.ndarray:
    """IoU of one box with many, in the boxes' own precision; NaN for two boxes without area."""
    low = np.maximum(one[:2], many[:, :2])
    high = np.minimum(one[2:], many[:, 2:])
    side = np.maximum(high - low + offset, 0)
    inter = side[:, 0] * side[:, 1]
    return inter / (one_area + many_area - inter)


def _weight(overlap: np.ndarray, iou_threshold: float, sigma: float, method: int) -> np.ndarray:
    dtype = overlap.dtype.type
    if method == GAUSSIAN:
        return np.exp(-(overlap * overlap) / dtype(c_float(sigma)))
    close = overlap >= dtype(c_float(iou_threshold))
    return np.where(close, dtype(0) if method == NAIVE else 1 - overlap, dtype(1))


def _first_best(score: np.ndarray) -> int:
    """Where a scan for something greater than the first score ends; NaN is not greater than anything."""
    if np.isnan(score[0]):
        return 0
    return int(np.argmax(np.where(np.isnan(score), -np.inf, score)))
