"""The public functions of halo attention: they check their arguments and pick an implementation."""

import functools
import warnings

import torch

from .reference import halo_attention_reference


def halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    border: str = "zero",
    scale: float | None = None,
    scale_rel: bool = False,
    rel_step: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Blocked local self-attention with a halo (arXiv 2103.12731, section 3).

    The (H, W) key map is cut into ``block_size`` squares. The queries of a square attend to the
    ``block_size + 2 * halo_size`` square around it. Maps that blocks do not tile are padded at the bottom and right;
    what lies outside the map is treated as ``border`` says.

    Args:
        q: queries (B, ceil(H / stride), ceil(W / stride), heads, D), any strides.
        k, v: keys (B, H, W, heads, D) and values (B, H, W, heads, Dv), any strides.
        rel_height, rel_width: relative tables (2 * window - 1, D), shared by all heads.
        stride: 1, or 2 for subsampled queries (block_size must be divisible by it).
        border: ``'zero'`` keeps keys outside the map in the softmax, as zeros with their relative logit;
            ``'mask'`` leaves them out.
        scale: factor of q.k, D ** -0.5 by default.
        scale_rel: whether the relative logits are scaled too.
        rel_step: 1 indexes the tables with the subsampled query position, ``stride`` with its true position.
        backend: ``'reference'``: eager PyTorch, any device and dtype, every window in memory. ``'triton'``: fused
            kernels, no window in memory; :func:`can_run_triton` says where. ``'auto'``: the kernels on CUDA tensors
            if they can run, else the reference; a kernel that does not compile is reported once, as a warning.
            TorchScript, ``torch.export`` and ONNX take the reference.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), heads, Dv) in q's dtype. The kernels have no second derivative.

    Raises:
        ValueError: for an unknown border or backend, a block that the stride does not divide, shapes or dtypes that
            disagree, or ``backend='triton'`` where the kernels cannot run.
    """
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    rel_scale = factor if scale_rel else 1.0
    if not torch.jit.is_scripting():
        out = _fused(
            backend, None, q, k, v, rel_height, rel_width, border,
            (block_size, halo_size, stride, border == "mask", factor, rel_scale, rel_step),
        )  # fmt: skip
        if out is not None:
            return out
    rel_height, rel_width = rel_height.to(q.dtype), rel_width.to(q.dtype)
    return halo_attention_reference(
        q, k, v, rel_height, rel_width, block_size, halo_size, stride, border == "mask", factor, rel_scale, rel_step
    )


def halo_attention_kv(
    q: torch.Tensor,
    kv: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    border: str = "zero",
    scale: float | None = None,
    scale_rel: bool = False,
    rel_step: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`halo_attention` with keys and values in one tensor, as one projection makes them.

    Its gradient is one tensor as well, which saves several passes over it that joining two gradients would take.

    Args:
        kv: (B, H, W, heads, D + Dv), each head's key before its value, any strides.
    """
    dim = q.shape[-1]
    k, v = kv[..., :dim], kv[..., dim:]
    factor = float(dim) ** -0.5 if scale is None else scale
    rel_scale = factor if scale_rel else 1.0
    if not torch.jit.is_scripting():
        out = _fused(
            backend, kv, q, k, v, rel_height, rel_width, border,
            (block_size, halo_size, stride, border == "mask", factor, rel_scale, rel_step),
        )  # fmt: skip
        if out is not None:
            return out
    rel_height, rel_width = rel_height.to(q.dtype), rel_width.to(q.dtype)
    return halo_attention_reference(
        q, k, v, rel_height, rel_width, block_size, halo_size, stride, border == "mask", factor, rel_scale, rel_step
    )


def _fused(backend, kv, q, k, v, rel_height, rel_width, border, settings) -> torch.Tensor | None:
    """Checks the arguments, and runs the kernels if `backend` and the arguments let them run."""
    if torch.compiler.is_compiling() or type(q) is not torch.Tensor or not q.is_cuda or torch.jit.is_tracing():
        _check(q, k, v, rel_height, rel_width, border, settings)
        if not _use_triton(backend, q, k, v, rel_height, rel_width, settings):
            return None
        if kv is None:
            return torch.ops.visionattn.halo_attention(q, k, v, rel_height, rel_width, *settings)[0]
        return torch.ops.visionattn.halo_attention_kv(q, kv, rel_height, rel_width, *settings)[0]

    # Eager: the same, with the checks made once for arguments like these, and without the dispatcher.
    tensors = (q, k, v, rel_height, rel_width)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    key = (backend, border, settings, grad, *((x.shape, x.dtype, x.device) for x in tensors))
    use = _checked.get(key)
    if use is None:
        _check(*tensors, border, settings)
        if len(_checked) >= 4096:
            _checked.clear()
        use = _checked[key] = _use_triton(backend, *tensors, settings)
    if not use:
        return None
    from . import fused

    if not grad:
        return fused.forward(*tensors, *settings)[0]
    if kv is None:
        return fused.HaloFunction.apply(*tensors, settings)
    return fused.HaloFunctionKV.apply(q, kv, rel_height, rel_width, settings)


_checked: dict[tuple, bool] = {}


def _check(q, k, v, rel_height, rel_width, border, settings) -> None:
    block_size, halo_size, stride, _, _, _, rel_step = settings
    if border not in ("zero", "mask"):
        raise ValueError(f"border={border!r} is unknown: use 'zero' or 'mask'")
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride != 0:
        raise ValueError(
            f"block_size={block_size}, halo_size={halo_size}, stride={stride}: "
            "block_size must be a positive multiple of stride, halo_size at least 0"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 5:
            raise ValueError(f"{name} has shape {list(x.shape)}: give (batch, height, width, heads, channels)")
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: give one floating-point dtype")
    if not q.device == k.device == v.device == rel_height.device == rel_width.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}, or the tables elsewhere: use one device")
    B, H, W, heads, dim = k.shape
    expected = (B, (H + stride - 1) // stride, (W + stride - 1) // stride, heads, dim)
    if q.shape != expected:
        raise ValueError(f"q has shape {list(q.shape)}: k {list(k.shape)} and stride={stride} need {list(expected)}")
    if v.shape[:4] != k.shape[:4] or v.shape[4] == 0:
        raise ValueError(f"v has shape {list(v.shape)}: it must agree with k {list(k.shape)} but for its channels")
    rows = 2 * (block_size + 2 * halo_size) - 1
    for name, table in (("rel_height", rel_height), ("rel_width", rel_width)):
        if table.shape != (rows, dim):
            raise ValueError(f"{name} has shape {list(table.shape)}: this window and q need {[rows, dim]}")
    if rel_step < 1 or rel_step * (block_size // stride - 1) > block_size + 2 * halo_size - 1:
        raise ValueError(f"rel_step={rel_step} leaves the relative tables: use 1 or stride={stride}")


def can_run_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    border: str = "zero",
    scale: float | None = None,
) -> str | None:
    """None if ``backend='triton'`` can run these arguments of :func:`halo_attention`, else the reason it cannot."""
    factor = 1.0 if scale is None else scale
    settings = (block_size, halo_size, stride, border == "mask", factor, 1.0, 1)
    return _triton_reason(False, q, k, v, rel_height, rel_width, settings)


def _triton_reason(auto, q, k, v, rel_height, rel_width, settings) -> str | None:
    block_size, halo_size, stride, mask, scale = settings[:5]
    if auto and q.device.type != "cuda":
        return f"the kernels run on CUDA, these tensors are on {q.device.type}"
    if torch.jit.is_tracing():
        return "torch.jit.trace takes the reference"
    if scale <= 0:
        return f"scale={scale} is not positive"
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, rel_height, rel_width))
    tables = (rel_height.dtype, rel_width.dtype)
    return _static_reason(
        auto, str(q.device), q.dtype, *tables, int(q.shape[3]), int(q.shape[4]), int(v.shape[4]),
        block_size, halo_size, stride, mask, grad,
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _static_reason(auto: bool, *static) -> str | None:
    # asked here, where Dynamo runs Python: its own answer to is_exporting() depends on torch's version
    if auto and (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()):
        return "an export takes the reference, whose operators every consumer knows"
    reason = _limits(*static[:9]) or _probe(*static)
    if auto and reason is not None and reason.startswith(_FAILED):
        _warn(reason)
    return reason


_FAILED = "its kernels failed: "
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"halo_attention runs its eager reference, slower and larger: {reason}", stacklevel=2)


def _limits(device, dtype, dtype_height, dtype_width, heads, dim, dim_v, block_size, halo_size) -> str | None:
    for t in (dtype, dtype_height, dtype_width):
        if t not in _DTYPES:
            return f"dtype {t} is not supported: use float16, bfloat16 or float32"
    if dim > 256 or dim_v > 256:
        return f"heads of {dim} and {dim_v} channels are too wide: at most 256"
    if block_size + 2 * halo_size > 64:
        return f"a window of {block_size + 2 * halo_size} is too large: at most 64"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if not device.startswith("cuda"):
        if triton.knobs.runtime.interpret:
            return None
        return f"the kernels run on CUDA, these tensors are on {device}"
    if torch.version.hip is not None:
        return "the kernels were not tried on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(device)} is below 8.0"
    return None


@functools.cache
def _probe(
    device, dtype, dtype_height, dtype_width, heads, dim, dim_v, block_size, halo_size, stride, mask, grad
) -> str | None:
    """Compiles the kernels and runs them on one block, so that a failure shows before anything depends on it."""
    from . import fused

    side, rows = block_size // stride, 2 * (block_size + 2 * halo_size) - 1
    settings = (block_size, halo_size, stride, mask, 1.0, 1.0, 1)
    try:
        with torch.no_grad():
            q = torch.zeros(1, side, side, heads, dim, device=device, dtype=dtype)
            kv = torch.zeros(1, block_size, block_size, heads, dim + dim_v, device=device, dtype=dtype)
            tables = (
                torch.zeros(rows, dim, device=device, dtype=dtype_height),
                torch.zeros(rows, dim, device=device, dtype=dtype_width),
            )
            k, v = kv[..., :dim], kv[..., dim:]
            out, lse = fused.forward(q, k, v, *tables, *settings)
            if grad:
                fused.backward(out, q, k, v, *tables, out, lse, *settings)
            if q.is_cuda:
                torch.cuda.synchronize(q.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever Triton, the assembler or the driver say
        lines = str(e).strip().splitlines() or [""]
        return f"{_FAILED}{type(e).__name__}: {lines[0][:300]}"
    return None


def _use_triton(backend: str, *args) -> bool:
    if backend == "reference":
        return False
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend={backend!r} is unknown: use 'auto', 'triton' or 'reference'")
    reason = _triton_reason(backend == "auto", *args)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' cannot run: {reason}")
    return reason is None
