"""FlexAttention: any pattern, through its definition. Block masks are made once per grid; compiled on CUDA."""

import functools
import math

import torch

from .call import Call
from .patterns import Cross, Disk, Neighborhood, coordinates

_BLOCK = 128
_CACHE = 64


def reason(call: Call, return_lse: bool) -> str | None:
    """None if this backend can run the call, else why not."""
    if torch.__version__ < "2.5":
        return f"torch {torch.__version__} has no FlexAttention"
    dim = call.q.shape[3]
    if call.q.device.type == "cuda":
        if dim & (dim - 1) or dim < 16:
            return f"FlexAttention's kernels need heads of 16 or more channels, a power of two: got {dim}"
        if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"FlexAttention's kernels do not take {call.q.dtype}"
    elif call.needs_grad():
        return "FlexAttention has no gradients on a CPU"
    return None


def _see(pattern, grid, device):
    """pattern.visible without work that depends on the grid inside: tables of the axes instead."""
    if isinstance(pattern, (Neighborhood, Cross)):
        tables = [torch.from_numpy(axis.mask()).to(device) for axis in pattern.axes(grid)]

        def visible(q, k):
            seen = [t[a, b] for t, a, b in zip(tables, coordinates(q, grid), coordinates(k, grid), strict=True)]
            join = torch.logical_or if isinstance(pattern, Cross) else torch.logical_and
            return functools.reduce(join, seen)

        return visible
    if isinstance(pattern, Disk):
        limit = math.ceil(pattern.radius**2)
        return lambda q, k: (
            sum((a - b) ** 2 for a, b in zip(coordinates(q, grid), coordinates(k, grid), strict=True)) < limit
        )
    return lambda q, k: pattern.visible(grid, q, k)


def _mask_function(call: Call):
    n, text, first, N = call.tokens, call.text, call.first, call.q.shape[1]
    text_at = 0 if call.text_first else n
    visible = _see(call.pattern, call.grid, call.q.device)
    lengths = None if call.text_lengths is None else call.text_lengths.to(call.q.device)

    def mask(b, h, q, k):
        q_grid, k_grid = (q >= first) & (q < first + n), (k >= first) & (k < first + n)
        # clamped, so that the tables are read inside their bounds for text too
        near = visible((q - first).clamp(0, n - 1), (k - first).clamp(0, n - 1))
        seen = torch.where(q_grid & k_grid, near, (k < N) | q_grid)
        if lengths is not None:
            seen = seen & ~((k >= text_at + lengths[b]) & (k >= text_at) & (k < text_at + text))
        return seen

    return mask


def _score_function(call: Call):
    if call.bias is None:
        return None
    grid, n, first, bias = call.grid, call.tokens, call.first, call.bias
    axes = call.pattern.axes(grid)

    def score(s, b, h, q, k):
        both = (q >= first) & (q < first + n) & (k >= first) & (k < first + n)
        qs = coordinates((q - first).clamp(0, n - 1), grid)
        ks = coordinates((k - first).clamp(0, n - 1), grid)
        at = [
            (torch.div(y - x, a.dilation, rounding_mode="floor") + a.window - 1).clamp(0, 2 * a.window - 2)
            for x, y, a in zip(qs, ks, axes, strict=True)
        ]
        return s + torch.where(both, bias[(h, *at)].to(s.dtype), 0.0)

    return score


_masks: dict = {}


def block_mask(call: Call):
    """FlexAttention's mask of a call, made once for its grid, pattern and device."""
    from torch.nn.attention.flex_attention import create_block_mask

    N, device = call.q.shape[1], call.q.device
    batch = None if call.text_lengths is None else call.q.shape[0]
    key = (call.grid, call.pattern, call.text, call.text_first, call.extra, str(device))
    if batch is None and key in _masks:
        return _masks[key]
    make = functools.partial(create_block_mask, _mask_function(call), batch, None, N, N + call.extra, device=device)
    found = make(BLOCK_SIZE=_BLOCK, _compile=device.type == "cuda")
    if batch is None:
        if len(_masks) >= _CACHE:
            _masks.clear()
        _masks[key] = found
    return found


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def run(call: Call, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = call.q, call.k, call.v
    if call.extra:
        k, v = torch.cat([k, call.extra_k], 1), torch.cat([v, call.extra_v], 1)
    attend = _compiled() if q.is_cuda else flex_attention
    result = attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod=_score_function(call),
        block_mask=block_mask(call), scale=call.scale, enable_gqa=call.grouped, return_lse=return_lse,
    )  # fmt: skip
    out, lse = result if return_lse else (result, None)
    return out.transpose(1, 2), lse
