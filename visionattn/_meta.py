"""Models on the meta device, without the time of work whose results it does not keep. Open to every room."""

import contextlib

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

DRAWING = {
    *("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"),
    *("xavier_normal_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_", "copy_"),
}


class NoInit(TorchFunctionMode, contextlib.ContextDecorator):
    """``with NoInit():``, or ``@NoInit()`` above a function: what fills a meta tensor in place returns at once.

    PyTorch works out in Python what each such step does to a shape, which is most of the time of building a model
    there. Tensors of other devices are filled as ever.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in DRAWING and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class NoResize(TorchFunctionMode, contextlib.ContextDecorator):
    """``with NoResize():`` meta tensors are resized to a given size by naming that size.

    PyTorch resizes there in Python, with every index and weight: most of the time of a forward pass of models that
    resize a table in each block. Tensors of other devices are resized as ever.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.interpolate and args and args[0].is_meta:
            size = args[1] if len(args) > 1 else kwargs.get("size")
            if isinstance(size, (tuple, list)):
                return args[0].new_empty((*args[0].shape[:2], *size))
        return func(*args, **kwargs)
