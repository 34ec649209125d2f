"""Neighbourhood attention (NAT, arXiv 2204.07143, section 3; DiNAT, arXiv 2209.15001) with relative biases.

The eager implementation here is what runs on a CPU, under TorchScript and in exported graphs: it cuts every axis into
tiles of about a window, so that a query meets the few keys around its tile and no N x N mask exists. On a GPU the
operator of :mod:`visionattn.ops.local` takes over.
"""
# ruff: noqa: RUF005  (TorchScript, which compiles most of this file, has no unpacking in lists)

import functools
import warnings

import torch
import torch.nn.functional as F

from .local import Neighborhood, local_attention, planner
from .local.patterns import encode


def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, ...],
    window: int | tuple[int, ...] | Neighborhood,
    dilation: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Every token attends to the ``window`` tokens nearest to it along each axis of a grid of 1 to 3 axes.

    The semantics are NATTEN's: at a border the window shifts inward, so every query sees as many keys; with a dilation,
    the candidates are the tokens whose index agrees with the query's modulo it (:class:`visionattn.ops.local.
    Neighborhood` says more of strides and causality).

    Args:
        q: queries (B, N, H, D), any strides; N the tokens of the grid in row-major order.
        k, v: keys (B, N, Hk, D) and values (B, N, Hk, Dv), any strides; Hk divides H.
        grid: lengths of the axes; window * dilation fits into each.
        window, dilation, stride, causal: one value, or one for each axis; or a whole pattern as ``window``.
        bias: (H, 2 * window - 1, ...) added to the scaled logits at ``key - query + window - 1`` along each axis,
            counted in steps of the dilation.
        scale: factor of q.k, D ** -0.5 by default.
        dropout: probability with which an attention weight is dropped (the others grow); for training.
        backend: ``'tiles'``, the implementation of this file: any device, dtype and program. Or a backend of
            :func:`visionattn.ops.local.local_attention`, without dropout. ``'auto'`` is that operator's choice on CUDA
            where its fused kernels run, else (a CPU, exported graphs, dropout, float64 ...) ``'tiles'``; kernels that
            can't run on CUDA are reported once, as a warning.

    Returns:
        (B, N, H, Dv) in q's dtype.

    Raises:
        ValueError: for a grid that is not the sequence's or has no room for the window, or shapes that disagree.
    """
    pattern = window if isinstance(window, Neighborhood) else Neighborhood(window, stride, dilation, causal)
    axes = pattern.axes(grid)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = choose_backend(q, k, v, pattern, len(axes), bias, scale, dropout)
    if backend != "tiles":
        if dropout > 0.0:
            raise ValueError(f"backend={backend!r} has no dropout={dropout}: use 'tiles', or no attention dropout")
        return local_attention(q, k, v, grid, pattern, bias=bias, scale=scale, backend=_local_name(backend))
    lengths = [axis.window for axis in axes]
    _check(q, k, v, grid, lengths, bias)
    return tiled_attention(
        q, k, v, [axis.length for axis in axes], lengths, [axis.dilation for axis in axes],
        [axis.stride for axis in axes], [axis.causal for axis in axes], bias,
        scale, dropout,
    )  # fmt: skip


def choose_backend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Neighborhood,
    dims: int,
    bias: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> str:
    """What ``backend='auto'`` of :func:`neighborhood_attention` is: ``'tiles'``, or ``'local'`` (fused kernels)."""
    if not q.is_cuda or dropout > 0.0 or scale <= 0.0 or v.shape[-1] != q.shape[-1] or torch.jit.is_tracing():
        return "tiles"
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    reason = _kernels_reason(
        str(q.device), q.dtype, fixed(q.shape[3]), fixed(q.shape[2]), fixed(k.shape[2]),
        tuple(encode(pattern, dims)), dims, False, False, None if bias is None else bias.dtype, False, grad,
    )  # fmt: skip
    return "local" if reason is None else "tiles"


def fixed(n: int) -> int:
    """n, as a constant of a graph whose sizes are symbolic."""
    return len(range(n))


@torch.compiler.assume_constant_result
def _kernels_reason(*key) -> str | None:
    # asked here, where Dynamo runs Python: its own answer to is_exporting() depends on torch's version
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return "an export takes operators that every consumer knows"
    reason = planner.static_reason(*key)
    if reason is not None:
        _report(reason)
    return reason


@functools.cache
def _report(reason: str) -> None:
    warnings.warn(f"neighborhood_attention runs without fused kernels, slower: {reason}", stacklevel=2)


def _local_name(backend: str) -> str:
    return "auto" if backend == "local" else backend


def _check(q, k, v, grid, window: list[int], bias) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}: give (batch, tokens, heads, channels)")
    n = 1
    for length in grid:
        n *= length
    if q.shape[1] != n:
        raise ValueError(f"grid {tuple(grid)} has {n} tokens, but q, k, v have {q.shape[1]}: pass the grid they lie on")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must agree with q {list(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"q has {q.shape[2]} heads, k and v {k.shape[2]}: theirs must divide q's")
    if bias is not None and list(bias.shape) != [q.shape[2], *(2 * w - 1 for w in window)]:
        raise ValueError(
            f"bias has shape {list(bias.shape)}: window {tuple(window)} on the grid {tuple(grid)} and {q.shape[2]} "
            f"heads need {[q.shape[2], *(2 * w - 1 for w in window)]}"
        )


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: list[int],
    window: list[int],
    dilation: list[int],
    stride: list[int],
    causal: list[bool],
    bias: torch.Tensor | None,
    scale: float,
    dropout: float,
    chunk: int = 2**25,
) -> torch.Tensor:
    """``backend='tiles'`` of :func:`neighborhood_attention`, one entry for each axis; what TorchScript compiles.

    Outside compiled graphs, no more than about ``chunk`` logits of one image are in memory at a time.
    """
    dims, heads = len(grid), q.shape[2]
    queries: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    slots: list[torch.Tensor] = []
    cost = heads
    # on the meta device each step costs PyTorch milliseconds, also of arithmetic on indices
    device = torch.device("cpu") if q.is_meta else q.device
    for a in range(dims):
        table = _axis_tables(grid[a], window[a], dilation[a], stride[a], causal[a], device)
        queries.append(table[0].to(q.device))
        keys.append(table[1].to(q.device))
        rows.append(table[2].to(q.device))
        slots.append(table[3].to(q.device))
        cost = cost * table[2].shape[0] * table[2].shape[1] * table[2].shape[2]
    if k.shape[2] != heads:
        k = k.repeat_interleave(heads // k.shape[2], 2)
        v = v.repeat_interleave(heads // v.shape[2], 2)
    q, k, v = q.unflatten(1, grid), k.unflatten(1, grid), v.unflatten(1, grid)
    if bias is None:
        bias = torch.zeros([1] + [2 * w - 1 for w in window], device=q.device, dtype=q.dtype)
    # what a query doesn't see is found in one more row of the table
    bias = F.pad(bias.to(q.dtype), [0, 1] * dims, value=float("-inf"))

    chunks = 1
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        chunks = max(1, min(rows[0].shape[0], cost // chunk))
    if chunks == 1:
        out = _attend(q, k, v, queries, keys, rows, bias, scale, dropout)
    else:
        outs: list[torch.Tensor] = []
        first_queries, first_keys, first_rows = queries[0].chunk(chunks), keys[0].chunk(chunks), rows[0].chunk(chunks)
        for i in range(len(first_queries)):
            queries[0], keys[0], rows[0] = first_queries[i], first_keys[i], first_rows[i]
            outs.append(_attend(q, k, v, queries, keys, rows, bias, scale, dropout))
        out = torch.cat(outs, 1)
    for a in range(dims):
        out = out.index_select(1 + a, slots[a])
    return out.flatten(1, dims)


def _axis_tables(
    length: int, window: int, dilation: int, stride: int, causal: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One axis, cut into tiles of T queries of one dilation group and the S keys around each.

    Returns:
        queries (tiles, T) and keys (tiles, S), positions on the axis (a tile that is not full repeats its last);
        rows (tiles, T, S) of the bias table, its last row + 1 where the query does not see the key;
        slots (length,), where a position is found among the tiles * T queries.
    """
    longest = (length + dilation - 1) // dilation
    per_group = max(1, (longest + window // 2) // window)
    T = (longest + per_group - 1) // per_group
    S = min(T + stride + window - 2, longest)

    tile = torch.arange(dilation * per_group, device=device)
    group = (tile // per_group)[:, None]
    n = (length - group + dilation - 1) // dilation  # tokens of the group
    p = torch.minimum((tile % per_group * T)[:, None] + torch.arange(T, device=device), n - 1)
    if causal:
        leader = torch.minimum(p // stride * stride + stride - 1, n - 1)
        start = (leader - window + 1).clamp(min=0)
        stop = p + 1
    else:
        leader = torch.minimum(p // stride * stride + stride // 2, n - 1)
        start = torch.minimum((leader - window // 2).clamp(min=0), n - window)
        stop = start + window
    # starts never decrease, so the first query's decides; a span that would leave the group moves inward
    first = torch.minimum(start[:, :1], (n - S).clamp(min=0))
    j = first + torch.arange(S, device=device)
    seen = (j[:, None, :] >= start[:, :, None]) & (j[:, None, :] < stop[:, :, None])
    rows = torch.where(seen, j[:, None, :] - p[:, :, None] + window - 1, 2 * window - 1)
    i = torch.arange(length, device=device)
    slots = i % dilation * (per_group * T) + i // dilation
    return group + dilation * p, group + dilation * torch.minimum(j, n - 1), rows, slots


def _cut(x: torch.Tensor, index: list[torch.Tensor]) -> torch.Tensor:
    """(B, *grid, H, D) to (B, tiles * H, positions of a tile, D)."""
    dims = len(index)
    for a in range(dims):
        x = x.index_select(1 + 2 * a, index[a].flatten())
        x = x.unflatten(1 + 2 * a, [index[a].shape[0], index[a].shape[1]])
    order = [0] + [1 + 2 * a for a in range(dims)] + [2 * dims + 1]
    order = order + [2 + 2 * a for a in range(dims)] + [2 * dims + 2]
    return x.permute(order).flatten(dims + 2, 2 * dims + 1).flatten(1, dims + 1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    rows: list[torch.Tensor],
    bias: torch.Tensor,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """The tiles' queries: (B, tiles * T of each axis, H, Dv)."""
    dims, heads = len(rows), q.shape[-2]
    table = bias
    for a in range(dims):
        table = table.index_select(1 + 3 * a, rows[a].flatten())
        table = table.unflatten(1 + 3 * a, [rows[a].shape[0], rows[a].shape[1], rows[a].shape[2]])
    order = [1 + 3 * a for a in range(dims)] + [0]
    order = order + [2 + 3 * a for a in range(dims)] + [3 + 3 * a for a in range(dims)]
    table = table.permute(order).flatten(2 * dims + 1, 3 * dims).flatten(dims + 1, 2 * dims)
    tiles = [t.shape[0] for t in queries]
    sizes = [t.shape[1] for t in queries]
    table = table.expand(tiles + [heads, table.shape[-2], table.shape[-1]]).flatten(0, dims)

    out = F.scaled_dot_product_attention(
        _cut(q, queries), _cut(k, keys), _cut(v, keys), attn_mask=table[None], dropout_p=dropout, scale=scale
    )
    out = out.unflatten(2, sizes).unflatten(1, tiles + [heads])
    order = [0]
    for a in range(dims):
        order = order + [1 + a, 2 + dims + a]
    out = out.permute(order + [1 + dims, 2 + 2 * dims])  # B, tiles, T, ..., H, Dv
    for a in range(dims):
        out = out.flatten(1 + a, 2 + a)
    return out
