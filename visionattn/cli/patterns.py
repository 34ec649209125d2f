"""Patterns as arguments: ``disk:16``, ``disk:16:4``, ``window:80:16``, ``window:18x24x24:2x8x8``, ``cross:2:3``."""

from visionattn.ops.local.patterns import Cross, Disk, Neighborhood, Pattern

SYNTAX = (
    "disk:RADIUS[:POOLING], window:SIZE[:STRIDE[:DILATION]], cross:ROWS:COLS[:STRIDE]; sizes of several axes with x, "
    "as in window:18x24x24:2x8x8"
)


def parse_pattern(text: str) -> Pattern:
    """The pattern that ``text`` describes.

    Raises:
        ValueError: where it describes none.
    """
    kind, *values = text.split(":")
    try:
        numbers = [_numbers(v) for v in values]
        if kind == "disk" and 1 <= len(values) <= 2:
            return Disk(float(values[0]) if "." in values[0] else int(values[0]), *map(int, values[1:]))
        if kind == "window" and 1 <= len(values) <= 3:
            return Neighborhood(*numbers)
        if kind == "cross" and 2 <= len(values) <= 3:
            return Cross(*numbers)
    except (ValueError, TypeError) as e:
        raise ValueError(f"pattern {text!r}: {e}; write {SYNTAX}") from None
    raise ValueError(f"pattern {text!r} is unknown: write {SYNTAX}")


def parse_shape(text: str) -> tuple[int, ...]:
    """``8x16`` as (8, 16)."""
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"{text!r} is no shape: write positive lengths with x between, as 8x16")
    return shape


def _numbers(text: str):
    numbers = tuple(int(part) if "." not in part else float(part) for part in text.split("x"))
    return numbers[0] if len(numbers) == 1 else numbers
