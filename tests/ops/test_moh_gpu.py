"""The kernels of mixture-of-head and aggregated attention on a GPU: errors against float64, networks, compilation."""

import pytest
import timm
import torch

import visionattn
from visionattn.ops.aggregated import aggregated_attention
from visionattn.ops.moh import gluon, moh_attention, top_k_gates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@DTYPES
@pytest.mark.parametrize("dim", [24, 64, 72, 128])
def test_moh(dim, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 777, 3, 8, dim, device="cuda").to(dtype).unbind(2)
    gates, _, _ = top_k_gates(torch.randn(2, 777, 8, device="cuda"), 3)
    oracle = moh_attention(q.double(), k.double(), v.double(), gates.double(), backend="reference")
    dense = moh_attention(q, k, v, gates, backend="dense")
    for backend in ("triton", "gather"):
        got = moh_attention(q, k, v, gates, backend=backend)
        assert error(got, oracle) <= 2 * error(dense, oracle), backend
        assert (got[gates == 0] == 0).all()


@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_moh_gluon(dim, dtype):
    """The Hopper kernel: sizes that fill no tile, more items than programs, heads of nobody and everybody."""
    for batch, tokens, keys, heads in ((2, 777, 777, 5), (1, 40, 300, 3), (8, 1024, 1024, 16)):
        torch.manual_seed(0)
        q = torch.randn(batch, tokens, heads, dim, device="cuda").to(dtype)
        k, v = torch.randn(batch, keys, 2, heads, dim, device="cuda").to(dtype).unbind(2)
        if gluon.reason(q, k, v) is not None:
            pytest.skip(gluon.reason(q, k, v))
        gates = torch.rand(batch, tokens, heads, device="cuda") + 0.5
        gates = gates * (torch.rand(batch, tokens, heads, device="cuda") < 0.5)
        gates[..., 0], gates[..., 1] = 0.0, 1.0
        oracle = moh_attention(q.double(), k.double(), v.double(), gates.double(), backend="reference")
        dense = moh_attention(q, k, v, gates, backend="dense")
        got = gluon.forward(q, k, v, gates, dim**-0.5)
        assert error(got, oracle) <= 2 * error(dense, oracle)
        assert (got[gates == 0] == 0).all()
        assert torch.equal(got, gluon.forward(q, k, v, gates, dim**-0.5))


def test_moh_auto_and_compile():
    torch.manual_seed(0)
    layer = visionattn.create_module("moh", dim=256, num_heads=8, shared_head=3, routed_head=2, qkv_bias=True)
    layer = layer.cuda().bfloat16().eval()
    x = torch.randn(2, 1024, 256, device="cuda", dtype=torch.bfloat16)
    layer.active = 0.5
    with torch.no_grad():
        sparse = layer(x)
        compiled = torch.compile(layer, fullgraph=True)(x)
        layer.backend = "dense"
        dense = layer(x)
    assert error(sparse, dense.double()) < 0.01 and error(compiled, dense.double()) < 0.01


def make(B, H, W, heads, dim, P, dtype, window=3):
    torch.manual_seed(0)
    N, L = H * W, window**2
    shapes = [(B, N, heads, dim), (B, N, 2, heads, dim), (B, P, 2, heads, dim), (heads, dim), (heads,), (heads, L)]
    shapes += [(heads, N, P), (heads, dim, L), (heads, L)]
    tensors = [torch.randn(s, device="cuda") * (0.3 if i > 2 else 1.0) for i, s in enumerate(shapes)]
    tensors[4] = tensors[4].abs() + 2.0
    return [t.to(dtype) if i < 3 else t for i, t in enumerate(tensors)]


@DTYPES
@pytest.mark.parametrize("case", [(2, 56, 56, 12, 24, 49), (1, 25, 33, 16, 24, 12), (1, 30, 40, 16, 32, 300)])
def test_aggregated(case, dtype):
    tensors = make(*case, dtype)
    grid = case[1:3]
    grad = torch.randn(tensors[0].shape, device="cuda").to(dtype)

    def run(cast, backend):
        leaves = [t.detach().to(cast or t.dtype).requires_grad_() for t in tensors]
        out = aggregated_attention(*leaves, *grid, backend=backend)
        return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    oracle = run(torch.float64, "reference")
    eager = run(dtype, "reference")  # everything at the kernels' input precision
    fused = run(None, "triton")
    for i, (x, y, z) in enumerate(zip(fused, eager, oracle, strict=True)):
        assert x.dtype == (dtype if i < 4 else torch.float32)
        # tau's gradient, one number a head, nearly cancels: float32's weights lack 2^-19 at logits of 50
        floor = 2e-5 if i == 5 else 1e-6
        assert error(x, z) <= 2 * error(y, z) + floor, (i, error(x, z), error(y, z))


@pytest.mark.parametrize("name", ["test_moh_vit", "transnext_micro"])
def test_networks(name):
    """Kernels or reference, in training under autocast: the same loss and gradients, as far as bf16 goes."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).cuda()
    x = torch.randn(4, 3, 160, 96, device="cuda")
    results = {}
    for backend in ("reference", "triton"):
        for module in model.modules():
            if hasattr(module, "sr_ratio"):
                module.backend = backend
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results[backend] = torch.cat([g.flatten() for g in grads])
    assert error(results["triton"], results["reference"].double()) < 0.15
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert error(compiled(x), model(x).double()) < 0.05
