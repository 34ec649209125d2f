"""The public functions of local attention: they check their arguments, and pick an implementation."""

import torch

from . import flex, natten, planner, sdpa
from .call import Call, make_call, pool_tokens
from .patterns import Disk, Grid, Pattern, encode
from .planner import BACKENDS, Explanation
from .reference import reference


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid,
    pattern: Pattern,
    text: int = 0,
    text_first: bool = True,
    text_lengths: torch.Tensor | None = None,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a joint sequence of text and a grid: a grid token sees its neighbourhood, and all text.

    Text tokens see every text and grid token. With ``text=0`` this is neighbourhood attention (NATTEN), with a
    :class:`Disk` it is CLEAR's (arXiv 2412.16112, section 3.2).

    Args:
        q: queries (B, N, H, D), any strides; N = text + tokens of the grid, the grid in row-major order.
        k, v: keys and values (B, N, Hk, D), any strides; Hk divides H (grouped heads).
        grid: 1 to 3 lengths.
        pattern: which grid tokens a grid token sees: :class:`Neighborhood`, :class:`Disk`, :class:`Cross`.
        text: number of text tokens.
        text_first: whether the sequence is [text | grid] or [grid | text].
        text_lengths: (B,) integers; text from there on is padding that nobody sees. The rows of padded text are
            computed like other text's.
        extra_k, extra_v: (B, M, Hk, D) keys that every grid token sees and no text token does: CLEAR's pooled keys, a
            reference image. ``Disk(downsample=f)`` without them takes the means of f x f blocks.
        bias: (H, 2 * window - 1, ...) added to the scaled logits of grid pairs at ``key - query + window - 1`` along
            each axis (counted in steps of the dilation), for :class:`Neighborhood`.
        scale: factor of q.k, D ** -0.5 by default.
        backend: ``'triton'``: fused kernels that visit only tiles that the pattern touches, CUDA (compute capability
            8.0 and up); text rows without padding run by cuDNN's attention through PyTorch where that was measured to
            be faster (Hopper, heads of 128 channels, 512 text tokens and more). ``'natten'``: its own kernels, where
            installed. ``'flex'``: FlexAttention. ``'sdpa'``: dense attention, masked where the pattern hides anything.
            ``'reference'``: eager PyTorch, any device and dtype. ``'auto'`` picks (:func:`explain` says which and why),
            and reports kernels that don't compile once, as a warning. A named backend never falls back.
        return_lse: also return the natural log-sum-exp of each query's logits, (B, H, N) in float32 or wider.

    Returns:
        (B, N, H, D) in q's dtype. Differentiable, once; the kernels' gradients are the same bits every time.

    Raises:
        ValueError: for shapes, dtypes or devices that disagree, a grid that isn't the sequence's, a pattern that the
            grid has no room for, or a named backend that cannot run.
    """
    tensors = (q, k, v, text_lengths, extra_k, extra_v, bias)
    settings = (grid, pattern, text, text_first, scale)
    if torch.compiler.is_compiling():
        if backend in ("auto", "triton"):
            result = _compiled(backend, *tensors, *settings)
            if result is not None:
                return result if return_lse else result[0]
    elif type(q) is torch.Tensor and q.is_cuda and backend in ("auto", "triton") and not torch.jit.is_tracing():
        result = _eager(backend, *tensors, *settings, return_lse)
        if result is not None:
            return result if return_lse else result[0]
    call = make_call(q, k, v, grid, pattern, text, text_first, text_lengths, extra_k, extra_v, bias, scale)
    name = _choose(call, backend, return_lse)
    out, lse = _run(name, call, return_lse)
    return (out, lse) if return_lse else out


def explain(
    q, k, v, grid, pattern, text=0, text_first=True, text_lengths=None, extra_k=None, extra_v=None, bias=None,
    scale=None, backend="auto", return_lse=False,
) -> Explanation:  # fmt: skip
    """What :func:`local_attention` would run with these arguments, why, and why others can't; runs nothing but the
    kernels' first compilation. ``print`` it.
    """
    call = make_call(q, k, v, grid, pattern, text, text_first, text_lengths, extra_k, extra_v, bias, scale)
    return planner.explain_call(call, backend, return_lse)


def _choose(call: Call, backend: str, return_lse: bool) -> str:
    if backend == "auto":
        return planner.choose(call, return_lse)[0]
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use 'auto' or one of {', '.join(BACKENDS)}")
    reason = {
        "triton": lambda: planner.triton_reason(call),
        "natten": lambda: natten.reason(call, return_lse),
        "flex": lambda: flex.reason(call, return_lse),
        "sdpa": lambda: sdpa.reason(call, return_lse),
        "reference": lambda: None,
    }[backend]()
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run: {reason}")
    return backend


def _run(name: str, call: Call, return_lse: bool):
    if name == "triton":
        return _kernels(call)
    if name == "sdpa":
        return sdpa.run(call)
    if name in ("natten", "flex"):
        return {"natten": natten, "flex": flex}[name].run(call, return_lse)
    return reference(*call.settings())


def _kernels(call: Call):
    from .ops import LocalFunction

    lengths = None if call.text_lengths is None else call.text_lengths.to(call.q.device)
    settings = call.grad_settings()
    if not call.needs_grad():
        from .fused import forward

        return forward(call.q, call.k, call.v, call.extra_k, call.extra_v, call.bias, lengths, *settings)
    return LocalFunction.apply(call.q, call.k, call.v, call.extra_k, call.extra_v, call.bias, lengths, settings)


# Eager CUDA: checks and choice made once for arguments like these, which small maps would otherwise wait for.
_checked: dict[tuple, tuple | None] = {}


def _like(t):
    return None if t is None else (t.shape, t.dtype, t.device, t.requires_grad)


def _eager(backend, q, k, v, lengths, extra_k, extra_v, bias, grid, pattern, text, text_first, scale, return_lse):
    if isinstance(pattern, Disk) and pattern.downsample:
        return None
    try:
        key = (
            backend, pattern, tuple(grid), text, text_first, scale, return_lse, torch.is_grad_enabled(), _like(q),
            _like(k), _like(v), _like(lengths), _like(extra_k), _like(extra_v), _like(bias),
        )  # fmt: skip
        known = key in _checked
    except (AttributeError, TypeError):  # make_call says what is wrong
        return None
    if not known:
        call = make_call(q, k, v, grid, pattern, text, text_first, lengths, extra_k, extra_v, bias, scale)
        use = _choose(call, backend, return_lse) == "triton"
        if len(_checked) >= 4096:
            _checked.clear()
        _checked[key] = (call.grad_settings(), call.needs_grad()) if use else None
    found = _checked[key]
    if found is None:
        return None
    from .fused import forward
    from .ops import LocalFunction

    settings, grad = found
    if lengths is not None:
        lengths = lengths.to(q.device)
    if grad:
        return LocalFunction.apply(q, k, v, extra_k, extra_v, bias, lengths, settings)
    return forward(q, k, v, extra_k, extra_v, bias, lengths, *settings)


def _compiled(backend, q, k, v, lengths, extra_k, extra_v, bias, grid, pattern, text, text_first, scale):
    """The operator, for a graph: grids may be symbolic, so the operator checks them when it runs."""
    if isinstance(pattern, Disk) and pattern.downsample and extra_k is None:
        n = q.shape[1] - text
        first = text if text_first else 0
        extra_k, extra_v = (pool_tokens(t[:, first : first + n], grid, pattern.downsample) for t in (k, v))
    code = encode(pattern, len(grid))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, extra_k, extra_v, bias))
    reason = f"the kernels know no {type(pattern).__name__}" if code is None else None
    if factor <= 0:
        reason = f"scale={scale} is not positive"
    has_text = True if text > 0 else False  # noqa: SIM210  (bool() of a symbolic number is no constant)
    if reason is None:
        reason = _static_reason(
            backend == "auto", str(q.device), q.dtype, _fixed(q.shape[3]), _fixed(q.shape[2]), _fixed(k.shape[2]),
            tuple(code), len(grid), has_text, extra_k is not None, None if bias is None else bias.dtype,
            lengths is not None, grad,
        )  # fmt: skip
    if reason is not None:
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot run: {reason}")
        return None
    return torch.ops.visionattn.local_attention(
        q, k, v, extra_k, extra_v, bias, lengths, list(grid), code, text, text_first, factor
    )


def _fixed(n: int) -> int:
    """n, as a constant of a graph whose sizes are symbolic: heads don't change with the picture."""
    return len(range(n))


@torch.compiler.assume_constant_result
def _static_reason(auto: bool, *key) -> str | None:
    from . import ops

    assert ops  # registers the operator before the graph names it
    if auto and not key[0].startswith("cuda"):
        return f"the kernels run on CUDA, these tensors are on {key[0]}"
    # asked here, where Dynamo runs Python: its own answer to is_exporting() depends on torch's version
    if auto and (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()):
        return "an export takes the reference, whose operators every consumer knows"
    return planner.static_reason(*key)
