"""Mixture-of-head attention: reference, backends, routing formulas, and (in a process of its own) the kernels."""

from pathlib import Path

import pytest
import torch

from tests.interpreter import interpret
from visionattn.ops.moh import (
    can_run_triton,
    load_balance_loss,
    moh_attention,
    scaled_softmax,
    straight_through_gates,
    top_k_gates,
)

HERE = Path(__file__).parent


def make(B=2, N=9, M=9, heads=4, dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, heads, dim, dtype=dtype) for n in (N, M, M))
    gates, _, _ = top_k_gates(torch.randn(B, N, heads, dtype=dtype), 2)
    bias = torch.randn(heads, N, M, dtype=dtype)
    return q, k, v, gates, bias


@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_written_out(with_bias):
    q, k, v, gates, bias = make()
    bias = bias if with_bias else None
    got = moh_attention(q, k, v, gates, 0.3, bias, backend="reference")
    for b, n, h in ((0, 0, 0), (1, 8, 3), (1, 4, 2)):
        logits = k[b, :, h] @ q[b, n, h] * 0.3
        if with_bias:
            logits = logits + bias[h, n]
        expected = gates[b, n, h] * (logits.exp() / logits.exp().sum()) @ v[b, :, h]
        torch.testing.assert_close(got[b, n, h], expected)


def test_gradcheck():
    q, k, v, gates, bias = (x.requires_grad_() for x in make(1, 3, 4, 2, 2))

    def run(*args):
        return moh_attention(*args[:4], 0.5, args[4], backend="reference")

    assert torch.autograd.gradcheck(run, (q, k, v, gates.detach().requires_grad_(), bias))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", ["dense", "gather", "auto"])
def test_backends(backend, with_bias):
    for case in (make(), make(1, 12, 5, 3, 4), make(heads=2)):  # of two heads, both are everybody's
        q, k, v, gates, bias = case
        bias = bias if with_bias else None
        expected = moh_attention(q, k, v, gates, None, bias, backend="reference")
        torch.testing.assert_close(moh_attention(q, k, v, gates, None, bias, backend=backend), expected)


def test_gather_computes_only_the_chosen():
    """The queries that reach the attention are as many as the fullest routed head has."""
    q, k, v, gates, _ = make(1, 64, 64, 4, 8, torch.float32)
    gates = torch.zeros_like(gates)
    gates[..., 0] = 1.0
    gates[0, :5, 2] = 0.5
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(query, *args, **kwargs):
        seen.append(tuple(query.shape[1:3]))
        return original(query, *args, **kwargs)

    from visionattn.ops.moh import gather

    gather.F = type("F", (), dict(scaled_dot_product_attention=staticmethod(record)))
    try:
        got = moh_attention(q, k, v, gates, backend="gather")
    finally:
        gather.F = torch.nn.functional
    assert seen == [(1, 64), (3, 5)]
    torch.testing.assert_close(got, moh_attention(q, k, v, gates, backend="reference"))


def test_gates():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 6, dtype=torch.float64)
    gates, probs, selected = top_k_gates(logits, 2)
    expected = logits.softmax(-1)
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(gates.sum(-1), torch.full((3, 5), 2.0, dtype=torch.float64))
    for token, row in zip(logits.view(-1, 6), gates.view(-1, 6), strict=True):
        best = token.topk(2).indices
        share = token.softmax(-1)[best]
        torch.testing.assert_close(row[best], 2 * share / share.sum())
        assert (row != 0).sum() == 2
    torch.testing.assert_close(scaled_softmax(logits).sum(-1), torch.full((3, 5), 6.0, dtype=torch.float64))
    hard, probs, _ = straight_through_gates(logits.requires_grad_(), 2)
    assert torch.equal(hard, selected)
    weights = torch.randn_like(hard)
    (got,) = torch.autograd.grad((hard * weights).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((probs * selected * weights).sum(), logits)
    torch.testing.assert_close(got, expected)


def test_load_balance_loss():
    uniform = torch.full((4, 6), 1 / 6)
    spread = torch.eye(6)[torch.tensor([[0, 1], [2, 3], [4, 5]])].sum(1)
    torch.testing.assert_close(load_balance_loss(uniform[:3], spread), torch.tensor(2.0))
    crowded = torch.eye(6)[torch.zeros(3, dtype=torch.long)]
    torch.testing.assert_close(load_balance_loss(crowded, crowded), torch.tensor(6.0))


def test_errors():
    q, k, v, gates, bias = make()
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        moh_attention(q, k, v, gates, backend="fast")
    with pytest.raises(ValueError, match="gates have shape"):
        moh_attention(q, k, v, gates[:, :3])
    with pytest.raises(ValueError, match="bias has shape"):
        moh_attention(q, k, v, gates, bias=bias[:, :3])
    with pytest.raises(ValueError, match="q, k, v have shapes"):
        moh_attention(q, k[..., :4], v, gates)
    with pytest.raises(ValueError, match="no gradient"):
        moh_attention(q.requires_grad_(), k, v, gates, backend="gather")
    assert "bias" in can_run_triton(q.detach(), k, v, gates, bias=bias)
    assert can_run_triton(q.detach().float(), k.float(), v.float(), gates) is not None  # on a CPU


def test_interpreted():
    """tests/ops/interpreted_moh.py, where Triton is imported as an interpreter."""
    interpret(HERE / "interpreted_moh.py")
