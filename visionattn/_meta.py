"""Models on the meta device, without the time of drawing weights that it does not keep. Open to every room."""

import contextlib

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
