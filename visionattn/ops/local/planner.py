"""Which backend runs a call, and why: limits, a probe of the kernels, and a model of their time."""

import functools
import math
import sys
import warnings
from dataclasses import dataclass, replace

import torch

from . import flex, natten, sdpa
from .call import LARGEST_BIAS_WINDOW, Call, make_call
from .counts import count
from .patterns import Disk, Neighborhood, Pattern, check_grid, decode, encode
from .rates import HOST_MS, OTHERS, kernel_of, text_rows_of

BACKENDS = ("triton", "natten", "flex", "sdpa", "reference")


@dataclass(frozen=True)
class Explanation:
    """What would run: ``str()`` it. ``predicted_ms`` is a model of one H100, good for comparing only.

    ``kernels``: for the backend ``'triton'`` on a GPU, what computes the rows of grid queries and of text queries.
    ``worthwhile``: whether the chosen backend is predicted to beat dense attention without any mask, which computes
    something else. Where it isn't, a caller who may choose (a diffusion pipeline) should stay dense.
    """

    backend: str
    why: str
    unavailable: dict[str, str]
    pairs: int
    dense_pairs: int
    executed_pairs: int
    masked_share: float
    predicted_ms: dict[str, float]
    worthwhile: bool
    kernels: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"runs {self.backend}: {self.why}",
            *(f"  {kernel}" for kernel in self.kernels),
            f"pairs {self.pairs:,} of {self.dense_pairs:,} ({self.pairs / self.dense_pairs:.1%}); tiles execute "
            f"{self.executed_pairs:,}, {self.masked_share:.0%} of them under a mask",
            "predicted (H100, bfloat16, forward): "
            + ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.predicted_ms.items()),
        ]
        lines += [f"not {name}: {reason}" for name, reason in self.unavailable.items()]
        return "\n".join(lines)


def static_key(call: Call) -> tuple | None:
    """What the kernels' limits depend on, hashable."""
    code = encode(call.pattern, len(call.grid))
    if code is None:
        return None
    q = call.q
    return (
        str(q.device), q.dtype, q.shape[3], q.shape[2], call.k.shape[2], tuple(code), len(call.grid), call.text > 0,
        call.extra > 0, None if call.bias is None else call.bias.dtype, call.text_lengths is not None,
        call.needs_grad(),
    )  # fmt: skip


def triton_reason(call: Call) -> str | None:
    """None if the kernels can run the call, else why not."""
    key = static_key(call)
    if key is None:
        return f"the kernels know no {type(call.pattern).__name__}"
    if torch.jit.is_tracing():
        return "torch.jit.trace takes the reference"
    if call.scale <= 0:
        return f"scale={call.scale} is not positive"
    return static_reason(*key)


def static_reason(*key) -> str | None:
    return limits(*key) or probe(*key)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.lru_cache(maxsize=4096)
def limits(device, dtype, dim, heads, kv_heads, code, ndim, text, extra, bias, lengths, grad) -> str | None:
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not supported: use float16, bfloat16 or float32"
    if dim > 256:
        return f"heads of {dim} channels are too wide: at most 256"
    pattern = decode(code)
    if not isinstance(pattern, Neighborhood) and ndim > 2:
        return f"the kernels of {type(pattern).__name__} take grids of at most two axes: this one has {ndim}"
    if bias is not None:
        widest = max(pattern.window)
        if widest > LARGEST_BIAS_WINDOW:
            return f"a bias table of window {widest} is too large: at most {LARGEST_BIAS_WINDOW}"
        if ndim == 3 and grad:
            return "the kernels have no gradient of a bias table with three axes"
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


FAILED = "its kernels failed: "


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"local_attention runs another backend than Triton, slower: {reason}", stacklevel=2)


def probe_grid(pattern: Pattern, ndim: int) -> tuple[int, ...]:
    """A small grid on which a pattern exists, with as many axes longer than 1."""
    if isinstance(pattern, Neighborhood):
        return tuple(max(w * d, 4) for w, d in zip(pattern.window, pattern.dilation, strict=True))
    if isinstance(pattern, Disk):
        return (16,) * ndim
    return (max(pattern.rows, 16), max(pattern.cols, 16))


@functools.lru_cache(maxsize=4096)
def probe(device, dtype, dim, heads, kv_heads, code, ndim, text, extra, bias, lengths, grad) -> str | None:
    """Compiles the kernels and runs them on a small grid, so that a failure shows before anything depends on it."""
    from .fused import backward, forward

    if not device.startswith("cuda"):
        return None  # interpreted: slow, and nothing to compile
    pattern = decode(code)
    grid = probe_grid(pattern, ndim)
    n = 16 * text + torch.Size(grid).numel()
    make = functools.partial(torch.zeros, device=device, dtype=dtype)
    try:
        with torch.no_grad():
            group = heads // kv_heads
            q, k, v = make(1, n, group, dim), make(1, n, 1, dim), make(1, n, 1, dim)
            ek, ev = (make(1, 16, 1, dim), make(1, 16, 1, dim)) if extra else (None, None)
            table = None
            if bias is not None:
                table = make(group, *(2 * w - 1 for w in pattern.window), dtype=bias)
            length = torch.full((1,), 7, device=device) if lengths else None
            settings = (grid, pattern, 16 * text, True, 1.0)
            out, lse = forward(q, k, v, ek, ev, table, length, *settings)
            if grad:
                backward(out, None, q, k, v, ek, ev, table, length, out, lse, *settings)
            torch.cuda.synchronize(q.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever Triton, the assembler or the driver say
        lines = str(e).strip().splitlines() or [""]
        return f"{FAILED}{type(e).__name__}: {lines[0][:300]}"
    return None


def reasons(call: Call, return_lse: bool) -> dict[str, str | None]:
    """For every backend, why it cannot run the call, or None."""
    return {
        "triton": triton_reason(call),
        "natten": natten.reason(call, return_lse),
        "flex": flex.reason(call, return_lse),
        "sdpa": sdpa.reason(call, return_lse),
        "reference": None,
    }


def predict(call: Call, device: str | None = None, plan=None) -> tuple[dict[str, float], dict]:
    """Milliseconds of each backend by the model, and the counts behind them; see :func:`rates.kernel_of`."""
    kernel = kernel_of(call, device, plan)
    counts = count(call.pattern, call.grid, call.text, call.extra, *kernel.tiles)
    flop = 4 * call.q.shape[3] * call.q.shape[2] * call.q.shape[0] * 1e-9  # of a pair; TFLOP/s are GFLOP per ms
    grid, text = counts["executed"] - counts["text_rows"], counts["text_rows"]
    natten = OTHERS["natten, masked" if counts["masked"] else "natten"]
    dense = OTHERS["dense" if sdpa.is_plain(call) else "masked sdpa"]
    predicted = {
        "triton": kernel.ms(flop * grid, flop * counts["masked"]),
        "natten": flop * grid / natten + flop * text / OTHERS["dense"],
        "flex": flop * counts["raster"] / OTHERS["flex"],
        "sdpa": flop * counts["dense"] / dense,
        "dense, unmasked": flop * counts["dense"] / OTHERS["dense"],
    }
    if text:
        predicted["triton"] += text_rows_of(call, device, plan).ms(flop * text)
    predicted["triton"] = max(predicted["triton"], HOST_MS)
    return predicted, counts


def choose(call: Call, return_lse: bool) -> tuple[str, str]:
    """The backend that ``'auto'`` runs, and why."""
    why = sdpa.reason(call, return_lse)
    if sdpa.is_plain(call) and why is None:
        return "sdpa", "the pattern hides nothing, so attention is dense"
    if call.q.is_cuda:
        reason = triton_reason(call)
        if reason is None:
            return "triton", "the fused kernels run, and visit only tiles that the pattern touches"
        if reason.startswith(FAILED):
            _warn(reason)
        for name, module in (("natten", natten), ("flex", flex)):
            if module.reason(call, return_lse) is None:
                return name, "the fastest of those that can run"
    if why is None and call.q.shape[1] <= 8192:
        return "sdpa", f"dense attention with a mask is fastest on {call.q.device.type}"
    return "reference", "nothing faster can run"


def explain_call(call: Call, backend: str, return_lse: bool) -> Explanation:
    found = reasons(call, return_lse)
    name, why = (backend, "asked for") if backend != "auto" else choose(call, return_lse)
    plan = _plan(call) if call.q.is_cuda and found["triton"] is None else None
    predicted, counts = predict(call, None, plan)
    return Explanation(
        name,
        why,
        {k: v for k, v in found.items() if v is not None},
        counts["pairs"],
        counts["dense"],
        counts["executed"],
        counts["masked"] / max(counts["executed"], 1),
        {k: v for k, v in predicted.items() if k == "dense, unmasked" or found.get(k) is None},
        beats_dense(predicted, name, str(call.q.device) if call.q.is_cuda else None),
        plan.kernels() if plan is not None and name == "triton" else (),
    )


def _plan(call: Call):
    from .fused import plan_of

    tensors = (call.q, call.k, call.v, call.extra_k, call.extra_v, call.bias, call.text_lengths)
    return plan_of(*tensors, *call.grad_settings())


def kernels_that_ran(grid: tuple[int, ...], pattern: Pattern) -> list[str]:
    """What computed the rows of calls of the backend ``'triton'`` on this grid so far, each way once."""
    fused = sys.modules.get("visionattn.ops.local.fused")  # it needs triton, and was imported if anything ran
    plans = list(fused._plans.values()) if fused else []
    return list(dict.fromkeys("; ".join(p.kernels()) for p in plans if (p.grid, p.pattern) == (grid, pattern)))


@functools.lru_cache(maxsize=4096)
def worthwhile(
    grid: tuple[int, ...],
    pattern: Pattern,
    text: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
) -> bool:
    """Whether the fused kernels can run a layer and are predicted to beat dense attention without a mask.

    For callers who may choose, as a diffusion pipeline may for each layer; cheap (cached, no tensors needed).

    Args:
        grid: 1 to 3 lengths, a tuple.
        pattern: what a grid token sees.
        text: number of text tokens, beside the grid's.
        heads, dim, dtype, device: of the queries; as many key heads.
        batch: sequences at once.
    """
    check_grid(grid)
    q = torch.empty((batch, text + math.prod(grid), heads, dim), dtype=dtype, device="meta")
    call = make_call(q, q, q, grid, replace_pooling(pattern), text)
    if pattern.dense(grid) or torch.device(device).type != "cuda":
        return False
    code = encode(pattern, len(grid))
    if code is None:
        return False
    pooled = isinstance(pattern, Disk) and bool(pattern.downsample)
    index = torch.device(device).index
    name = f"cuda:{torch.cuda.current_device() if index is None else index}"
    key = (name, dtype, dim, heads, heads, tuple(code), len(grid), text > 0, pooled, None, False, False)
    if static_reason(*key) is not None:
        return False
    return is_predicted_faster(call, name)


def replace_pooling(pattern: Pattern) -> Pattern:
    """The pattern without pooled keys, which a call would compute."""
    return replace(pattern, downsample=None) if isinstance(pattern, Disk) else pattern


def is_predicted_faster(call: Call, device: str | None = None) -> bool:
    predicted, _ = predict(call, device)
    return beats_dense(predicted, "triton", device)


def beats_dense(predicted: dict[str, float], name: str, device: str | None = None) -> bool:
    """Whether a backend is predicted to beat dense attention by more than the model is off, which was measured on GPUs
    of compute capability 9.0 only."""
    measured = device is None or torch.cuda.get_device_capability(device) == (9, 0)
    return predicted.get(name, math.inf) < (0.95 if measured else 0.85) * predicted["dense, unmasked"]
