"""The Triton kernels of the residual sum and its norm, interpreted on a CPU. test_transnext_kernels.py runs this file
with TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import need_interpreter
from visionattn.ops.norm_triton import AddNorm, add_norm

need_interpreter()


@pytest.mark.parametrize("shape", [(3, 50, 20), (1, 5, 72), (2, 1, 300)])
@pytest.mark.parametrize("second", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
def test_add_norm(shape, second, used):
    """Values and gradients of (x + y, norm), whichever of the two goes on."""
    if (second is None) != (used == "norm") and second is None:
        pytest.skip("no sum without y")
    torch.manual_seed(0)
    x, gs, gn = torch.randn(3, *shape)
    y = None if second is None else torch.randn(shape).to(second)
    leaves = [x, y, torch.randn(shape[2]), torch.randn(shape[2])]
    exact = [None if t is None else t.double().requires_grad_() for t in leaves]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    total, out = AddNorm.apply(*leaves, 1e-6, torch.bfloat16 if second == torch.bfloat16 else torch.float32)
    summed = exact[0] if y is None else exact[0] + exact[1]
    expected = F.layer_norm(summed, (shape[2],), exact[2], exact[3], 1e-6)
    loose = second == torch.bfloat16
    limits = dict(rtol=2e-2, atol=4e-2) if loose else dict(rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(out.double(), expected, **limits)
    ours = theirs = 0.0
    if used != "norm":
        torch.testing.assert_close(total.double(), summed, rtol=1e-6, atol=1e-6)
        ours, theirs = ours + (total * gs).sum(), theirs + (summed * gs.double()).sum()
    if used != "sum":
        ours, theirs = ours + (out * gn).sum(), theirs + (expected * gn.double()).sum()
    ours.backward()
    theirs.backward()
    for a, b in zip(leaves, exact, strict=True):
        if a is not None and b.grad is not None:
            assert a.grad.dtype == a.dtype
            torch.testing.assert_close(a.grad.double(), b.grad, **limits)
    with torch.no_grad():
        assert torch.equal(add_norm(*leaves, 1e-6, out.dtype)[1], out)
