"""The Triton kernels of MALA and of the residual norm on a GPU, against the float64 reference."""

import pytest
import torch

from visionattn.ops.linear import mala_mix, rotary_lines, rotary_tables

pytestmark = pytest.mark.gpu
# batch, height, width, heads, channels of a head, prefix tokens
SIZES = [(2, 56, 56, 1, 64, 0), (2, 7, 9, 3, 20, 1)]
# the paper's beta is 1 / z, which magnifies what rounding does to z
LIMIT = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_float64(sizes, dtype):
    B, H, W, heads, dim, P = sizes
    torch.manual_seed(0)
    C = heads * dim
    qkvo = torch.randn(B, P + H * W, 4 * C, device="cuda", dtype=dtype)
    weight = torch.randn(C, 1, 5, 5, device="cuda") * 0.2
    bias = torch.randn(C, device="cuda")
    sin, cos = rotary_tables(rotary_lines(H, dim, "cuda"), rotary_lines(W, dim, "cuda"))
    sin = torch.cat([torch.zeros(P, dim, device="cuda"), sin]).to(dtype)
    cos = torch.cat([torch.ones(P, dim, device="cuda"), cos]).to(dtype)
    inputs = [x.requires_grad_() for x in (qkvo, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = mala_mix(*inputs, sin, cos, heads, (H, W), backend="triton")
    expected = mala_mix(*exact, sin.double(), cos.double(), heads, (H, W), backend="reference")
    g = torch.randn(got.shape, device="cuda").to(dtype)
    got.backward(g)
    expected.backward(g.double())
    assert error(got, expected) < LIMIT[dtype]
    for ours, theirs in zip(inputs, exact, strict=True):
        assert error(ours.grad, theirs.grad) < LIMIT[dtype]
    with torch.no_grad():
        assert torch.equal(mala_mix(*inputs, sin, cos, heads, (H, W), backend="triton"), got)


@pytest.mark.parametrize("C", [20, 64, 192, 1536])
def test_norm(C):
    from visionattn.ops.norm_triton import add_norm

    torch.manual_seed(0)
    x, y = torch.randn(3, 197, C, device="cuda") * 3 + 1, torch.randn(3, 197, C, device="cuda").bfloat16()
    weight, bias = torch.randn(C, device="cuda"), torch.randn(C, device="cuda")
    total, out = add_norm(x, y, weight, bias, 1e-6, torch.bfloat16)
    assert torch.equal(total, x + y)
    expected = torch.nn.functional.layer_norm(total.double(), [C], weight.double(), bias.double(), 1e-6)
    assert error(out, expected) < 4e-3
    assert error(add_norm(x, None, weight, bias, 1e-6, torch.float32)[1], expected) > 0.01  # of x alone
    alone = torch.nn.functional.layer_norm(x.double(), [C], weight.double(), bias.double(), 1e-6)
    assert error(add_norm(x, None, weight, bias, 1e-6, torch.float32)[1], alone) < 1e-6
