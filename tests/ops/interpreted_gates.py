"""The Triton kernels of mixture-of-head attention's gates, interpreted on a CPU. test_transnext_kernels.py runs this
file with TRITON_INTERPRET=1."""

import pytest
import torch

from tests.interpreter import need_interpreter
from visionattn.ops.moh import gates_triton
from visionattn.ops.moh.routing import load_balance_loss, scaled_softmax, top_k_gates

need_interpreter()


def reference(logits, E, S, k):
    """As layers/moh.py composes them."""
    if E == 0:
        return scaled_softmax(logits), None
    routed, probs, selected = top_k_gates(logits[..., :E], k)
    loss = load_balance_loss(probs, selected)
    if S == 0:
        return routed, loss
    kinds = scaled_softmax(logits[..., E : E + 2])
    shared = kinds[..., :1] * (scaled_softmax(logits[..., E + 2 :]) if S > 1 else 1.0)
    return torch.cat([shared, kinds[..., 1:] * routed], dim=-1), loss


@pytest.mark.parametrize("E, S, k", [(9, 3, 6), (16, 8, 12), (27, 5, 16), (2, 2, 2), (5, 1, 2), (7, 0, 3), (0, 6, 0)])
@pytest.mark.parametrize("used", ["both", "gates", "loss"])
def test_gates(E, S, k, used):
    if used == "loss" and E == 0:
        pytest.skip("no loss without routed heads")
    torch.manual_seed(0)
    exact = torch.randn(2, 35, gates_triton.width(E, S), dtype=torch.float64, requires_grad=True)
    logits = exact.detach().float().requires_grad_()
    gates, loss = gates_triton.HeadGates.apply(logits, E, S, k)
    expected, expected_loss = reference(exact, E, S, k)
    torch.testing.assert_close(gates.double(), expected, rtol=1e-5, atol=1e-6)
    g = torch.randn(expected.shape, dtype=torch.float64)
    ours = theirs = 0.0
    if used != "loss":
        ours, theirs = ours + (gates * g.float()).sum(), theirs + (expected * g).sum()
    if E > 0:
        torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
        if used != "gates":
            ours, theirs = ours + 3.0 * loss, theirs + 3.0 * expected_loss
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_equal_scores_choose_k():
    gates, part = gates_triton.forward(torch.zeros(1, 3, 6, dtype=torch.bfloat16), 6, 0, 2)
    assert torch.equal(gates, torch.tensor([1.0, 1.0, 0, 0, 0, 0]).expand(1, 3, 6))
    loss, share = gates_triton.load_balance(part, 3)
    assert torch.equal(share, torch.tensor([1.0, 1.0, 0, 0, 0, 0]))
    torch.testing.assert_close(loss, torch.tensor(2.0))
