"""The kernels of local attention on a GPU: errors against float64, poison, compile, graphs, offsets beyond 32 bits."""

import math
import time

import pytest
import torch
import torch.nn.functional as F

from tests.extras import require_extra
from visionattn.ops.local import Cross, Disk, Neighborhood, explain, local_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# grid, pattern, text, batch, heads, key heads, head size, what else
CASES = {
    "clear": ((45, 37), Disk(8), 77, 2, 2, 2, 128, {}),
    "clear, pooled": ((44, 36), Disk(8, downsample=4), 77, 1, 2, 2, 128, {}),
    "clear, wide": ((85, 48), Disk(16), 512, 1, 2, 1, 128, {}),
    "disk, text last": ((13, 9), Disk(4), 1, 2, 4, 2, 64, dict(text_first=False)),
    "stride is the tile": ((64, 48), Neighborhood(16, 16), 512, 1, 2, 2, 128, {}),
    "stride": ((85, 48), Neighborhood((17, 20), (3, 8)), 77, 1, 2, 2, 128, {}),
    "slides": ((45, 37), Neighborhood(12), 77, 2, 2, 2, 96, dict(lengths=(5, 77))),
    "dilated": ((40, 37), Neighborhood(7, 2, (2, 5)), 0, 2, 2, 2, 64, {}),
    "small": ((13, 9), Neighborhood(9), 0, 3, 2, 2, 32, {}),
    "wide heads": ((20, 21), Neighborhood(9), 30, 1, 2, 2, 256, {}),
    "line": ((1000,), Neighborhood(65, 4, 3), 77, 1, 2, 2, 128, {}),
    "causal line": ((1000,), Neighborhood(64, causal=True), 0, 1, 2, 2, 64, {}),
    "video": ((9, 20, 21), Neighborhood((4, 8, 8), (2, 4, 4)), 30, 2, 1, 1, 128, {}),
    "video, causal": ((9, 15, 14), Neighborhood((4, 5, 8), 1, 1, (True, False, False)), 0, 1, 2, 2, 64, {}),
    "cross": ((37, 45), Cross(8, 8, 4), 77, 1, 2, 2, 64, {}),
    "nat": ((56, 56), Neighborhood(7), 0, 2, 2, 2, 32, dict(bias=True)),
    "dinat": ((28, 30), Neighborhood(7, 1, 4), 0, 2, 4, 4, 32, dict(bias=True)),
    "nat, window 13": ((20, 23), Neighborhood(13), 0, 2, 2, 2, 32, dict(bias=True)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make(case, dtype):
    grid, pattern, text, B, heads, kv_heads, dim, more = CASES[case]
    torch.manual_seed(0)
    n = math.prod(grid) + text
    tensors = [torch.randn(B, n, h, dim, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads)]
    lengths = more.get("lengths")
    given = dict(grid=grid, pattern=pattern, text=text, text_first=more.get("text_first", True))
    given["text_lengths"] = None if lengths is None else torch.tensor(lengths, device="cuda")
    if more.get("bias"):
        shape = (heads, *(2 * a.window - 1 for a in pattern.axes(grid)))
        tensors.append(torch.randn(shape, device="cuda").to(dtype))
    return tensors, given


def run(tensors, grad, dtype, given, backend):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    bias = leaves[3] if len(leaves) > 3 else None
    out = local_attention(*leaves[:3], **given, bias=bias, backend=backend)
    return out, *torch.autograd.grad(out, leaves, grad.to(dtype))


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


def check(tensors, given, dtype):
    """Errors of the kernels, at most twice those of PyTorch's dense attention under a mask at the same precision."""
    grad = torch.randn(tensors[0].shape, device="cuda").to(dtype)
    oracle = run(tensors, grad, torch.float64, given, "reference")
    dense = run(tensors, grad, dtype, given, "sdpa")
    fused = run(tensors, grad, dtype, given, "triton")
    for name, x, y, z in zip(("out", "dq", "dk", "dv", "dbias"), fused, dense, oracle, strict=False):
        assert x.isfinite().all(), name
        assert error(x, z) <= 2 * error(y, z) + 1e-7, f"{name}: {error(x, z):.2e}, dense {error(y, z):.2e}"


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    check(*make(case, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("case", ["clear", "stride", "small", "nat", "video"])
def test_errors_of_other_dtypes(case, dtype):
    check(*make(case, DTYPES[dtype]), DTYPES[dtype])


def test_poison_and_strides():
    """NaN around every tensor and in the keys that no tile visits; channels of heads apart."""
    grid, pattern, text = (64, 64), Disk(8), 77
    n, heads, dim = 64 * 64 + text, 2, 128
    big = torch.full((3, 1, n + 8, heads + 1, dim + 8), float("nan"), device="cuda", dtype=torch.bfloat16)
    q, k, v = (big[i, :, 4 : 4 + n, :heads, :dim] for i in range(3))
    for x in (q, k, v):
        x.normal_()
    expected = local_attention(q.double(), k.double(), v.double(), grid, pattern, text, backend="reference")
    out = local_attention(q, k, v, grid, pattern, text, backend="triton")
    assert error(out, expected) < 5e-3
    far = k.clone()
    far[:, text:].view(1, 64, 64, heads, dim)[:, 48:] = float("nan")
    out = local_attention(q, far, v, grid, pattern, text, backend="triton")
    rows = out[:, text:].view(1, 64, 64, heads, dim)
    assert rows[:, :24].isfinite().all()
    assert rows[:, 48:].isnan().any()  # the control


@pytest.mark.parametrize("case", ["clear", "stride", "nat", "video"])
def test_deterministic(case):
    tensors, given = make(case, torch.bfloat16)
    grad = torch.randn_like(tensors[0])
    first, second = (run(tensors, grad, torch.bfloat16, given, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_log_sum_exp():
    tensors, given = make("clear", torch.bfloat16)
    _, lse = local_attention(*tensors, **given, backend="triton", return_lse=True)
    _, expected = local_attention(*(t.double() for t in tensors), **given, backend="reference", return_lse=True)
    torch.testing.assert_close(lse.double(), expected, atol=1e-4, rtol=1e-4)


def test_window_of_the_grid_is_dense():
    tensors, given = make("clear", torch.bfloat16)
    given |= dict(grid=(45, 37), pattern=Neighborhood((45, 37)))
    dense = F.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in tensors)).transpose(1, 2)
    assert error(local_attention(*tensors, **given, backend="triton"), dense) < 5e-3
    assert explain(*tensors, **given).backend == "sdpa"


def test_flex():
    tensors, given = make("stride", torch.bfloat16)
    expected = local_attention(*(t.double() for t in tensors), **given, backend="reference")
    assert error(local_attention(*tensors, **given, backend="flex"), expected) < 5e-3


def test_natten():
    natten = require_extra("natten", "natten")
    if not natten.HAS_LIBNATTEN:
        pytest.skip("natten is installed without its kernels")
    tensors, given = make("stride", torch.bfloat16)
    given |= dict(grid=(85, 48), pattern=Neighborhood((17, 20), (3, 8)))
    expected = local_attention(*(t.double() for t in tensors), **given, backend="reference")
    assert error(local_attention(*tensors, **given, backend="natten"), expected) < 5e-3


def test_compile_and_cuda_graph():
    tensors, given = make("clear", torch.bfloat16)

    def attend(q, k, v, height: int, width: int):
        return local_attention(q, k, v, (height, width), given["pattern"], given["text"])

    expected = attend(*tensors, *given["grid"])
    compiled = torch.compile(attend, fullgraph=True)
    assert torch.equal(compiled(*tensors, *given["grid"]), expected)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = attend(*tensors, *given["grid"])
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_more_than_32_bits():
    """2 ** 31 elements and more in one tensor: the last rows are as right as the first."""
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} are free")
    height, width, heads, dim = 1024, 1024, 17, 128
    q = torch.randn(1, height * width, heads, dim, device="cuda", dtype=torch.bfloat16)
    out = local_attention(q, q, q, (height, width), Disk(4), backend="triton")
    part = q.view(height, width, heads, dim)[-16:, -16:, -2:].reshape(1, 256, 2, dim)
    expected = local_attention(*[part.double()] * 3, (16, 16), Disk(4), backend="reference")
    inner = (slice(None), slice(8, None), slice(8, None))
    found = out.view(1, height, width, heads, dim)[:, -16:, -16:, -2:]
    assert error(found[inner], expected.view(1, 16, 16, 2, dim)[inner]) < 5e-3


def test_set_up():
    """A new grid at 8192 px: below 1 ms of set-up and 1 MB, nothing compiled again."""
    from visionattn.ops.local import fused

    q = torch.randn(1, 16, 24, 128, device="cuda", dtype=torch.bfloat16)
    times, sizes = [], []
    for height in (500, 508, 512):
        shape = (1, height * 512 + 512, 24, 128)
        views = [q[:, :1].expand(shape)] * 3
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        plan = fused.Plan(*views, None, None, None, None, (height, 512), Disk(16), 512, True, 0.1, None)
        plan.table(plan.tiles.forward.query, plan.tiles.forward.key)
        times.append(time.perf_counter() - start)
        sizes.append(torch.cuda.memory_allocated() - before)
    assert min(times) < 1e-3, times
    assert max(sizes) < 2**20, sizes
