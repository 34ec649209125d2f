"""Text rows of local attention by cuDNN on a Hopper GPU: errors, log-sum-exp, gradients, same bits, compile, graphs."""

import math

import pytest
import torch

from visionattn.ops.local import Disk, Neighborhood, explain, fused, local_attention
from visionattn.ops.local import text as text_rows

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs a GPU of compute capability 9.0")]

# grid, pattern, text, batch, heads, key heads, channels, text first, chunks, packed projection
CASES = {
    "chosen": ((64, 64), Disk(8), 512, 1, 24, 24, 128, True, None, False),
    "one part": ((45, 37), Disk(8), 300, 2, 4, 4, 128, False, 1, True),
    "chunks and a rest": ((45, 37), Neighborhood(12), 77, 2, 4, 4, 128, True, 3, True),
    "grouped heads": ((64, 48), Disk(8), 256, 1, 8, 2, 128, True, 4, False),
    "heads of 64": ((64, 48), Neighborhood(16, 16), 130, 1, 4, 4, 64, False, 2, True),
    "video": ((9, 20, 21), Neighborhood((4, 8, 8), (2, 4, 4)), 256, 1, 2, 2, 128, True, 2, False),
}


@pytest.fixture(autouse=True)
def force(monkeypatch):
    monkeypatch.setattr(text_rows, "choice", "cudnn")
    monkeypatch.setattr(fused, "_plans", {})


def make(case, dtype, monkeypatch):
    grid, pattern, text, batch, heads, kv_heads, dim, first, count, packed = CASES[case]
    if count is not None:
        monkeypatch.setattr(text_rows, "pick_chunks", lambda blocks, keys, processors: text_rows.cut(keys, count))
    torch.manual_seed(0)
    n = math.prod(grid) + text
    if packed:
        tensors = list(torch.randn(batch, n, 3, heads, dim, device="cuda").to(dtype).unbind(2))
    else:
        tensors = [torch.randn(batch, n, h, dim, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads)]
    return tensors, dict(grid=grid, pattern=pattern, text=text, text_first=first)


def chunks_of(tensors, given):
    q, k, v = tensors
    settings = (given["grid"], given["pattern"], given["text"], given["text_first"], q.shape[-1] ** -0.5)
    return fused.plan(q, k, v, None, None, None, None, *settings).text_chunks


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


def run(tensors, grad, dtype, given, backend):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = local_attention(*leaves, **given, backend=backend)
    return out, *torch.autograd.grad(out, leaves, grad.to(dtype))


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.bfloat16) for case in CASES), ("chunks and a rest", torch.float16)]
)
def test_errors(case, dtype, monkeypatch):
    """Of text rows and of all gradients: at most twice those of dense attention under a mask; the same bits twice."""
    tensors, given = make(case, dtype, monkeypatch)
    chunks = chunks_of(tensors, given)
    assert chunks is not None and chunks.count == (CASES[case][8] or chunks.count)
    grad = torch.randn(tensors[0].shape, device="cuda").to(dtype)
    found, again, dense = (run(tensors, grad, dtype, given, name) for name in ("triton", "triton", "sdpa"))
    oracle = run(tensors, grad, torch.float64, given, "reference")
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    n, text = math.prod(given["grid"]), given["text"]
    place = slice(0, text) if given["text_first"] else slice(n, n + text)
    found, dense, oracle = ([x[0][:, place], *x[1:]] for x in (found, dense, oracle))
    for name, x, y, z in zip(("text rows", "dq", "dk", "dv"), found, dense, oracle, strict=True):
        assert x.isfinite().all(), name
        assert error(x, z) <= 2 * error(y, z) + 1e-7, f"{name}: {error(x, z):.2e}, dense {error(y, z):.2e}"
    _, lse = local_attention(*tensors, **given, backend="triton", return_lse=True)
    _, expected = local_attention(*(t.double() for t in tensors), **given, backend="reference", return_lse=True)
    torch.testing.assert_close(lse.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["one part", "chunks and a rest"])
def test_compile_and_cuda_graph(case, monkeypatch):
    tensors, given = make(case, torch.bfloat16, monkeypatch)

    def attend(q, k, v):
        return local_attention(q, k, v, **given)

    expected = attend(*tensors)
    assert torch.equal(torch.compile(attend, fullgraph=True)(*tensors), expected)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = attend(*tensors)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_what_is_switched_off_stays_off(monkeypatch):
    tensors, given = make("chosen", torch.bfloat16, monkeypatch)
    assert "cuDNN" in str(explain(*tensors, **given))
    lengths = torch.tensor([100], device="cuda")
    assert "cuDNN" not in str(explain(*tensors, **given, text_lengths=lengths))
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert chunks_of(tensors, given) is None
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(True)
    try:
        assert chunks_of(tensors, given) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert chunks_of(tensors, given) is not None
    assert chunks_of([t.float() for t in tensors], given) is None
    monkeypatch.setattr(text_rows, "choice", "auto")
    few = [t[:, 512 - 77 :] for t in tensors]
    assert chunks_of(few, {**given, "text": 77}) is None  # shorter than LEAST_TEXT
