"""Deformable operators of ``mmcv._ext``: convolution v1 and v2 and multi-scale deformable attention.

v1: Dai et al., "Deformable Convolutional Networks" (ICCV 2017, arXiv 1703.06211), eq. 2; v2, with a mask: Zhu et al.,
"Deformable ConvNets v2" (CVPR 2019, arXiv 1811.11168), eq. 1; attention: Zhu et al., "Deformable DETR" (ICLR 2021,
arXiv 2010.04159), eq. 3. ``columns`` and ``ones`` are scratch space of mmcv's kernels; ``im2col_step`` says how many
images those take at once; neither changes a result.
"""

import weakref

import torch
from torch import Tensor

from ._call import kernel, widen

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
]


@kernel
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Writes the convolution into ``output`` (B, C_out, H_out, W_out).

    Args:
        input: (B, C_in, H, W); weight: (C_out, C_in / group, kH, kW).
        offset: (B, 2 * deformable_group * kH * kW, H_out, W_out), (y, x) of every kernel position, in pixels.
        dW, dH, padW, padH, dilationW, dilationH, group, deformable_group: as in a convolution.
    """
    place = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_convolve(input, weight, offset, None, None, place))


@kernel
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Adds the gradients by input and offset to ``gradInput`` and ``gradOffset``; arguments as in the forward."""
    place = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _gradients(gradOutput, input, weight, offset, None, place)
    _add(gradInput, grads[0])
    _add(gradOffset, grads[2])
    # torchvision has one kernel for all gradients; what it says about the weight waits in mmcv's scratch space
    columns.weight_gradient = (_references(input, offset, gradOutput), grads[1])


@kernel
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Adds ``scale`` times the gradient by the weight to ``gradWeight``; arguments as in the forward operator."""
    references, grad = columns.__dict__.pop("weight_gradient", (None, None))
    if references is None or references != _references(input, offset, gradOutput):
        place = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
        grad = _gradients(gradOutput, input, torch.zeros_like(gradWeight), offset, None, place)[1]
    _add(gradWeight, scale * grad)


@kernel
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Writes the convolution into ``output`` (B, C_out, H_out, W_out).

    Args:
        input, weight, offset, group, deformable_group: as in :func:`deform_conv_forward`.
        mask: (B, deformable_group * kernel_h * kernel_w, H_out, W_out), factors of the samples.
        bias: (C_out,), read if ``with_bias``.
    """
    place = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_convolve(input, weight, offset, mask, bias if with_bias else None, place))


@kernel
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Adds the gradients to the five ``grad_*`` tensors (to ``grad_bias`` if ``with_bias``)."""
    place = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    grads = _gradients(grad_output, input, weight, offset, mask, place)
    targets = (grad_input, grad_weight, grad_offset, grad_mask)
    for target, grad in zip(targets, grads, strict=False):
        _add(target, grad)
    if with_bias:
        _add(grad_bias, grads[4])


@kernel
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention, by mmcv's own function in plain PyTorch: (B, Q, heads * D).

    Args:
        value: (B, S, heads, D), S the pixels of all levels.
        value_spatial_shapes: (L, 2) height and width of the levels.
        value_level_start_index: (L,), not read: it follows from the shapes.
        sampling_locations: (B, Q, heads, L, P, 2), x and y from 0 to 1.
        attention_weights: (B, Q, heads, L, P).
    """
    wide = widen(value, sampling_locations, attention_weights)
    return _attend(wide[0], value_spatial_shapes, *wide[1:]).to(value.dtype)


@kernel
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Adds the gradients to the three ``grad_*`` tensors; arguments as in the forward operator."""
    inputs = [t.detach().requires_grad_() for t in widen(value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = _attend(inputs[0], value_spatial_shapes, *inputs[1:])
    grads = torch.autograd.grad(output, inputs, grad_output.reshape(output.shape).to(output.dtype))
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        _add(target, grad)


def _convolve(input, weight, offset, mask, bias, place) -> Tensor:
    use_mask = mask is not None
    input, weight, offset = widen(input, weight, offset)
    mask = input.new_zeros(input.size(0), 1) if mask is None else widen(mask)[0]
    bias = input.new_zeros(weight.size(0)) if bias is None else widen(bias)[0]
    return torch.ops.torchvision.deform_conv2d(input, weight, offset, mask, bias, *place, use_mask)


def _gradients(grad_output, input, weight, offset, mask, place) -> tuple[Tensor, ...]:
    """Gradients by input, weight, offset, mask, bias."""
    use_mask = mask is not None
    grad_output, input, weight, offset = widen(grad_output, input, weight, offset)
    mask = input.new_zeros(input.size(0), 1) if mask is None else widen(mask)[0]
    bias = input.new_zeros(weight.size(0))
    backward = torch.ops.torchvision._deform_conv2d_backward
    grads = backward(grad_output, input, weight, offset, mask, bias, *place, use_mask)
    _no_gradient_at_edge(grads[2], offset, weight.shape[2:], place)
    return grads


def _no_gradient_at_edge(grad: Tensor, offset: Tensor, kernel: tuple[int, int], place: tuple[int, ...]) -> None:
    """Zeroes the offset's gradient where a sample lies at exactly -1, one pixel before the first.

    The bilinear value has a kink there. mmcv takes the derivative from outside, torchvision that from inside; with a
    padding of 1 and the offsets still zero, as they start, every sample in the padding's first row lies there.
    """
    height, width = offset.shape[2:]
    view = (-1, place[7], kernel[0], kernel[1], 2, height, width)
    axes = [torch.arange(n, device=offset.device) for n in (kernel[0], kernel[1], height, width)]
    row = axes[0][:, None, None, None] * place[4] + axes[2][:, None] * place[0] - place[2]
    column = axes[1][:, None, None] * place[5] + axes[3] * place[1] - place[3]
    grid = torch.stack([row.expand(*kernel, height, width), column.expand(*kernel, height, width)], dim=2)
    grad.masked_fill_(((grid + offset.reshape(view)) == -1).view(offset.shape), 0)


def _attend(value, shapes, locations, weights) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def _add(target: Tensor, grad: Tensor) -> None:
    target.add_(grad.to(target.dtype))


def _references(*tensors: Tensor) -> tuple:
    return tuple((weakref.ref(t), t._version) for t in tensors)
