"""What the hosts' arguments ask for: which attention each block has, with which arguments."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from visionattn.layers.registry import module_class

SOFTMAX = "BS"  # the authors' letters for a host's own softmax attention (Agent: B, InLine: S)
MIXER = "AIL"  # ... and for the mechanism (Agent: A, InLine: I; L for any linear one)


def numbers(value: Any, name: str, count: int) -> list[int]:
    """``'9-16-49-49'``, ``'1111'``, ``['9', '16', 49, 49]`` or one number, as ``count`` integers; shorter lists repeat
    their last entry.

    Raises:
        ValueError: for something else.
    """
    try:
        if isinstance(value, str) and "-" not in value and len(value) > 1 and len(value) == count:
            value = list(value)
        parts = value.split("-") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
        parts = [int(part) for part in parts]
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a list of integers: give {count} of them, or '9-16-49-49'") from None
    if not parts or len(parts) > count:
        raise ValueError(f"{name}={value!r} has {len(parts)} entries: give 1 to {count}")
    return parts + parts[-1:] * (count - len(parts))


def mixes(attn_type: str, depths: Sequence[int]) -> list[list[bool]]:
    """For each block of each stage, whether it has the mechanism (else the host's softmax attention).

    ``attn_type`` has one letter per stage: A, I, L the mechanism; B, S softmax; M mixed, where the digits after the
    letters say how many leading blocks of the stage have the mechanism (``'AAMB2'``).

    Raises:
        ValueError: for another letter, or digits missing.
    """
    letters, digits = attn_type[: len(depths)].upper(), attn_type[len(depths) :]
    if len(letters) != len(depths) or any(letter not in SOFTMAX + MIXER + "M" for letter in letters):
        raise ValueError(
            f"attn_type={attn_type!r}: give {len(depths)} letters, each A or I (the mechanism), B or S (softmax) or M "
            "(mixed, with the number of leading blocks after the letters)"
        )
    if "M" in letters and not digits.isdigit():
        raise ValueError(
            f"attn_type={attn_type!r} has a mixed stage: put its number of leading blocks after the letters"
        )
    plan = []
    for letter, depth in zip(letters, depths, strict=True):
        leading = depth if letter in MIXER else int(digits) if letter == "M" else 0
        plan.append([i < leading for i in range(depth)])
    return plan


def make_mixer(
    layer: str | type[nn.Module], dim: int, num_heads: int, asked: dict[str, Any], **offered: Any
) -> nn.Module:
    """The mechanism ``layer``, a registered name or a class, for a host's block.

    ``asked`` are the mechanism's own arguments; of ``offered``, what a host knows (sizes, biases, dropout), it gets
    those that it takes.
    """
    cls = module_class(layer) if isinstance(layer, str) else layer
    taken = inspect.signature(cls.__init__).parameters
    offered = {name: value for name, value in offered.items() if name in taken}
    return cls(dim, num_heads=num_heads, **{**offered, **asked})


def agent_shapes_of(value: Any) -> list[tuple[int, int] | None]:
    """The dense copies' ``downstream_agent_shapes``: one (p, r) or integer per stage, or None for all."""
    if value is None:
        return [None] * 4
    shapes = [None if s is None else (s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in value]
    if len(shapes) != 4:
        raise ValueError(f"agent_shapes={value!r} has {len(shapes)} entries: give one (p, r) for each of 4 stages")
    return shapes
