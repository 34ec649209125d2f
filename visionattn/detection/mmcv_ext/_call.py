"""How the operators are called: as a compiled kernel is, outside autograd and autocast."""

import functools

import numpy as np
import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)

LOW_PRECISION = (torch.float16, torch.bfloat16)


def kernel(function):
    """Runs ``function`` without gradients and without autocast, as mmcv's compiled operators run.

    mmcv's ``autograd.Function``s decide about types before they call the operator (deformable convolution takes the
    offset's type, for instance); autocast inside the operator would change the type of what it computes.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return call


def widen(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, 16-bit ones as float32: coordinates are too coarse in 16 bits to compute with."""
    return tuple(t.float() if t.dtype in LOW_PRECISION else t for t in tensors)


def c_float(number: float) -> float:
    """``number`` as mmcv's operators get it: their scalars are C floats, also beside double tensors."""
    return float(np.float32(number))
