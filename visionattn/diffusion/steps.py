"""Which denoising step a call belongs to, and whether that one stays dense."""

from collections.abc import Callable
from typing import Any

import torch


class Steps:
    """The steps of a pipeline's generations; its transformers (Wan 2.2 has two, for high and low noise) share one.

    A new step is a lower timestep, or a scheduler that counted on: FLUX's timesteps, in bfloat16 and shifted for a
    large picture, can be the same number many times. A higher timestep, or a scheduler set anew, is a new generation.

    Args:
        first: leading steps of every generation that stay dense.
        until: timesteps (in the transformer's own unit) above which a step stays dense.
        index: the scheduler's number of the current step, None before the first; None without a scheduler that counts.
    """

    def __init__(self, first: int = 0, until: float | None = None, index: Callable[[], int | None] | None = None):
        self.first = first
        self.until = until
        self.index = index
        self.seen = 0  # steps of this generation before the current one
        self.done = 0  # dense ones of the last generation
        self._last: tuple[float, int] | None = None

    def dense(self, timestep: Any) -> bool:
        """Whether a call of a transformer at ``timestep`` stays dense; reads it, for which a GPU waits, if it must."""
        if not self.first and self.until is None:
            return False
        if timestep is None:
            return False
        # a token's own timestep is 0 where it is given (image to video): the highest is the step's
        now = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        index = (self.index() if self.index is not None else None) or 0
        last = self._last
        if last is None or now > last[0] or index < last[1]:
            self.seen = self.done = 0
        elif now < last[0] or index > last[1]:
            self.seen += 1
        self._last = now, index
        dense = self.seen < self.first or (self.until is not None and now > self.until)
        self.done = max(self.done, self.seen + 1) if dense else self.done
        return dense


def counter(pipe: Any) -> Callable[[], int | None] | None:
    """Reads how far a pipeline's current scheduler has counted; None for what has no scheduler."""
    if not hasattr(pipe, "scheduler"):
        return None
    return lambda: getattr(pipe.scheduler, "step_index", None)
