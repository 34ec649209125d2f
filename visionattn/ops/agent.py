"""Agent attention (ECCV 2024, arXiv 2312.08874, section 4): a few agents gather from the keys and are spread again."""

import torch
import torch.nn.functional as F


def agent_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    agent_bias: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equation 6 of the paper in plain products.

    Returns:
        The output (B, N, H, D), the agents' weights over the keys (B, H, n, M), the queries' over agents (B, H, N, n).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bahd,bmhd->bham", agents * scale, k)
    gather = (logits if agent_bias is None else logits + agent_bias).softmax(dim=-1)
    agent_values = torch.einsum("bham,bmhd->bahd", gather, v)
    logits = torch.einsum("bnhd,bahd->bhna", q * (scale if query_scale is None else query_scale), agents)
    spread = (logits if query_bias is None else logits + query_bias).softmax(dim=-1)
    return torch.einsum("bhna,bahd->bnhd", spread, agent_values), gather, spread


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    agent_bias: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    query_scale: float | None = None,
) -> torch.Tensor:
    """``softmax(q agents^T) softmax(agents k^T) v``: attention that is linear in the number of tokens.

    Args:
        q: (B, N, H, D).
        k, v: (B, M, H, D).
        agents: (B, n, H, D).
        agent_bias: (H, n, M), added to the agents' logits over the keys.
        query_bias: (H, N, n), added to the queries' logits over the agents.
        scale: of both products, D^-0.5 by default.
        dropout_p: dropout of both softmax results.
        backend: ``'reference'``, ``'sdpa'`` (PyTorch's fused attention, twice), or ``'auto'``.
        query_scale: of the product of queries and agents, where it is another one (AgentSD).

    Returns:
        (B, N, H, D).

    Raises:
        ValueError: for an unknown backend, or dropout with the reference.
    """
    if backend == "reference":
        if dropout_p > 0.0:
            raise ValueError("agent_attention: the reference has no dropout: use backend='sdpa'")
        return agent_attention_reference(q, k, v, agents, agent_bias, query_bias, scale, query_scale)[0]
    if backend != "auto" and backend != "sdpa":
        raise ValueError(f"agent_attention: backend {backend} is unknown: use one of auto, reference, sdpa")
    agents = agents.transpose(1, 2)
    agent_mask = agent_bias.unsqueeze(0).to(q.dtype) if agent_bias is not None else None
    query_mask = query_bias.unsqueeze(0).to(q.dtype) if query_bias is not None else None
    agent_values = F.scaled_dot_product_attention(
        agents, k.transpose(1, 2), v.transpose(1, 2), attn_mask=agent_mask, dropout_p=dropout_p, scale=scale
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), agents, agent_values, attn_mask=query_mask, dropout_p=dropout_p,
        scale=scale if query_scale is None else query_scale,
    )  # fmt: skip
    return out.transpose(1, 2)


def pooling_bins(
    grid: tuple[int, int], agent_shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bins of adaptive average pooling as a matrix, for :func:`pool_agents`.

    Returns:
        (p * r, H * W) in ``dtype``, a power of two in a bin's places and 0 elsewhere, and (p * r, 1) in at least
        float32, what the sums are to be multiplied with: so ``dtype`` rounds the sums, not the weights.
    """

    def axis(length: int, bins: int) -> torch.Tensor:
        places, bin = torch.arange(length, device=device), torch.arange(bins, device=device)[:, None]
        first = torch.div(bin * length, bins, rounding_mode="floor")
        end = torch.div((bin + 1) * length + bins - 1, bins, rounding_mode="floor")
        return (places >= first) & (places < end)

    rows, columns = axis(grid[0], agent_shape[0]), axis(grid[1], agent_shape[1])
    inside = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    count = inside.sum(dim=1, keepdim=True).to(torch.promote_types(dtype, torch.float32))
    power = torch.exp2(-torch.floor(torch.log2(count)))
    return (inside * power).to(dtype), 1.0 / (count * power)


def pool_agents(
    q: torch.Tensor,
    grid: tuple[int, int],
    agent_shape: tuple[int, int],
    bins: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Agent tokens: adaptive average pooling of the query map.

    Args:
        q: (B, H * W, C), all heads together.
        grid: (H, W).
        agent_shape: (p, r); bins overlap where they do not divide the grid.
        bins: of :func:`pooling_bins`; bins that overlap are then one matrix product, which on a GPU takes a small part
            of the time of PyTorch's pooling kernel (that was 24 to 29 % of a network's time on an H100).

    Returns:
        (B, p * r, C).
    """
    B, C = q.shape[0], q.shape[2]
    H, W = grid
    p, r = agent_shape
    x = q.reshape(B, H, W, C)
    if p == H and r == W:
        return q
    if H % p == 0 and W % r == 0:
        return x.reshape(B, p, H // p, r, W // r, C).mean(dim=(2, 4)).reshape(B, p * r, C)
    if bins is not None:
        sums = torch.bmm(bins[0].unsqueeze(0).expand(B, -1, -1), q)
        return (sums * bins[1]).to(q.dtype)
    pooled = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (p, r))
    return pooled.flatten(2).transpose(1, 2)


def resize_agents(bias: torch.Tensor, agent_num: int, agent_shape: tuple[int, int]) -> torch.Tensor:
    """(H, n, M) to (H, p * r, M): the agents seen as a square map, resized bilinearly."""
    p, r = agent_shape
    side = int(agent_num**0.5)
    if p == side and r == side:
        return bias
    heads, tokens = bias.shape[0], bias.shape[2]
    bias = bias.transpose(1, 2).reshape(heads, tokens, side, side)
    bias = F.interpolate(bias, size=[p, r], mode="bilinear", align_corners=False)
    return bias.flatten(2).transpose(1, 2)


def agent_key_bias(
    block: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    grid: tuple[int, int],
    agent_shape: tuple[int, int],
) -> torch.Tensor:
    """The bias of the agents' logits over the keys: block part + row part + column part (the paper's section 4.2).

    Args:
        block: ``an_bias`` (H, n, 7, 7).
        row, column: ``ah_bias`` (1, H, n, h, 1) and ``aw_bias`` (1, H, n, 1, w).
        grid: the keys' (H, W); block, and row + column where h x w is another grid, are resized to it bilinearly.
        agent_shape: (p, r); the agents' axis is resized bilinearly where p * r is not n.

    Returns:
        (H, p * r, H * W).
    """
    size = [grid[0], grid[1]]
    bias = F.interpolate(block, size=size, mode="bilinear", align_corners=False)
    lines = (row + column).squeeze(0)
    if lines.shape[2] != size[0] or lines.shape[3] != size[1]:
        lines = F.interpolate(lines, size=size, mode="bilinear", align_corners=False)
    return resize_agents((bias + lines).flatten(2), block.shape[1], agent_shape)


def query_agent_bias(
    block: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    grid: tuple[int, int],
    agent_shape: tuple[int, int],
) -> torch.Tensor:
    """The bias of the queries' logits over the agents, as :func:`agent_key_bias`.

    Args:
        block: ``na_bias`` (H, n, 7, 7).
        row, column: ``ha_bias`` (1, H, h, 1, n) and ``wa_bias`` (1, H, 1, w, n).
        grid, agent_shape: as there, for the queries.

    Returns:
        (H, H * W, p * r).
    """
    row, column = row.permute(0, 1, 4, 2, 3), column.permute(0, 1, 4, 2, 3)
    return agent_key_bias(block, row, column, grid, agent_shape).transpose(1, 2)
