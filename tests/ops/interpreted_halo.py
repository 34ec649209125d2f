"""The Triton kernels of halo attention, interpreted on a CPU. test_halo.py runs this file with TRITON_INTERPRET=1.

bfloat16 is left to the GPU: the interpreter multiplies its bit patterns as integers.
"""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops.halo import fused, halo_attention, halo_attention_kv
from visionattn.ops.halo.reference import halo_attention_reference

need_interpreter()

# B, H, W, heads, D, Dv, block, halo, stride, border, scale_rel, rel_step, dtype
CASES = {
    "h1": (1, 8, 16, 2, 16, 16, 8, 3, 1, "zero", False, 1, torch.float32),
    "strided, odd map, masked": (1, 9, 13, 1, 16, 24, 4, 1, 2, "mask", False, 2, torch.float32),
    "strided, narrow heads, scaled": (2, 7, 5, 1, 8, 16, 4, 1, 2, "zero", True, 1, torch.float32),
    "halo beyond its neighbours": (1, 7, 6, 1, 5, 3, 3, 4, 1, "mask", True, 1, torch.float32),
    "chunks of queries and keys": (1, 13, 11, 1, 16, 16, 12, 2, 1, "zero", False, 1, torch.float32),
    "no halo": (1, 6, 6, 1, 16, 16, 4, 0, 1, "zero", False, 1, torch.float32),
    "half precision": (1, 9, 9, 1, 16, 16, 8, 3, 1, "mask", False, 1, torch.float16),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3}


def inside_nan(x: torch.Tensor, channels_first: bool = False) -> torch.Tensor:
    """x as a view of a larger tensor of NaN: rows, columns and channels around it are poison."""
    order = (0, 4, 3, 1, 2) if channels_first else (0, 1, 2, 3, 4)
    inverse = sorted(range(5), key=lambda i: order[i])
    big = torch.full([n + 4 for n in (x.shape[i] for i in order)], float("nan"), dtype=x.dtype).permute(inverse)
    view = big[tuple(slice(2, 2 + n) for n in x.shape)]
    return view.copy_(x)


def problem(case, seed=0):
    B, H, W, heads, dim, dim_v, block, halo, stride, border, scale_rel, rel_step, dtype = CASES[case]
    torch.manual_seed(seed)
    q = torch.randn(B, -(-H // stride), -(-W // stride), heads, dim).to(dtype)
    kv = torch.randn(B, H, W, heads, dim + dim_v).to(dtype)
    tables = [(torch.randn(2 * (block + 2 * halo) - 1, dim) * 0.3).to(dtype) for _ in range(2)]
    scale = dim**-0.5
    return q, kv, *tables, (block, halo, stride, border == "mask", scale, scale if scale_rel else 1.0, rel_step)


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_kernels(case):
    *tensors, settings = problem(case)
    dim = tensors[0].shape[-1]
    oracle = [t.double().requires_grad_() for t in tensors]
    q, kv, rel_h, rel_w = oracle
    out = halo_attention_reference(q, kv[..., :dim], kv[..., dim:], rel_h, rel_w, *settings)
    grad = torch.randn_like(out)
    expected = (out, *torch.autograd.grad(out, oracle, grad))

    channels_first = case == "no halo"
    poisoned = [inside_nan(t, channels_first).requires_grad_() for t in tensors[:2]]
    poisoned += [t.requires_grad_() for t in tensors[2:]]
    grad = inside_nan(grad.to(tensors[0].dtype), channels_first)
    out, _ = torch.ops.visionattn.halo_attention_kv(*poisoned, *settings)
    for name, x, y in zip(
        ("out", "dq", "dkv", "dth", "dtw"), (out, *torch.autograd.grad(out, poisoned, grad)), expected, strict=True
    ):
        assert error(x, y) < TOLERANCE[tensors[0].dtype], name


def test_kernels_nan_can_show():
    """The control of the poison above: a kernel that believes in one more row reads NaN."""
    q, kv, rel_h, rel_w, settings = problem("h1")
    dim = q.shape[-1]
    B, H, W, heads, _ = kv.shape
    poisoned = inside_nan(kv)
    larger = poisoned.as_strided((B, H + 1, W, heads, kv.shape[-1]), poisoned.stride(), poisoned.storage_offset())
    assert larger[:, H].isnan().all()
    for k, bad in ((poisoned, False), (larger, True)):
        out, _ = fused.forward(q, k[..., :dim], k[..., dim:], rel_h, rel_w, *settings)
        assert out[:, :H].isnan().any() == bad


def test_kernels_are_deterministic():
    *tensors, settings = problem("h1")
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, _ = torch.ops.visionattn.halo_attention_kv(*leaves, *settings)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_operators_opcheck(packed):
    torch.use_deterministic_algorithms(False)
    q, kv, rel_h, rel_w, settings = problem("no halo")
    dim = q.shape[-1]
    q, kv, rel_h, rel_w = (t.requires_grad_() for t in (q, kv, rel_h, rel_w))
    if packed:
        torch.library.opcheck(torch.ops.visionattn.halo_attention_kv.default, (q, kv, rel_h, rel_w, *settings))
    else:
        k, v = (x.detach().requires_grad_() for x in (kv[..., :dim], kv[..., dim:]))
        torch.library.opcheck(torch.ops.visionattn.halo_attention.default, (q, k, v, rel_h, rel_w, *settings))


@pytest.mark.parametrize("packed", [False, True])
def test_operators_compile(packed):
    torch.use_deterministic_algorithms(False)
    *tensors, settings = problem("no halo")
    block, halo = settings[:2]
    dim = tensors[0].shape[-1]

    def attend(q, kv, rel_h, rel_w, backend):
        if packed:
            return halo_attention_kv(q, kv, rel_h, rel_w, block, halo, backend=backend)
        return halo_attention(q, kv[..., :dim], kv[..., dim:], rel_h, rel_w, block, halo, backend=backend)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(attend, fullgraph=True, backend=backend)(*tensors, "triton")
    assert "visionattn.halo_attention" in graphs[0].code
    leaves = [t.requires_grad_() for t in tensors]
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves, "triton")
    expected = attend(*leaves, "reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )
