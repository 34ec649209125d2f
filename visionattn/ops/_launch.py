"""Launches of Triton kernels that cost little CPU time.

Triton looks at every argument of every launch, which costs more than small kernels run. Here a launch is bound to what
follows from shapes, strides and dtypes (a plan keeps it for them), so only the pointers are left to look at.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

_MOST_PLANS = 4096


class Launch:
    """A kernel whose numbers and constants are bound; called with its tensors.

    The kernel's arguments stand in the order tensors, numbers, constants.

    Args:
        kernel: of ``triton.jit``.
        grid: programs along one to three axes.
        numbers: values of the arguments after the tensors.
        constants: ``constexpr`` arguments by name.
        options: ``num_warps``, ``num_stages``.
    """

    def __init__(self, kernel, grid: tuple[int, ...], numbers: tuple, constants: dict, **options: int):
        self.kernel, self.numbers, self.named = kernel, numbers, {**constants, **options}
        self.grid = (*grid, 1, 1)[:3]
        self.rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self.compiled = None

    def __call__(self, *tensors: torch.Tensor) -> None:
        if 0 in self.grid:
            return
        aligned = not any(t.data_ptr() & 15 for t in tensors)
        if aligned and self.compiled is not None:
            self.compiled[self.grid](*tensors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.named)
        if aligned:
            self.compiled = compiled  # None where kernels are interpreted


class Plans:
    """What was made for a key once; the key holds all that the launches depend on."""

    def __init__(self):
        self.known: dict[tuple, Any] = {}

    def get(self, key: tuple, make: Callable[[], Any]) -> Any:
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= _MOST_PLANS:  # shapes that never repeat
                self.known.clear()
            found = self.known[key] = make()
        return found


def on_device(x: torch.Tensor):
    """A context in which the device of ``x`` is the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
