"""Aggregated attention: the reference against its formula, errors, and (in a process of its own) the kernels."""

import math
from pathlib import Path

import pytest
import torch

from tests.interpreter import interpret
from visionattn.ops.aggregated import aggregated_attention, can_run_triton

HERE = Path(__file__).parent


def make(B=2, H=4, W=3, heads=2, dim=4, P=2, window=3):
    torch.manual_seed(0)
    N, L = H * W, window**2
    shapes = [(B, N, heads, dim), (B, N, 2, heads, dim), (B, P, 2, heads, dim), (heads, dim), (heads,), (heads, L)]
    shapes += [(heads, N, P), (heads, dim, L), (heads, L)]
    return [torch.randn(s, dtype=torch.float64).abs() if len(s) == 1 else torch.randn(s, dtype=torch.float64)
            for s in shapes]  # fmt: skip


@pytest.mark.parametrize("window", [3, 5])
def test_one_token_at_a_time(window):
    """The formula of the docstring, with Python loops."""
    H, W, P = 4, 3, 2
    tensors = make(H=H, W=W, P=P, window=window)
    q, kv, kv_pool, embedding, tau, bias_local, bias_pool, tokens, token_bias = tensors
    out = aggregated_attention(*tensors, H, W, window)
    for b, h, (y, x) in ((0, 0, (0, 0)), (1, 1, (3, 2)), (0, 1, (2, 1)), (1, 0, (1, 2))):
        n = y * W + x
        unit = q[b, n, h] / q[b, n, h].norm()
        places = [(y + i - window // 2, x + j - window // 2) for i in range(window) for j in range(window)]
        near = [(j, r * W + c) for j, (r, c) in enumerate(places) if 0 <= r < H and 0 <= c < W]
        asked = (unit + embedding[h]) * tau[h] * math.log(len(near) + P)
        keys = [kv[b, m, 0, h] for _, m in near] + [kv_pool[b, p, 0, h] for p in range(P)]
        bias = [bias_local[h, j] for j, _ in near] + [bias_pool[h, n, p] for p in range(P)]
        logits = torch.stack([asked @ (k / k.norm()) + c for k, c in zip(keys, bias, strict=True)])
        weights = logits.softmax(0)
        expected = sum(
            (weights[i] + unit @ tokens[h, :, j] + token_bias[h, j]) * kv[b, m, 1, h] for i, (j, m) in enumerate(near)
        )
        expected = expected + sum(weights[len(near) + p] * kv_pool[b, p, 1, h] for p in range(P))
        torch.testing.assert_close(out[b, n, h], expected)


def test_gradcheck():
    tensors = [t.requires_grad_() for t in make(B=1, H=2, W=3, heads=1, dim=2, P=1)]
    assert torch.autograd.gradcheck(lambda *args: aggregated_attention(*args, 2, 3, 3), tensors)


def test_16_bit_activations_with_float32_parameters():
    """As the kernels take them; the output and the gradients keep their inputs' dtypes."""
    exact = make(H=6, W=5, dim=8, P=4)
    mixed = [t.bfloat16() if i < 3 else t.float() for i, t in enumerate(exact)]
    mixed = [t.requires_grad_() for t in mixed]
    oracle = [t.detach().double().requires_grad_() for t in mixed]
    results = []
    for tensors in (mixed, oracle):
        out = aggregated_attention(*tensors, 6, 5, 3, backend="reference")
        results.append((out, *torch.autograd.grad(out.double().square().sum(), tensors)))
    assert [x.dtype for x in results[0]] == [torch.bfloat16] + [t.dtype for t in mixed]
    for x, y in zip(*results, strict=True):
        assert (x.double() - y).norm() / y.norm() < 0.03


def test_dropout():
    tensors = make()
    torch.manual_seed(0)
    out = [aggregated_attention(*tensors, 4, 3, 3, dropout_p=p) for p in (0.0, 0.5, 0.5)]
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])


def test_errors():
    tensors = make()
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        aggregated_attention(*tensors, 4, 3, 3, backend="fast")
    with pytest.raises(ValueError, match="odd side"):
        aggregated_attention(*tensors, 4, 3, 2)
    with pytest.raises(ValueError, match="5 x 3 map"):
        aggregated_attention(*tensors, 5, 3, 3)
    with pytest.raises(ValueError, match="bias_pool has shape"):
        aggregated_attention(*tensors[:6], tensors[6][:, :3], *tensors[7:], 4, 3, 3)
    with pytest.raises(ValueError, match="backend='triton' cannot run: dtype"):
        aggregated_attention(*tensors, 4, 3, 3, backend="triton")
    assert "cpu" in can_run_triton(tensors[0].float())
    assert "dropout" in can_run_triton(tensors[0].float(), dropout_p=0.1)


@pytest.mark.parametrize("part", ["kernels", "deterministic or operator"])
def test_interpreted(part):
    """tests/ops/interpreted_aggregated.py, where Triton is imported as an interpreter."""
    interpret(HERE / "interpreted_aggregated.py", only=part)
