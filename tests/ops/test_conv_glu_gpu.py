"""The convolutional GLU's kernels on a GPU: errors against float64 beside PyTorch's operators', and compilation."""

import pytest
import torch

from visionattn.ops.conv_glu import conv_glu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("sizes", [(64, 56, 56, 384), (5, 13, 9, 85), (3, 7, 7, 1536)])
def test_conv_glu(sizes, dtype):
    torch.manual_seed(0)
    B, H, W, C = sizes
    h = torch.randn(B, H * W, 2 * C, device="cuda").to(dtype)
    weight, bias = torch.randn(C, 1, 3, 3, device="cuda"), torch.randn(C, device="cuda")
    grad = torch.randn(B, H * W, C, device="cuda").to(dtype)

    def run(backend, cast, params):
        leaves = [h.detach().to(cast), weight.detach().to(params), bias.detach().to(params)]
        leaves = [x.requires_grad_() for x in leaves]
        out = conv_glu(*leaves, (H, W), backend)
        return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    oracle = run("reference", torch.float64, torch.float64)
    eager = run("reference", dtype, dtype)
    ours = run("triton", dtype, torch.float32)
    for i, (x, y, z) in enumerate(zip(ours, eager, oracle, strict=True)):
        assert error(x, z) <= 2 * error(y, z) + 1e-6, (i, error(x, z), error(y, z))
    again = run("triton", dtype, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


def test_compiled():
    torch.manual_seed(0)
    h = torch.randn(2, 35, 64, device="cuda", requires_grad=True)
    weight, bias = torch.randn(32, 1, 3, 3, device="cuda"), torch.randn(32, device="cuda")

    def f(h):
        return conv_glu(h, weight, bias, (5, 7), "triton").square()

    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(compiled(h), f(h))
    (ours,) = torch.autograd.grad(compiled(h).sum(), h)
    (expected,) = torch.autograd.grad(f(h).sum(), h)
    torch.testing.assert_close(ours, expected)
