"""The public function of mixture-of-head attention: it checks its arguments and picks an implementation."""

import functools
import warnings

import torch
import torch.nn.functional as F

from visionattn.ops._triton import cannot_run

from .gather import moh_attention_gather
from .reference import moh_attention_reference

BACKENDS = ("auto", "reference", "dense", "gather", "triton")
# 'auto' takes the kernels where they beat dense attention on an H100: at most this share of heads active, from so many
# keys on (docs/moh.md; the row for 0.9 is where 0.89 was measured). Triton pads heads of other sizes than powers of
# two, and dense attention is faster then; the Gluon kernel does not.
SPARSE = ((0.5, 512), (0.8, 1024), (0.9, 8192))
SPARSE_SPLIT = ((0.9, 512),)


def moh_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor | None,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    active: float = 1.0,
) -> torch.Tensor:
    """Attention whose head h of token n is weighed by ``gates[..., n, h]``; 0 means that the token left it out.

    Args:
        q: queries (B, N, H, D), any strides.
        k, v: keys and values (B, M, H, D).
        gates: (B, N, H), or None for plain attention.
        scale: factor of q.k, D ** -0.5 by default.
        bias: added to the logits, (H, N, M) or (B, H, N, M).
        dropout_p: dropout of the attention weights.
        backend: ``'reference'``: eager, every logit in memory. ``'dense'``: PyTorch's fused attention for all heads,
            then the gates. ``'gather'``: a head is computed for the queries that chose it, by indexing (inference on
            any device). ``'triton'``: the same in one kernel that leaves out what nobody chose (inference on CUDA, no
            bias; :func:`can_run_triton`). ``'auto'``: ``'triton'`` where it can run and is faster, else ``'dense'``.
        active: share of heads that are not 0, on average; only ``'auto'`` asks.

    Returns:
        (B, N, H, D) in q's dtype.

    Raises:
        ValueError: for an unknown backend, shapes that disagree, or a backend that cannot run these arguments.
    """
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if not torch.jit.is_scripting():
        chosen = _choose(q, k, v, gates, factor, bias, dropout_p, backend, active)
        if chosen == "triton":
            return _fused(q, k, v, gates, factor)
        if chosen == "gather":
            return moh_attention_gather(q, k, v, gates, factor, bias)
        if chosen == "reference":
            return moh_attention_reference(q, k, v, gates, factor, bias)
    mask = bias if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, dropout_p=dropout_p, scale=factor
    ).transpose(1, 2)
    return out if gates is None else out * gates.unsqueeze(-1).to(out.dtype)


def _fused(q, k, v, gates, scale) -> torch.Tensor:
    from . import fused  # noqa: F401  registers the operator

    return torch.ops.visionattn.moh_attention(q, k, v, gates, scale)


def _choose(q, k, v, gates, scale, bias, dropout_p, backend, active) -> str:
    """The implementation that will run."""
    _check(q, k, v, gates, bias, backend)
    if backend == "auto":
        if _worth(q, k, active) and _triton_reason(True, q, k, v, gates, scale, bias, dropout_p) is None:
            return "triton"
        return "dense"
    reason = None
    if backend == "triton":
        reason = can_run_triton(q, k, v, gates, scale, bias, dropout_p)
    elif backend == "gather":
        reason = _inference_reason(q, k, v, gates, dropout_p)
    elif backend == "reference" and dropout_p > 0.0:
        reason = f"it has no dropout (dropout_p={dropout_p})"
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run: {reason}; use 'auto' or 'dense'")
    return backend


def _worth(q, k, active) -> bool:
    """Whether the kernels were measured to be faster than dense attention."""
    if not q.is_cuda:
        return False
    table = SPARSE
    if q.shape[3] not in (16, 32, 64, 128):
        table = SPARSE_SPLIT if _takes_gluon(str(q.device), q.dtype, int(q.shape[3])) else ()
    return any(active <= share and k.shape[1] >= keys for share, keys in table)


@torch.compiler.assume_constant_result
def _takes_gluon(device: str, dtype: torch.dtype, dim: int) -> bool:
    if cannot_run(device, dtype) is not None:
        return False
    from . import fused, gluon

    return gluon.taken(torch.device(device), dtype, dim, fused.forward_choice)


def _inference_reason(q, k, v, gates, dropout_p) -> str | None:
    if gates is None:
        return "it needs gates"
    if dropout_p > 0.0:
        return f"it has no dropout (dropout_p={dropout_p})"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gates)):
        return "it has no gradient"
    return None


def can_run_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor | None,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    """None if ``backend='triton'`` can run these arguments of :func:`moh_attention`, else the reason it cannot."""
    return _triton_reason(False, q, k, v, gates, scale, bias, dropout_p)


def _triton_reason(auto, q, k, v, gates, scale, bias, dropout_p) -> str | None:
    reason = _inference_reason(q, k, v, gates, dropout_p)
    if reason is not None:
        return reason
    if bias is not None:
        return "the kernel takes no bias"
    if torch.jit.is_tracing():
        return "torch.jit.trace takes other backends"
    if scale <= 0.0:
        return f"scale={scale} is not positive"
    return _static_reason(auto, str(q.device), q.dtype, int(q.shape[-1]))


@torch.compiler.assume_constant_result
def _static_reason(auto: bool, device: str, dtype: torch.dtype, dim: int) -> str | None:
    # asked here, where Dynamo runs Python: its own answer to is_exporting() depends on torch's version
    if auto and (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()):
        return "an export takes PyTorch's attention, which every consumer knows"
    if dim > 256:
        return f"heads have {dim} channels, the kernel holds up to 256"
    reason = cannot_run(device, dtype)
    if reason is None and auto:
        reason = _probe(device, dtype, dim)
    return reason


@functools.cache
def _probe(device: str, dtype: torch.dtype, dim: int) -> str | None:
    """Compiles the kernel and runs it once, so that a failure shows before anything depends on it."""
    from . import fused

    try:
        with torch.no_grad():
            q = torch.zeros(1, 16, 1, dim, device=device, dtype=dtype)
            fused.best_forward(q, q, q, torch.ones(1, 16, 1, device=device), 1.0)
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever Triton, the assembler or the driver say
        reason = f"its kernel failed: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}"
        warnings.warn(f"moh_attention computes every head: {reason}", stacklevel=2)
        return reason
    return None


def _check(q, k, v, gates, bias, backend) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}: give (B, N, H, D) and twice "
            "(B, M, H, D)"
        )
    if gates is not None and gates.shape != q.shape[:3]:
        raise ValueError(f"gates have shape {list(gates.shape)}: q needs {list(q.shape[:3])}")
    if bias is not None and bias.shape[-3:] != (q.shape[2], q.shape[1], k.shape[1]):
        expected = [q.shape[2], q.shape[1], k.shape[1]]
        raise ValueError(f"bias has shape {list(bias.shape)}: q and k need {expected}, or that for each of the batch")
