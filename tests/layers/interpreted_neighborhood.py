"""The layer on local attention's kernels, interpreted on a CPU. test_neighborhood.py runs this file with
TRITON_INTERPRET=1."""

import pytest
import torch

from tests.interpreter import need_interpreter
from visionattn.layers import NeighborhoodAttention

need_interpreter()


def pair(**kwargs):
    """The same layer by kernels and by tiles."""
    layers = []
    for backend in ("triton", "tiles"):
        torch.manual_seed(0)
        layer = NeighborhoodAttention(32, 2, 3, backend=backend, **kwargs)
        torch.nn.init.normal_(layer.rpb)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("size, kwargs", [((7, 9), dict(dilation=2)), ((2, 5), {}), ((11,), dict(dims=1))])
def test_forward_and_backward(size, kwargs):
    fused, tiles = pair(**kwargs)
    x = torch.randn(2, *size, 32)
    grads = []
    for layer in (fused, tiles):
        y = x.clone().requires_grad_()
        out = layer(y)
        out.square().sum().backward()
        grads.append([out, y.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_one_graph():
    fused, tiles = pair()
    x = torch.randn(1, 5, 6, 32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), tiles(x))
