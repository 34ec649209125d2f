"""The kernels of the depthwise residual and of InLine attention compile, without a GPU, within their shared memory."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from visionattn.ops import depthwise_triton, inline_triton

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

SHARED_KIB = {80: 163, 90: 227}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SINGLE = {"s_ptr", "sa_ptr", "sb_ptr", "m_ptr", "ma_ptr", "mb_ptr", "mk_ptr", "mv_ptr", "dm_ptr", "sg_ptr", "part_ptr"}
FLOATS = {"scale", "factor"}


def compile_kernel(kernel, constants: dict, dtype: torch.dtype, capability: int, single: set[str] = frozenset()):
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in SINGLE | single else f"*{NAMES[dtype]}"
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024


BLOCK = dict(BLOCK_N=depthwise_triton.BLOCK_N, BLOCK_C=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_depthwise(capability, dtype):
    weights = {"w_ptr", "b_ptr"}  # float32 under autocast
    for flip in (False, True):
        constants = dict(RESIDUAL=not flip, BIAS=not flip, FLIP=flip, **BLOCK)
        compile_kernel(depthwise_triton._conv_kernel, constants, dtype, capability, weights)
    constants = dict(CHUNK=depthwise_triton.WEIGHT_CHUNK, **BLOCK)
    compile_kernel(depthwise_triton._weight_kernel, constants, dtype, capability)


@pytest.mark.parametrize("dim, dtype", [(24, torch.bfloat16), (64, torch.bfloat16), (32, torch.float32)])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_inline(capability, dim, dtype):
    constants = inline_triton._constants(dim, dtype)
    blocks = dict(BLOCK_N=inline_triton.BLOCK_N, **constants)
    compile_kernel(inline_triton._moments_kernel, dict(CHUNK=inline_triton.CHUNK, **blocks), dtype, capability)
    constants.pop("PREC")
    compile_kernel(inline_triton._finish_kernel, dict(CENTER=True, **constants), dtype, capability)
    compile_kernel(inline_triton._apply_kernel, dict(BIAS=True, **blocks), dtype, capability)
    compile_kernel(inline_triton._grads_kernel, blocks, dtype, capability)
