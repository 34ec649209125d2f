"""The Triton kernels of graph attention, interpreted on a CPU. test_graph.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops.graph import fused, graph_attention_reference, make_graph  # noqa: F401

need_interpreter()

# nodes, heads, channels, share of edges, scale of the queries (5 brings half the logits to the clamp), fused projection
CASES = {
    "pattern": (11, 8, 10, 0.4, 1.0, True),
    "clamped": (9, 2, 16, 0.6, 5.0, False),
    "more edges than a block": (22, 1, 4, 0.95, 1.0, True),
    "heads over several programs": (7, 5, 96, 0.5, 1.0, False),
    "few edges, isolated nodes": (12, 3, 3, 0.05, 1.0, True),
    "no edges": (4, 2, 8, 0.0, 1.0, True),
}


def error(x, y):
    return ((x.double() - y).norm() / y.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-2), (torch.float16, 0.0)])
@pytest.mark.parametrize("case", CASES)
def test_kernels(case, dtype, eps):
    N, H, D, share, scale, joint = CASES[case]
    torch.manual_seed(1)
    src, dst = (torch.rand(N, N) < share).nonzero(as_tuple=True)
    order = torch.randperm(len(src))
    graph = make_graph(src[order], dst[order], N)
    qkv = torch.randn(N, 3, H, D)
    qkv[:, 0] *= scale
    qkv = qkv.to(dtype)
    leaf = qkv.clone().requires_grad_()
    q, k, v = leaf.unbind(1)
    if not joint:
        q, k, v = (x.clone() for x in (q, k, v))
    into, out_of = graph.incoming(), graph.outgoing()
    edges = (into.start, into.neighbour, out_of.start, out_of.neighbour)
    out, _ = torch.ops.visionattn.graph_attention(q, k, v, *edges, eps)
    grad = torch.randn(N, H, D).to(dtype)
    out.backward(grad)

    exact = qkv.double().requires_grad_()
    expected, _ = graph_attention_reference(*exact.unbind(1), graph.src, graph.dst, None, eps)
    expected.backward(grad.double())
    tolerance = 2e-6 if dtype is torch.float32 else 2e-3
    assert error(out.detach(), expected.detach()) < tolerance
    for i in range(3):
        assert error(leaf.grad[:, i], exact.grad[:, i]) < tolerance
    without = torch.bincount(graph.dst, minlength=N) == 0
    assert (out[without] == 0).all()


def test_opcheck():
    N, H, D = 6, 2, 4
    src, dst = (torch.rand(N, N) < 0.5).nonzero(as_tuple=True)
    graph = make_graph(src, dst, N)
    q, k, v = torch.randn(3, N, H, D, requires_grad=True).unbind(0)
    into, out_of = graph.incoming(), graph.outgoing()
    args = (q, k, v, into.start, into.neighbour, out_of.start, out_of.neighbour, 0.0)
    torch.library.opcheck(torch.ops.visionattn.graph_attention.default, args)
