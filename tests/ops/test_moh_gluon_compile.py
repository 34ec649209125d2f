"""The Gluon kernel of mixture-of-head attention compiles for sm90 without a GPU: hardly spills, fits shared memory."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from tests.ops.cross_compile import SHARED_KIB, usage
from visionattn.ops.moh import gluon

if gluon.cannot_build_gluon(gluon.KERNELS) is not None:
    pytest.skip(gluon.cannot_build_gluon(gluon.KERNELS), allow_module_level=True)

from triton.experimental.gluon._runtime import GluonASTSource

from visionattn.ops.moh import kernels_hopper

NAMES = {torch.bfloat16: "*bf16", torch.int32: "*i32", torch.float32: "*fp32"}


def compile_forward(setting, dim):
    q, k, v = torch.empty(2, 100, 3, 4, dim, dtype=torch.bfloat16).unbind(2)
    lists = [torch.empty(1, dtype=torch.int32) for _ in range(4)]
    args, named = gluon.launch_arguments(q, k, v, torch.ones(2, 100, 4), torch.empty_like(q), lists, 0.125, setting)
    kernel = kernels_hopper.forward_kernel
    values = dict(zip([n for n in kernel.arg_names if n not in named], args, strict=True)) | named
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in named or value is None:
            signature[name], constexprs[(i,)] = "constexpr", value
        elif name.endswith("_desc"):
            signature[name] = f"tensordesc<bf16{value.block_shape},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[(i,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "qk_scale" else "i32"
    source = GluonASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, maxnreg=setting.cap))


@pytest.mark.parametrize("dim", [64, 72])
def test_compiles(dim):
    compiled = compile_forward(gluon.SETTING, dim)
    assert compiled.metadata.shared <= SHARED_KIB[90] * 1024
    assert "wgmma" in compiled.asm["ptx"]
    assert usage(compiled)["STACK"] <= 16  # bytes spilled, outside the loop over keys
