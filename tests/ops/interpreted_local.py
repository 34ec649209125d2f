"""The kernels of local attention, interpreted on a CPU. test_local.py runs this file with TRITON_INTERPRET=1.

bfloat16 is left to the GPU: the interpreter multiplies its bit patterns as integers.
"""

import math
import warnings

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops.local import Cross, Disk, Neighborhood, fused, local_attention, planner
from visionattn.ops.local import text as text_rows
from visionattn.ops.local.reference import reference
from visionattn.ops.local.tiles import Tile, Tiles

need_interpreter()

SMALL = (1, 4, 4)
# grid, pattern, query tile, key tile, and what is not the default of `problem`
CASES = {
    "window": ((6, 9), Neighborhood(4), SMALL, SMALL, {}),
    "stride, text padded": ((6, 9), Neighborhood((4, 6), (2, 3)), SMALL, (1, 2, 8), dict(text=5, lengths=(3, 0), B=2)),
    "dilation, text last, extra": ((7, 6), Neighborhood(3, 1, 2), SMALL, SMALL, dict(text=3, first=False, extra=2)),
    "video": (
        (3, 4, 5), Neighborhood((2, 3, 4), (2, 1, 2), 1, (True, False, False)), (2, 2, 4), SMALL, dict(text=17),
    ),
    "line": ((40,), Neighborhood(7, 3, 2), (1, 1, 16), (1, 1, 16), dict(kv_heads=1)),
    "causal line": ((40,), Neighborhood(9, 3, 2, True), (1, 1, 16), (1, 1, 16), {}),
    "disk": ((6, 9), Disk(3.5), SMALL, SMALL, dict(text=17, kv_heads=1)),
    "disk, larger tiles": ((9, 7), Disk(3), (1, 4, 8), SMALL, {}),
    "cross": ((7, 9), Cross(2, 3, (2, 1)), SMALL, (1, 2, 8), dict(text=1)),
    "bias": ((6, 9), Neighborhood((3, 4)), SMALL, SMALL, dict(bias=True)),
    "bias, dilated": ((8, 9), Neighborhood(3, 1, (2, 3)), (1, 4, 8), SMALL, dict(bias=True)),
    "bias of a line": ((20,), Neighborhood(5), (1, 1, 16), (1, 1, 16), dict(bias=True, kv_heads=1)),
    "descriptors": ((6, 9), Disk(3), SMALL, SMALL, dict(text=17, extra=17, tma=True)),
    "descriptors, video": ((3, 4, 5), Neighborhood((2, 3, 4)), (2, 2, 4), SMALL, dict(text=16, tma=True, B=2)),
    "half precision": ((6, 9), Neighborhood(5), SMALL, SMALL, dict(text=2, dtype=torch.float16)),
}  # fmt: skip
TEXT_TILES = Tiles(*[Tile(SMALL, SMALL, 4, 1)] * 4, False)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3}


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """x as a view of a larger tensor of NaN: tokens and channels around it are poison."""
    B, n, heads, dim = x.shape
    big = torch.full((B, n + 8, heads, dim + 4), float("nan"), dtype=x.dtype)
    return big[:, 4 : 4 + n, :, :dim].copy_(x)


def problem(case, seed=0):
    grid, pattern, query, key, more = CASES[case]
    given = dict(text=0, lengths=None, first=True, extra=0, B=1, kv_heads=2, bias=False, tma=False, dtype=torch.float32)
    given |= more
    torch.manual_seed(seed)
    B, heads, dim, dtype = given["B"], 2, 16, given["dtype"]
    n = math.prod(grid) + given["text"]
    shapes = [(B, n, heads, dim), *[(B, n, given["kv_heads"], dim)] * 2]
    shapes += [(B, given["extra"], given["kv_heads"], dim)] * 2 if given["extra"] else []
    tensors = [torch.randn(s).to(dtype) for s in shapes] + [None] * (5 - len(shapes))
    bias = None
    if given["bias"]:
        bias = torch.randn(heads, *(2 * a.window - 1 for a in pattern.axes(grid))).to(dtype)
    lengths = None if given["lengths"] is None else torch.tensor(given["lengths"])
    tile = Tile(query, key, 4, 1)
    settings = (grid, pattern, given["text"], given["first"], 0.3)
    return [*tensors, bias], lengths, settings, Tiles(tile, tile, tile, tile, given["tma"], waves=20)


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_kernels(case):
    tensors, lengths, settings, tiles = problem(case)
    dtype = tensors[0].dtype
    oracle = [None if t is None else t.double().requires_grad_() for t in tensors]
    grid, pattern, text, first, scale = settings
    out, lse = reference(*oracle[:3], grid, pattern, text, first, lengths, *oracle[3:], scale)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    there = [t for t in oracle if t is not None]
    expected = [out, lse, *torch.autograd.grad((out, lse), there, (grad, grad_lse))]

    # NaN lies around every tensor; descriptors need the sequence's own strides
    poisoned = [None if t is None else inside_nan(t) for t in tensors[:5]] if not tiles.tma else tensors[:5]
    poisoned.append(tensors[5])
    out, lse = fused.forward(*poisoned, lengths, *settings, tiles=tiles)
    grads = fused.backward(
        inside_nan(grad.to(dtype)), grad_lse.float(), *poisoned, lengths, out, lse, *settings, tiles=tiles
    )
    found = [out, lse, *(g for g in grads if g is not None)]
    names = [
        "out",
        "lse",
        *(n for n, t in zip(("q", "k", "v", "ek", "ev", "bias"), tensors, strict=True) if t is not None),
    ]
    for name, x, y in zip(names, found, expected, strict=True):
        assert error(x, y) < TOLERANCE[dtype], name


def test_keys_outside_the_visited_tiles_are_not_read():
    """A query in the corner: NaN beyond the tiles around it does not reach it, and NaN inside does (the control)."""
    grid, pattern = (4, 32), Neighborhood((4, 4))
    q, k, v = torch.randn(3, 1, 128, 1, 16)
    tile = Tile(SMALL, SMALL, 4, 1)
    tiles = Tiles(tile, tile, tile, tile, False)
    for column, bad in ((16, False), (1, True)):
        poisoned = k.clone().view(1, 4, 32, 1, 16)
        poisoned[:, :, column] = float("nan")
        out, _ = fused.forward(
            q, poisoned.view_as(k), v, None, None, None, None, grid, pattern, 0, True, 0.25, tiles=tiles
        )
        assert out.view(4, 32, 16)[:, :4].isnan().any() == bad


def test_a_query_that_sees_nothing():
    """No text is left and the pattern is a window of none: text rows over padded text alone."""
    q, k, v = torch.randn(3, 2, 6, 1, 16)
    lengths = torch.tensor([0, 2])
    out = local_attention(q, k, v, (4,), Neighborhood(2), 2, text_lengths=lengths, backend="triton")
    expected = local_attention(q, k, v, (4,), Neighborhood(2), 2, text_lengths=lengths, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", ["disk", "descriptors, video", "text last"])
def test_text_rows_by_dense_attention(case, count, monkeypatch):
    """PyTorch's fused attention writes them, in one part or in chunks and what they leave over, heads grouped."""
    settings = {"text last": ((7, 6), Neighborhood(3), 5, False, 0.3)}
    if case == "text last":
        batch, kv_heads, settings, tiles = 2, 2, settings[case], None
    else:
        _, _, settings, tiles = problem(case)
        batch, kv_heads = CASES[case][4].get("B", 1), CASES[case][4].get("kv_heads", 2)
    grid, pattern, text, first, scale = settings
    n = math.prod(grid) + text
    torch.manual_seed(0)
    q, k, v = (inside_nan(torch.randn(batch, n, heads, 16)) for heads in (4, kv_heads, kv_heads))
    p = fused.Plan(q, k, v, None, None, None, None, *settings, tiles or TEXT_TILES)
    p.text_chunks = text_rows.cut(n, count)
    assert (n - p.text_chunks.count * p.text_chunks.keys) % n != 1
    out, lse = torch.empty(batch, n, 4, 16), torch.empty(batch, 4, n)
    fused.text_forward(p, q, k, v, None, out, lse)
    expected, expected_lse = reference(
        q.double(), k.double(), v.double(), grid, pattern, text, first, None, None, None, None, scale
    )
    place = slice(p.text_at, p.text_at + text)
    assert error(out[:, place], expected[:, place]) < 1e-6
    assert error(lse[..., place], expected_lse[..., place]) < 1e-6
    other = slice(p.first, p.first + p.tokens)
    assert out[:, other].isnan().all() and lse[..., other].isnan().all()  # nothing else was written


def test_gradients_of_text_rows_by_dense_attention(monkeypatch):
    """The backward kernels take its output and log-sum-exp; where it fails, once said, Triton runs."""
    leaves = small()
    settings = (3, 4), Disk(2), 2
    ran = []

    def forward(*args):
        ran.append(1)
        if len(ran) > 1:
            raise RuntimeError("no plan")
        return original(*args)

    original = text_rows.forward
    monkeypatch.setattr(text_rows, "forward", forward)
    monkeypatch.setattr(text_rows, "failed", [])
    monkeypatch.setattr(text_rows, "takes", lambda *args: True)
    monkeypatch.setattr(text_rows, "pick_chunks", lambda blocks, keys, processors: text_rows.cut(keys, 2))
    monkeypatch.setattr(fused, "_plans", {})
    grads = []
    for backend in ("triton", "reference", "triton"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = local_attention(*leaves, *settings, backend=backend, return_lse=True)
        grads.append([*out, *torch.autograd.grad(out[0].square().sum() + out[1].sin().sum(), leaves)])
    ways = planner.kernels_that_ran(*settings[:2])
    assert ways == [
        "rows of grid queries: Triton's kernel; rows of text queries: cuDNN's attention in 2 chunks of 7 keys"
    ]
    assert len(ran) == 2 and ["no plan" in str(w.message) for w in caught] == [True]
    for found in (grads[0], grads[2]):
        torch.testing.assert_close(found, grads[1])


def test_kernels_are_deterministic():
    tensors, lengths, settings, tiles = problem("bias")
    results = []
    for _ in range(2):
        out, lse = fused.forward(*tensors, lengths, *settings, tiles=tiles)
        results.append([out, *fused.backward(out, None, *tensors, lengths, out, lse, *settings, tiles=tiles)])
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(*results, strict=True))


def small(text=2):
    torch.manual_seed(0)
    return [torch.randn(1, 12 + text, 2, 16, requires_grad=True) for _ in range(3)]


def test_operator_opcheck():
    torch.use_deterministic_algorithms(False)
    from visionattn.ops.local import ops
    from visionattn.ops.local.patterns import encode

    assert ops
    extra = [torch.randn(1, 2, 2, 16, requires_grad=True) for _ in range(2)]
    args = (*small(), *extra, None, torch.tensor([1]), [3, 4], encode(Disk(2), 2), 2, True, 0.25)
    torch.library.opcheck(torch.ops.visionattn.local_attention.default, args)
    bias = torch.randn(2, 5, 5, requires_grad=True)
    args = (*small(0), None, None, bias, None, [3, 4], encode(Neighborhood(3), 2), 0, True, 0.25)
    torch.library.opcheck(torch.ops.visionattn.local_attention.default, args)


def test_operator_compiles_with_grids_that_change():
    torch.use_deterministic_algorithms(False)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def attend(q, k, v, height: int, width: int):
        return local_attention(q, k, v, (height, width), Neighborhood(3), 2, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count, dynamic=True)
    for height, width in ((3, 4), (4, 5), (6, 3)):
        q, k, v = torch.randn(3, 1, 2 + height * width, 2, 16)
        expected = local_attention(q, k, v, (height, width), Neighborhood(3), 2, backend="reference")
        torch.testing.assert_close(compiled(q, k, v, height, width), expected)
    assert len(graphs) == 1
    assert "visionattn.local_attention" in graphs[0].code


def test_operator_compiles_with_gradients():
    torch.use_deterministic_algorithms(False)
    leaves = small()

    def attend(q, k, v, backend):
        return local_attention(q, k, v, (3, 4), Disk(2), 2, backend=backend, return_lse=True)

    torch._dynamo.reset()
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves, "triton")
    expected = attend(*leaves, "reference")
    torch.testing.assert_close(out, expected)
    total = [x[0].square().sum() + x[1].sin().sum() for x in (out, expected)]
    torch.testing.assert_close(torch.autograd.grad(total[0], leaves), torch.autograd.grad(total[1], leaves))


def test_eager_gradients():
    leaves = small()
    results = []
    for backend in ("triton", "reference"):
        out = local_attention(*leaves, (3, 4), Disk(2, downsample=None), 2, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results)


def test_disk_far_from_borders():
    """Tiles that take the loop without bounds; forward alone, since the grid is large for an interpreter."""
    torch.manual_seed(0)
    grid, pattern = (25, 26), Disk(1.5)
    q, k, v = (torch.randn(1, 25 * 26, 1, 16) for _ in range(3))
    small = Tile(SMALL, SMALL, 4, 1)
    out, lse = fused.forward(
        q, k, v, None, None, None, None, grid, pattern, 0, True, 0.25, Tiles(small, small, small, small, False)
    )
    expected, expected_lse = local_attention(
        *(x.double() for x in (q, k, v)), grid=grid, pattern=pattern, scale=0.25, backend="reference", return_lse=True
    )
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
