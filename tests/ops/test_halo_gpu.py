"""The halo kernels on a GPU: errors against float64, memory, compile, offsets beyond 32 bits."""

import pytest
import torch

from visionattn.ops.halo import can_run_triton, halo_attention, halo_attention_kv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# block, halo, Dv of H0 to H2, H3, H4, H5, H6, H7; D = 16
FAMILY = {
    "h1": (8, 3, 16),
    "h3": (10, 3, 16),
    "h4": (12, 2, 16),
    "h5": (14, 2, 40),
    "h6": (8, 4, 48),
    "h7": (10, 3, 64),
}


def make(B, H, W, heads, dim, dim_v, block, halo, stride, dtype):
    torch.manual_seed(0)
    q = torch.randn(B, -(-H // stride), -(-W // stride), heads, dim, device="cuda").to(dtype)
    kv = torch.randn(B, H, W, heads, dim + dim_v, device="cuda").to(dtype)
    tables = [(torch.randn(2 * (block + 2 * halo) - 1, dim, device="cuda") * 0.3).to(dtype) for _ in range(2)]
    return [q, kv, *tables]


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


def run(tensors, grad, dtype, settings, backend):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = halo_attention_kv(*leaves, **settings, backend=backend)
    return out, *torch.autograd.grad(out, leaves, grad.to(dtype))


def check(tensors, settings):
    """Error of the kernels over that of eager PyTorch at the same precision, against float64."""
    dtype = tensors[0].dtype
    grad = torch.randn(*tensors[0].shape[:4], tensors[1].shape[-1] - tensors[0].shape[-1], device="cuda").to(dtype)
    oracle = run(tensors, grad, torch.float64, settings, "reference")
    eager = run(tensors, grad, dtype, settings, "reference")
    fused = run(tensors, grad, dtype, settings, "triton")
    for name, x, y, z in zip(("out", "dq", "dkv", "dth", "dtw"), fused, eager, oracle, strict=True):
        assert error(x, z) <= 2 * error(y, z), f"{name}: {error(x, z):.2e}, eager {error(y, z):.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("model", FAMILY)
def test_errors(model, dtype):
    block, halo, dim_v = FAMILY[model]
    tensors = make(2, 2 * block + 1, block + 5, 3, 16, dim_v, block, halo, 1, dtype)
    border = "mask" if dtype == torch.float16 else "zero"
    check(tensors, dict(block_size=block, halo_size=halo, border=border))


@pytest.mark.parametrize("model", FAMILY)
def test_errors_strided(model):
    block, halo, dim_v = FAMILY[model]
    tensors = make(2, 2 * block + 1, block + 5, 3, 16, dim_v, block, halo, 2, torch.bfloat16)
    check(tensors, dict(block_size=block, halo_size=halo, stride=2, border="mask", scale_rel=True, rel_step=2))


@pytest.mark.parametrize(
    "shape", [(16, 4, 32, 32), (5, 6, 64, 64), (8, 3, 128, 128), (8, 3, 20, 7)], ids=lambda s: "-".join(map(str, s))
)
def test_errors_other_shapes(shape):
    block, halo, dim, dim_v = shape
    tensors = make(1, 2 * block + 1, block + 3, 2, dim, dim_v, block, halo, 1, torch.bfloat16)
    check(tensors, dict(block_size=block, halo_size=halo))


def test_any_strides_and_poison():
    q, kv, rel_h, rel_w = make(2, 21, 19, 4, 16, 16, 8, 3, 1, torch.bfloat16)
    big = torch.full((2, 4, 40, 25, 24), float("nan"), device="cuda", dtype=torch.bfloat16)
    view = big.permute(0, 3, 4, 1, 2)[:, 2:23, 3:22, :, 4:36].copy_(kv)
    out = halo_attention_kv(q, kv, rel_h, rel_w, 8, 3, border="mask", backend="triton")
    k, v = view[..., :16], view[..., 16:]
    assert torch.equal(halo_attention(q, k, v, rel_h, rel_w, 8, 3, border="mask", backend="triton"), out)
    assert not out.isnan().any()
    # the control: poison inside the map shows exactly where a window covers it
    view[0, 20, 18, 2, 3] = float("nan")
    out = halo_attention(q, k, v, rel_h, rel_w, 8, 3, border="mask", backend="triton")
    assert out[0, 16:, 16:, 2].isnan().all()
    assert not out[1].isnan().any()
    assert not out[0, :8].isnan().any()


def test_deterministic():
    tensors = make(2, 32, 32, 4, 16, 16, 8, 3, 1, torch.bfloat16)
    grad = torch.randn(2, 32, 32, 4, 16, device="cuda")
    first, second = (run(tensors, grad, torch.bfloat16, dict(block_size=8, halo_size=3), "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_compile_fullgraph():
    tensors = [t.requires_grad_() for t in make(2, 16, 24, 4, 16, 16, 8, 3, 1, torch.bfloat16)]

    def attend(*args):
        return halo_attention_kv(*args, 8, 3) * 2

    assert can_run_triton(tensors[0], *tensors[1].split(16, -1), *tensors[2:], 8, 3) is None
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(attend, fullgraph=True, backend=backend)(*tensors)
    assert "visionattn.halo_attention_kv" in graphs[0]
    out, expected = torch.compile(attend, fullgraph=True)(*tensors), attend(*tensors)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.float().square().sum(), tensors) for x in (out, expected)]
    torch.testing.assert_close(grads[0], grads[1])


def test_export_takes_the_reference():
    class Attend(torch.nn.Module):
        def forward(self, q, kv, rel_h, rel_w):
            return halo_attention_kv(q, kv, rel_h, rel_w, 8, 3)

    tensors = tuple(make(1, 16, 16, 2, 16, 16, 8, 3, 1, torch.float32))
    program = torch.export.export(Attend(), tensors)
    assert "visionattn" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*tensors), Attend()(*tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_takes_the_reference():
    tensors = make(1, 16, 16, 2, 16, 16, 8, 3, 1, torch.float32)
    program = torch.jit.trace(lambda q, kv, h, w: halo_attention_kv(q, kv, h, w, 8, 3), tensors, check_trace=False)
    assert "visionattn::" not in str(program.graph)  # source paths of this package stand in it too
    tensors[0] = tensors[0] * 0.5
    torch.testing.assert_close(program(*tensors), halo_attention_kv(*tensors, 8, 3), rtol=1e-4, atol=1e-4)


def test_tables_of_another_dtype():
    q, kv, rel_h, rel_w = make(2, 16, 16, 4, 16, 16, 8, 3, 1, torch.bfloat16)
    rel_h, rel_w = rel_h.float().requires_grad_(), rel_w.float().requires_grad_()
    out = halo_attention_kv(q, kv, rel_h, rel_w, 8, 3, backend="triton")
    torch.testing.assert_close(
        out, halo_attention_kv(q, kv, rel_h.bfloat16(), rel_w.bfloat16(), 8, 3, backend="triton")
    )
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (rel_h, rel_w)))


def test_memory_stays_small():
    """Training a layer of H1's first stage: workspaces are a few times q, k and v, not windows or logits."""
    tensors = [t.requires_grad_() for t in make(8, 64, 64, 4, 16, 16, 8, 3, 1, torch.bfloat16)]
    grad = torch.randn(8, 64, 64, 4, 16, device="cuda", dtype=torch.bfloat16)
    halo_attention_kv(*tensors, 8, 3).backward(grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    halo_attention_kv(*tensors, 8, 3).backward(grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 4 * sum(t.numel() * t.element_size() for t in tensors[:2])


def test_more_than_two_billion_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    B = 2**31 // (64 * 64 * 4 * 32) + 8
    q, kv, rel_h, rel_w = make(2, 64, 64, 4, 16, 16, 8, 3, 1, torch.bfloat16)
    large_q, large_kv = (torch.zeros(B, *t.shape[1:], device="cuda", dtype=t.dtype) for t in (q, kv))
    large_q[-2:], large_kv[-2:] = q, kv
    large = [t.requires_grad_() for t in (large_q, large_kv, rel_h, rel_w)]
    small = [t.requires_grad_() for t in (q, kv)]
    out = halo_attention_kv(*large, 8, 3, backend="triton")
    expected = halo_attention_kv(*small, rel_h, rel_w, 8, 3, backend="triton")
    assert torch.equal(out[-2:], expected)
    grads = torch.autograd.grad(out[-2:].float().square().sum(), large[:2])
    expected = torch.autograd.grad(expected.float().square().sum(), small)
    assert all(torch.equal(x[-2:], y) for x, y in zip(grads, expected, strict=True))
