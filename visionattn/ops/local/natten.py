"""natten's own kernels, where they are installed: the grid by its neighbourhood attention, text by dense attention."""

import functools
import importlib.util

import torch

from .call import Call
from .patterns import Neighborhood


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed (pip install natten)"
    import natten

    if not getattr(natten, "HAS_LIBNATTEN", False):
        return "natten is installed without its kernels"
    return None


def reason(call: Call, return_lse: bool) -> str | None:
    """None if this backend can run the call, else why not."""
    if not isinstance(call.pattern, Neighborhood):
        return f"natten has windows only, not {type(call.pattern).__name__}"
    if call.bias is not None:
        return "natten 0.20 and later has no relative bias"
    if call.text_lengths is not None:
        return "natten takes no text_lengths"
    if call.q.shape[2] != call.k.shape[2]:
        return f"natten needs as many key heads as query heads: got {call.k.shape[2]} and {call.q.shape[2]}"
    for axis in call.pattern.axes(call.grid):
        if axis.window < 2:
            return f"natten needs windows of at least 2: got {axis.window} on the axis of length {axis.length}"
    if call.q.device.type != "cuda":
        return f"natten's kernels run on CUDA, these tensors are on {call.q.device}"
    if return_lse and call.text:
        return "natten's path returns no log-sum-exp of text queries"
    return _missing()


def neighborhood(q, k, v, grid, pattern, scale, extra=None, **options):
    """natten's attention of a grid: (B, N, H, D) in, output and, if asked, log-sum-exp out. Any natten backend."""
    import natten

    axes = pattern.axes(grid)
    B, _, heads, dim = q.shape
    shaped = (x.contiguous().view(B, *grid, heads, dim) for x in (q, k, v))
    run = (natten.na1d, natten.na2d, natten.na3d)[len(grid) - 1]
    if extra is not None:
        options |= dict(additional_keys=extra[0].contiguous(), additional_values=extra[1].contiguous())
    return run(
        *shaped, kernel_size=tuple(a.window for a in axes), stride=tuple(a.stride for a in axes),
        dilation=tuple(a.dilation for a in axes), is_causal=tuple(a.causal for a in axes), scale=scale, **options,
    )  # fmt: skip


def run(call: Call, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    place = slice(call.first, call.first + call.tokens)
    text_at = 0 if call.text_first else call.tokens
    words = slice(text_at, text_at + call.text)
    q, k, v = call.q, call.k, call.v
    keys, values = [k[:, words]] if call.text else [], [v[:, words]] if call.text else []
    if call.extra:
        keys.append(call.extra_k)
        values.append(call.extra_v)
    extra = (torch.cat(keys, 1), torch.cat(values, 1)) if keys else None
    result = neighborhood(
        q[:, place], k[:, place], v[:, place], call.grid, call.pattern, call.scale, extra, return_lse=return_lse
    )
    out, lse = result if return_lse else (result, None)
    out = out.reshape(q.shape[0], call.tokens, *q.shape[2:])
    if return_lse:
        return out, lse.reshape(q.shape[0], call.tokens, q.shape[2]).transpose(1, 2)
    if not call.text:
        return out, None
    rows = torch.nn.functional.scaled_dot_product_attention(
        q[:, words].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=call.scale
    ).transpose(1, 2)
    return torch.cat([rows, out] if call.text_first else [out, rows], 1), None
