"""Mixture-of-head attention that gathers, for each routed head, the queries that chose it; eager, on every device."""

import torch
import torch.nn.functional as F


def moh_attention_gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Heads that all tokens chose are computed densely, the others for as many queries as the fullest of them has.

    Finding that number waits for the device once.
    """
    chosen = (gates != 0).transpose(1, 2)  # (B, H, N)
    most = chosen.sum(dim=2).amax(dim=0)
    N = q.shape[1]
    dense = torch.nonzero(most == N).flatten()
    sparse = torch.nonzero(most < N).flatten()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = q.new_zeros(q.shape)

    def attend(heads, queries, mask):
        return F.scaled_dot_product_attention(queries, k[:, heads], v[:, heads], attn_mask=mask, scale=scale)

    if len(dense):
        mask = None if bias is None else bias[..., dense, :, :].to(q.dtype)
        out[:, dense] = attend(dense, q[:, dense], mask)
    capacity = int(most[sparse].max()) if len(sparse) else 0
    if capacity:
        # a stable sort of "not chosen" brings the choosers to the front; what follows them is overwritten by gate 0
        rows = (~chosen[:, sparse]).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :capacity]
        index = rows.unsqueeze(-1)
        queries = q[:, sparse].gather(2, index.expand(-1, -1, -1, q.shape[3]))
        mask = None
        if bias is not None:
            some = bias[..., sparse, :, :].expand(q.shape[0], -1, -1, -1)
            mask = some.gather(2, index.expand(-1, -1, -1, bias.shape[-1])).to(q.dtype)
        found = torch.zeros_like(q[:, sparse]).scatter(2, index.expand_as(queries), attend(sparse, queries, mask))
        out[:, sparse] = found
    return out.transpose(1, 2) * gates.unsqueeze(-1).to(out.dtype)
