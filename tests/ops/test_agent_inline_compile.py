"""Kernels of the linear-attention backbones compile, without a GPU, as they are launched: they fit the shared memory,
and spill as little as stands here."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from tests.ops.cross_compile import SHARED_KIB, check, record, usage
from visionattn.ops import depthwise_triton, inline_triton, mala_triton, norm_triton
from visionattn.ops.linear import WIDE_KIB

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

# by MALA's kernels, in bytes a thread: heads of 96 channels hold sums of 128 x 128; nobody has timed them on an A100
SPILLS = {
    (64, 80): {"_query_grad_kernel": 1536},
    (96, 80): {"_query_grad_kernel": 4096},
    (96, 90): {"_query_grad_kernel": 512},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_depthwise(capability, dtype, monkeypatch):
    kernels = record(monkeypatch, depthwise_triton, "_conv_kernel", "_weight_kernel")
    out, _, v = torch.empty(2, 28 * 28, 3 * 192, dtype=dtype).chunk(3, dim=2)
    weight, bias = torch.empty(1, 192, 9), torch.empty(192)  # float32 under autocast
    y = depthwise_triton.launch(out, v, weight, bias, 28, 28, 0)
    depthwise_triton.gradients(y, v, weight, bias.dtype, (28, 28, 0), (True, True, True))
    check(kernels, capability, spills={})


@pytest.mark.parametrize("dim, dtype", [(24, "bfloat16"), (64, "bfloat16"), (32, "float32")])
@pytest.mark.parametrize("capability", [80, 90])
def test_inline(capability, dim, dtype, monkeypatch):
    record(monkeypatch, depthwise_triton, "_weight_kernel")
    names = ["_moments_kernel", "_finish_kernel", "_apply_kernel", "_grads_kernel"]
    kernels = record(monkeypatch, inline_triton, *names)
    C, sizes = 4 * dim, (4, 56, 56, 0, dim**-0.5)  # 3136 tokens: in chunks
    q, k, v = torch.empty(2, 56 * 56, 3 * C, dtype=getattr(torch, dtype)).chunk(3, dim=2)
    weight = torch.empty(2, C, 9, dtype=q.dtype)
    y, *state = inline_triton.launch(q, k, v, weight, torch.empty(C, dtype=q.dtype), *sizes)
    inline_triton.gradients(y, q, k, v, weight, *state, *sizes)
    check(kernels, capability, spills={})


@pytest.mark.parametrize("dim, dtype", [(64, "bfloat16"), (96, "bfloat16"), (32, "float32")])
@pytest.mark.parametrize("capability", [80, 90])
def test_mala(capability, dim, dtype, monkeypatch):
    record(monkeypatch, depthwise_triton, "_weight_kernel")
    names = ["_state_kernel", "_finish_kernel", "_mix_kernel", "_query_grad_kernel", "_key_grad_kernel"]
    kernels = record(monkeypatch, mala_triton, *names)
    C, sizes = 2 * dim, (2, 56, 56)
    x = torch.empty(2, 56 * 56, 4 * C, dtype=getattr(torch, dtype))
    inputs = [torch.empty(C, 25), torch.empty(C), torch.empty(56 * 56, dim), torch.empty(56 * 56, dim)]
    y, *state = mala_triton.launch(x, *inputs, *sizes)
    mala_triton.gradients(y, x, *inputs, *state, *sizes)
    check(kernels, capability, SPILLS.get((dim, capability), {}))
    largest = max(compiled.metadata.shared for kernel in kernels for compiled in kernel.compile(capability))
    assert largest <= 1024 * (WIDE_KIB[x.dtype.itemsize] if dim > 64 else SHARED_KIB[89])


def test_norm(monkeypatch):
    kernels = record(monkeypatch, norm_triton, "_norm_kernel")
    x, y, weight = torch.empty(2, 196, 192), torch.empty(2, 196, 192, dtype=torch.bfloat16), torch.empty(192)
    norm_triton.add_norm(x, y, weight, weight, 1e-6, torch.bfloat16)
    check(kernels, 90, spills={})
    (compiled,) = kernels[0].compile(90)
    kernels[0].launches[0][1]["maxnreg"] = 16
    (squeezed,) = kernels[0].compile(90)
    assert usage(compiled)["STACK"] == 0 < usage(squeezed)["STACK"]  # a spill is seen
