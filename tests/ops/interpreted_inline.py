"""The Triton kernels of InLine attention, interpreted on a CPU. test_agent_inline.py runs this file with
TRITON_INTERPRET=1."""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops import inline_triton
from visionattn.ops._launch import Plans
from visionattn.ops.inline import inline_mix

need_interpreter()


def case(B, H, W, C, P, images, bias, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, P + H * W, 3 * C, generator=g) + 0.5).to(dtype).chunk(3, dim=2)
    weight = torch.randn(images, C, 9, generator=g).to(dtype)
    return [q, k, v, weight, torch.randn(C, generator=g).to(dtype) if bias else None]


# batch, height, width, channels, prefix tokens, images with kernels of their own, bias; heads
CASES = [
    ((2, 5, 7, 48, 0, 2, False), 2),  # heads 24 wide, as CSWin-B
    ((2, 5, 7, 32, 1, 2, True), 2),
    ((1, 1, 1, 16, 2, 1, True), 1),
    ((1, 27, 20, 32, 1, 1, False), 1),
]


@pytest.mark.parametrize("sizes, heads, chunks", [(*case, 1) for case in CASES] + [(*CASES[-1], 2)])
def test_forward_and_gradients(sizes, heads, chunks, monkeypatch):
    monkeypatch.setattr(inline_triton, "AT_ONCE", 1024 if chunks == 1 else 512)
    monkeypatch.setattr(inline_triton, "_plans", Plans())
    H, W, P = sizes[1], sizes[2], sizes[4]
    inputs = [None if x is None else x.detach().requires_grad_() for x in case(*sizes)]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    got = inline_mix(*inputs, heads, (H, W), P, backend="triton")
    expected = inline_mix(*exact, heads, (H, W), P, backend="reference")
    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    got.backward(g)
    expected.backward(g.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(inputs, exact, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        assert torch.equal(inline_mix(*inputs, heads, (H, W), P, backend="triton"), got)


def test_half_precision():
    inputs = case(2, 5, 7, 32, 1, 2, True, torch.float16)
    got = inline_mix(*inputs, 2, (5, 7), 1, backend="triton")
    expected = inline_mix(*[x.double() for x in inputs], 2, (5, 7), 1, backend="reference")
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=3e-3, atol=3e-3)


def test_registration():
    inputs = [x.detach().contiguous().requires_grad_() for x in case(1, 3, 4, 16, 1, 1, True)]
    torch.library.opcheck(inline_triton.inline_mix_op, (*inputs, 1, 3, 4, 1, 0.25))
