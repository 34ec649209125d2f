"""The Triton kernels of the convolutional GLU, interpreted on a CPU. test_transnext_kernels.py runs this file with
TRITON_INTERPRET=1."""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops import conv_glu_triton
from visionattn.ops.conv_glu import conv_glu

need_interpreter()


def case(B, H, W, C, bias, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(B, H * W, 2 * C, generator=g).to(dtype)
    return [h, torch.randn(C, 1, 3, 3, generator=g), torch.randn(C, generator=g) if bias else None]


# tiles that end inside an image, images inside a tile, one row or column, channels that no tile divides
CASES = [(2, 9, 11, 20, True), (5, 3, 4, 70, False), (3, 1, 5, 16, True), (2, 6, 1, 3, True)]


@pytest.mark.parametrize("sizes", CASES)
def test_forward_and_gradients(sizes):
    grid = sizes[1:3]
    inputs = [None if x is None else x.requires_grad_() for x in case(*sizes)]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    got = conv_glu(*inputs, grid, backend="triton")
    expected = conv_glu(*exact, grid, backend="reference")
    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    got.backward(g)
    expected.backward(g.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(inputs, exact, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=3e-5)
    with torch.no_grad():
        assert torch.equal(conv_glu(*inputs, grid, backend="triton"), got)


def test_half_precision_under_single_precision_weights():
    h, weight, bias = case(2, 5, 7, 20, True, torch.bfloat16)
    h.requires_grad_()
    got = conv_glu(h, weight, bias, (5, 7), "triton")
    got.sum().backward()
    exact = h.detach().double().requires_grad_()
    expected = conv_glu(exact, weight.double(), bias.double(), (5, 7), "reference")
    expected.sum().backward()
    assert got.dtype == h.grad.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=8e-3, atol=1e-2)
    torch.testing.assert_close(h.grad.double(), exact.grad, rtol=2e-2, atol=3e-2)


def test_registration():
    h, weight, bias = (x.requires_grad_() for x in case(1, 3, 4, 16, True))
    torch.library.opcheck(conv_glu_triton.conv_glu_op, (h, weight, bias, 3, 4))
