"""Magnitude-aware linear attention (MALA, ICCV 2025, arXiv 2507.00698) and its rotary embedding.

With phi(x) = elu(x) + 1 and s_ij = (D^-1/2 / N) phi(q_i) . phi(k_j), the paper's weights are

    a_ij = beta_i s_ij - gamma_i,   beta_i = 1 + 1 / z_i,   gamma_i = z_i / N,   z_i = sum_j s_ij

so that every row sums to 1 and a longer query gives a sharper row. As released, the products are of rotated queries and
keys while z stays that of the unrotated ones.
"""

import torch
import torch.nn.functional as F

from ._triton import cannot_run, in_auto, lacks_shared_memory


def rotary_angles(dim: int, device: torch.device | None = None) -> torch.Tensor:
    """The D / 4 angles 10000^-t of a head, t from 0 to 1 with both ends, in float32 as the released code has them."""
    return 1.0 / (10000.0 ** torch.linspace(0.0, 1.0, dim // 4, device=device, dtype=torch.float32))


def rotary_lines(length: int, dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Signed sines and cosines along one axis of a map.

    Args:
        length: positions 0 .. length - 1, in tokens, whatever the resolution.
        dim: D of a head, a multiple of 4.

    Returns:
        (2, length, D / 2) in float32: sines (negative at even channels) and cosines, each angle twice.
    """
    positions = torch.arange(length, device=device, dtype=torch.float32)
    phases = positions[:, None] * rotary_angles(dim, device)[None, :]
    sin, cos = phases.sin(), phases.cos()
    return torch.stack([torch.stack([-sin, sin], dim=-1).flatten(1), torch.stack([cos, cos], dim=-1).flatten(1)])


def rotary_tables(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed sines and cosines of a grid, from those of its rows and columns.

    Args:
        rows: (2, H, D / 2), of :func:`rotary_lines`.
        columns: (2, W, D / 2).

    Returns:
        sin, cos: (H * W, D). Half of the channels turn with the row, half with the column.
    """
    H, W = rows.shape[1], columns.shape[1]
    both = torch.cat([rows.unsqueeze(2).expand(-1, -1, W, -1), columns.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1)
    both = both.flatten(1, 2)
    return both[0], both[1]


def rotate(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring channels: (a, b) to (a cos - b sin, b cos + a sin).

    Args:
        x: (B, N, ..., D).
        sin, cos: (N, D) of :func:`rotary_tables`; the sign of the first term is in ``sin``.
    """
    shape = [sin.shape[0]] + [1] * (x.ndim - 3) + [sin.shape[1]]
    sin, cos = sin.reshape(shape), cos.reshape(shape)
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, partner, sin)


def beta(z: torch.Tensor) -> torch.Tensor:
    """1 + 1 / z, with what the released code adds to z."""
    return 1.0 + 1.0 / (z + 1e-6)


def phi(x: torch.Tensor) -> torch.Tensor:
    """The feature map, elu(x) + 1."""
    return F.elu(x) + 1.0


def mala_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sin: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The equations above with their N x M weights.

    Returns:
        The output (B, N, H, D) and the weights (B, H, N, M). Their rows sum to 1 where nothing is rotated.
    """
    tokens = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = phi(q), phi(k)
    z = torch.einsum("bnhd,bmhd->bhnm", q, k).sum(dim=-1, keepdim=True) * (scale / tokens)
    if sin is not None and cos is not None:
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (scale / tokens)
    weights = beta(z) * scores - z / tokens
    return torch.einsum("bhnm,bmhd->bnhd", weights, v), weights


def _state_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q (scale / N) (k^T v) of (B, N, D), strided as they may be."""
    # the factor is applied inside the product, to sums in float32: in float16 k^T v itself overflows
    nothing = torch.zeros(1, 1, 1, device=v.device, dtype=v.dtype)
    state = torch.baddbmm(nothing, k.transpose(1, 2), v, beta=0.0, alpha=scale / k.shape[1])
    return torch.bmm(q, state)


def _two_products(
    qk: torch.Tensor, v: torch.Tensor, sin: torch.Tensor | None, cos: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """MALA of queries and keys (B, N, 2, H, D), the feature map not yet applied, and values (B, N, H, D)."""
    B, N, _, H, D = qk.shape
    qk = phi(qk)
    k_mean = qk[:, :, 1].mean(dim=1, keepdim=True) * scale
    v_mean = v.mean(dim=1, keepdim=True)
    z = (qk[:, :, 0] * k_mean).sum(dim=-1, keepdim=True)  # float32 under autocast
    if sin is not None and cos is not None:
        qk = rotate(qk, sin, cos)
    q, k = qk.unbind(dim=2)
    # beta goes onto the queries, so that the second product needs no pass of its own
    q = q * beta(z).to(q.dtype)
    if H > 2:
        heads_q, heads_k, heads_v = [x.transpose(1, 2).reshape(B * H, N, D) for x in (q, k, v)]
        out = _state_product(heads_q, heads_k, heads_v, scale).reshape(B, H, N, D).transpose(1, 2)
    else:  # head by head, the products read the tokens where they lie: no copies, and few launches more
        outs: list[torch.Tensor] = []
        for heads_q, heads_k, heads_v in zip(q.unbind(2), k.unbind(2), v.unbind(2)):  # noqa: B905
            outs.append(_state_product(heads_q, heads_k, heads_v, scale))
        out = torch.stack(outs, dim=2) if H > 1 else outs[0].unsqueeze(2)
    return torch.addcmul(out, z.to(out.dtype), v_mean.to(out.dtype), value=-1.0)


def mala_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sin: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Magnitude-aware linear attention in two products, linear in the number of tokens.

    Args:
        q, k, v: (B, N, H, D), the feature map not yet applied.
        sin, cos: (N, D) of :func:`rotary_tables`, or None for no rotation.
        scale: D^-0.5 by default.
        backend: ``'reference'`` (N x N weights), ``'matmul'``, or ``'auto'``.

    Returns:
        (B, N, H, D).

    Raises:
        ValueError: for an unknown backend.
    """
    if backend == "reference":
        return mala_attention_reference(q, k, v, sin, cos, scale)[0]
    if backend != "auto" and backend != "matmul":
        raise ValueError(f"mala_attention: backend {backend} is unknown: use one of auto, reference, matmul")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _two_products(torch.stack([q, k], dim=2), v, sin, cos, scale)


def local_values(
    v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, grid: tuple[int, int]
) -> torch.Tensor:
    """The depthwise convolution of values (B, P + H * W, C) on their grid; 0 for the P tokens before it."""
    H, W = grid
    B, N, C = v.shape
    prefix = N - H * W
    x = v[:, prefix:].reshape(B, H, W, C).permute(0, 3, 1, 2)
    x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=C)
    x = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
    return F.pad(x, (0, 0, prefix, 0)) if prefix > 0 else x


WIDE_KIB = {2: 112, 4: 176}  # shared memory of the kernels of heads wider than 64 channels, by bytes of a number


@torch.jit.unused
def cannot_mix(qkvo: torch.Tensor, num_heads: int, taps: int) -> str | None:
    """Why the Triton kernels of :func:`mala_mix` can't run; None where they can."""
    if torch.onnx.is_in_onnx_export():
        return "the export needs PyTorch's own operators"
    dim = qkvo.shape[2] // 4 // num_heads
    if dim > 128:  # a state of D x D sums would spill
        return f"heads of {dim} channels are wider than 128"
    if taps != 9 and taps != 25:
        return f"its convolution has {taps} taps, not 9 or 25"
    reason = cannot_run(str(qkvo.device), qkvo.dtype)
    if reason is None and dim > 64:  # up to 64 channels, 99 KiB are enough: what the smallest GPUs have
        reason = lacks_shared_memory(str(qkvo.device), WIDE_KIB[qkvo.element_size()])
        reason = reason and f"with heads of {dim} channels in {qkvo.dtype} it {reason}"
    return reason


@torch.jit.unused
def _triton(
    qkvo: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sin: torch.Tensor,
    cos: torch.Tensor,
    num_heads: int,
    grid: tuple[int, int],
) -> torch.Tensor:
    from . import mala_triton  # triton is imported by whoever runs it

    args = (qkvo, weight.flatten(1), bias, sin, cos, num_heads, grid[0], grid[1])
    if torch.compiler.is_compiling():
        return mala_triton.mala_mix_op(*args)[0]
    if torch.is_grad_enabled():
        return mala_triton.MALAFunction.apply(*args)
    return mala_triton.launch(*args)[0]


def mala_mix(
    qkvo: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sin: torch.Tensor,
    cos: torch.Tensor,
    num_heads: int,
    grid: tuple[int, int],
    backend: str = "auto",
) -> torch.Tensor:
    """All that stands between the two projections of a MALA layer: ``(attention + local) * o``.

    Args:
        qkvo: (B, P + H * W, 4 * C): queries, keys, values (heads one after the other in each) and the gate o.
        weight, bias: (C, 1, 5, 5) and (C) of the depthwise convolution of the values on the grid.
        sin, cos: (P + H * W, D) of :func:`rotary_tables`, in qkvo's dtype.
        grid: (H, W).
        backend: ``'reference'`` (N x N weights), ``'matmul'``, ``'triton'`` (few launches, no copies), or ``'auto'``:
            the kernels where :data:`visionattn.ops._triton.IN_AUTO` has them and they can run, else the products. The
            kernels have no second derivative; ``'matmul'`` has.

    Returns:
        (B, P + H * W, C).

    Raises:
        ValueError: for an unknown backend, or one that can't run here.
    """
    if not torch.jit.is_scripting() and (backend == "triton" or (backend == "auto" and in_auto("mala"))):
        reason = cannot_mix(qkvo, num_heads, weight.shape[2] * weight.shape[3])
        if reason is None:
            return _triton(qkvo, weight, bias, sin, cos, num_heads, grid)
        if backend == "triton":
            raise ValueError(f"mala_mix: backend 'triton' can't run: {reason}: use 'auto' or 'matmul'")
    B, N, C = qkvo.shape[0], qkvo.shape[1], qkvo.shape[2] // 4
    qk, v, o = qkvo.split([2 * C, C, C], dim=-1)
    qk = qk.reshape(B, N, 2, num_heads, C // num_heads)
    heads_v = v.reshape(B, N, num_heads, C // num_heads)
    if backend == "reference":
        q, k = qk.unbind(dim=2)
        y = mala_attention_reference(q, k, heads_v, sin, cos)[0]
    elif backend == "auto" or backend == "matmul":
        y = _two_products(qk, heads_v, sin, cos, (C // num_heads) ** -0.5)
    else:
        raise ValueError(f"mala_mix: backend {backend} is unknown: use one of auto, reference, matmul, triton")
    return (y.reshape(B, N, C) + local_values(v, weight, bias, grid)) * o


def rotary_softmax_mix(
    qkvo: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sin: torch.Tensor,
    cos: torch.Tensor,
    num_heads: int,
    grid: tuple[int, int],
) -> torch.Tensor:
    """:func:`mala_mix` with softmax attention of the rotated queries and keys in MALA's place (no feature map)."""
    B, N, C = qkvo.shape[0], qkvo.shape[1], qkvo.shape[2] // 4
    qk, v, o = qkvo.split([2 * C, C, C], dim=-1)
    qk = rotate(qk.reshape(B, N, 2, num_heads, C // num_heads), sin, cos)
    q, k = qk.unbind(dim=2)
    heads_v = v.reshape(B, N, num_heads, C // num_heads)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), heads_v.transpose(1, 2))
    y = y.transpose(1, 2).reshape(B, N, C)
    return (y + local_values(v, weight, bias, grid)) * o
