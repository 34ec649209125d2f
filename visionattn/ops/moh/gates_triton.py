"""Triton kernels of the gates of mixture-of-head attention: what routing.py says in about twenty small passes.

One row of logits per token: E of the routed heads, 2 of the kinds (where there are both), S of the shared heads (where
there are several). With P, p, a the softmaxes of the three, sel the k largest of P and Z = sum(sel P):

    r = k sel P / Z;   gates = [2 a_1 S p, 2 a_2 r];   load balance = E sum_e mean(P_e) mean(sel_e)

Backward computes all of it again from the logits.
"""

import torch
import triton
import triton.language as tl

from visionattn.ops._launch import Launch, Plans, on_device


@triton.jit
def _softmax(ptr, inside, n: tl.constexpr, NP: tl.constexpr):
    """(rows, NP) probabilities of n logits; 0 beyond n."""
    column = tl.arange(0, NP)[None, :]
    x = tl.load(ptr[:, None] + column, mask=inside[:, None] & (column < n), other=0.0).to(tl.float32)
    x = tl.where(column < n, x, float("-inf"))
    x = tl.exp(x - tl.max(x, axis=1)[:, None])
    return x / tl.sum(x, axis=1)[:, None]


@triton.jit
def _first_kind(ptr, inside):
    """Probability of the first of two."""
    first = tl.load(ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(ptr + 1, mask=inside, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(second - first))


@triton.jit
def _selected(probs, K: tl.constexpr, NP: tl.constexpr):
    """1 for the K largest, of equal ones the first."""
    i = tl.arange(0, NP)[None, :, None]
    j = tl.arange(0, NP)[None, None, :]
    this, other = probs[:, :, None], probs[:, None, :]
    before = (other > this) | ((other == this) & (j < i))
    return (tl.sum(before.to(tl.int32), axis=2) < K).to(tl.float32)


@triton.jit
def _forward_kernel(
    gates_ptr, part_ptr, logits_ptr,
    T, R,
    E: tl.constexpr, S: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < T
    wide = row.to(tl.int64)
    logits = logits_ptr + wide * R
    gates = gates_ptr + wide[:, None] * (S + E)
    kind = tl.full([ROWS], 0.5, tl.float32)
    if E > 0:
        e = tl.arange(0, EP)
        probs = _softmax(logits, inside, E, EP)
        selected = tl.where((e < E)[None, :], _selected(probs, K, EP), 0.0)
        kept = probs * selected
        routed = kept * (K / tl.sum(kept, axis=1))[:, None]
        if S > 0:
            kind = _first_kind(logits + E, inside)
            routed *= (2.0 * (1.0 - kind))[:, None]
        mask = inside[:, None] & (e < E)[None, :]
        tl.store(gates + S + e[None, :], routed, mask=mask)
        part = part_ptr + tl.program_id(0) * 2 * E + e
        tl.store(part, tl.sum(tl.where(mask, probs, 0.0), axis=0), mask=e < E)
        tl.store(part + E, tl.sum(tl.where(mask, selected, 0.0), axis=0), mask=e < E)
    if S == 1:
        tl.store(gates_ptr + wide * (S + E), 2.0 * kind, mask=inside)
    if S > 1:
        s = tl.arange(0, SP)
        shared = _softmax(logits + (E + 2 if E > 0 else 0), inside, S, SP) * (2.0 * S * kind)[:, None]
        tl.store(gates + s[None, :], shared, mask=inside[:, None] & (s < S)[None, :])


@triton.jit
def _loss_kernel(loss_ptr, share_ptr, part_ptr, parts, T, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr):
    """The load-balance term, and the shares of tokens that chose each head."""
    e = tl.arange(0, EP)
    probs = tl.zeros([EP], tl.float32)
    chosen = tl.zeros([EP], tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < parts)[:, None] & (e < E)[None, :]
        at = part_ptr + row[:, None] * (2 * E) + e[None, :]
        probs += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        chosen += tl.sum(tl.load(at + E, mask=mask, other=0.0), axis=0)
    tokens = T * 1.0
    chosen /= tokens
    tl.store(share_ptr + e, chosen, mask=e < E)
    tl.store(loss_ptr, E * tl.sum(probs / tokens * chosen, axis=0))


@triton.jit
def _backward_kernel(
    d_logits_ptr, d_gates_ptr, logits_ptr, share_ptr, d_loss_ptr,
    T, R,
    E: tl.constexpr, S: tl.constexpr, K: tl.constexpr, LOSS: tl.constexpr, GATES: tl.constexpr,
    EP: tl.constexpr, SP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < T
    wide = row.to(tl.int64)
    logits = logits_ptr + wide * R
    out = d_logits_ptr + wide[:, None] * R
    d_gates = d_gates_ptr + wide[:, None] * (S + E)
    dtype: tl.constexpr = d_logits_ptr.dtype.element_ty
    kind = tl.full([ROWS], 0.5, tl.float32)
    d_kind = tl.zeros([ROWS], tl.float32)
    if E > 0:
        e = tl.arange(0, EP)
        mask = inside[:, None] & (e < E)[None, :]
        probs = _softmax(logits, inside, E, EP)
        if S > 0:
            kind = _first_kind(logits + E, inside)
        d_probs = tl.zeros([ROWS, EP], tl.float32)
        if GATES:
            selected = tl.where((e < E)[None, :], _selected(probs, K, EP), 0.0)
            kept = probs * selected
            scale = K / tl.sum(kept, axis=1)
            d_routed = tl.load(d_gates + S + e[None, :], mask=mask, other=0.0).to(tl.float32)
            along = tl.sum(d_routed * kept, axis=1) * scale
            if S > 0:
                d_kind -= 2.0 * along
                d_routed *= (2.0 * (1.0 - kind))[:, None]
                along *= 2.0 * (1.0 - kind)
            d_probs += selected * (d_routed - (along / K)[:, None]) * scale[:, None]
        if LOSS:
            share = tl.load(share_ptr + e, mask=e < E, other=0.0)
            d_probs += (share * (tl.load(d_loss_ptr).to(tl.float32) * E / (T * 1.0)))[None, :]
        d_routes = probs * (d_probs - tl.sum(d_probs * probs, axis=1)[:, None])
        tl.store(out + e[None, :], d_routes.to(dtype), mask=mask)
    if S > 1:
        s = tl.arange(0, SP)
        mask = inside[:, None] & (s < S)[None, :]
        start: tl.constexpr = E + 2 if E > 0 else 0
        probs = _softmax(logits + start, inside, S, SP)
        d_probs = tl.zeros([ROWS, SP], tl.float32)
        if GATES:
            d_probs += tl.load(d_gates + s[None, :], mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(d_probs * probs, axis=1)
        d_kind += 2.0 * S * along
        d_shared = probs * (d_probs - along[:, None]) * (2.0 * S * kind)[:, None]
        tl.store(out + start + s[None, :], d_shared.to(dtype), mask=mask)
    if E > 0 and S > 0:
        if S == 1 and GATES:
            d_kind += 2.0 * tl.load(d_gates_ptr + wide * (S + E), mask=inside, other=0.0).to(tl.float32)
        d_kind *= kind * (1.0 - kind)
        at = d_logits_ptr + wide * R + E
        tl.store(at, d_kind.to(dtype), mask=inside)
        tl.store(at + 1, (-d_kind).to(dtype), mask=inside)


_plans = Plans()


def _sizes(E: int, S: int) -> dict:
    EP, SP = max(2, triton.next_power_of_2(E)), max(2, triton.next_power_of_2(S))
    # _selected compares a row's heads with each other: (ROWS, EP, EP) numbers
    return dict(EP=EP, SP=SP, ROWS=max(4, min(64, 8192 // (EP * EP), 2048 // SP)))


def width(E: int, S: int) -> int:
    """Logits of a token: E routed heads, the kinds, S shared heads."""
    return E + (2 if E > 0 and S > 0 else 0) + (S if S > 1 else 0)


def forward(logits: torch.Tensor, E: int, S: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gates (..., S + E) in float32; for E > 0 also the tiles' sums (tiles, 2, E) of probabilities and choices."""
    logits = logits.contiguous()
    R = logits.shape[-1]
    T = logits.numel() // R
    gates = torch.empty(*logits.shape[:-1], S + E, dtype=torch.float32, device=logits.device)
    sizes = _sizes(E, S)
    programs = triton.cdiv(T, sizes["ROWS"])
    part = torch.empty(programs, 2, E, dtype=torch.float32, device=logits.device) if E > 0 else None

    def make() -> Launch:
        return Launch(_forward_kernel, (programs,), (T, R), dict(E=E, S=S, K=k, **sizes), num_warps=4)

    with on_device(logits):
        tensors = (gates, gates if part is None else part, logits)
        _plans.get((_forward_kernel, T, E, S, k, logits.dtype, logits.device), make)(*tensors)
    return gates, part


def load_balance(part: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The load-balance term (a number), and the shares (E) of the T tokens that chose each head."""
    parts, _, E = part.shape
    share = torch.empty(E, dtype=torch.float32, device=part.device)
    loss = torch.empty((), dtype=torch.float32, device=part.device)

    def make() -> Launch:
        constants = dict(E=E, EP=max(2, triton.next_power_of_2(E)), ROWS=64)
        return Launch(_loss_kernel, (1,), (parts, T), constants, num_warps=4)

    with on_device(part):
        _plans.get((_loss_kernel, parts, T, E, part.device), make)(loss, share, part)
    return loss, share


def backward(d_gates, d_loss, logits, share, E: int, S: int, k: int) -> torch.Tensor:
    """Gradient of the logits; either of the first two may be None."""
    R = logits.shape[-1]
    T = logits.numel() // R
    d_logits = torch.empty_like(logits)
    sizes = _sizes(E, S)
    flags = dict(LOSS=d_loss is not None, GATES=d_gates is not None)
    d_gates = logits if d_gates is None else d_gates.contiguous()
    tensors = (d_logits, d_gates, logits, *(logits if t is None else t for t in (share, d_loss)))

    def make() -> Launch:
        constants = dict(E=E, S=S, K=k, **flags, **sizes)
        return Launch(_backward_kernel, (triton.cdiv(T, sizes["ROWS"]),), (T, R), constants, num_warps=4)

    with on_device(logits):
        key = (_backward_kernel, T, E, S, k, *flags.values(), logits.device, *(t.dtype for t in tensors))
        _plans.get(key, make)(*tensors)
    return d_logits


class HeadGates(torch.autograd.Function):
    """(gates, load-balance term; None without routed heads) of logits (..., :func:`width`)."""

    @staticmethod
    def forward(ctx, logits, E, S, k):
        logits = logits.contiguous()
        gates, part = forward(logits, E, S, k)
        loss, share = (None, None) if part is None else load_balance(part, logits.numel() // logits.shape[-1])
        ctx.save_for_backward(logits, share)
        ctx.sizes = (E, S, k)
        ctx.set_materialize_grads(False)
        return gates, loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_gates, d_loss):
        logits, share = ctx.saved_tensors
        if d_gates is None and d_loss is None:
            return None, None, None, None
        return backward(d_gates, d_loss, logits, share, *ctx.sizes), None, None, None
