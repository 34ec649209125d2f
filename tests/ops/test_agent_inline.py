"""Agent and InLine attention, the depthwise residual: fast paths against the float64 reference, and their gradients."""

from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from tests.interpreter import interpret
from visionattn.ops import _triton, depthwise
from visionattn.ops.agent import agent_attention, agent_attention_reference, agent_key_bias, pool_agents, pooling_bins
from visionattn.ops.depthwise import depthwise_residual
from visionattn.ops.inline import feature_map, inline_attention, inline_attention_reference

HERE = Path(__file__).parent
B, N, M, H, D, AGENTS = 2, 15, 12, 2, 8, 4


def normal(*shape: int, seed: int = 0, dtype=torch.float64, grad: bool = False) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def agent_inputs(dtype=torch.float64, grad: bool = False) -> list[torch.Tensor]:
    shapes = [(B, N, H, D), (B, M, H, D), (B, M, H, D), (B, AGENTS, H, D), (H, AGENTS, M), (H, N, AGENTS)]
    return [normal(*shape, seed=i, dtype=dtype, grad=grad) for i, shape in enumerate(shapes)]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def test_agent_reference_is_two_softmaxes():
    q, k, v, a, key_bias, query_bias = agent_inputs()
    out, gather, spread = agent_attention_reference(q, k, v, a, key_bias, query_bias)
    head, agent, query = 1, 2, 3
    logits = (k[0, :, head] @ a[0, agent, head]) * D**-0.5 + key_bias[head, agent]
    torch.testing.assert_close(gather[0, head, agent], logits.softmax(0))
    logits = (a[0, :, head] @ q[0, query, head]) * D**-0.5 + query_bias[head, query]
    torch.testing.assert_close(spread[0, head, query], logits.softmax(0))
    torch.testing.assert_close(out[0, query, head], logits.softmax(0) @ (gather[0, head] @ v[0, :, head]))


@pytest.mark.parametrize("biased", [True, False])
def test_agent_sdpa(biased):
    inputs = agent_inputs()
    if not biased:
        inputs[4] = inputs[5] = None
    expected = agent_attention(*inputs, backend="reference")
    assert error(agent_attention(*inputs, backend="sdpa"), expected) < 1e-14
    single = [None if x is None else x.float() for x in inputs]
    assert error(agent_attention(*single), expected) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_agent_gradients(backend):
    inputs = agent_inputs(grad=True)
    assert gradcheck(lambda *xs: agent_attention(*xs, backend=backend), inputs)


def test_agent_pooling_bins_overlap():
    q = normal(1, 7 * 5, 3)
    pooled = pool_agents(q, (7, 5), (3, 2)).reshape(1, 3, 2, 3)
    x = q.reshape(1, 7, 5, 3)
    torch.testing.assert_close(pooled[0, 1, 1], x[0, 2:5, 2:5].mean((0, 1)))
    even = pool_agents(normal(1, 36, 3), (6, 6), (3, 2))
    torch.testing.assert_close(even.reshape(3, 2, 3)[2, 1], normal(1, 36, 3).reshape(6, 6, 3)[4:6, 3:].mean((0, 1)))
    assert pool_agents(q, (7, 5), (7, 5)) is q


@pytest.mark.parametrize("grid, shape", [((7, 5), (3, 2)), ((13, 10), (3, 4)), ((5, 7), (7, 3)), ((56, 56), (3, 3))])
def test_agent_pooling_as_a_product(grid, shape):
    tokens = normal(2, grid[0] * grid[1], 9)
    for dtype, limit in ((torch.float64, 1e-14), (torch.bfloat16, 2e-2)):
        q = tokens.to(dtype)[:, :, 3:6]  # strided, as a projection's part
        got = pool_agents(q, grid, shape, pooling_bins(grid, shape, q.device, dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), pool_agents(q.double(), grid, shape), rtol=limit, atol=limit / 4)


def test_agent_bias_parts():
    block, row, column = normal(H, 4, 7, 7), normal(1, H, 4, 6, 1), normal(1, H, 4, 1, 5)
    same = agent_key_bias(block, torch.zeros(1, H, 4, 7, 1), torch.zeros(1, H, 4, 1, 7), (7, 7), (2, 2))
    assert torch.equal(same, block.flatten(2))  # 7 x 7 to 7 x 7 changes nothing
    lines = agent_key_bias(torch.zeros_like(block), row, column, (6, 5), (2, 2)).reshape(H, 4, 6, 5)
    torch.testing.assert_close(lines[1, 2, 3, 4], row[0, 1, 2, 3, 0] + column[0, 1, 2, 0, 4])
    more = agent_key_bias(block, row, column, (6, 5), (4, 4))
    assert more.shape == (H, 16, 30)


def inline_inputs(dtype=torch.float64, grad: bool = False, tokens: int = M) -> list[torch.Tensor]:
    shapes = [(B, N, H, D), (B, tokens, H, D), (B, tokens, H, D)]
    return [normal(*shape, seed=i, dtype=dtype, grad=grad) for i, shape in enumerate(shapes)]


def test_inline_rows_sum_to_one():
    weights = inline_attention_reference(*inline_inputs())[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N, dtype=torch.float64))
    assert (weights < 0).any()


def test_inline_two_products():
    inputs = inline_inputs()
    expected = inline_attention(*inputs, backend="reference")
    assert error(inline_attention(*inputs, backend="matmul"), expected) < 1e-14
    assert error(inline_attention(*[x.float() for x in inputs]), expected) < 1e-6
    assert (
        error(inline_attention(*inputs, scale=0.3), inline_attention(*inputs, scale=0.3, backend="reference")) < 1e-14
    )


def test_inline_half_precision_does_not_overflow():
    """Sums of thousands of products of large keys and values: in float16 k^T v is beyond the largest number."""
    q, k, v = inline_inputs(tokens=4096)
    k, v = k + 6, v + 6
    q, k, v = q.half(), k.half(), v.half()
    expected = inline_attention(q.double(), k.double(), v.double(), backend="reference")
    got = inline_attention(q, k, v)
    assert got.isfinite().all()
    # the order of the released code: both factors scaled before their product, the subtraction behind it
    factor = (D**-0.5 / k.shape[1]) ** 0.5
    product = torch.einsum("bmhd,bmhe->bhde", k * factor, v * factor)
    rest = 1 - D**-0.5 * torch.einsum("bnhd,bhd->bnh", q, k.mean(1))
    theirs = torch.einsum("bnhd,bhde->bnhe", q, product) + rest.unsqueeze(-1) * v.mean(1, keepdim=True)
    assert error(got, expected) <= 2 * error(theirs, expected)


@pytest.mark.parametrize("backend", ["reference", "matmul"])
def test_inline_gradients(backend):
    assert gradcheck(lambda *xs: inline_attention(*xs, backend=backend), inline_inputs(grad=True))


def test_feature_maps():
    x = torch.tensor([-2.0, 0.5])
    assert torch.equal(feature_map(x, "identity"), x)
    torch.testing.assert_close(feature_map(x, "relu"), torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(feature_map(x, "leakyrelu"), torch.tensor([-0.02, 0.5]))
    torch.testing.assert_close(feature_map(x, "exp"), torch.tensor([-0.4, 0.1]).exp())
    with pytest.raises(ValueError, match="relu, leakyrelu or exp"):
        feature_map(x, "softplus")


def residual_inputs(images: int, prefix: int, dtype=torch.float64, grad: bool = False):
    tokens, C = prefix + 12, 6
    shapes = [(B, tokens, C), (B, tokens, C), (images, C, 9), (C,)]
    return [normal(*shape, seed=i, dtype=dtype, grad=grad) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("images", [1, B])
def test_depthwise_residual(images, prefix):
    inputs = residual_inputs(images, prefix)
    expected = depthwise_residual(*inputs, (3, 4), prefix, backend="reference")
    assert error(depthwise_residual(*inputs, (3, 4), prefix, backend="conv"), expected) < 1e-14
    assert torch.equal(expected[:, :prefix], inputs[0][:, :prefix])
    inputs[3] = None
    expected = depthwise_residual(*inputs, (3, 4), prefix, backend="reference")
    assert error(depthwise_residual(*inputs, (3, 4), prefix), expected) < 1e-14


@pytest.mark.parametrize("backend", ["reference", "conv"])
@pytest.mark.parametrize("images, prefix", [(1, 0), (1, 1), (B, 1)])
def test_depthwise_residual_gradients(images, prefix, backend):
    inputs = residual_inputs(images, prefix, grad=True)
    assert gradcheck(lambda *xs: depthwise_residual(*xs, (3, 4), prefix, backend=backend), inputs)


@pytest.mark.parametrize("part", ["depthwise", "inline"])
def test_interpreted(part):
    """tests/ops/interpreted_*.py, where Triton is imported as an interpreter."""
    interpret(HERE / f"interpreted_{part}.py")


def test_triton_says_why_not():
    with pytest.raises(ValueError, match="can't run: its sums are float32"):
        depthwise_residual(*residual_inputs(1, 0), (3, 4), backend="triton")
    single = [x.float() for x in residual_inputs(1, 0)]
    with pytest.raises(ValueError, match="on cpu"):
        depthwise_residual(*single, (3, 4), backend="triton")


def test_which_kernels_compiled_inference_takes(monkeypatch):
    asked = []
    monkeypatch.setattr(depthwise, "in_auto", lambda name: asked.append(name))
    out, v = torch.zeros(1, 12, 4), torch.zeros(1, 12, 8)
    for values in (v[..., :4], v[..., :4].contiguous()):
        depthwise_residual(out, values, torch.zeros(1, 4, 9), None, (3, 4))
    assert asked == ["depthwise_part", "depthwise"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(_triton, "KERNELS", "auto")
    taken = {True: [], False: []}
    for grad in taken:
        with torch.set_grad_enabled(grad):
            taken[grad] = [name for name in sorted(_triton.IN_AUTO) if _triton.in_auto(name)]
    assert taken == {True: [], False: ["depthwise_part", "inline"]}


def test_unknown_backends():
    with pytest.raises(ValueError, match="use one of"):
        agent_attention(*agent_inputs(), backend="flash")
    with pytest.raises(ValueError, match="use one of"):
        inline_attention(*inline_inputs(), backend="flash")
    with pytest.raises(ValueError, match="use one of"):
        depthwise_residual(*residual_inputs(1, 0), (3, 4), backend="flash")
