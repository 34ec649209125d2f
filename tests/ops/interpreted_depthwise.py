"""The Triton kernels of the depthwise residual, interpreted on a CPU. test_agent_inline.py runs this file with
TRITON_INTERPRET=1."""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops import depthwise_triton
from visionattn.ops.depthwise import depthwise_residual

need_interpreter()


def case(B, H, W, C, P, images, bias, dtype=torch.float32, side=3):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, P + H * W, 3 * C, generator=g).to(dtype)
    out, _, v = qkv.chunk(3, dim=2)  # as a projection leaves them: strided
    weight = torch.randn(images, C, side * side, generator=g)
    return [out, v, weight, torch.randn(C, generator=g) if bias else None]


CASES = [
    (2, 5, 7, 20, 0, 1, True),
    (2, 5, 7, 20, 1, 1, True),
    (2, 9, 3, 70, 1, 2, False),
    (1, 1, 1, 3, 2, 1, True),
    (2, 30, 20, 16, 0, 2, True),  # two chunks of the weight gradient
    (2, 5, 7, 20, 1, 2, True, torch.float32, 5),
]


@pytest.mark.parametrize("sizes", CASES)
def test_forward_and_gradients(sizes):
    H, W, P = sizes[1], sizes[2], sizes[4]
    inputs = [None if x is None else x.detach().requires_grad_() for x in case(*sizes)]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    got = depthwise_residual(*inputs, (H, W), P, backend="triton")
    expected = depthwise_residual(*exact, (H, W), P, backend="reference")
    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    got.backward(g)
    expected.backward(g.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(inputs, exact, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        assert torch.equal(depthwise_residual(*inputs, (H, W), P, backend="triton"), got)


def test_half_precision_values_under_single_precision_weights():
    out, v, weight, bias = case(2, 5, 7, 20, 1, 1, True, torch.float16)
    got = depthwise_residual(out, v, weight, bias, (5, 7), 1, backend="triton")
    expected = depthwise_residual(out.double(), v.double(), weight.double(), bias.double(), (5, 7), 1, "reference")
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)


def test_registration():
    out, v, weight, bias = case(1, 3, 4, 16, 1, 1, True)
    args = [x.detach().contiguous().requires_grad_() for x in (out, v, weight, bias)]
    torch.library.opcheck(depthwise_triton.depthwise_residual_op, (*args, 3, 4, 1))


def test_no_double():
    out, v, weight, bias = (x.double() for x in case(1, 3, 4, 16, 0, 1, True))
    with pytest.raises(ValueError, match="float64"):
        depthwise_residual(out, v, weight, bias, (3, 4), 0, backend="triton")
