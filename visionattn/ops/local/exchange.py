"""The collectives of attention over several processes: one all-to-all along the first axis, which autograd knows.

Everything that processes tell each other goes through :func:`exchange`: halo rows, gathered text, heads for tokens
(Ulysses). Gradients are those of the sum of all processes' losses; what several processes hold copies of (replicated
text) gets each process's part, to be summed over the group as data-parallel gradients are.
"""

from typing import Any

import torch
import torch.distributed as dist


def world(group: Any = None) -> tuple[int, int]:
    """This process's rank in the group, and the group's size.

    Raises:
        RuntimeError: if torch.distributed is not initialised, or this process is not of the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: start with torchrun, and call torch.distributed.init_process_group"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise RuntimeError("this process is not in the group that it gave: call with a group of its own")
    return rank, dist.get_world_size(group)


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of ``torch.tensor_split``: as equal as they can be, the first ones larger."""
    return tuple(total // parts + (i < total % parts) for i in range(parts))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _run(x, send, receive, group)

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _run(x, send, receive, group):
    out = x.new_empty((sum(receive), *x.shape[1:]))
    if torch.compiler.is_compiling():  # a graph takes no try
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group)
        return out
    try:
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group)
    except RuntimeError as e:
        first = (str(e).strip().splitlines() or [""])[0][:200]
        raise RuntimeError(
            f"the processes could not exchange tokens: one is gone, or was later than the group's timeout ({first})"
        ) from e
    return out


def exchange(x: torch.Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any = None) -> torch.Tensor:
    """Sends rows of ``x`` to every process, and returns the received ones in the order of the processes.

    Args:
        x: (sum(send), ...): first the rows for rank 0, then those for rank 1, and so on.
        send: rows for each rank.
        receive: rows from each rank: its ``send`` at this process's place.
        group: the process group, the default one if None.

    Returns:
        (sum(receive), ...). Differentiable.

    Raises:
        RuntimeError: if a process is gone, or does not come within the group's timeout (gloo; under NCCL its watchdog
            ends the process).
    """
    return _Exchange.apply(x, tuple(send), tuple(receive), group)


class _Depend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        ctx.save_for_backward(*others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(t) for t in ctx.saved_tensors)


def depend(x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    """``x``, with gradients of zero for ``others``: an exchange's backward ends only if every process runs it."""
    return _Depend.apply(x, *(t for t in others if t is not None))


def gather(x: torch.Tensor, counts: tuple[int, ...], group: Any = None) -> torch.Tensor:
    """All processes' rows, in their order: (counts[rank], ...) to (sum(counts), ...). Differentiable."""
    rank, size = world(group)
    if size == 1:
        return x
    repeated = x.expand(size, *x.shape).flatten(0, 1)
    return exchange(repeated, (counts[rank],) * size, counts, group)


def heads_for_tokens(
    x: torch.Tensor, counts: tuple[tuple[int, ...], ...], heads: tuple[int, ...], group: Any = None
) -> torch.Tensor:
    """Ulysses, there: from own tokens of all heads to all tokens of own heads.

    Args:
        x: (B, n, H, D), the runs of this process one behind the other (text and grid, say).
        counts: for each run, its tokens at each rank; the runs come back whole, one behind the other.
        heads: heads of each rank, in order.

    Returns:
        (B, sum of counts, heads[rank], D).
    """
    rank, size = world(group)
    B, n, H, D = x.shape
    totals = tuple(sum(run[r] for run in counts) for r in range(size))
    if n != totals[rank] or sum(heads) != H:
        raise ValueError(f"x has {n} tokens and {H} heads: counts and heads say {totals[rank]} and {sum(heads)}")
    parts = x.transpose(0, 1).split(list(heads), dim=2)
    flat = torch.cat([p.reshape(-1) for p in parts])
    receive = [t * B * heads[rank] * D for t in totals]
    got = exchange(flat, tuple(n * B * h * D for h in heads), tuple(receive), group)
    pieces = [
        piece.view(-1, B, heads[rank], D).split([run[r] for run in counts])
        for r, piece in enumerate(got.split(receive))
    ]
    whole = [piece[i] for i in range(len(counts)) for piece in pieces]
    return torch.cat(whole).transpose(0, 1)


def tokens_for_heads(
    x: torch.Tensor, counts: tuple[tuple[int, ...], ...], heads: tuple[int, ...], group: Any = None
) -> torch.Tensor:
    """Ulysses, back: the inverse of :func:`heads_for_tokens`."""
    rank, size = world(group)
    B, _, own, D = x.shape
    totals = tuple(sum(run[r] for run in counts) for r in range(size))
    wholes = x.transpose(0, 1).split([sum(run) for run in counts])
    runs = [whole.split(list(run)) for whole, run in zip(wholes, counts, strict=True)]
    flat = torch.cat([run[r].reshape(-1) for r in range(size) for run in runs])
    n = totals[rank]
    got = exchange(flat, tuple(t * B * own * D for t in totals), tuple(n * B * h * D for h in heads), group)
    pieces = got.split([n * B * h * D for h in heads])
    return torch.cat([p.view(n, B, h, D) for p, h in zip(pieces, heads, strict=True)], dim=2).transpose(0, 1)
