"""Neighbourhood attention and NAT on a GPU: the kernels behind the layer, the networks' precision, one graph."""

import copy

import pytest
import timm
import torch

import visionattn  # noqa: F401  registers the models
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers import NeighborhoodAttention
from visionattn.ops.neighborhood import choose_backend, neighborhood_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side, heads, dilation", [(56, 2, 1), (56, 2, 8), (28, 4, 4), (14, 8, 2), (7, 16, 1)])
def test_layers_of_nat_tiny(side, heads, dilation, dtype):
    """By the kernels, and no worse than twice PyTorch's own dense attention under a mask."""
    torch.manual_seed(0)
    layer = NeighborhoodAttention(32 * heads, heads, 7, dilation).cuda()
    q, k, v = torch.randn(2, side * side, 3, heads, 32, device="cuda", dtype=dtype).unbind(2)
    assert choose_backend(q, k, v, layer.pattern, 2, layer.rpb, layer.scale, 0.0) == "local"
    torch.nn.init.normal_(layer.rpb)
    bias = layer.rpb.detach()
    args = ((side, side), 7, dilation)
    oracle = neighborhood_attention(q.double(), k.double(), v.double(), *args, bias=bias.double(), backend="reference")
    dense = neighborhood_attention(q, k, v, *args, bias=bias, backend="sdpa")
    for backend in ("auto", "tiles"):
        out = neighborhood_attention(q, k, v, *args, bias=bias, backend=backend)
        assert (out.double() - oracle).norm() <= 2 * (dense.double() - oracle).norm()


def test_gradients_by_kernels():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(64, 2, 7, 2).cuda()
    torch.nn.init.normal_(layer.rpb)
    twin = copy.deepcopy(layer).double()
    twin.backend = "tiles"
    x = torch.randn(2, 28, 13, 64, device="cuda")  # one side is padded
    grads = []
    for module, y in ((layer, x.clone().requires_grad_()), (twin, x.double().requires_grad_())):
        module(y).square().sum().backward()
        grads.append([y.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a.double() - b).norm() <= 2e-5 * b.norm()


@pytest.mark.parametrize("fixture, name", [("nat_mini", "nat_mini"), ("dinat_tiny_256x224", "dinat_tiny")])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_released_networks(fixture, name, how, tmp_path):
    manifest, expected = fx.load(FIXTURES / "nat" / fixture)
    torch.save({k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}, tmp_path / "official.pth")
    overlay = dict(file=str(tmp_path / "official.pth"))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval().cuda()
    x = torch.from_numpy(fx.inputs(manifest)["x"]).cuda()
    run = torch.compile(model, fullgraph=True) if how == "compiled" else model
    with torch.no_grad():
        assert relative_error(run(x), expected["logits"]) < 5e-6


def test_export_has_no_kernels():
    model = timm.create_model("test_nat").eval().cuda()
    x = torch.randn(1, 3, 96, 96, device="cuda")
    program = torch.export.export(model, (x,))
    assert not any("visionattn" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-4)


def test_training_step_under_autocast():
    model = timm.create_model("test_nat", drop_path_rate=0.1).cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(torch.randn(4, 3, 96, 96, device="cuda")).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
