"""The Triton kernels of MALA, interpreted on a CPU. test_linear.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops import mala_triton, norm_triton
from visionattn.ops._launch import Plans
from visionattn.ops.linear import mala_mix, rotary_lines, rotary_tables

need_interpreter()


def case(B, H, W, heads, dim, P, bias, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    C = heads * dim
    qkvo = torch.randn(B, P + H * W, 4 * C, generator=g).to(dtype)
    weight, shift = torch.randn(C, 1, 5, 5, generator=g) * 0.2, torch.randn(C, generator=g)
    sin, cos = rotary_tables(rotary_lines(H, dim), rotary_lines(W, dim))
    sin, cos = torch.cat([torch.zeros(P, dim), sin]), torch.cat([torch.ones(P, dim), cos])
    return [qkvo, weight, shift if bias else None, sin, cos], (heads, (H, W))


CASES = [(2, 5, 7, 2, 8, 0, True), (1, 3, 4, 3, 12, 2, False), (1, 9, 8, 1, 20, 1, True)]


@pytest.mark.parametrize("sizes, chunks", [(sizes, 1) for sizes in CASES] + [(CASES[-1], 2)])
def test_forward_and_gradients(sizes, chunks, monkeypatch):
    if chunks > 1:
        monkeypatch.setattr(mala_triton, "AT_ONCE", 64)
        monkeypatch.setattr(mala_triton, "CHUNK", 64)
    monkeypatch.setattr(mala_triton, "_plans", Plans())
    inputs, rest = case(*sizes)
    leaves = [None if x is None else x.requires_grad_() for x in inputs[:3]]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs[:3]]
    tables = [x.double() for x in inputs[3:]]
    got = mala_mix(*leaves, *inputs[3:], *rest, backend="triton")
    expected = mala_mix(*exact, *tables, *rest, backend="reference")
    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    got.backward(g)
    expected.backward(g.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)
    for ours, theirs in zip(leaves, exact, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=3e-5)
    with torch.no_grad():
        assert torch.equal(mala_mix(*leaves, *inputs[3:], *rest, backend="triton"), got)


def test_half_precision():
    inputs, rest = case(1, 5, 7, 1, 16, 0, True, torch.float16)
    got = mala_mix(*inputs, *rest, backend="triton")
    expected = mala_mix(*[x.double() for x in inputs], *rest, backend="reference")
    assert got.dtype == torch.float16
    assert (got.double() - expected).norm() < 3e-3 * expected.norm()


def test_registration():
    inputs, (heads, grid) = case(1, 3, 4, 1, 8, 0, True)
    inputs[1] = inputs[1].flatten(1)
    inputs = [x.requires_grad_(i < 3) for i, x in enumerate(inputs)]
    torch.library.opcheck(mala_triton.mala_mix_op, (*inputs, heads, *grid))


@pytest.mark.parametrize("rows, C", [(5, 20), (70, 96)])
def test_norm(rows, C):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, rows, C, generator=g) * 3 + 1, torch.randn(2, rows, C, generator=g).half()
    weight, bias = torch.randn(C, generator=g), torch.randn(C, generator=g)
    total, out = norm_triton.add_norm(x, y, weight, bias, 1e-6, torch.float16)
    assert torch.equal(total, x + y) and total.dtype == torch.float32
    expected = torch.nn.functional.layer_norm(total.double(), [C], weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    same, out = norm_triton.add_norm(x, None, weight, bias, 1e-6, torch.float32)
    assert same is x
    expected = torch.nn.functional.layer_norm(x.double(), [C], weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
