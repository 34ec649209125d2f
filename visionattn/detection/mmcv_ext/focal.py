"""Focal losses of ``mmcv._ext``.

Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017, arXiv 1708.02002), equation 5.

mmcv's backward operators return the derivative for a gradient of one; its ``autograd.Function``s multiply and reduce.
"""

import torch
from torch import Tensor

from ._call import c_float, kernel, widen

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]

# mmcv clamps probabilities here before the logarithm, for every type
SMALLEST = torch.finfo(torch.float32).tiny


@kernel
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the loss of every logit into ``output``.

    Args:
        input: (N, C) logits; output: the same shape and type.
        target: (N,) int64 classes; one outside [0, C) is background, negative for every class.
        weight: (C,) factor of a row by its target, or empty; a background row has the factor 1.
        gamma, alpha: exponent of the modulating factor, and weight of positives (negatives have 1 - alpha).
    """
    gamma, alpha = c_float(gamma), c_float(alpha)
    (logits,) = widen(input)
    p, positive = _probability(logits), _one_hot(target, input.size(1))
    loss = torch.where(
        positive,
        -alpha * (1 - p).pow(gamma) * p.clamp_min(SMALLEST).log(),
        -(1 - alpha) * p.pow(gamma) * (1 - p).clamp_min(SMALLEST).log(),
    )
    output.copy_(_weighted(loss, weight, target))


@kernel
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the derivative of :func:`sigmoid_focal_loss_forward` by the logits into ``grad_input`` (N, C)."""
    gamma, alpha = c_float(gamma), c_float(alpha)
    (logits,) = widen(input)
    p, positive = _probability(logits), _one_hot(target, input.size(1))
    grad = torch.where(
        positive,
        -alpha * (1 - p).pow(gamma) * (1 - p - gamma * p * p.clamp_min(SMALLEST).log()),
        -(1 - alpha) * p.pow(gamma) * (gamma * (1 - p) * (1 - p).clamp_min(SMALLEST).log() - p),
    )
    grad_input.copy_(_weighted(grad, weight, target))


@kernel
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the loss of every row into ``output`` (N,).

    Args:
        input: (N, C) probabilities: mmcv takes the softmax before.
        target: (N,) int64 classes in [0, C); a row with a negative one has no loss.
        weight: (C,) factor of a row by its target, or empty.
        gamma, alpha: exponent of the modulating factor, and weight of all rows.
    """
    gamma, alpha = c_float(gamma), c_float(alpha)
    p, valid = _taken(input, target)
    loss = -alpha * (1 - p).pow(gamma) * p.clamp_min(SMALLEST).log()
    output.copy_(_weighted(loss.where(valid, 0.0), weight, target))


@kernel
def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the derivative of :func:`softmax_focal_loss_forward` by the *logits* into ``grad_input`` (N, C).

    ``buff`` (N,) gets the factor of a row; arguments as in the forward operator.
    """
    gamma, alpha = c_float(gamma), c_float(alpha)
    p, valid = _taken(input, target)
    factor = alpha * ((1 - p).pow(gamma - 1) * gamma * p * p.clamp_min(SMALLEST).log() - (1 - p).pow(gamma))
    factor = _weighted(factor.where(valid, 0.0), weight, target)
    buff.copy_(factor)
    (probabilities,) = widen(input)
    grad_input.copy_(factor[:, None] * (_one_hot(target, input.size(1)).to(factor.dtype) - probabilities))


def _probability(logits: Tensor) -> Tensor:
    # not torch.sigmoid: where 1 - p underflows, and its logarithm is clamped, the last digit of p decides
    return 1 / (1 + (-logits).exp())


def _one_hot(target: Tensor, classes: int) -> Tensor:
    return target[:, None] == torch.arange(classes, device=target.device)


def _taken(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's probability of its target, and which rows have one."""
    (probabilities,) = widen(probabilities)
    return probabilities.gather(1, target.clamp_min(0)[:, None]).squeeze(1), target >= 0


def _weighted(values: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """``values`` (N,) or (N, C), each row times its target's class weight."""
    classes = weight.numel()
    if not classes:
        return values
    inside = (target >= 0) & (target < classes)
    factor = weight.to(values.dtype)[target.clamp(0, classes - 1)].where(inside, 1.0)
    return values * (factor[:, None] if values.dim() == 2 else factor)
