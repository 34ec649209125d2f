"""The public functions of local attention: they check their arguments, and pick an implementation."""

import torch

from . import sdpa
from .call import Call, make_call
from .patterns import Grid, Pattern
from .reference import reference

BACKENDS = ("reference", "sdpa")


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid,
    pattern: Pattern,
    text: int = 0,
    text_first: bool = True,
    text_lengths: torch.Tensor | None = None,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a joint sequence of text and a grid: a grid token sees its neighbourhood, and all text.

    Text tokens see every text and grid token. With ``text=0`` this is neighbourhood attention (NATTEN), with a
    :class:`Disk` it is CLEAR's (arXiv 2412.16112, section 3.2).

    Args:
        q: queries (B, N, H, D), any strides; N = text + tokens of the grid, the grid in row-major order.
        k, v: keys and values (B, N, Hk, D), any strides; Hk divides H (grouped heads).
        grid: 1 to 3 lengths.
        pattern: which grid tokens a grid token sees: :class:`Neighborhood`, :class:`Disk`, :class:`Cross`.
        text: number of text tokens.
        text_first: whether the sequence is [text | grid] or [grid | text].
        text_lengths: (B,) integers; text from there on is padding that nobody sees. The rows of padded text are
            computed like other text's.
        extra_k, extra_v: (B, M, Hk, D) keys that every grid token sees and no text token does: CLEAR's pooled keys, a
            reference image. ``Disk(downsample=f)`` without them takes the means of f x f blocks.
        bias: (H, 2 * window - 1, ...) added to the scaled logits of grid pairs at ``key - query + window - 1`` along
            each axis (counted in steps of the dilation), for :class:`Neighborhood`.
        scale: factor of q.k, D ** -0.5 by default.
        backend: ``'auto'``, or one of :func:`explain`'s. A named backend never falls back.
        return_lse: also return the natural log-sum-exp of each query's logits, (B, H, N) in float32 or wider.

    Returns:
        (B, N, H, D) in q's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that disagree, a grid that isn't the sequence's, a pattern that the
            grid has no room for, or a named backend that cannot run.
    """
    call = make_call(q, k, v, grid, pattern, text, text_first, text_lengths, extra_k, extra_v, bias, scale)
    name = _choose(call, backend, return_lse)
    out, lse = sdpa.run(call) if name == "sdpa" else reference(*call.settings())
    return (out, lse) if return_lse else out


def _choose(call: Call, backend: str, return_lse: bool) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is unknown: use 'auto' or one of {', '.join(BACKENDS)}")
    if backend == "sdpa" and (why := sdpa.reason(call, return_lse)):
        raise ValueError(f"backend='sdpa' cannot run: {why}")
    if backend == "auto":
        return "reference" if return_lse or sdpa.reason(call, return_lse) else "sdpa"
    return backend
