"""The public function of aggregated attention: it checks its arguments and picks an implementation."""

import functools
import warnings

import torch

from visionattn.ops._triton import cannot_run

from .reference import aggregated_attention_reference

BACKENDS = ("auto", "reference", "triton")


def aggregated_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    kv_pool: torch.Tensor,
    query_embedding: torch.Tensor,
    tau: torch.Tensor,
    bias_local: torch.Tensor,
    bias_pool: torch.Tensor,
    tokens: torch.Tensor,
    token_bias: torch.Tensor,
    height: int,
    width: int,
    window: int = 3,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Pixel-focused attention: a token's neighbourhood and a pooled map under one softmax (arXiv 2311.17132).

    Queries and keys are normalised here. With u = q / |q| and s_n = tau * log(neighbours inside the map + P)::

        A = softmax([ (u + query_embedding) s_n . k / |k| + bias_local over the neighbours inside the map,
                      (u + query_embedding) s_n . k_pool / |k_pool| + bias_pool ])
        out = (A_local + u . tokens + token_bias) v_neighbours + A_pool v_pool

    Args:
        q: (B, N, heads, D) of a map of N = height * width tokens, row by row; any strides.
        kv: keys and values (B, N, 2, heads, D), as one projection makes them; any strides.
        kv_pool: the pooled map's, (B, P, 2, heads, D).
        query_embedding: (heads, D).
        tau: positive temperatures (heads,).
        bias_local: (heads, window ** 2).
        bias_pool: (heads, N, P).
        tokens, token_bias: (heads, D, window ** 2) and (heads, window ** 2); added after the softmax and its dropout.
        window: odd side of the neighbourhood.
        dropout_p: dropout of the attention weights.
        backend: ``'reference'``: eager PyTorch, any device and dtype. ``'triton'``: fused kernels, no neighbourhood
            in memory; no dropout, no second derivative; :func:`can_run_triton` says where. ``'auto'``: the reference,
            until the kernels' tests have passed on a GPU (docs/gpu-tests.md).

    Returns:
        (B, N, heads, D).

    Raises:
        ValueError: for an unknown backend, an even window, shapes that disagree, or ``backend='triton'`` where the
            kernels cannot run.
    """
    if not torch.jit.is_scripting():
        tensors = (q, kv, kv_pool, query_embedding, tau, bias_local, bias_pool, tokens, token_bias)
        if _use_triton(tensors, height, width, window, dropout_p, backend):
            return _fused(tensors, height, width, window)
    return aggregated_attention_reference(
        q, kv, kv_pool, query_embedding, tau, bias_local, bias_pool, tokens, token_bias, height, width,
        window, dropout_p,
    )  # fmt: skip


def can_run_triton(q: torch.Tensor, window: int = 3, dropout_p: float = 0.0) -> str | None:
    """None if ``backend='triton'`` can run arguments like these, else the reason it cannot."""
    return _triton_reason(False, q, window, dropout_p)


def _fused(tensors, height, width, window) -> torch.Tensor:
    from . import fused

    if torch.compiler.is_compiling() or type(tensors[0]) is not torch.Tensor or _transformed():
        return torch.ops.visionattn.aggregated_attention(*tensors, height, width, window)[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return fused.AggregatedFunction.apply(*tensors, height, width, window)
    return fused.forward(*tensors, height, width, window)[0]


def _transformed() -> bool:
    """Whether torch.func is at work, whose tensors have no memory to read."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _use_triton(tensors, height, width, window, dropout_p, backend) -> bool:
    _check(tensors, height, width, window, backend)
    if backend == "reference":
        return False
    reason = _triton_reason(backend == "auto", tensors[0], window, dropout_p)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' cannot run: {reason}; use 'auto' or 'reference'")
    return reason is None


def _triton_reason(auto: bool, q, window: int, dropout_p: float) -> str | None:
    if auto and q.device.type != "cuda":
        return f"the kernels run on CUDA, these tensors are on {q.device.type}"
    if dropout_p > 0.0:
        return f"the kernels have no dropout (dropout_p={dropout_p})"
    if torch.jit.is_tracing():
        return "torch.jit.trace takes the reference"
    return _static_reason(auto, str(q.device), q.dtype, int(q.shape[-1]), window)


@torch.compiler.assume_constant_result
def _static_reason(auto: bool, device: str, dtype: torch.dtype, dim: int, window: int) -> str | None:
    # asked here, where Dynamo runs Python: its own answer to is_exporting() depends on torch's version
    if auto and (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()):
        return "an export takes the reference, whose operators every consumer knows"
    if dim > 128 or window > 7:
        return f"heads of {dim} channels and window={window}: the kernels hold 128 channels and a window of 7"
    reason = cannot_run(device, dtype)
    return _probe(device, dtype, dim, window) if auto and reason is None else reason


@functools.cache
def _probe(device: str, dtype: torch.dtype, dim: int, window: int) -> str | None:
    """Compiles the kernels and runs them once, so that a failure shows before anything depends on it."""
    from . import fused

    def zeros(*shape, dtype=dtype):
        return torch.zeros(shape, device=device, dtype=dtype)

    L = window * window
    params = [zeros(*shape, dtype=torch.float32) for shape in ((1, dim), (1,), (1, L))]
    last = [zeros(1, dim, L, dtype=torch.float32), zeros(1, L, dtype=torch.float32)]
    tensors = [zeros(1, 16, 1, dim), zeros(1, 16, 2, 1, dim), zeros(1, 4, 2, 1, dim), *params, zeros(1, 16, 4), *last]
    try:
        with torch.no_grad():
            out, lse = fused.forward(*tensors, 4, 4, window)
            fused.backward(out, *tensors, out, lse, 4, 4, window)
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever Triton, the assembler or the driver say
        reason = f"its kernels failed: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}"
        warnings.warn(f"aggregated_attention runs its eager reference, slower and larger: {reason}", stacklevel=2)
        return reason
    return None


def _check(tensors, height, width, window, backend) -> None:
    q, kv, kv_pool, embedding, tau, bias_local, bias_pool, tokens, token_bias = tensors
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: the neighbourhood has an odd side, 3 for example")
    if q.dim() != 4 or height * width != q.shape[1]:
        raise ValueError(f"q has shape {list(q.shape)}: give (B, N, heads, D) of a {height} x {width} map")
    B, N, heads, dim = q.shape
    P, L = kv_pool.shape[1], window * window
    expected = dict(
        kv=(kv, (B, N, 2, heads, dim)), kv_pool=(kv_pool, (B, P, 2, heads, dim)),
        query_embedding=(embedding, (heads, dim)), tau=(tau, (heads,)), bias_local=(bias_local, (heads, L)),
        bias_pool=(bias_pool, (heads, N, P)), tokens=(tokens, (heads, dim, L)), token_bias=(token_bias, (heads, L)),
    )  # fmt: skip
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}: q {list(q.shape)} and window={window} need "
                             f"{list(shape)}")  # fmt: skip
    if kv.dtype != q.dtype or kv_pool.dtype != q.dtype:
        raise ValueError(f"q, kv, kv_pool are {q.dtype}, {kv.dtype}, {kv_pool.dtype}: give one dtype")
