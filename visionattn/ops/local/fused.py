"""Launches the Triton kernels of local attention, and registers them as operators that autograd and compile know."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from visionattn.ops._triton import give_up

from . import kernels, kernels_backward, tables
from . import text as text_rows
from .patterns import Cross, Disk, Grid, Pattern, radius_squared
from .tiles import Tiles, cdiv, pad_dim, pick_tiles

LOG2E = math.log2(math.e)

# The forward kernel of the grid's rows, for benchmarks and tests: 'auto', 'triton', or 'gluon' wherever it can run.
FORWARD_CHOICES = ("auto", "triton", "gluon")
forward_choice = os.environ.get("VISIONATTN_LOCAL_FORWARD", "auto")
if forward_choice not in FORWARD_CHOICES:
    raise ValueError(f"VISIONATTN_LOCAL_FORWARD={forward_choice!r}: use one of {', '.join(FORWARD_CHOICES)}")
# The same of the backward kernels of the grid's rows.
backward_choice = os.environ.get("VISIONATTN_LOCAL_BACKWARD", "auto")
if backward_choice not in FORWARD_CHOICES:
    raise ValueError(f"VISIONATTN_LOCAL_BACKWARD={backward_choice!r}: use one of {', '.join(FORWARD_CHOICES)}")


@dataclass(frozen=True)
class Boxes:
    """The grid and the pattern as three axes: z, y, x."""

    kind: int
    lengths: tuple[int, int, int]
    windows: tuple[int, int, int]
    strides: tuple[int, int, int]
    dilations: tuple[int, int, int]
    causal: tuple[bool, bool, bool]
    radius_sq: int

    @property
    def three(self) -> bool:
        return self.lengths[0] > 1

    def tiles(self, tile: tuple[int, int, int]) -> tuple[int, int, int]:
        """Owner tiles along each axis, of all dilation groups."""
        sizes = zip(self.lengths, self.dilations, tile, strict=True)
        return tuple(d * cdiv(cdiv(n, d), t) for n, d, t in sizes)


def boxes(pattern: Pattern, grid: Grid) -> Boxes:
    pattern.check(grid)
    lead = (1,) * (3 - len(grid))
    lengths = (*lead, *grid)
    if isinstance(pattern, Disk):
        ones = (1, 1, 1)
        return Boxes(1, lengths, ones, ones, ones, (False,) * 3, radius_squared(pattern))
    axes = pattern.axes(grid)
    windows, strides, dilations = (
        (*lead, *(getattr(a, name) for a in axes)) for name in ("window", "stride", "dilation")
    )
    causal = (*(False for _ in lead), *(a.causal for a in axes))
    return Boxes(2 if isinstance(pattern, Cross) else 0, lengths, windows, strides, dilations, causal, 0)


class _Launch:
    """A kernel whose numbers are bound; called with its tensors.

    Triton looks at every argument of every launch, which costs more than these kernels do on small maps. A plan is
    made per shapes, strides and dtypes, so all that Triton would look at is known but the pointers' alignment.
    """

    def __init__(self, kernel, programs: int, numbers: tuple, constants: dict, tiles: Tiles):
        self.kernel, self.numbers, self.named = kernel, numbers, {**constants, **tiles.launch()}
        self.grid = (programs, 1, 1)
        self.rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self.compiled = None

    def __call__(self, *tensors) -> None:
        if self.grid[0] == 0:
            return
        plain = True
        for t in tensors:
            if t is None:
                continue
            if type(t) is TensorDescriptor or t.data_ptr() & 15:
                plain = False
                break
        if plain and self.compiled is not None:
            self.compiled[self.grid](*tensors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.named)
        if plain:
            self.compiled = compiled  # None where kernels are interpreted


def _describe(x: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    # the stride of a single entry is never used, but has to be valid
    step = max(16 // x.element_size(), 1)
    strides = [
        s if n > 1 or i == len(shape) - 1 else step * 4096 for i, (n, s) in enumerate(zip(shape, strides, strict=True))
    ]
    return TensorDescriptor(x, shape, strides, block)


def _suits_descriptor(x: torch.Tensor) -> bool:
    size = x.element_size()
    used = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s * size % 16 == 0 and 0 < s * size < 2**40 for s in used)


_tables: dict[tuple, tuple[torch.Tensor, int]] = {}


def device_table(pattern: Pattern, grid: Grid, own, other, keys_own: bool, device) -> tuple[torch.Tensor, int]:
    """A visit table on a device, and its number of column classes; made once."""
    key = (pattern, grid, own, other, keys_own, str(device))
    found = _tables.get(key)
    if found is None:
        if len(_tables) >= 256:
            _tables.clear()
        table, classes = tables.table_for(pattern, grid, own[1:], other[1:], keys_own)
        found = _tables[key] = (torch.from_numpy(table).to(device), classes)
    return found


class Plan:
    """What follows from the arguments' shapes, strides, dtypes and the settings: sizes, and the launches."""

    def __init__(self, q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale, tiles):
        B, self.N, self.heads, self.D = q.shape
        self.batch, self.kv_heads = B, k.shape[2]
        self.group = self.heads // self.kv_heads
        self.grid, self.pattern, self.text, self.scale = grid, pattern, text, scale
        self.tokens = math.prod(grid)
        self.first, self.text_at = (text, 0) if text_first else (0, self.tokens)
        self.extra = 0 if ek is None else ek.shape[1]
        self.boxes = boxes(pattern, grid)
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        self.precision = precision if q.dtype == torch.float32 else "ieee"
        self.device, self.dtype = q.device, q.dtype
        self.bias_shape = None if bias is None else tuple(bias.shape)
        self.has_lengths = lengths is not None and text > 0
        self.DP = pad_dim(self.D)
        self.tiles = tiles or pick_tiles(
            q.dtype, self.D, self.boxes, bias is not None, _capability(q.device), text
        )  # fmt: skip
        if any(d > 1 for d in self.boxes.dilations):
            self.tiles = replace(self.tiles, tma=False)
        self.tma = self.tiles.tma and all(_suits_descriptor(x) for x in (q, k, v, ek, ev) if x is not None)
        self.qk_scale = scale * LOG2E
        self.inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.extra_strides = (*ek.stride()[:3], *ev.stride()[:3]) if ek is not None else (0,) * 6
        self.gluon = None  # the setting of the forward kernel of kernels_hopper.py, where that runs
        self.gluon_grad = None  # the settings of the backward kernels of kernels_grad.py, where they run
        if tiles is None and self.tma and _capability(q.device) == 90:
            from . import gluon, gluon_grad

            given = (q, k, v, ek, bias, lengths, grid, pattern, text)
            self.gluon = gluon.choose(*given, forward_choice)
            self.gluon_grad = gluon_grad.choose(*given, backward_choice)
        # how cuDNN computes the text rows, None where Triton's kernel does
        self.text_chunks = None
        if tiles is None:
            self.text_chunks = text_rows.choose(q, k, v, lengths, text, _capability(q.device), text_rows.choice)
        self._launches: dict = {}

    # Constants and numbers that several kernels share

    def constants(self, query, key, **more) -> dict:
        b = self.boxes
        return dict(
            KIND=b.kind, THREE=b.three, CZ=b.causal[0], CY=b.causal[1], CX=b.causal[2],
            QZ=query[0], QH=query[1], QW=query[2], KZ=key[0], KH=key[1], KW=key[2], D=self.D, DP=self.DP,
            TEXT=self.text > 0, BIAS=self.bias_shape is not None, TMA=self.tma, PREC=self.precision, **more,
        )  # fmt: skip

    def numbers(self, own, classes: int) -> tuple:
        b = self.boxes
        return (
            *b.lengths, self.heads, self.group, self.text, self.text_at, self.first, self.extra, self.N,
            *b.windows, *b.strides, *b.dilations, b.radius_sq, *b.tiles(own), classes,
        )  # fmt: skip

    def table(self, own, other, keys_own=False):
        if self.boxes.kind == 0:
            return None, 0
        return device_table(self.pattern, self.boxes.lengths[1:], own, other, keys_own, self.device)

    def grid_descriptor(self, x, tile, batch: int):
        """Over (T, H, W, heads, D) of one batch entry, or over (B, H, W, heads, D) of 2-D grids."""
        T, H, W = self.boxes.lengths
        part = x[batch:, self.first :] if self.boxes.three else x[:, self.first :]
        token = x.stride(1)
        lead = (T, H * W * token) if self.boxes.three else (self.batch, x.stride(0))
        shape = [lead[0], H, W, x.shape[2], self.D]
        return _describe(part, shape, [lead[1], W * token, token, x.stride(2), 1], [*tile[:3], 1, self.DP])

    def run_descriptor(self, x, start: int, count: int, block: int):
        shape = [self.batch, count, x.shape[2], self.D]
        return _describe(x[:, start:], shape, list(x.stride()), [1, block, 1, self.DP])

    def launch(self, name, kernel, programs, numbers, constants, tiles) -> _Launch:
        found = self._launches.get(name)
        if found is None:
            found = self._launches[name] = _Launch(kernel, programs, numbers, constants, tiles)
        return found

    def batches(self) -> list[tuple[int, int]]:
        """(first batch entry, number) of each launch over the grid: descriptors of 3-D grids hold one entry."""
        if self.tma and self.boxes.three:
            return [(b, 1) for b in range(self.batch)]
        return [(0, self.batch)]

    def prefix_descriptors(self, k, v, ek, ev, block: int) -> tuple:
        """Of text keys and values, and extra ones."""
        if not self.tma:
            return (None,) * 4
        text = (None, None)
        if self.text:
            text = tuple(self.run_descriptor(x, self.text_at, self.text, block) for x in (k, v))
        if ek is None:
            return (*text, None, None)
        return (*text, *(self.run_descriptor(x, 0, self.extra, block) for x in (ek, ev)))

    def chunks(self, programs: int, length: int, block: int) -> tuple[int, int]:
        """Into how many chunks a loop over `length` tokens is cut to fill the GPU, and their length."""
        wanted = max(1, min(self.tiles.waves // max(programs, 1), length // (4 * block), 64))
        chunk = cdiv(cdiv(length, wanted), block) * block
        return cdiv(length, chunk), chunk

    def kernels(self) -> tuple[str, ...]:
        """What computes the rows of grid queries, and of text queries."""
        grid = "Triton's kernel" if self.gluon is None else "Gluon's kernel"
        text = "Triton's kernel" if self.text_chunks is None else str(self.text_chunks)
        lines = (f"rows of grid queries: {grid}", f"rows of text queries: {text}")
        return lines if self.text else lines[:1]


def _capability(device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_plans: dict[tuple, Plan] = {}


def _signature(t):
    return None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)


def plan(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale, tiles=None) -> Plan:
    key = (
        _signature(q), _signature(k), _signature(v), _signature(ek), _signature(ev), _signature(bias),
        _signature(lengths), q.device, grid, pattern, text, text_first, scale, tiles,
        torch.backends.cuda.matmul.allow_tf32, forward_choice, backward_choice, text_rows.choice,
        torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= 4096:  # shapes that never repeat
            _plans.clear()
        found = _plans[key] = Plan(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale, tiles)
    return found


def plan_of(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale) -> Plan:
    """The plan of a call, whatever its strides."""
    q, k, v, ek, ev = (_inner(t) for t in (q, k, v, ek, ev))
    bias = None if bias is None else bias.contiguous()
    return plan(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale)


def _inner(t):
    """t with its channels next to each other."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _elsewhere(q) -> bool:
    return q.is_cuda and q.device.index != torch.cuda.current_device()


def forward(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale, tiles=None):
    """Output (B, N, H, D), and natural log-sum-exp (B, H, N) in float32."""
    if _elsewhere(q):
        with torch.cuda.device(q.device):
            return forward(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale, tiles)
    q, k, v, ek, ev = (_inner(t) for t in (q, k, v, ek, ev))
    bias = None if bias is None else bias.contiguous()
    p = plan(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale, tiles)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((p.batch, p.heads, p.N), dtype=torch.float32, device=q.device)
    if p.text:
        text_forward(p, q, k, v, lengths, out, lse)
    grid_forward(p, q, k, v, ek, ev, bias, lengths, out, lse)
    return out, lse


def grid_forward(p: Plan, q, k, v, ek, ev, bias, lengths, out, lse) -> None:
    """The rows of grid queries."""
    if p.gluon is not None and _gluon_forward(p, q, k, v, out, lse):
        return
    t = p.tiles.forward
    table, classes = p.table(t.query, t.key)
    strides = (*p.inputs, *out.stride()[:3], *p.extra_strides)
    constants = p.constants(t.query, t.key, EXTRA=p.extra > 0, LENGTHS=p.has_lengths)
    prefix = p.prefix_descriptors(k, v, ek, ev, t.keys)
    for batch, count in p.batches():
        descriptors = (None, None)
        if p.tma:
            descriptors = tuple(p.grid_descriptor(x, t.key, batch) for x in (k, v))
        launch = p.launch(
            ("forward", batch), kernels.grid_forward, math.prod(p.boxes.tiles(t.query)) * p.heads * count,
            (*strides, batch, *p.numbers(t.query, classes), p.qk_scale), constants, t,
        )  # fmt: skip
        launch(q, k, v, out, lse, ek, ev, bias, lengths, table, *descriptors, *prefix)


def _try_gluon(failed: list[str], choice: str, rows: str, run: Callable[[], None]) -> bool:
    """Whether Gluon's kernels ran; where one fails to compile or start, Triton's run from then on, unless forced."""
    if failed and choice == "auto":
        return False
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever Gluon, the assembler or the driver say
        if choice == "gluon":
            raise
        give_up(failed, e, f"{rows} Triton's kernels, not Gluon's")
        return False
    return True


def _gluon_forward(p: Plan, q, k, v, out, lse) -> bool:
    from . import gluon

    run = partial(gluon.grid_forward, p, q, k, v, out, lse, p.gluon)
    return _try_gluon(gluon.failed, forward_choice, "local_attention runs", run)


def text_forward(p: Plan, q, k, v, lengths, out, lse) -> None:
    """The rows of text queries, which see all text and the whole grid."""
    if text_rows.try_forward(p, q, k, v, out, lse):
        return
    t = p.tiles.dense
    tiles = cdiv(p.text, t.queries)
    chunks, chunk = p.chunks(tiles * p.heads * p.batch, p.N, t.keys)
    part = torch.empty((chunks, p.batch, p.heads, p.text, p.D), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    descriptors = (None, None)
    if p.tma:
        descriptors = tuple(p.run_descriptor(x, 0, p.N, t.keys) for x in (k, v))
    launch = p.launch(
        "text", kernels.dense_forward, tiles * chunks * p.heads * p.batch,
        (*p.inputs, p.heads, p.group, p.text, p.text_at, p.N, chunk, tiles, chunks, p.qk_scale),
        dict(BM=t.queries, BN=t.keys, D=p.D, DP=p.DP, LENGTHS=p.has_lengths, TMA=p.tma, PREC=p.precision), t,
    )  # fmt: skip
    launch(q, k, v, part, part_lse, lengths, *descriptors)
    merge_tiles = replace(t, warps=4, stages=1)
    rows = 16
    tiles = cdiv(p.text, rows)
    launch = p.launch(
        "merge", kernels.merge_chunks, tiles * p.heads * p.batch,
        (*out.stride()[:3], p.heads, p.text, p.text_at, p.N, tiles, chunks), dict(BM=rows, D=p.D, DP=p.DP), merge_tiles,
    )  # fmt: skip
    launch(part, part_lse, out, lse)


def backward(
    grad, grad_lse, q, k, v, ek, ev, bias, lengths, out, lse, grid, pattern, text, text_first, scale, tiles=None
):
    """Gradients of q, k, v, extra_k, extra_v, bias (None for what is None)."""
    if _elsewhere(q):
        with torch.cuda.device(q.device):
            return backward(
                grad, grad_lse, q, k, v, ek, ev, bias, lengths, out, lse, grid, pattern, text, text_first, scale, tiles
            )
    q, k, v, ek, ev, grad = (_inner(t) for t in (q, k, v, ek, ev, grad))
    bias = None if bias is None else bias.contiguous()
    if grad.data_ptr() & 15:
        grad = grad.clone(memory_format=torch.contiguous_format)
    p = plan(q, k, v, ek, ev, bias, lengths, grid, pattern, text, text_first, scale, tiles)
    steps = grad.stride()[:3]
    tma = p.tma and _suits_descriptor(grad)
    delta = torch.empty_like(lse)
    rows = 64
    count = cdiv(p.N, rows)
    p.launch(
        ("delta", steps, grad_lse is None), kernels_backward.delta_kernel, count * p.heads * p.batch,
        (*out.stride()[:3], *steps, p.heads, p.N, count), dict(BM=rows, D=p.D, DP=p.DP, DLSE=grad_lse is not None),
        replace(p.tiles.query, warps=4, stages=1),
    )(out, grad, None if grad_lse is None else grad_lse.contiguous(), delta)  # fmt: skip
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    if not (tma and p.gluon_grad is not None and _gluon_backward(p, q, k, v, grad, lse, delta, dq, dk, dv)):
        query_grad(p, tma, q, k, v, grad, ek, ev, bias, lengths, lse, delta, dq)
        key_grad(p, tma, q, k, v, grad, bias, lse, delta, dk, dv)
    dbias = None if bias is None else bias_grad(p, q, k, v, grad, bias, lse, delta)
    if p.text:
        place = slice(p.text_at, p.text_at + p.text)
        dq[:, place] = text_query_grad(p, tma, q, k, v, grad, lengths, lse, delta)
        found = dense_key_grad(p, tma, "text", q, k, v, grad, lengths, lse, delta, p.text, p.text_at, 0, p.N)
        dk[:, place], dv[:, place] = found
    dek = dev = None
    if p.extra:
        dek, dev = dense_key_grad(
            p, tma, "extra", q, ek, ev, grad, None, lse, delta, p.extra, 0, p.first, p.first + p.tokens
        )
        dek, dev = dek.to(q.dtype), dev.to(q.dtype)
    elif ek is not None:
        dek, dev = torch.zeros_like(ek), torch.zeros_like(ev)
    return dq, dk, dv, dek, dev, dbias


def _gluon_backward(p: Plan, q, k, v, grad, lse, delta, dq, dk, dv) -> bool:
    from . import gluon_grad

    run = partial(gluon_grad.backward, p, q, k, v, grad, lse, delta, dq, dk, dv)
    return _try_gluon(gluon_grad.failed, backward_choice, "local_attention's gradients run", run)


def query_grad(p: Plan, tma, q, k, v, grad, ek, ev, bias, lengths, lse, delta, dq) -> None:
    """Writes the grid's rows of dq."""
    t = p.tiles.query
    table, classes = p.table(t.query, t.key)
    constants = {**p.constants(t.query, t.key, EXTRA=p.extra > 0, LENGTHS=p.has_lengths), "TMA": tma}
    strides = (*p.inputs, *grad.stride()[:3], *dq.stride()[:3], *p.extra_strides)
    prefix = p.prefix_descriptors(k, v, ek, ev, t.keys) if tma else (None,) * 4
    for batch, count in p.batches() if tma else [(0, p.batch)]:
        descriptors = tuple(p.grid_descriptor(x, t.key, batch) for x in (k, v)) if tma else (None, None)
        launch = p.launch(
            ("query", grad.stride(), tma, batch), kernels_backward.grid_query_grad,
            math.prod(p.boxes.tiles(t.query)) * p.heads * count,
            (*strides, batch, *p.numbers(t.query, classes), p.qk_scale, p.scale), constants, t,
        )  # fmt: skip
        launch(q, k, v, grad, lse, delta, dq, ek, ev, bias, lengths, table, *descriptors, *prefix)


def bias_grad(p: Plan, q, k, v, grad, bias, lse, delta) -> torch.Tensor:
    """The gradient of the bias table of a grid of one or two axes."""
    b = p.boxes
    rows = max(16, min(64, 2048 // p.DP))
    tiles = cdiv(p.tokens, rows)
    slots = torch.zeros((p.batch, p.heads, tiles, math.prod(p.bias_shape[1:])), dtype=torch.float32, device=q.device)
    launch = p.launch(
        ("bias", grad.stride()), kernels_backward.bias_grad, tiles * p.heads * p.batch,
        (*p.inputs, *grad.stride()[:3], *b.lengths[1:], p.heads, p.group, p.first, p.N, *b.windows[1:], *b.strides[1:],
         *b.dilations[1:], tiles, p.qk_scale),
        dict(CY=b.causal[1], CX=b.causal[2], BM=rows, D=p.D, DP=p.DP), replace(p.tiles.query, warps=4, stages=1),
    )  # fmt: skip
    launch(q, k, v, grad, lse, delta, bias, slots)
    return slots.sum((0, 2)).reshape(p.bias_shape).to(bias.dtype)


def key_grad(p: Plan, tma, q, k, v, grad, bias, lse, delta, dk, dv) -> None:
    """Writes the grid's rows of dk and dv."""
    t = p.tiles.backward_keys
    table, classes = p.table(t.key, t.query, keys_own=True)
    constants = {**p.constants(t.query, t.key), "TMA": tma}
    strides = (*p.inputs, *grad.stride()[:3], *dk.stride()[:3])
    prefix = (None, None)
    if tma and p.text:
        prefix = tuple(p.run_descriptor(x, p.text_at, p.text, t.queries) for x in (q, grad))
    for batch, count in p.batches() if tma else [(0, p.batch)]:
        descriptors = tuple(p.grid_descriptor(x, t.query, batch) for x in (q, grad)) if tma else (None, None)
        launch = p.launch(
            ("keys", grad.stride(), tma, batch), kernels_backward.grid_key_grad,
            math.prod(p.boxes.tiles(t.key)) * p.kv_heads * count,
            (*strides, batch, *p.numbers(t.key, classes), p.qk_scale, p.scale), constants, t,
        )  # fmt: skip
        launch(q, k, v, grad, lse, delta, dk, dv, bias, table, *descriptors, *prefix)


def text_query_grad(p: Plan, tma, q, k, v, grad, lengths, lse, delta) -> torch.Tensor:
    """dq of text queries, (B, text, heads, D) in float32."""
    t = p.tiles.query
    tiles = cdiv(p.text, t.queries)
    chunks, chunk = p.chunks(tiles * p.heads * p.batch, p.N, t.keys)
    part = torch.empty((chunks, p.batch, p.text, p.heads, p.D), dtype=torch.float32, device=q.device)
    descriptors = tuple(p.run_descriptor(x, 0, p.N, t.keys) for x in (k, v)) if tma else (None, None)
    launch = p.launch(
        ("text queries", grad.stride(), tma), kernels_backward.dense_query_grad, tiles * chunks * p.heads * p.batch,
        (*p.inputs, *grad.stride()[:3], p.heads, p.group, p.text, p.text_at, p.N, chunk, tiles, chunks, p.qk_scale,
         p.scale),
        dict(BM=t.queries, BN=t.keys, D=p.D, DP=p.DP, LENGTHS=p.has_lengths, TMA=tma, PREC=p.precision), t,
    )  # fmt: skip
    launch(q, k, v, grad, lse, delta, part, lengths, *descriptors)
    return part.sum(0)


def dense_key_grad(p: Plan, tma, name, q, k, v, grad, lengths, lse, delta, keys, keys_at, q_from, q_to):
    """dk and dv, (B, keys, key heads, D) in float32, of keys that all queries [q_from, q_to) see."""
    t = p.tiles.backward_keys
    lengths = lengths if p.has_lengths else None
    tiles = cdiv(keys, t.keys)
    chunks, chunk = p.chunks(tiles * p.kv_heads * p.batch, q_to - q_from, t.queries)
    dk = torch.empty((chunks, p.batch, keys, p.kv_heads, p.D), dtype=torch.float32, device=q.device)
    dv = torch.empty_like(dk)
    descriptors = tuple(p.run_descriptor(x, 0, p.N, t.queries) for x in (q, grad)) if tma else (None, None)
    launch = p.launch(
        (name, "keys", grad.stride(), tma), kernels_backward.dense_key_grad, tiles * chunks * p.kv_heads * p.batch,
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], p.heads, p.group, keys, keys_at, q_from,
         q_to, p.N, chunk, tiles, chunks, p.qk_scale, p.scale),
        dict(BM=t.queries, BN=t.keys, D=p.D, DP=p.DP, LENGTHS=lengths is not None, TMA=tma, PREC=p.precision), t,
    )  # fmt: skip
    launch(q, k, v, grad, lse, delta, dk, dv, lengths, *descriptors)
    return dk.sum(0), dv.sum(0)
