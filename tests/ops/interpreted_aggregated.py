"""The Triton kernels of aggregated attention, interpreted on a CPU. test_aggregated.py runs this file."""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops.aggregated import aggregated_attention, fused
from visionattn.ops.aggregated.reference import aggregated_attention_reference

need_interpreter()

# B, H, W, heads, D, P, window, tiles, dtype
CASES = {
    "one tile of pooled keys": (2, 5, 4, 2, 8, 4, 3, fused.Tiles(16, 16, 4), torch.float32),
    "several of both": (1, 5, 7, 2, 16, 35, 3, fused.Tiles(16, 16, 4), torch.float32),
    "24 channels, images in chunks": (3, 4, 6, 1, 24, 6, 3, fused.Tiles(32, 16, 4), torch.float32),
    "window of 5": (1, 6, 5, 1, 12, 3, 5, fused.Tiles(16, 16, 4), torch.float32),
    "one row": (1, 1, 9, 1, 16, 2, 3, fused.Tiles(16, 16, 4), torch.float32),
    "half precision": (1, 5, 5, 1, 16, 4, 3, fused.Tiles(16, 16, 4), torch.float16),
}
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3}
NAMES = ["q", "kv", "kv_pool", "query_embedding", "tau", "bias_local", "bias_pool", "tokens", "token_bias"]


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """x as a view of a larger tensor of NaN: what a kernel reads beside it shows."""
    big = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype)
    view = big[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def problem(case):
    B, H, W, heads, dim, P, window, tiles, dtype = CASES[case]
    torch.manual_seed(0)
    N, L = H * W, window**2
    data = [torch.randn(s) for s in ((B, N, heads, dim), (B, N, 2, heads, dim), (B, P, 2, heads, dim))]
    data = [x.to(dtype) for x in data]
    params = [
        torch.randn(heads, dim) * 0.3, torch.rand(heads) + 1.0, torch.randn(heads, L) * 0.5,
        torch.randn(heads, N, P) * 0.5, torch.randn(heads, dim, L) * 0.3, torch.randn(heads, L) * 0.3,
    ]  # fmt: skip
    return [*data, *params], (H, W, window), fused.Plan(*[tiles] * 5)


@pytest.mark.parametrize("case", CASES)
def test_kernels(case):
    tensors, sizes, tiles = problem(case)
    oracle = [t.double().requires_grad_() for t in tensors]
    expected = aggregated_attention_reference(*oracle, *sizes)
    grad = torch.randn_like(expected).to(tensors[0].dtype)
    wanted = torch.autograd.grad(expected, oracle, grad.double())

    poisoned = [inside_nan(t) for t in tensors]
    out, lse = fused.forward(*poisoned, *sizes, tiles=tiles)
    got = fused.backward(inside_nan(grad), *poisoned, out, lse, *sizes, tiles=tiles)

    def error(x, y):
        return ((x.double() - y).norm() / y.norm()).item()

    limit = TOLERANCE[tensors[0].dtype]
    assert error(out, expected) < limit
    for name, x, y in zip(NAMES, got, wanted, strict=True):
        assert x.shape == y.shape and error(x, y) < limit, (name, error(x, y))


def test_deterministic():
    tensors, sizes, tiles = problem("several of both")
    out, lse = fused.forward(*tensors, *sizes, tiles=tiles)
    results = [fused.backward(out, *tensors, out, lse, *sizes, tiles=tiles) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_operator():
    tensors, sizes, _ = problem("one tile of pooled keys")
    torch.use_deterministic_algorithms(False)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.visionattn.aggregated_attention.default, (*leaves, *sizes))

    def run(*args, backend="triton"):
        return aggregated_attention(*args, *sizes, backend=backend)

    expected = run(*leaves, backend="reference")
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), wanted, rtol=1e-3, atol=1e-4)
