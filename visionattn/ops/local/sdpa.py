"""PyTorch's dense attention: without a mask where the pattern hides nothing, else with a mask (N x N booleans)."""

import torch
import torch.nn.functional as F

from .call import Call
from .reference import _bias, _padded_text, visible_keys

_LARGEST_MASK = 2**30  # bytes


def is_plain(call: Call) -> bool:
    """Whether the call is attention without any mask."""
    return (
        call.pattern.dense(call.grid)
        and call.bias is None
        and call.text_lengths is None
        and (call.extra == 0 or call.text == 0)
    )


def reason(call: Call, return_lse: bool) -> str | None:
    """None if this backend can run the call, else why not."""
    if return_lse:
        return "scaled_dot_product_attention returns no log-sum-exp"
    if is_plain(call):
        return None
    N = call.q.shape[1]
    size = N * (N + call.extra)
    if call.bias is not None:
        size *= call.q.shape[2] * call.q.element_size()
    if call.text_lengths is not None:
        size *= call.q.shape[0]
    if size > _LARGEST_MASK:
        return f"its mask of {N} x {N + call.extra} would take {size / 2**30:.1f} GiB: at most 1"
    return None


def run(call: Call) -> tuple[torch.Tensor, None]:
    q, k, v = call.q, call.k, call.v
    if call.extra:
        k, v = torch.cat([k, call.extra_k], 1), torch.cat([v, call.extra_v], 1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=_mask(call), scale=call.scale,
        enable_gqa=call.grouped,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _mask(call: Call) -> torch.Tensor | None:
    if is_plain(call):
        return None
    N, device = call.q.shape[1], call.q.device
    keys = N + call.extra
    mask = visible_keys(call.pattern, call.grid, call.text, call.text_first, call.extra, 0, N, device)[None, None]
    padded = _padded_text(call.text_lengths, call.text, 0 if call.text_first else call.tokens, keys, device)
    if padded is not None:
        mask = mask & ~padded[:, None, None, :]
    if call.bias is None:
        return mask
    bias = _bias(call.bias.to(call.q.dtype), call.pattern, call.grid, 0, N, call.first, keys, device)
    return bias.masked_fill(~mask, float("-inf"))
