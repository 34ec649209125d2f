"""The Triton kernels of the depthwise residual and of InLine attention on a GPU, against the float64 reference."""

import pytest
import torch

from visionattn.ops.depthwise import depthwise_residual
from visionattn.ops.inline import inline_mix

pytestmark = pytest.mark.gpu
# batch, height, width, channels, heads, prefix tokens
SIZES = [(2, 56, 56, 96, 3, 0), (3, 14, 14, 192, 6, 1), (2, 7, 9, 192, 8, 0), (1, 100, 75, 64, 1, 1)]
LIMIT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("operator", ["depthwise", "inline"])
def test_against_float64(operator, sizes, dtype, per_image):
    B, H, W, C, heads, P = sizes
    torch.manual_seed(0)
    new = dict(device="cuda", dtype=dtype)
    q, k, v = torch.randn(B, P + H * W, 3 * C, **new).chunk(3, dim=2)
    weight, bias = torch.randn(B if per_image else 1, C, 9, **new) / 3, torch.randn(C, **new)
    inputs = [q, v, weight, bias] if operator == "depthwise" else [q, k, v, weight, bias]
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rest = ((H, W), P) if operator == "depthwise" else (heads, (H, W), P)
    function = depthwise_residual if operator == "depthwise" else inline_mix
    g = torch.randn(B, P + H * W, C, **new)
    got, expected = function(*inputs, *rest, backend="triton"), function(*exact, *rest, backend="reference")
    got.backward(g)
    expected.backward(g.double())
    assert error(got, expected) < LIMIT[dtype]
    for ours, theirs in zip(inputs, exact, strict=True):
        assert error(ours.grad, theirs.grad) < LIMIT[dtype]
    with torch.no_grad():
        assert torch.equal(function(*inputs, *rest, backend="triton"), got)
